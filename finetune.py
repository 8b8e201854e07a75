#!/usr/bin/env python
"A later stage: `python finetune.py -pm NAME_best.pth` trains on from a checkpoint at a tenth of its rate."

import dataclasses
import os

from landmarks_fastai import cli
from landmarks_fastai.checkpoint import find_checkpoint
from landmarks_fastai.runs import claimed_run


def main():
    args = cli.finetune_arguments()
    given = find_checkpoint(args.pretrained_model, args.out)
    settings = cli.next_settings(args, given.settings)
    record = dataclasses.replace(args.record, given=os.path.abspath(given.path))
    wanted = f"{given.name}+{settings.epochs}"
    with claimed_run(args.out, args.name, wanted, record, args.overwrite, args.resume) as run:
        print(f"run {run.name}, from {given.path}", flush=True)

        from landmarks_fastai.stage import find_rate, fit_stage, report, score_loaded
        from landmarks_fastai.state import read_state
        from landmarks_fastai.training import later_stage, resumed_stage

        machine = cli.machine(args)
        state = read_state(run)
        if state:
            print(cli.goes_on(state))
            learn = resumed_stage(state, state.settings, machine, run)
            loaded = tuple(state.facts["loaded"])
        else:
            learn = later_stage(given, settings, machine, run)
            loaded = score_loaded(learn, given)
            if args.lr == "find":
                find_rate(learn, run)
        best = fit_stage(learn, run, given, loaded, cli.started(state), state)
        print(report(run, best, machine))


if __name__ == "__main__":
    cli.run_door(main)
