"What the parsers of the scripts share. Nothing heavy is imported here, so that --help is quick."

import argparse
import dataclasses
import os
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

from landmarks_fastai.errors import UserError
from landmarks_fastai.runs.run import MACHINE, flags_of
from landmarks_fastai.settings import OUT, Settings
from landmarks_fastai.utils.distributed import is_first, prints_line
from landmarks_fastai.utils.hardware import AMP, LOGS, Machine, find_gpu, gpu_count, why_no_gpu

TRAINING = ["batch_size", "epochs", "repeats", "minutes", "patience", "lr", "head_lr_mult", "freeze_bn", "loss", "opt", "wd",
            "accumulate", "sched", "step_size", "gamma", "seed"]  # fmt: skip
IMAGES = ["align", "whole_pct", "aug", "degrade", "mirror", "ema", "tta", "confidence"]
FIELDS = {f.name: f for f in dataclasses.fields(Settings)}


class Parser(argparse.ArgumentParser):
    "The parser of a script. Of several processes one prints an error. With `raises` an error is a `UserError`."

    raises = False

    def __init__(self, description: str, epilog: str | None = None):
        text = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, epilog=epilog, formatter_class=text, allow_abbrev=False)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        "As argparse's; an empty text is an error (but for -d, the current folder): it comes from a variable that is not set."
        parsed, rest = super().parse_known_args(args, namespace)
        for name, value in vars(parsed).items():
            if value == "" or (isinstance(value, list) and "" in value):
                flag = "PATH" if name == "paths" else flags_of(name)[0]
                self.error(f"{flag} is empty: is a variable of the shell not set?")
        return parsed, rest

    def error(self, message: str) -> Any:
        if self.raises:
            raise UserError(message)
        if prints_line():
            super().error(message)
        sys.exit(2)

    def add_settings(self, title: str, names: Iterable[str], defaults: dict[str, str] | None = None) -> Any:
        "Add a group with the flags of settings; `defaults` are words for --help. Returns the group."
        group = self.add_argument_group(title)
        for name in names:
            f = FIELDS[name]
            default = (defaults or {}).get(name) or (
                "off" if f.default is False else "none" if f.default == "" else f.default
            )
            if name in ("tta", "confidence", "freeze_bn"):  # a later stage may switch off what the checkpoint has
                kwargs: dict[str, Any] = {"action": argparse.BooleanOptionalAction}
            elif f.default is False:
                kwargs = {"action": "store_true", "default": None}
            elif f.metadata["choices"]:
                kwargs = {"choices": f.metadata["choices"]}
            else:
                kind = type(f.default)
                kwargs = dict(zip(("type", "metavar"), TYPES.get(name) or (kind, METAVARS[kind]), strict=True))
            about = f"{f.metadata['about']} (default: {default})".replace("%", "%%")
            group.add_argument(*flags_of(name), dest=name, help=about, **kwargs)
        return group

    def add_checkpoint(self, about: str = "checkpoint: the name of a run in the output folder, or a path", **kwargs):
        self.add_argument(*flags_of("pretrained_model"), metavar="NAME", help=about, **kwargs)

    def add_machine(self, training: bool = True) -> None:
        "Add the flags of `Machine`, and --out."
        add = self.add_argument_group("machine").add_argument

        def switch(flag: str, on: bool, about: str) -> None:
            action = argparse.BooleanOptionalAction if on else "store_true"
            add(flag, action=action, default=None, help=f"{about} (default: {'on' if on else 'off'})")

        about = "use the GPU: CUDA, or Apple's MPS (default: off; falls back to the CPU)"
        add("--gpu", action="store_true", default=None, help=about)
        about = "worker processes that load images" if training else "threads that load images, on a GPU"
        count = number(int, 0, 256, "number from 0 to 256")
        add("--workers", type=count, metavar="N", help=f"{about} (default: by the number of cores)")
        if training:
            about = "threads of PyTorch on the CPU; a resumed run is the same to the last bit only with a fixed number"
            count = number(int, 1, 1024, "number from 1 to 1024")
            add("--threads", type=count, metavar="N", help=f"{about} (default: as many as other programs leave free)")
        about = "largest image, in millions of pixels; decoding takes 10 MB per million, in each worker"
        millions = number(float, 1e-6, 1e6, "number of millions of pixels")
        add("--max-pixels", type=millions, metavar="X", help=f"{about} (default: {Machine.max_pixels:g})")
        about = "; auto: the GPU's best type; off on a CPU, on MPS and on GTX 16xx cards" if training else ""
        amp = None if training else "off"
        add("--amp", choices=AMP, default=amp, help=f"mixed precision{about} (default: {amp or Machine.amp})")
        if training:  # a prediction reads each image once
            switch("--cache", False, "cache the fitted images on disk, for later epochs and stages")
        switch("--compile", False, "torch.compile the network: a minute to start, faster steps; needs a C++ compiler")
        switch("--channels-last", True, "channels_last memory format")
        switch("--tf32", True, "with a GPU that has it: allow TF32 matrix multiplication")
        if training:
            about = "also write scalars, settings and results.png for this program, into runs/NAME (default: none)"
            add("--log", choices=LOGS, help=about)
            about = "save the state for --resume every MIN minutes, and after each epoch"
            minutes = number(float, 0, 1e6, "number of minutes")
            add("--save-every", type=minutes, metavar="MIN", help=f"{about} (default: {Machine.save_every:g})")
        add("--out", default=OUT, metavar="DIR", help=f"output folder (default: {OUT})")


