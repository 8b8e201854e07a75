#!/usr/bin/env python
"A later stage: `python finetune.py -pm NAME_best.pth` trains on from a checkpoint at a tenth of its rate."

from landmarks_fastai import cli


def main():
    args = cli.finetune_arguments()

    from landmarks_fastai.checkpoint import claimed_run, find_checkpoint
    from landmarks_fastai.stage import find_rate, fit_stage, report, score_loaded
    from landmarks_fastai.training import later_stage

    machine = cli.machine(args)
    given = find_checkpoint(args.pretrained_model, args.out)
    settings = cli.next_settings(args, given.settings)
    with claimed_run(args.out, args.name, f"{given.name}+{settings.epochs}", args.overwrite, given) as run:
        print(f"run {run.name}, from {given.path}")
        learn, settings = later_stage(given, settings, machine, run)
        loaded = score_loaded(learn, given, settings, machine)
        if args.lr == "find":
            settings = find_rate(learn, settings, run)
        best = fit_stage(learn, settings, run, given, loaded, cli.STARTED, machine)
        print(report(run, best, machine))


if __name__ == "__main__":
    cli.run_door(main)
