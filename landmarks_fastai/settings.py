"What a network was trained with: one record that travels with its checkpoint, every default named here once."

import dataclasses
import math
from dataclasses import dataclass, field

from landmarks_fastai.errors import UserError

FITS = ("crop", "pad", "squish")  # `pixel_map` in geometry.py says what each does
OPTIMISERS = ("adamw", "adam", "sgd")
STARTS = ("mean", "random")
TARGETS = ("unit", "pixels")
LOSSES = ("l1", "smooth_l1", "mse", "wing")  # losses.py says what each is
MIRRORS = ("auto", "none")
ON_BAD = ("stop", "skip")
SCHEDULES = ("plateau", "step", "onecycle", "none")
ROUNDINGS = ("nearest", "floor", "none")

OUT = "runs"  # folder that a run's files go to

FINETUNE_EPOCHS = 6  # the seed's second and third stage
FINETUNE_RATE = 0.1  # of the rate that the stage before began with


def _setting(default, about, choices=None, low=None, high=None):
    return field(default=default, metadata={"about": about, "choices": choices, "low": low, "high": high})


@dataclass(frozen=True)
class Settings:
    """The defaults are the seed's, as its command line and its description have them, but for what was measured to be
    better (`benchmarks/score.md`); `RECIPES["seed"]` undoes all of that.
    """

    arch: str = _setting("resnext50_32x4d", "network: any torchvision or timm name; timm:NAME where both have it")
    head: str = _setting("linear", "layers between body and points: linear, or a list like 512,bn,relu,drop0.5")
    start: str = _setting(
        "mean", "the last layer starts at the training rows' mean shape, or at random", choices=STARTS
    )
    targets: str = _setting(
        "unit", "what the last layer gives: unit coordinates, or pixels of the input", choices=TARGETS
    )
    size: int = _setting(128, "side of the network's square input, in pixels", low=8, high=4096)
    fit: str = _setting("crop", "how an image becomes that square", choices=FITS)
    n_points: int = _setting(0, "landmarks of an image; the data's own number", low=0, high=100_000)
    pairs: tuple = _setting((), "mirror map: the k-th entry is the index of the mirrored k-th point; empty: none")
    mean: tuple = _setting((0.485, 0.456, 0.406), "per-channel mean that the body expects of its input, in 0..1")
    std: tuple = _setting((0.229, 0.224, 0.225), "per-channel standard deviation, likewise")
    data: str = _setting("", "folder with train/ (images/ and landmarks.csv) and test/")
    on_bad: str = _setting(
        "stop", "rows with bad labels or images: list them and stop, or leave them out (skip)", choices=ON_BAD
    )
    valid_pct: float = _setting(0.2, "share of the rows held out for validation", low=1e-6, high=0.999999)
    valid_random: bool = _setting(False, "draw the validation rows at random, not the last ones of the file")
    all_rows: bool = _setting(
        False, "train on the validation rows too, once the choices are made: no honest score is left"
    )
    aug: float = _setting(1.0, "strength of what training does to an image, 0 to 2", low=0.0, high=2.0)
    mirror: str = _setting(
        "auto", "mirror training images by a map learned from the labels, if they have one", choices=MIRRORS
    )
    loss: str = _setting("mse", "loss, on errors in pixels of the input", choices=LOSSES)
    ema: float = _setting(
        0.99,
        "decay of the weights' running average, which is kept where it scores better; 0: none",
        low=0.0,
        high=0.999999,
    )
    tta: bool = _setting(False, "score each epoch by two looks, the second mirrored")
    batch_size: int = _setting(32, "images of a training step", low=1, high=65536)
    epochs: int = _setting(10, "passes over the training rows", low=1)
    lr: float = _setting(2e-3, "learning rate at the start of the stage", low=1e-12, high=1e3)
    head_rate: float = _setting(0.02, "rate of the head, as a share of the body's", low=1e-6, high=1e3)
    opt: str = _setting("adamw", "optimiser", choices=OPTIMISERS)
    wd: float = _setting(0.05, "weight decay, of biases and norms too (adam, sgd: 0)", low=0.0, high=1e3)
    sched: str = _setting("plateau", "learning rate schedule", choices=SCHEDULES)
    step_size: int = _setting(4, "epochs between reductions, for --sched step", low=1)
    gamma: float = _setting(0.1, "factor of a reduction, for --sched step", low=1e-9, high=1.0)
    accumulate: int = _setting(1, "batches whose gradients make one step", low=1, high=65536)
    patience: int = _setting(0, "stop after so many epochs without a better score; 0: never", low=0)
    minutes: float = _setting(0.0, "end within so many minutes, however many epochs; 0: by -e", low=0.0, high=1e6)
    freeze: bool = _setting(False, "train the head alone, the body stays as it was loaded")
    seed: int = _setting(
        0, "number that the head's start and the order of the images are drawn from", low=0, high=2**32 - 1
    )
    split_seed: int = _setting(0, "number that --valid-random draws by: the first stage's seed", low=0, high=2**32 - 1)

    def __post_init__(self):
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if f.name in ("mean", "std"):
                _check_stats(f.name, value)
            elif f.name == "pairs":
                check_pairs(value, self.n_points)
            else:
                _check(f, value)

    def replace(self, **changes) -> "Settings":
        "Other values of some settings, by name. Raises `UserError` for one that does not exist, or a value out of range."
        if unknown := sorted(changes.keys() - {f.name for f in dataclasses.fields(self)}):
            raise UserError(f"unknown setting: {', '.join(unknown)}")
        return dataclasses.replace(self, **changes)

    def of(self, names) -> dict:
        return {name: getattr(self, name) for name in names}

    def to_dict(self) -> dict:
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_dict(cls, facts: dict) -> "Settings":
        "Raises `UserError` where a setting is missing, unknown or of the wrong kind: the file is not trusted."
        names = {f.name for f in dataclasses.fields(cls)}
        if isinstance(facts, dict):
            facts = {k: getattr(cls, k) for k in NEWER} | facts
            if facts.pop("borders", "keep") != "keep":  # its points are those of trimmed images
                raise UserError(
                    "trained with --borders trim, and border trimming was removed (it cut faces out of dark pictures): "
                    "train again, or use an earlier version of this program"
                )
        if not isinstance(facts, dict) or set(facts) != names:
            odd = sorted(set(facts) ^ names) if isinstance(facts, dict) else ["settings"]
            raise UserError(f"setting missing or unknown: {', '.join(odd)}")
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in facts.items()})


