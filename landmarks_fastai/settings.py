"""What a user chose (`Settings`) and what was learned from the data (`DataFacts`); a checkpoint stores both.

Every default is defined here, once.
"""

import dataclasses
import math
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from landmarks_fastai.errors import UserError

if TYPE_CHECKING:
    from typing_extensions import Self

FITS = ("crop", "pad", "squish")  # described in `pixel_map`, geometry.py
CROPS = ("auto", "image", "box")
OPTIMISERS = ("adamw", "adam", "sgd")
HEAD_INITS = ("mean", "random")
LOSSES = ("l1", "smooth_l1", "mse", "wing")  # defined in training/losses.py
MIRRORS = ("auto", "none")
ON_BAD = ("stop", "skip")
SCHEDULES = ("plateau", "step", "onecycle", "none")
ROUNDINGS = ("nearest", "floor", "none")

OUT = "runs"  # default folder of the runs

FINETUNE_EPOCHS = 6  # of the published entry's second and third stage
# A later stage's learning rate, as a multiple of the previous stage's, by its schedule. A tenth is the published entry's.
# Where crops are aligned, one cycle at a half is the default: from 2.08 on photographs to 1.85 and 1.65 in two stages,
# where plateau at a tenth stood at 1.86 after four of its epochs (`benchmarks/score.md`).
FINETUNE_LR_MULT = {"plateau": 0.1, "step": 0.1, "none": 0.1, "onecycle": 0.5}


def _setting(
    default: Any,
    about: str,
    part: str = "training",  # data, split, input or network; see `names_of`
    choices: tuple[str, ...] | None = None,
    low: float | None = None,
    high: float | None = None,
) -> Any:
    return field(default=default, metadata={"about": about, "part": part, "choices": choices, "low": low, "high": high})


class _Record:
    "A frozen dataclass that is stored as JSON."

    @classmethod
    def names(cls) -> list[str]:
        "Return the names of its fields."
        return [f.name for f in dataclasses.fields(cls)]  # pyright: ignore[reportArgumentType] (subclasses are dataclasses)

    def replace(self, **changes: Any) -> "Self":
        "Return a copy with some fields changed. Raises `UserError` for an unknown field or a value out of range."
        if unknown := sorted(changes.keys() - set(self.names())):
            raise UserError(f"unknown setting: {', '.join(unknown)}")
        return dataclasses.replace(self, **changes)  # pyright: ignore[reportArgumentType] (subclasses are dataclasses)

    def to_dict(self) -> dict[str, Any]:
        "Return all fields as JSON types."
        values = ((name, getattr(self, name)) for name in self.names())
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values}

    @classmethod
    def from_dict(cls, record: Any) -> "Self":
        """Create the value from a record of `to_dict`.

        Raises `UserError` if a field is missing, unknown or of the wrong type: the file is not trusted.
        """
        if not isinstance(record, dict) or set(record) != set(cls.names()):
            odd = sorted(set(record) ^ set(cls.names())) if isinstance(record, dict) else ["settings"]
            raise UserError(f"setting missing or unknown: {', '.join(map(str, odd))}")
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in record.items()})


