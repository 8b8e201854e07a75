#!/usr/bin/env python
"A later stage: `python finetune.py -pm NAME_best.pth` trains on from a checkpoint at a tenth of its rate."

from landmarks_fastai import cli


def main():
    args = cli.finetune_arguments()

    from landmarks_fastai.checkpoint import claim_run, find_checkpoint
    from landmarks_fastai.training import fit_stage, later_stage, report, score_loaded

    device = cli.device(args)
    before = find_checkpoint(args.pretrained_model, args.out)
    settings = cli.next_settings(args, before.settings)
    run = claim_run(args.out, args.name, f"{before.name}+{settings.epochs}", args.overwrite, before)
    print(f"run {run.name}, from {before.path}")
    learn = later_stage(before, settings, device, args.workers, args.out)
    loaded = score_loaded(learn, before)
    best = fit_stage(learn, settings, run, before, loaded)
    print(report(run, best, device))


if __name__ == "__main__":
    cli.run_door(main)
