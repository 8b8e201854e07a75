"""Arguments shared by the doors.

Nothing heavy is imported here, so that `--help` answers at once. Every default lives in settings.py; a flag that was
not given is None, which is how a later stage knows what to take from the checkpoint.
"""

import argparse
import dataclasses
import os
import sys

from landmarks_fastai.cli.resume import FLAGS, flag_of, resumed
from landmarks_fastai.settings import (
    FINETUNE_EPOCHS,
    FINETUNE_RATE,
    INPUT,
    NETWORK,
    OUT,
    RECIPES,
    ROUNDINGS,
    SPLIT,
    Settings,
)
from landmarks_fastai.utils.hardware import AMP, Machine

# how the system's loader says that there is no memory for a library
UNMAPPED = ("failed to map segment", "cannot allocate memory", "Cannot allocate memory")
WORDS = {"data": "DIR", "arch": "NAME", "head": "LAYERS"}  # what --help calls a flag's value


class _Ignored(argparse.Action):
    "A flag of an earlier version, which command lines may still hold."

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
    if name == "tta":  # a later stage may switch off what it was handed down
        group.add_argument(*flags, dest=name, action=argparse.BooleanOptionalAction, default=None, help=about)
    elif f.type in (bool, "bool"):
        group.add_argument(*flags, dest=name, action="store_true", default=None, help=about)
    else:
        kind, choices = _rate if name == "lr" else type(f.default), f.metadata["choices"]
        word = None if choices else WORDS.get(name) or {int: "N", float: "X", _rate: "X|find"}[kind]
        group.add_argument(*flags, dest=name, type=kind, choices=choices, help=about, metavar=word)


def _add_settings(parser, title, names, defaults=None):
    group = parser.add_argument_group(title)
    for name in names:
        _add_setting(group, name, (defaults or {}).get(name))
    return group


def _add_machine(parser, amp="auto"):
    group = parser.add_argument_group("machine")
    group.add_argument("--gpu", action="store_true", help="use the GPU (default: off; without one the CPU goes on)")
    group.add_argument(
        "--workers", type=_workers, metavar="N", help="processes that decode images (default: by the machine's cores)"
    )
    group.add_argument("--max-pixels", type=_megapixels, default=Machine.max_pixels, metavar="X",
                       help="millions of pixels that an image may have; decoding takes 10 MB a million, in each worker "
                       f"(default: {Machine.max_pixels:g})")  # fmt: skip
    about = "; auto: what the GPU is best at, off on a CPU and on GTX 16xx cards" if amp == "auto" else ""
    group.add_argument("--amp", choices=AMP, default=amp,
                       help=f"mixed precision{about} (default: {amp})")  # fmt: skip
    for flag, on, about in SWITCHES:
        if flag == "--cache" and amp == "off":  # a prediction reads each image once
            continue
        group.add_argument(flag, action=argparse.BooleanOptionalAction if on else "store_true", default=on,
                           help=f"{about} (default: {'on' if on else 'off'})")  # fmt: skip
    if amp == "auto":
        group.add_argument("--save-every", type=_minutes, default=Machine.save_every, metavar="MIN",
                           help="minutes from one writing of the run's state to the next; each epoch's end has its own "
                           f"(default: {Machine.save_every:g})")  # fmt: skip
    group.add_argument("--out", default=OUT, metavar="DIR", help=f"folder that the run's files go to (default: {OUT})")


def _rate(text: str):
    "A learning rate, or `find`."
    return text if text == "find" else float(text)


def _minutes(text: str) -> float:
    if not 0 <= float(text) < 1e6:  # False for NaN too
        raise argparse.ArgumentTypeError(f"{text} is no number of minutes")
    return float(text)


def _workers(text: str) -> int:
    if not text.isdecimal() or int(text) > 256:
        raise argparse.ArgumentTypeError(f"{text} is no number from 0 to 256")
    return int(text)


def _megapixels(text: str) -> float:
    if not 0 < float(text) < 1e6:  # False for NaN too
        raise argparse.ArgumentTypeError(f"{text} is no number of millions of pixels")
    return float(text)


def _add_name(group):
    group.add_argument(
        "-n", "--name", help="name of the run, and so of its folder (default: a free one made from its settings)"
    )
    group.add_argument("--overwrite", action="store_true", help="let the new run replace one of that name")
    group.add_argument("--resume", action="store_true",
                       help="go on with the run -n from where it was stopped, with the flags that it was started with")  # fmt: skip


SWITCHES = [
    ("--cache", False, "keep the fitted images on disk, and read them there in later epochs and stages"),
    ("--compile", False, "torch.compile the network: a minute's start, faster steps; needs a C++ compiler"),
    ("--channels-last", True, "the memory order that convolutions are faster in"),
    ("--pin-memory", True, "with a GPU: batches in page-locked memory, which are copied faster"),
    ("--tf32", True, "with a GPU that has it: matrices are multiplied with 10 bits of mantissa"),
]
TRAINING = ["batch_size", "epochs", "minutes", "patience", "lr", "head_rate", "loss", "opt", "wd", "accumulate", "sched",
            "step_size", "gamma", "seed"]  # fmt: skip