def add_name(group: Any) -> None:
    "Add -n, --overwrite and --resume."
    about = "name of the run and of its folder (default: made from the settings)"
    group.add_argument("-n", "--name", help=about)
    about = "replace an existing run of that name"
    group.add_argument("--overwrite", action="store_true", help=about)
    about = "resume the stopped run -n, with the flags that it was started with"
    group.add_argument("--resume", action="store_true", help=about)


def learning_rate(text: str) -> float | str:
    "A learning rate, or the word find."
    return text if text == "find" else _float(text, "find")


def margin(text: str) -> float:
    "The margin of the aligned crops, or `off`."
    value = 0.0 if text == "off" else _float(text, "off")
    if value and not 1 <= value <= 10:
        raise argparse.ArgumentTypeError(f"{text} is neither off nor a number from 1 to 10")
    return value


def _float(text: str, word: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither {word} nor a number") from None


def number(kind: type, low: float, high: float, what: str) -> Callable[[str], float]:
    "The `type` of a flag: a number from `low` to `high`."

    def parse(text: str) -> float:
        if not low <= kind(text) <= high:  # NaN too
            raise argparse.ArgumentTypeError(f"{text} is not a {what}")
        return kind(text)

    parse.__name__ = kind.__name__  # for argparse's message: invalid int value
    return parse


def absolute(text: str) -> str:
    "An absolute path; an empty text stays, which is an error."
    return text and os.path.abspath(text)


METAVARS = {int: "N", float: "X"}
TYPES = {  # type and word in --help of flags whose value is more than a number
    "data": (os.path.abspath, "SOURCE"),
    "valid": (absolute, "SOURCE"),
    "exclude": (absolute, "FILE"),
    "group": (str, "COLUMN"),
    "category": (str, "NAME"),
    "arch": (str, "NAME"),
    "head": (str, "LAYERS"),
    "lr": (learning_rate, "X|find"),
    "align": (margin, "X|off"),
}


def words_of(parser: Parser, flags: dict[str, list[str]]) -> list[str]:
    "The words of flags with their values; a switch has the value on or off. The parser raises errors."
    words = []
    for flag, values in flags.items():
        with suppress(UserError):  # a flag that takes a value
            if values in (["on"], ["off"]) and parser.parse_known_args([flag]):
                off = flag.replace("--", "--no-", 1)
                words += [flag] if values == ["on"] else [] if parser.parse_known_args([off])[1] else [off]
                continue
        words += [flag, *values]
    return words


def typed_flags(args: argparse.Namespace) -> dict[str, Any]:
    "The flags that are on the command line, without those that name the run and say what to do with it."
    return {k: v for k, v in vars(args).items() if v is not None and k not in ("name", "out", "overwrite", "resume")}


def chosen_settings(flags: dict[str, Any]) -> dict[str, Any]:
    "The settings among the flags."
    return {k: v for k, v in flags.items() if k in Settings.names() and v is not None and (k, v) != ("lr", "find")}


def check_fixed(flags: dict[str, Any], checkpoint: Settings, names: Iterable[str]) -> None:
    "Raise `UserError` if one of these settings is among the flags and differs from the checkpoint's."
    for name in names:
        flag, was = flags_of(name)[0], getattr(checkpoint, name)
        if flags.get(name) not in (None, was):
            hint = f"run without {flag}, or train again"
            raise UserError(f"{flag} {flags[name]} contradicts the checkpoint, which has {was}: {hint}")


def prepared_machine(flags: dict[str, Any]) -> Machine:
    "The `Machine` of the flags, prepared. Without a GPU, --gpu prints a warning and the CPU is used."
    device = "cpu"
    if flags.get("gpu"):
        device = find_gpu() or "cpu"
        if device == "cpu" and is_first():
            print(f"warning: --gpu was given, {why_no_gpu()}: using the CPU", file=sys.stderr)
        elif device == "cuda" and (gpus := gpu_count()) > 1:
            print(f"note: --gpu uses one of {gpus} GPUs; docs/machines.md says how to use all", file=sys.stderr)
    machine = Machine(device, **{k: v for k, v in flags.items() if k in MACHINE - {"gpu"} and v is not None})
    machine.prepare()
    return machine
