"""How long a first stage trains if nobody says so: by the number of training images.

The published entry's ten epochs are 98,000 steps with the competition's images and 40 with 120 images, which is far too few
(`benchmarks/few.py`).
"""

from collections.abc import Collection
from typing import TYPE_CHECKING

from landmarks_fastai.settings import Settings

if TYPE_CHECKING:
    from landmarks_fastai.training.learner import LandmarkLearner

STEPS = 1500  # of a stage, at least
VALIDATED = 75  # steps between two validations, at least
LOW, FEW_STEPS = 0.25, 10_000  # of `note_low_lr`: share of the default learning rate, number of steps


def choose_length(settings: Settings, images: int, typed: Collection[str] = ()) -> Settings:
    """Return the settings with a length for so many training images; those of `typed` stay as they are.

    Nothing changes where the defaults make `STEPS` steps.
    """
    if settings.epochs * images >= STEPS * settings.batch_size:
        return settings
    # 150 photographs, 800 steps, score on 435 others: 15.9 with the rate of 2e-3; 12.5 with 4e-3; 11.0 with 8e-3; 15.5 with
    # 1.6e-2; 7.8 with 8e-3 and stronger augmentation
    changes = {"sched": "onecycle", "batch_size": 16, "lr": 8e-3, "aug": 1.5}
    settings = settings.replace(**{k: v for k, v in changes.items() if k not in typed})
    repeats = max(1, round(VALIDATED * settings.batch_size / images))
    steps = max(1, images * repeats // settings.batch_size)
    return settings.replace(repeats=repeats, epochs=-(-STEPS // steps))


def describe_length(settings: Settings, images: int) -> str:
    "Return the line that says how long a stage of so many training images is."
    steps = images * settings.repeats // settings.batch_size
    passes = f" ({settings.repeats} passes over the images each)" if settings.repeats > 1 else ""
    schedule = "one cycle" if settings.sched == "onecycle" else f"schedule {settings.sched}"
    return f"{images} images: {settings.epochs} epochs of {steps} steps{passes}, {schedule}; -e changes it"


def note_low_lr(learn: "LandmarkLearner", default: float) -> None:
    """Print a note if the learning rate is far below the default and the stage has few steps.

    Measured scores with the published entry's 3e-4 and the default of 2e-3: 7.74 and 3.93 after 670 steps on 2,175
    photographs, 7.78 and 5.23 after 1,780 steps on 19,000 drawn faces. The entry made 98,000 steps; nothing between was
    measured.
    """
    steps = learn.settings.epochs * len(learn.dls.train) // learn.settings.accumulate
    if learn.settings.lr <= LOW * default and steps < FEW_STEPS and not learn.settings.minutes:
        print(
            f"note: {steps} steps are few for -lr {learn.settings.lr:g}: the network may still be far from its best at the "
            f"end; the default is -lr {default:g}",
            flush=True,
        )