@dataclass(frozen=True)
class Settings(_Record):
    """The settings of one stage, checked when they are created. Raises `UserError` for a value out of range.

    The defaults are the published entry's, except where a measurement found something better (`benchmarks/score.md`);
    `RECIPES["baseline"]` restores the entry's.
    """

    arch: str = _setting(
        "resnext50_32x4d", "network: any torchvision or timm name; timm:NAME where both have it", "network"
    )
    head: str = _setting(
        "map64",
        "layers between body and points: linear, or a list like 512,bn,relu,drop0.5; map64, alone or before the list: they read "
        "the body's feature map too, reduced to 64 channels",
        "network",
    )
    init_head: str = _setting(
        "mean", "initialise the last layer at the mean shape of the training rows, or at random", choices=HEAD_INITS
    )
    size: int = _setting(128, "side of the network's square input, in pixels", "input", low=8, high=4096)
    fit: str = _setting("crop", "how an image is fitted to the square input", "input", FITS)
    crop: str = _setting(
        "auto", "first view of an object: the whole image, or its box; auto: box if images hold several", "input", CROPS
    )
    align: float = _setting(
        1.3, "second pass over aligned crops, this many times the size of the shape", "data", low=0.0, high=10.0
    )
    whole_pct: float = _setting(
        0.25, "fraction of a training batch that is whole images where crops are aligned", "data", low=0.0, high=1.0
    )
    data: str = _setting(
        "",
        "labels, a file or folder of any tool of docs/labels.md; or train/ (images/, landmarks.csv) and test/",
        "data",
    )
    category: str = _setting("", "category of the objects, where the labels have several", "data")
    on_bad: str = _setting("stop", "bad labels or images: list them and stop, or skip these rows", "data", ON_BAD)
    exclude: str = _setting(
        "", "text file of rows to leave out, as the doctor's exclude.txt: a file name a line", "data"
    )
    valid_pct: float = _setting(0.2, "fraction of the rows held out for validation", "split", low=1e-6, high=0.999999)
    valid_random: bool = _setting(False, "hold out random rows instead of the last ones of the file", "split")
    group: str = _setting(
        "auto",
        "what the split does not divide: auto (the source's groups, folders, clips), folder, clip, none, or a column",
        "split",
    )
    valid: str = _setting(
        "", "the validation rows: labels of their own, or a text file with a file name a line", "data"
    )
    all_rows: bool = _setting(
        False, "train on the validation rows too; the score then is of rows that were trained on", "data"
    )
    aug: float = _setting(1.0, "strength of the augmentation, 0 to 2", "data", low=0.0, high=2.0)
    degrade: float = _setting(
        0.0,
        "probability that a training image is blurred, darkened, partly covered: each independently",
        "data",
        low=0.0,
        high=1.0,
    )
    mirror: str = _setting("auto", "flip training images, with flip indices learned from the labels", "data", MIRRORS)
    loss: str = _setting("mse", "loss, of errors in pixels of the input", choices=LOSSES)
    ema: float = _setting(
        0.99,
        "decay of the exponential moving average of the weights (0: none); saved when it scores better",
        low=0.0,
        high=0.999999,
    )
    tta: bool = _setting(False, "score each epoch with the flip test")
    confidence: bool = _setting(False, "after the last epoch, learn a spread for each landmark: how far off it may be")
    batch_size: int = _setting(32, "batch size", "data", low=1, high=65536)
    epochs: int = _setting(10, "number of epochs", low=1)
    repeats: int = _setting(1, "passes over the training images in an epoch", "data", low=1, high=65536)
    lr: float = _setting(
        2e-3, "learning rate of the body at the start of the stage; find: run lr_find", low=1e-12, high=1e3
    )
    head_lr_mult: float = _setting(0.02, "learning rate of the head, as a multiple of the body's", low=1e-6, high=1e3)
    opt: str = _setting("adamw", "optimiser", choices=OPTIMISERS)
    wd: float = _setting(0.05, "weight decay, applied to biases and norms too (adam, sgd: 0)", low=0.0, high=1e3)
    sched: str = _setting("plateau", "learning rate schedule", choices=SCHEDULES)
    step_size: int = _setting(4, "epochs between reductions, with --sched step", low=1)
    gamma: float = _setting(0.1, "factor of a reduction, with --sched step", low=1e-9, high=1.0)
    accumulate: int = _setting(1, "batches whose gradients are accumulated for one step", low=1, high=65536)
    patience: int = _setting(0, "early stopping: epochs without a better score (0: never)", low=0)
    minutes: float = _setting(0.0, "time limit in minutes (0: none); replaces -e", low=0.0, high=1e6)
    freeze: bool = _setting(False, "freeze the body, train the head only")
    freeze_bn: bool = _setting(False, "keep the means and variances of the batch norms as they were loaded")
    seed: int = _setting(0, "random seed", low=0, high=2**32 - 1)
    split_seed: int = _setting(0, "random seed of --valid-random: the first stage's", "data", low=0, high=2**32 - 1)

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            object.__setattr__(self, f.name, _plain(getattr(self, f.name)))
            _check(f, getattr(self, f.name))

    @property
    def rows(self) -> dict[str, Any]:
        "The settings, by name, that say which rows of a source there are: arguments of `labelled_images`."
        return {name: getattr(self, name) for name in ("category", "valid", "exclude")}

    def of(self, *parts: str) -> dict[str, Any]:
        "Return the settings of some parts, by name; see `names_of`."
        return {name: getattr(self, name) for name in names_of(*parts)}


def names_of(*parts: str) -> list[str]:
    """Return the names of the settings of some parts.

    - data: of the DataLoaders; a Learner takes them from there, with those of `split` and `input`.
    - split: a later stage cannot change them, it would validate on rows that were trained on.
    - input: a prediction takes the checkpoint's; a later stage may change them, and scores at both.
    - network: the weights are useless with other values.
    - training: all others.
    """
    return [f.name for f in dataclasses.fields(Settings) if f.metadata["part"] in parts]


