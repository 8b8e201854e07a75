"From parsed flags to settings and a machine."

import argparse
import dataclasses
import os
import sys

from landmarks_fastai.cli.resume import flag_of
from landmarks_fastai.errors import UserError
from landmarks_fastai.settings import (
    FINETUNE_EPOCHS,
    FINETUNE_LR_MULT,
    INPUT,
    NETWORK,
    RECIPES,
    SPLIT,
    WEIGHT_DECAY,
    Settings,
)
from landmarks_fastai.utils.hardware import Machine

# The drawn faces' own choices, so that `python train.py` alone ends within three minutes on two cores with points that
# sit right. Measured on 1,260 drawn faces at 64 px, nine epochs from random weights, score on the 130 held out: one
# cycle up to 4e-3 29.6; the defaults' rate with two steps down 30.7; that with a norm before the last layer 30.8.
DRAWN = {
    "arch": "resnet18", "size": 64, "epochs": 9, "valid_pct": 0.1, "sched": "onecycle", "lr": 4e-3, "head_lr_mult": 0.05,
}  # fmt: skip


def explicit_settings(args) -> dict:
    "The settings that were typed."
    names = {f.name for f in dataclasses.fields(Settings)}
    return {k: v for k, v in vars(args).items() if k in names and v is not None and (k, v) != ("lr", "find")}


def first_settings(args, drawn: bool) -> Settings:
    "The settings of a first stage."
    recipe = RECIPES[args.recipe]
    start = {k: v for k, v in DRAWN.items() if not recipe or k in ("arch", "size", "valid_pct")} if drawn else {}
    typed = start | recipe | explicit_settings(args)
    typed.setdefault("wd", WEIGHT_DECAY[typed.get("opt", Settings.opt)])
    return Settings(**typed | {"data": os.path.abspath(typed.get("data") or ".")})


def default_lr(args, drawn: bool) -> float:
    "The rate of a first stage where none is typed."
    return first_settings(argparse.Namespace(**vars(args) | {"lr": None}), drawn).lr


def next_settings(args, before: Settings) -> Settings:
    "The settings of a later stage. Raises `UserError` for a flag that contradicts what cannot change."
    typed = explicit_settings(args)
    check_fixed(typed, before, NETWORK + SPLIT)
    changes = {
        "epochs": FINETUNE_EPOCHS,
        "lr": before.lr * FINETUNE_LR_MULT,
        "seed": (before.seed + 1) % 2**32,
        "minutes": 0.0,
        "freeze": False,
    }
    if typed.get("opt", before.opt) != before.opt:
        changes["wd"] = WEIGHT_DECAY[typed["opt"]]
    changes |= {"shape": ()} if not before.align or not typed.get("align", before.align) else {}
    if "data" in typed:
        typed["data"] = os.path.abspath(typed["data"] or ".")
    after = before.replace(**changes | typed)
    if after.targets == "pixels" and after.of(INPUT) != before.of(INPUT):
        raise UserError(
            f"the checkpoint speaks in pixels of {before.size} px input (--targets pixels): run without --size and --fit"
        )
    return after


def drawn_faces(settings: Settings, out, weights: str) -> Settings:
    "The settings with the drawn faces, made where they are not there yet, as their data."
    from landmarks_fastai.synthetic.sample import make_sample

    folder = os.path.join(out, "drawn_faces")
    print(
        f"no -d: drawing faces into {folder}" if not os.path.isdir(folder) else f"no -d: the drawn faces in {folder}",
        flush=True,
    )
    make_sample(folder)
    start = "from random weights" if weights == "none" else f"from {weights} weights"
    print(
        f"{settings.arch} at {settings.size} px {start}, schedule {settings.sched}; "
        f"on your own data: {Settings.arch} at {Settings.size} px from imagenet weights"
    )
    return settings.replace(data=os.path.abspath(folder))


def predict_settings(args, checkpoint: Settings) -> Settings:
    "The checkpoint's settings, with the data and batch size that were typed."
    typed = explicit_settings(args)
    check_fixed(typed, checkpoint, NETWORK + INPUT)
    if args.flip_test and not checkpoint.flip_indices:
        raise UserError(
            "--tta: the checkpoint has no flip map (its landmarks have none, or --mirror none): run without --tta"
        )
    return checkpoint.replace(**typed)


def check_fixed(typed: dict, before: Settings, names):
    for name in names:
        if name in typed and typed[name] != getattr(before, name):
            flag = flag_of(name)
            raise UserError(
                f"{flag} {typed[name]} contradicts the checkpoint, which has {getattr(before, name)}: run without {flag}, or train again"
            )


def machine(args):
    "The `Machine` that was asked for, made ready. Without a GPU, --gpu is the CPU, with a line that says so."
    import torch

    if args.gpu and not torch.cuda.is_available():
        why = "no GPU was found" if torch.backends.cuda.is_built() else "this torch was built without CUDA"
        print(f"warning: --gpu was given, {why}: using the CPU", file=sys.stderr)
    device = "cuda" if args.gpu and torch.cuda.is_available() else "cpu"
    names = {f.name for f in dataclasses.fields(Machine)} - {"device"}
    found = Machine(device, **{k: v for k, v in vars(args).items() if k in names})
    found.prepare()
    return found