# What checkpoints lack that were written before there was a choice.
NEWER = ("on_bad",)

# What the DataLoaders decide; a Learner takes it from them.
DATA = ("size", "fit", "n_points", "pairs", "data", "on_bad", "valid_pct", "valid_random", "all_rows", "aug", "mirror",
        "batch_size", "split_seed")  # fmt: skip
# What a checkpoint decides: its weights have no other meaning.
NETWORK = ("arch", "head", "targets")
# What it decides for a prediction, and a later stage may change: it is scored at both.
INPUT = ("size", "fit")
# And what a later stage cannot change either: rows that the network was trained on would be validated on.
SPLIT = ("valid_pct", "valid_random")

# The published entry as it was, every addition of this program's switched off. Its loss was taken on pixels of the
# input, and its last layer began near zero: at the picture's corner.
RECIPES = {
    "best": {},
    "seed": {
        "start": "random", "targets": "pixels", "loss": "mse", "aug": 0.0, "mirror": "none", "ema": 0.0, "tta": False,
        "lr": 3e-4, "head_rate": 1.0,
    },
}  # fmt: skip

# L2 decay of 0.05 (adam, sgd) is not AdamW's decay of 0.05: it would flatten the network.
WEIGHT_DECAY = {"adamw": 0.05, "adam": 0.0, "sgd": 0.0}


def _check(f, value):
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


def _range(low, high):
    return f"from {low} to {high}" if high is not None else f"of at least {low}"


def _check_stats(name, value):
    right = isinstance(value, tuple) and len(value) == 3
    if not right or not all(isinstance(v, (int, float)) and math.isfinite(v) for v in value):
        raise UserError(f"{name} is {value!r}: three numbers expected")
    if name == "std" and min(value) <= 0:
        raise UserError(f"std is {value!r}: numbers above 0 expected")


def check_pairs(pairs, n_points: int):
    "Raise `UserError` unless the pairs are empty, or a permutation of the points that is its own inverse."
    right = isinstance(pairs, tuple) and len(pairs) in (0, n_points) and all(type(p) is int for p in pairs)
    if not right or any(not 0 <= p < len(pairs) or pairs[p] != k for k, p in enumerate(pairs)):
        raise UserError(f"pairs is no list of {n_points} points in which each one's partner names it back")