IMAGES = ["aug", "mirror", "ema", "tta"]


def train_parser() -> argparse.ArgumentParser:
    "The flags of train.py."
    parser = _parser(
        "Train a network that finds many landmarks in a picture: the first stage.\n\n"
        "Without -d it draws a small set of faces (once), and trains on those.",
        "Reads DIR/train/landmarks.csv and DIR/train/images; writes the folder runs/NAME: best.pth (the checkpoint),\n"
        "history.csv, batch.png (what was trained on), mirror.png (the mirror map), results.png (truth beside prediction),\n"
        "lr.png (--lr find). The next stage: python finetune.py -pm NAME",
    )
    parser.add_argument("--recipe", choices=RECIPES, default="best",
                        help="best: the defaults below; seed: the published entry, every later addition off (default: best)")  # fmt: skip
    data = _add_settings(
        parser, "data", ["data", "on_bad", "valid_pct", "valid_random", "all_rows"], {"data": "drawn faces"}
    )
    _add_name(data)
    network = _add_settings(parser, "network", ["arch", "head", "start", "targets", "freeze", *INPUT])
    network.add_argument("--weights", metavar="W", help="what the body starts from: imagenet, none, or a .safetensors or .pth file "
                         "(default: imagenet; drawn faces: none)")  # fmt: skip
    _add_settings(parser, "training", TRAINING)
    _add_settings(parser, "what the images go through, and what is kept", IMAGES)
    _add_machine(parser)
    return parser


def train_arguments(argv=None):
    "What train.py was asked for."
    return _parse(train_parser(), argv, "train.py")


def finetune_parser() -> argparse.ArgumentParser:
    "The flags of finetune.py."
    parser = _parser(
        "Train on from the best checkpoint of a stage before, at a lower rate.\n\n"
        "Network, head, input, split, optimiser, schedule and data are the checkpoint's where no flag says otherwise.\n"
        "The stage ends with the best of its own epochs and of the model that it was given.",
    )
    _add_checkpoint(parser, required=False)
    own = {
        "epochs": FINETUNE_EPOCHS,
        "lr": f"{FINETUNE_RATE} of the rate that the stage before began with",
        "seed": "one above the checkpoint's",
        "minutes": "0",
        "freeze": "off",
    }
    its = {f.name: own.get(f.name, "the checkpoint's") for f in dataclasses.fields(Settings)}
    training = _add_settings(parser, "training", [*TRAINING, "data", "on_bad", "freeze", "all_rows"], its)
    _add_settings(parser, "what the images go through, and what is kept", [*INPUT, *IMAGES], its)
    _add_name(training)
    _add_settings(parser, "must agree with the checkpoint", NETWORK + SPLIT, its)
    _add_machine(parser)
    return parser


def finetune_arguments(argv=None):
    "What finetune.py was asked for."
    parser = finetune_parser()
    args = _parse(parser, argv, "finetune.py")
    if args.pretrained_model is None:
        parser.error("the following arguments are required: -pm/--pretrained-model (or --resume and -n)")
    return args


def _parse(parser, argv, script: str):
    "What was typed; with --resume what the run was started with."
    words = sys.argv[1:] if argv is None else list(argv)
    args = parser.parse_args(words)
    args.script = script
    return resumed(parser, args, words) if args.resume else args


def predict_parser() -> argparse.ArgumentParser:
    "The flags of predict.py."
    parser = _parser(
        "Predict the test images' points and write the submission.\n\n"
        "Reads DIR/test/test_points.csv and DIR/test/images; writes runs/NAME/submit.csv (the submission),\n"
        "points.npy (every point of every image, in pixels of the image as stored) and points.json (its file names).",
    )
    _add_checkpoint(parser)
    _add_settings(
        parser, "data", ["data", "batch_size"], {"data": "the checkpoint's", "batch_size": "the checkpoint's"}
    )
    parser.add_argument("--round", dest="rounding", choices=ROUNDINGS, default=ROUNDINGS[0],
                        help=f"how submitted coordinates become whole (default: {ROUNDINGS[0]})")  # fmt: skip
    parser.add_argument("--tta", action=argparse.BooleanOptionalAction, default=None, dest="second_look",
                        help="look a second time, at the mirrored image (default: where the checkpoint has a mirror map)")  # fmt: skip
    fixed = NETWORK + INPUT
    _add_settings(parser, "must agree with the checkpoint", fixed, dict.fromkeys(fixed, "the checkpoint's"))
    _add_machine(parser, amp="off")
    return parser


def predict_arguments(argv=None):
    "What predict.py was asked for."
    return predict_parser().parse_args(argv)


def _add_checkpoint(parser, required=True):
    parser.add_argument("-pm", "--pretrained-model", required=required, metavar="NAME",
                        help="checkpoint: a run's name in the output folder, or a path")  # fmt: skip


def _let_go_of_unread():
    "Python would try again at its end to write what nobody reads."
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
