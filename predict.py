#!/usr/bin/env python
"The submission: `python predict.py -pm NAME` predicts the test images' points."

from landmarks_fastai import cli


def main():
    args = cli.predict_arguments()

    from landmarks_fastai.checkpoint import find_checkpoint
    from landmarks_fastai.inference import predict_test
    from landmarks_fastai.runs import claim_output

    machine = cli.machine(args)
    checkpoint = find_checkpoint(args.pretrained_model, args.out)
    settings = cli.predict_settings(args, checkpoint.settings)
    run = claim_output(args.out, checkpoint.name)
    second_look = bool(settings.pairs) if args.second_look is None else args.second_look
    n = predict_test(checkpoint, settings.data, run, args.rounding, machine, settings.batch_size, second_look, cli.bar)
    print(
        f"{n} images: {run.file('submit.csv')}; all points in {run.file('points.npy')}, their names in {run.file('points.json')}"
    )


if __name__ == "__main__":
    cli.run_door(main)
