"The submission: `python predict.py -pm NAME` predicts the test images' points."

from landmarks_fastai.cli import app, arguments, resolve
from landmarks_fastai.errors import UserError
from landmarks_fastai.utils.distributed import on_first, this_process


def main() -> None:
    args = on_first(arguments.predict_arguments)
    if this_process().count > 1:
        raise UserError("predict.py runs in one process: start it without torchrun")

    from landmarks_fastai.inference.predictor import predict_test
    from landmarks_fastai.runs.checkpoint import find_checkpoint
    from landmarks_fastai.runs.claim import claim_output
    from landmarks_fastai.utils.parallel import bar

    machine = resolve.machine(args)
    checkpoint = find_checkpoint(args.pretrained_model, args.out)
    settings = resolve.predict_settings(args, checkpoint.settings)
    run = claim_output(args.out, checkpoint.name)
    flip_test = bool(settings.flip_indices) if args.flip_test is None else args.flip_test
    n = predict_test(checkpoint, settings.data, run, args.rounding, machine, settings.batch_size, flip_test, bar)
    print(
        f"{n} images: {run.file('submit.csv')}; all points in {run.file('points.npy')}, their names in {run.file('points.json')}"
    )
    if args.rounding == "nearest":  # an error spread evenly over a pixel has a mean square of 1/12
        print("the submission has whole numbers, which adds about 0.08 to its score: --round none writes decimals")


def command() -> None:
    "The command `landmarks-predict`."
    app.run_main(main)
