#!/usr/bin/env python
"The first stage: `python train.py -d DIR`; `python train.py` alone trains on drawn faces."

from landmarks_fastai import cli
from landmarks_fastai.resume import record_of
from landmarks_fastai.runs import claimed_run


def main():
    args = cli.train_arguments()
    drawn = args.data is None
    settings = cli.first_settings(args, drawn)
    wanted = f"{settings.arch}_b_{settings.batch_size}_e_{settings.epochs}"
    with claimed_run(args.out, args.name, wanted, record_of(args), args.overwrite, args.resume) as run:
        print(f"run {run.name}", flush=True)

        from landmarks_fastai.stage import find_rate, fit_stage, note_low_rate, report
        from landmarks_fastai.state import read_state
        from landmarks_fastai.training import first_stage, resumed_stage

        machine = cli.machine(args)
        state = read_state(run)
        if state:
            print(cli.goes_on(state))
            learn = resumed_stage(state, machine, run)
        else:
            weights = args.weights if args.weights is not None else "none" if drawn else "imagenet"
            if drawn:
                settings = cli.drawn_faces(settings, args.out, weights)
            learn = first_stage(settings, weights, machine, run)
            if args.lr == "find":
                find_rate(learn, run)
            elif args.lr:
                note_low_rate(learn, cli.default_rate(args, drawn))
        best = fit_stage(learn, run, started=cli.started(state), state=state)
        print(report(run, best, machine))


if __name__ == "__main__":
    cli.run_door(main)
