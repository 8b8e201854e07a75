"A later stage: `python finetune.py -pm NAME` continues from the best checkpoint of a run, at a lower learning rate."

import os
from functools import partial
from typing import Any

from landmarks_fastai.cli import app, options
from landmarks_fastai.runs.claim import claimed_run
from landmarks_fastai.runs.run import Record, find_checkpoint_file, run_name
from landmarks_fastai.settings import FINETUNE_EPOCHS, FINETUNE_LR_MULT, WEIGHT_DECAY, DataFacts, Settings, names_of


def finetune_parser() -> options.Parser:
    "The flags of finetune.py."
    parser = options.Parser(
        "Continue training from the best checkpoint of a previous stage, at a lower learning rate.\n\n"
        "Settings that are not given are taken from the checkpoint.\n"
        "The stage saves its best epoch, or the loaded model if no epoch is better."
    )
    parser.add_checkpoint()
    onecycle, others = FINETUNE_LR_MULT["onecycle"], FINETUNE_LR_MULT["plateau"]
    defaults = dict.fromkeys(options.FIELDS, "the checkpoint's") | {
        "epochs": str(FINETUNE_EPOCHS),
        "lr": f"{onecycle} of the previous stage's with onecycle, {others} with others",
        "sched": "onecycle where crops are aligned, else the checkpoint's",
        "seed": "the checkpoint's plus 1",
        "minutes": "0",
        "aug": "half of the checkpoint's where crops are aligned, else the checkpoint's",
        "freeze": "off",
        "freeze_bn": "on where crops are aligned, else the checkpoint's",
    }
    training = parser.add_settings(
        "training",
        [*options.TRAINING, "data", "category", "on_bad", "exclude", "freeze", "valid", "all_rows"],
        defaults,
    )
    parser.add_settings("augmentation and evaluation", [*names_of("input"), *options.IMAGES], defaults)
    options.add_name(training)
    parser.add_settings("must agree with the checkpoint", names_of("network", "split"), defaults)
    parser.add_machine()
    return parser


def next_settings(flags: dict[str, Any], before: Settings, facts: DataFacts) -> Settings:
    "The settings of a later stage. Raises `UserError` for a flag that contradicts the checkpoint."
    from landmarks_fastai.data.align import MIN_GAIN

    options.check_fixed(flags, before, names_of("network", "split"))
    in_vain = before.align and facts.align_gain < MIN_GAIN  # the stage before printed it
    aligned = bool(flags.get("align", before.align)) and not in_vain
    sched = flags.get("sched") or ("onecycle" if aligned else before.sched)
    changes = {
        "epochs": FINETUNE_EPOCHS,
        "sched": sched,
        "lr": before.lr * FINETUNE_LR_MULT[sched],
        "seed": (before.seed + 1) % 2**32,
        "minutes": 0.0,
        # the second stage ends at 1.572 instead of 1.663 (benchmarks/score.md)
        "aug": before.aug / 2 if aligned else before.aug,
        "freeze": False,
        "freeze_bn": aligned or before.freeze_bn,
    }
    if flags.get("opt", before.opt) != before.opt:
        changes["wd"] = WEIGHT_DECAY[flags["opt"]]
    return before.replace(**changes | options.chosen_settings(flags))


def main() -> None:
    parser = finetune_parser()
    args = parser.parse_args()
    flags = options.typed_flags(args)
    if "pretrained_model" in flags:
        flags["pretrained_model"] = os.path.abspath(find_checkpoint_file(args.pretrained_model, args.out))
    elif not args.resume:
        parser.error("the following arguments are required: -pm/--pretrained-model (or --resume and -n)")
    record = Record("finetune.py", flags)
    default_name = f"{run_name(record.checkpoint)}+{flags.get('epochs', FINETUNE_EPOCHS)}"
    with claimed_run(args.out, args.name, default_name, record, args.overwrite, args.resume) as run:
        print(f"run {run.name}, from {run.record.checkpoint}", flush=True)

        from landmarks_fastai.runs.checkpoint import read_checkpoint
        from landmarks_fastai.training.builders import later_stage, resumed_stage
        from landmarks_fastai.training.length import note_low_lr
        from landmarks_fastai.training.stage import find_lr, fit_stage, report, score_loaded
        from landmarks_fastai.training.state import read_state

        flags = run.record.flags  # with --resume those of the run's start
        previous = read_checkpoint(run.record.checkpoint)
        machine = options.prepared_machine(flags)
        state = read_state(run)
        if state:
            learn, scores = resumed_stage(state, machine, run), run.record.loaded
        else:
            settings = next_settings(flags, previous.settings, previous.facts)
            learn = later_stage(previous, settings, machine, run)
            scores = score_loaded(learn, previous)
            if flags.get("lr") == "find":
                find_lr(learn, run)
            elif "lr" in flags:
                note_low_lr(learn, FINETUNE_LR_MULT[settings.sched] * previous.settings.lr)
        started = app.STARTED - (state.metadata["seconds"] if state else 0.0)
        best = fit_stage(learn, run, previous, scores, started, state)
        print(report(run, best, machine, learn.dls.valid.items.counted))


command = partial(app.run_main, main)