@dataclass(frozen=True)
class DataFacts(_Record):
    "What was learned from the training data, and what the network's body expects. Raises `UserError` for wrong values."

    n_points: int = 0  # landmarks of an object
    shape: tuple[float, ...] = ()  # mean shape of the objects, centred, of radius 1: x0, y0, x1, y1, …; empty: none
    align_gain: float = 0.0  # factor by which aligned crops reduce the spread of the points; 0: they are of no use
    points_box: tuple[
        float, ...
    ] = ()  # mean box of the points in the input: left, top, right, bottom, unit coordinates
    flip_indices: tuple[int, ...] = ()  # index of the mirrored k-th point, for each k; empty: no flip map
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)  # of each channel of the body's input, in 0..1
    std: tuple[float, ...] = (0.229, 0.224, 0.225)  # standard deviation, likewise
    point_names: tuple[str, ...] = ()  # of the landmarks; empty: the source names none
    skeleton: tuple[int, ...] = ()  # landmarks that a line joins: a0, b0, a1, b1, …
    category: str = ""  # of the objects, as the source names it

    def __post_init__(self) -> None:
        if type(self.n_points) is not int or not 0 <= self.n_points <= 100_000:
            raise UserError(f"n_points is {self.n_points!r}: a number from 0 to 100000 expected")
        if not _are_numbers((self.align_gain,)) or self.align_gain < 0:
            raise UserError(f"align_gain is {self.align_gain!r}: a number of at least 0 expected")
        for name in ("mean", "std"):
            if not _are_numbers(value := getattr(self, name)) or len(value) != 3:
                raise UserError(f"{name} is {value!r}: three numbers expected")
        if min(self.std) <= 0:
            raise UserError(f"std is {self.std!r}: numbers above 0 expected")
        box = self.points_box
        if not _are_numbers(box) or (box and not (len(box) == 4 and box[2] > box[0] and box[3] > box[1])):
            raise UserError(f"points_box is {box!r}: left, top, right, bottom expected")
        if len(self.point_names) not in (0, self.n_points) or not all(
            isinstance(name, str) for name in self.point_names
        ):
            raise UserError(f"point_names is not a list of {self.n_points} texts")
        if not isinstance(self.category, str):
            raise UserError(f"category is {self.category!r}: a text expected")
        joined = self.skeleton
        if len(joined) % 2 or not all(type(k) is int and 0 <= k < self.n_points for k in joined):
            raise UserError(f"skeleton is not a list of pairs of {self.n_points} points")
        if not _are_numbers(self.shape) or len(self.shape) not in (0, 2 * self.n_points):
            raise UserError(f"shape is not a list of {self.n_points} points")
        check_flip_indices(self.flip_indices, self.n_points)


# `baseline` is the published entry, without what this program adds to it. Its last layer was initialised at random.
RECIPES: dict[str, dict[str, Any]] = {
    "best": {},
    "baseline": {
        "head": "linear", "init_head": "random", "loss": "mse", "aug": 0.0, "mirror": "none", "ema": 0.0, "tta": False, "align": 0.0,
        "lr": 3e-4, "head_lr_mult": 1.0,
    },
}  # fmt: skip

# Settings that decide how long a stage is: without them it follows from the number of images (`training/length.py`).
LENGTH = ("epochs", "repeats", "minutes", "lr", "sched")

# Default weight decay of each optimiser. adam and sgd add L2 decay to the gradient: 0.05 would be far too strong there.
WEIGHT_DECAY = {"adamw": 0.05, "adam": 0.0, "sgd": 0.0}
assert WEIGHT_DECAY.keys() == set(OPTIMISERS) and FINETUNE_LR_MULT.keys() == set(SCHEDULES)


def _plain(value: Any) -> Any:
    "Return a path as text, and a scalar of numpy or torch as a number."
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return value.item() if getattr(value, "shape", None) == () else value


def _check(f: dataclasses.Field, value: Any) -> None:
    kind = type(f.default)
    right = isinstance(value, kind) or (kind is float and type(value) is int)
    if not right or (kind is not bool and isinstance(value, bool)):
        raise UserError(f"{f.name} is {value!r}: {kind.__name__} expected")
    choices, low, high = (f.metadata[k] for k in ("choices", "low", "high"))
    if choices and value not in choices:
        raise UserError(f"{f.name} is {value!r}: one of {', '.join(choices)} expected")
    if kind in (int, float):
        if not math.isfinite(value) or (low is not None and value < low) or (high is not None and value > high):
            raise UserError(f"{f.name} is {value}: a number {_range(low, high)} expected")


def _range(low: float | None, high: float | None) -> str:
    return f"from {low} to {high}" if high is not None else f"of at least {low}"


def _are_numbers(values: Any) -> bool:
    return isinstance(values, tuple) and all(type(v) in (int, float) and abs(v) < 1e6 for v in values)  # False for NaN


def check_flip_indices(flip_indices: Any, n_points: int) -> None:
    "Raise `UserError` unless the flip indices are empty, or a permutation of the points that is its own inverse."
    right = (
        isinstance(flip_indices, tuple)
        and len(flip_indices) in (0, n_points)
        and all(type(p) is int for p in flip_indices)
    )
    if not right or any(not 0 <= p < len(flip_indices) or flip_indices[p] != k for k, p in enumerate(flip_indices)):
        raise UserError(f"flip_indices is not a permutation of {n_points} points that is its own inverse")
