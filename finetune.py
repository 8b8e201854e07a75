#!/usr/bin/env python
"A later stage: `python finetune.py -pm NAME` trains on from the checkpoint of a run at a tenth of its rate."

from landmarks_fastai.cli import app, arguments, resolve
from landmarks_fastai.cli.resume import record_of
from landmarks_fastai.runs.claim import claimed_run
from landmarks_fastai.runs.run import find_checkpoint_file, run_name
from landmarks_fastai.settings import FINETUNE_EPOCHS, FINETUNE_RATE


def main():
    args = arguments.finetune_arguments()
    args.pretrained_model = str(find_checkpoint_file(args.pretrained_model, args.out))
    wanted = f"{run_name(args.pretrained_model)}+{args.epochs or FINETUNE_EPOCHS}"
    with claimed_run(args.out, args.name, wanted, record_of(args), args.overwrite, args.resume) as run:
        print(f"run {run.name}, from {args.pretrained_model}", flush=True)

        from landmarks_fastai.runs.checkpoint import read_checkpoint
        from landmarks_fastai.training.builders import later_stage, resumed_stage
        from landmarks_fastai.training.stage import find_rate, fit_stage, note_low_rate, report, score_loaded
        from landmarks_fastai.training.state import read_state

        given = read_checkpoint(args.pretrained_model)
        settings = resolve.next_settings(args, given.settings)
        machine = resolve.machine(args)
        state = read_state(run)
        if state:
            print(app.goes_on(state))
            learn = resumed_stage(state, machine, run)
            loaded = tuple(state.facts["loaded"])
        else:
            learn = later_stage(given, settings, machine, run)
            loaded = score_loaded(learn, given)
            if args.lr == "find":
                find_rate(learn, run)
            elif args.lr:
                note_low_rate(learn, FINETUNE_RATE * given.settings.lr)
        best = fit_stage(learn, run, given, loaded, app.started(state), state)
        print(report(run, best, machine))


if __name__ == "__main__":
    app.run_door(main)
