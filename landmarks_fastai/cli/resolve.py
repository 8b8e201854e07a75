"Make `Settings` and a `Machine` of parsed flags."

import argparse
import dataclasses
import os
import sys
from typing import Any

from landmarks_fastai.cli.resume import flag_of
from landmarks_fastai.errors import UserError
from landmarks_fastai.settings import (
    FINETUNE_EPOCHS,
    FINETUNE_LR_MULT,
    RECIPES,
    WEIGHT_DECAY,
    Settings,
    names_of,
)
from landmarks_fastai.utils.distributed import is_first
from landmarks_fastai.utils.hardware import Machine, find_gpu, why_no_gpu

# Settings for the drawn faces: `python train.py` alone should take three minutes on two cores. Scores on 120 held-out
# faces, from random weights: 64 px, batches of 32, 9 epochs, a quarter whole 28.4; 64 px, batches of 16, 12 epochs, half
# whole 17.1; these 11.1, with 14 epochs 15.2. A network without pretrained weights needs more whole images for its first pass.
DRAWN = {
    "arch": "resnet18", "size": 48, "batch_size": 16, "epochs": 16, "valid_pct": 0.1, "sched": "onecycle", "lr": 4e-3,
    "head_lr_mult": 0.05, "whole_pct": 0.5,
}  # fmt: skip


def explicit_settings(args: argparse.Namespace) -> dict:
    "The settings that are on the command line."
    names = {f.name for f in dataclasses.fields(Settings)}
    return {k: v for k, v in vars(args).items() if k in names and v is not None and (k, v) != ("lr", "find")}


def first_settings(args: argparse.Namespace, drawn: bool) -> Settings:
    "The settings of a first stage; `drawn` if it trains on drawn faces."
    recipe = RECIPES[args.recipe]
    start = {k: v for k, v in DRAWN.items() if not recipe or k in ("arch", "size", "valid_pct")} if drawn else {}
    typed: dict[str, Any] = start | recipe | explicit_settings(args)
    typed.setdefault("wd", WEIGHT_DECAY[typed.get("opt", Settings.opt)])
    typed["data"] = os.path.abspath(typed.get("data") or ".")
    return Settings(**typed)


def default_lr(args: argparse.Namespace, drawn: bool) -> float:
    "The learning rate of a first stage without -lr."
    return first_settings(argparse.Namespace(**vars(args) | {"lr": None}), drawn).lr


def next_settings(args: argparse.Namespace, before: Settings) -> Settings:
    "The settings of a later stage. Raises `UserError` for a flag that contradicts the checkpoint."
    typed = explicit_settings(args)
    check_fixed(typed, before, names_of("network", "split"))
    sched = typed.get("sched") or ("onecycle" if typed.get("align", before.align) else before.sched)
    changes = {
        "epochs": FINETUNE_EPOCHS,
        "sched": sched,
        "lr": before.lr * FINETUNE_LR_MULT[sched],
        "seed": (before.seed + 1) % 2**32,
        "minutes": 0.0,
        "freeze": False,
    }
    if typed.get("opt", before.opt) != before.opt:
        changes["wd"] = WEIGHT_DECAY[typed["opt"]]
    if "data" in typed:
        typed["data"] = os.path.abspath(typed["data"] or ".")
    return before.replace(**changes | typed)


def drawn_faces(settings: Settings, out: str, weights: str) -> Settings:
    "The settings with the folder of drawn faces as data. The faces are drawn if they do not exist."
    from landmarks_fastai.synthetic.sample import make_sample

    folder = os.path.join(out, "drawn_faces")
    print(f"no -d: {'the drawn faces in' if os.path.isdir(folder) else 'drawing faces into'} {folder}", flush=True)
    make_sample(folder)
    start = "random" if weights == "none" else weights
    default = f"{Settings.arch} at {Settings.size} px from imagenet weights"
    print(f"{settings.arch} at {settings.size} px from {start} weights, schedule {settings.sched}; with -d: {default}")
    return settings.replace(data=os.path.abspath(folder))


def check_prediction(args: argparse.Namespace, network: "Network") -> None:
    "Raise `UserError` for flags of predict.py that contradict the checkpoint."
    check_fixed(explicit_settings(args), network.settings, names_of("network", "input"))
    if args.flip_test and not network.facts.flip_indices:
        raise UserError("--tta: the checkpoint has no flip map (none was found, or --mirror none): run without --tta")


def check_fixed(typed: dict, before: Settings, names: list[str]) -> None:
    "Raise `UserError` if one of the settings on the command line differs from the checkpoint's."
    for name in names:
        flag, was = flag_of(name), getattr(before, name)
        if name in typed and typed[name] != was:
            hint = f"run without {flag}, or train again"
            raise UserError(f"{flag} {typed[name]} contradicts the checkpoint, which has {was}: {hint}")


def machine(args: argparse.Namespace) -> Machine:
    "The `Machine` of the flags, prepared. Without a GPU, --gpu prints a warning and the CPU is used."
    device = "cpu"
    if args.gpu:
        device = find_gpu() or "cpu"
        if device == "cpu" and is_first():
            print(f"warning: --gpu was given, {why_no_gpu()}: using the CPU", file=sys.stderr)
    names = {f.name for f in dataclasses.fields(Machine)} - {"device"}
    found = Machine(device, **{k: v for k, v in vars(args).items() if k in names})
    found.prepare()
    return found
