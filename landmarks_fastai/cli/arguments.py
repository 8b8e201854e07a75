"""The flags of the three scripts.

Nothing heavy is imported here, so that --help is quick. Defaults are in settings.py; a flag that is not on the command
line is None, which a later stage replaces by the checkpoint's value.
"""

import argparse
import dataclasses
import sys
from collections.abc import Callable

from landmarks_fastai.cli.resume import FLAGS, flag_of, resumed
from landmarks_fastai.runs.run import PREDICTIONS, typed_as
from landmarks_fastai.settings import (
    FINETUNE_EPOCHS,
    FINETUNE_LR_MULT,
    OUT,
    RECIPES,
    ROUNDINGS,
    Settings,
    names_of,
)
from landmarks_fastai.utils.hardware import AMP, Machine

METAVARS = {"data": "DIR", "arch": "NAME", "head": "LAYERS"}
ALIASES = {"init_head": "--start", "head_lr_mult": "--head-rate"}  # spellings of earlier versions


class _Ignored(argparse.Action):
    "A flag of an earlier version, accepted and ignored."

    def __call__(self, *args):
        pass


def _parser(description, epilog=None):
    parser = argparse.ArgumentParser(
        description=description, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--borders", action=_Ignored, default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    return parser


def _add_setting(group, name, default=None):
    f = next(f for f in dataclasses.fields(Settings) if f.name == name)
    flags = FLAGS.get(name, (flag_of(name),))
    default = default or ("off" if f.default is False else f.default)
    about = f"{f.metadata['about']} (default: {default})".replace("%", "%%")
    if name in ("tta", "confidence"):  # a later stage may switch off what the checkpoint has
        group.add_argument(*flags, dest=name, action=argparse.BooleanOptionalAction, default=None, help=about)
    elif f.type in (bool, "bool"):
        group.add_argument(*flags, dest=name, action="store_true", default=None, help=about)
    else:
        kind, choices = {"lr": _rate, "align": _margin}.get(name, type(f.default)), f.metadata["choices"]
        word = (
            None if choices else METAVARS.get(name) or {int: "N", float: "X", _rate: "X|find", _margin: "X|off"}[kind]
        )
        group.add_argument(*flags, dest=name, type=kind, choices=choices, help=about, metavar=word)
        if name in ALIASES:
            group.add_argument(ALIASES[name], dest=name, type=kind, choices=choices, help=argparse.SUPPRESS)


def _add_settings(parser, title, names, defaults=None):
    group = parser.add_argument_group(title)
    for name in names:
        _add_setting(group, name, (defaults or {}).get(name))
    return group


def _add_machine(parser, amp="auto"):
    add = parser.add_argument_group("machine").add_argument
    add("--gpu", action="store_true", help="use the GPU: CUDA, or Apple's MPS (default: off; falls back to the CPU)")
    what = "worker processes that load images" if amp == "auto" else "threads that load images, on a GPU"
    about = f"{what} (default: by the number of cores)"
    add("--workers", type=_number(int, 0, 256, "number from 0 to 256"), metavar="N", help=about)
    pixels, millions = Machine.max_pixels, _number(float, 1e-6, 1e6, "number of millions of pixels")
    about = (
        f"largest image, in millions of pixels; decoding takes 10 MB per million, in each worker (default: {pixels:g})"
    )
    add("--max-pixels", type=millions, default=pixels, metavar="X", help=about)
    about = "; auto: the GPU's best type; off on a CPU, on MPS and on GTX 16xx cards" if amp == "auto" else ""
    add("--amp", choices=AMP, default=amp, help=f"mixed precision{about} (default: {amp})")
    for flag, on, about in SWITCHES:
        if flag != "--cache" or amp == "auto":  # a prediction reads each image once
            action = argparse.BooleanOptionalAction if on else "store_true"
            add(flag, action=action, default=on, help=f"{about} (default: {'on' if on else 'off'})")
    if amp == "auto":
        every, minutes = Machine.save_every, _number(float, 0, 1e6, "number of minutes")
        about = f"save the state for --resume every MIN minutes, and after each epoch (default: {every:g})"
        add("--save-every", type=minutes, default=every, metavar="MIN", help=about)
    add("--out", default=OUT, metavar="DIR", help=f"output folder (default: {OUT})")


def _rate(text: str):
    "A learning rate, or the word find."
    return text if text == "find" else _float(text, "find")


def _margin(text: str) -> float:
    "The margin of the aligned crops, or `off`."
    margin = 0.0 if text == "off" else _float(text, "off")
    if margin and not 1 <= margin <= 10:
        raise argparse.ArgumentTypeError(f"{text} is neither off nor a number from 1 to 10")
    return margin


def _float(text: str, word: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither {word} nor a number") from None


def _recipe(text: str) -> str:
    return {"seed": "baseline"}.get(text, text)  # the name in earlier versions


def _number(kind: type, low: float, high: float, what: str) -> Callable[[str], float]:
    "The `type` of a flag: a number from `low` to `high`."

    def parse(text: str) -> float:
        if not low <= kind(text) <= high:  # NaN too
            raise argparse.ArgumentTypeError(f"{text} is no {what}")
        return kind(text)

    parse.__name__ = kind.__name__  # for argparse's message: invalid int value
    return parse


def _add_name(group):
    group.add_argument("-n", "--name", help="name of the run and of its folder (default: made from the settings)")
    group.add_argument("--overwrite", action="store_true", help="replace an existing run of that name")
    about = "resume the stopped run -n, with the flags that it was started with"
    group.add_argument("--resume", action="store_true", help=about)


SWITCHES = [
    ("--cache", False, "cache the fitted images on disk, for later epochs and stages"),
    ("--compile", False, "torch.compile the network: a minute to start, faster steps; needs a C++ compiler"),
    ("--channels-last", True, "channels_last memory format"),
    ("--pin-memory", True, "with a GPU: pin memory of the batches"),
    ("--tf32", True, "with a GPU that has it: allow TF32 matrix multiplication"),
]
TRAINING = ["batch_size", "epochs", "minutes", "patience", "lr", "head_lr_mult", "loss", "opt", "wd", "accumulate", "sched",
            "step_size", "gamma", "seed"]  # fmt: skip
IMAGES = ["align", "whole_pct", "aug", "degrade", "mirror", "ema", "tta", "confidence"]


def train_parser() -> argparse.ArgumentParser:
    "The flags of train.py."
    parser = _parser(
        "Train a network that finds many landmarks in a picture: the first stage.\n\n"
        "Without -d it makes a small set of drawn faces (once) and trains on them.",
        "Reads DIR/train/landmarks.csv and DIR/train/images; writes the folder runs/NAME: best.pth (the checkpoint),\n"
        "history.csv, batch.png (a training batch), mirror.png (the flip map), results.png (targets and predictions),\n"
        f"lr.png (--lr find). The next stage: {typed_as('finetune.py')} -pm NAME",
    )
    about = "best: the defaults below; baseline: the published entry (default: best)"
    parser.add_argument("--recipe", type=_recipe, choices=RECIPES, default="best", help=about)
    names = ["data", "on_bad", "valid_pct", "valid_random", "all_rows"]
    _add_name(_add_settings(parser, "data", names, {"data": "drawn faces"}))
    network = _add_settings(parser, "network", ["arch", "head", "init_head", "freeze", *names_of("input")])
    about = "weights of the body: imagenet, none, or a .safetensors or .pth file (default: imagenet; drawn faces: none)"
    network.add_argument("--weights", metavar="W", help=about)
    _add_settings(parser, "training", TRAINING)
    _add_settings(parser, "augmentation and evaluation", IMAGES)
    _add_machine(parser)
    return parser


def train_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    "The parsed command line of train.py."
    return _parse(train_parser(), argv, "train.py")


def finetune_parser() -> argparse.ArgumentParser:
    "The flags of finetune.py."
    parser = _parser(
        "Continue training from the best checkpoint of a previous stage, at a lower learning rate.\n\n"
        "Settings that are not given are taken from the checkpoint.\n"
        "The stage saves its best epoch, or the loaded model if no epoch is better."
    )
    _add_checkpoint(parser)
    lr = f"{FINETUNE_LR_MULT['onecycle']} of the previous stage's with onecycle, {FINETUNE_LR_MULT['plateau']} with others"
    sched = "onecycle where crops are aligned, else the checkpoint's"
    changed = {
        "epochs": FINETUNE_EPOCHS,
        "lr": lr,
        "sched": sched,
        "seed": "the checkpoint's plus 1",
        "minutes": "0",
        "freeze": "off",
    }
    defaults = {f.name: changed.get(f.name, "the checkpoint's") for f in dataclasses.fields(Settings)}
    training = _add_settings(parser, "training", [*TRAINING, "data", "on_bad", "freeze", "all_rows"], defaults)
    _add_settings(parser, "augmentation and evaluation", [*names_of("input"), *IMAGES], defaults)
    _add_name(training)
    _add_settings(parser, "must agree with the checkpoint", names_of("network", "split"), defaults)
    _add_machine(parser)
    return parser


def finetune_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    "The parsed command line of finetune.py."
    parser = finetune_parser()
    args = _parse(parser, argv, "finetune.py")
    if args.pretrained_model is None:
        parser.error("the following arguments are required: -pm/--pretrained-model (or --resume and -n)")
    return args


def _parse(parser, argv, script: str) -> argparse.Namespace:
    "The parsed flags; with --resume those of the run's start."
    words = sys.argv[1:] if argv is None else list(argv)
    args = parser.parse_args(words)
    args.script = script
    return resumed(parser, args, words) if args.resume else args


def predict_parser() -> argparse.ArgumentParser:
    "The flags of predict.py."
    parser = _parser(
        "Predict the points of pictures; without PATH, of the competition's test images, and write the submission.\n\n"
        "With PATH: writes runs/NAME/predictions.csv (or what --format says), in pixels of the picture as it is shown.\n"
        "Without: reads DIR/test/test_points.csv and DIR/test/images; writes runs/NAME/submit.csv (the submission),\n"
        "points.npy (every point of every image, in pixels of the image as stored) and points.json (its file names)."
    )
    about = "pictures, folders, patterns like 'a/**/*.jpg', videos; - reads a list of these from stdin"
    parser.add_argument("paths", nargs="*", metavar="PATH", help=about)
    about = "checkpoint: the name of a run in the output folder, or a path; an .onnx file; several are averaged"
    _add_checkpoint(parser, about, action="append", required=True)
    group = parser.add_argument_group("pictures").add_argument
    group("--format", choices=PREDICTIONS, help="of the file of points (default: csv)")
    group("--overlay", action="store_true", help="write copies of the pictures with the points into runs/NAME/overlay")
    group("--confidence", action="store_true", dest="draw_confidence", help="draw each point's spread in them, too")
    group("--detect", action="store_true", help="find the faces in each picture first; several are possible")
    group("--smooth", action="store_true", help="videos: smooth the points over time (One Euro filter)")
    about = "CSV of file_name,left,top,right,bottom: the boxes of the objects' points, in pixel edges of the picture"
    group("--boxes", metavar="CSV", help=about)
    defaults = {f.name: "the checkpoint's" for f in dataclasses.fields(Settings)}
    _add_settings(parser, "data", ["data", "batch_size"], defaults)
    about = f"rounding of the submitted coordinates (default: {ROUNDINGS[0]})"
    parser.add_argument("--round", dest="rounding", choices=ROUNDINGS, help=about)
    about = "flip test: average the points of image and mirror image (default: on with flip indices)"
    parser.add_argument("--tta", action=argparse.BooleanOptionalAction, default=None, dest="flip_test", help=about)
    _add_settings(parser, "must agree with the checkpoint", names_of("network", "input"), defaults)
    _add_machine(parser, amp="off")
    return parser


def predict_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    "The parsed command line of predict.py."
    parser = predict_parser()
    args = parser.parse_args(argv)
    flags = {"overlay": args.overlay, "detect": args.detect, "boxes": args.boxes, "smooth": args.smooth,
             "confidence": args.draw_confidence, "format": args.format}  # fmt: skip
    typed = [f"--{name}" + ("" if value is True else f" {value}") for name, value in flags.items() if value]
    if not args.paths and typed:
        parser.error(f"{typed[0].split()[0]} is for pictures: name them, as in: -pm NAME photo.jpg {typed[0]}")
    for flag, value in (("--round", args.rounding), ("-d", args.data)):
        if args.paths and value is not None:
            parser.error(f"{flag} is for the submission: run without it, or without PATH")
    if args.draw_confidence and not args.overlay:
        parser.error(
            "--confidence draws on the copies of --overlay: add it (the file of points has every spread anyway)"
        )
    args.format, args.rounding = args.format or "csv", args.rounding or ROUNDINGS[0]
    if args.detect and args.boxes:
        parser.error("--detect finds boxes and --boxes has them: use one")
    return args


def _add_checkpoint(parser, about="checkpoint: the name of a run in the output folder, or a path", **kwargs):
    parser.add_argument("-pm", "--pretrained-model", metavar="NAME", help=about, **kwargs)
