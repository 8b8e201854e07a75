"The first stage: `python train.py -d DIR`; `python train.py` alone trains on drawn faces."

import os
from functools import partial
from typing import Any

from landmarks_fastai.cli import app, options
from landmarks_fastai.runs.claim import claimed_run
from landmarks_fastai.runs.run import Record, typed_as
from landmarks_fastai.settings import LENGTH, RECIPES, WEIGHT_DECAY, Settings, names_of
from landmarks_fastai.utils.distributed import rank0_first

# Settings for the drawn faces: `python train.py` alone should take three minutes on two cores. Scores on 120 held-out
# faces, from random weights, 16 epochs: resnet18 11.1, this network 8.7 in 0.6 of the CPU time. Batches of 32 are no better:
# 15.7 after 12 or 14 epochs (resnet18). A network without pretrained weights needs more whole images for its first pass.
DRAWN = {
    "arch": "resnet10t", "size": 48, "batch_size": 16, "epochs": 14, "valid_pct": 0.1, "sched": "onecycle", "lr": 4e-3,
    "head_lr_mult": 0.05, "whole_pct": 0.5,
}  # fmt: skip


def train_parser() -> options.Parser:
    "The flags of train.py."
    parser = options.Parser(
        "Train a network that finds many landmarks in a picture: the first stage.\n\n"
        "Without -d it makes a small set of drawn faces (once) and trains on them.",
        "Reads DIR/train/landmarks.csv and DIR/train/images; writes the folder runs/NAME: best.pth (the checkpoint),\n"
        "history.csv, batch.png (a training batch), mirror.png (the flip map), report.html (where and when it errs),\n"
        f"results.png (the worst, median and best images), lr.png (--lr find). The next stage: {typed_as('finetune.py')} -pm NAME",
    )
    about = "best: the defaults below; baseline: the published entry (default: best)"
    parser.add_argument("--recipe", choices=RECIPES, help=about)
    names = ["data", "category", "on_bad", "exclude", "valid_pct", "valid_random", "group", "valid", "all_rows"]
    options.add_name(parser.add_settings("data", names, {"data": "drawn faces", "category": "the only one"}))
    network = parser.add_settings("network", ["arch", "head", "init_head", "freeze", *names_of("input")])
    about = "weights of the body: imagenet, none, or a .safetensors or .pth file (default: imagenet; drawn faces: none)"
    network.add_argument("--weights", type=weights_of, metavar="W", help=about)
    parser.add_settings("training", options.TRAINING)
    parser.add_settings("augmentation and evaluation", options.IMAGES)
    parser.add_machine()
    return parser


def weights_of(text: str) -> str:
    return text if text in ("imagenet", "none") else options.absolute(text)


def first_settings(flags: dict[str, Any]) -> Settings:
    "The settings of a first stage. Without a folder of data it trains on drawn faces."
    recipe, drawn = RECIPES[flags.get("recipe", "best")], {} if "data" in flags else DRAWN
    if recipe:
        drawn = {k: v for k, v in drawn.items() if k in ("arch", "size", "valid_pct")}
    settings: dict[str, Any] = drawn | recipe | options.chosen_settings(flags)
    settings.setdefault("wd", WEIGHT_DECAY[settings.get("opt", Settings.opt)])
    return Settings(**settings)


def has_length(flags: dict[str, Any]) -> bool:
    "Return whether the flags fix how long the stage is; else the number of training images does."
    return bool("data" not in flags or RECIPES[flags.get("recipe", "best")] or flags.keys() & set(LENGTH))


def draw_faces(settings: Settings, out: str | os.PathLike, weights: str) -> Settings:
    "The settings with the folder of drawn faces as data. The faces are drawn if they do not exist."
    from landmarks_fastai.synthetic.sample import make_sample

    folder = os.path.join(out, "drawn_faces")
    print(f"no -d: {'the drawn faces in' if os.path.isdir(folder) else 'drawing faces into'} {folder}", flush=True)
    make_sample(folder)
    start = "random" if weights == "none" else weights
    default = f"{Settings.arch} at {Settings.size} px from imagenet weights"
    print(f"{settings.arch} at {settings.size} px from {start} weights, schedule {settings.sched}; with -d: {default}")
    return settings.replace(data=os.path.abspath(folder))


def main() -> None:
    args = train_parser().parse_args()
    flags = options.typed_flags(args)
    settings = first_settings(flags)
    length = f"_b_{settings.batch_size}_e_{settings.epochs}" if has_length(flags) else ""
    default_name = f"{settings.arch}{length}"
    with claimed_run(args.out, args.name, default_name, Record("train.py", flags), args.overwrite, args.resume) as run:
        print(f"run {run.name}", flush=True)

        from landmarks_fastai.training.builders import first_stage, resumed_stage
        from landmarks_fastai.training.length import note_low_lr
        from landmarks_fastai.training.stage import find_lr, fit_stage, report
        from landmarks_fastai.training.state import read_state

        flags = run.record.flags  # with --resume those of the run's start
        machine = options.prepared_machine(flags)
        state = read_state(run)
        if state:
            learn = resumed_stage(state, machine, run)
        else:
            settings = first_settings(flags)
            weights = flags.get("weights", "imagenet" if "data" in flags else "none")
            if "data" not in flags:
                settings = rank0_first(lambda: draw_faces(settings, run.out, weights))
            learn = first_stage(settings, weights, machine, run, None if has_length(flags) else flags)
            if flags.get("lr") == "find":
                find_lr(learn, run)
            elif "lr" in flags:
                note_low_lr(learn, first_settings(flags | {"lr": None}).lr)
        started = app.STARTED - (state.metadata["seconds"] if state else 0.0)
        best = fit_stage(learn, run, started=started, state=state)
        print(report(run, best, machine, learn.dls.valid.items.counted))


command = partial(app.run_main, main)
