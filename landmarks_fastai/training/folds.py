"Small networks for the doctor, each of which has not seen a part of the rows."

from pathlib import Path

import numpy as np

from landmarks_fastai.data.items import LabelledImages
from landmarks_fastai.data.split import group_rows
from landmarks_fastai.runs.checkpoint import Checkpoint
from landmarks_fastai.runs.run import Run
from landmarks_fastai.settings import Settings
from landmarks_fastai.training.builders import first_stage
from landmarks_fastai.training.length import choose_length
from landmarks_fastai.training.stage import fit_stage
from landmarks_fastai.utils.files import write_text
from landmarks_fastai.utils.hardware import Machine

VALIDATIONS = 4  # of a fold: a third of the time would go into those of a first stage


def train_folds(
    images: LabelledImages,
    count: int,
    settings: Settings,
    weights: str,  # as in `first_stage`
    machine: Machine,
    folder: Path,  # of the networks' runs
) -> list[Checkpoint]:
    "Train a network for each fold of the rows on the others; images and groups are not divided. Raises `UserError`."
    names = images.labels.all_names()
    groups = group_rows(images.labels, names, settings)
    groups = np.arange(len(names)) if groups is None else groups
    fold = np.random.default_rng(0).permutation(groups.max() + 1)[groups] % count
    settings = choose_length(settings, len(images) * (count - 1) // count)
    fewer = max(1, settings.epochs // VALIDATIONS)
    settings = settings.replace(repeats=settings.repeats * fewer, epochs=-(-settings.epochs // fewer))
    checkpoints = []
    for k in range(count):
        run = Run(folder, f"fold_{k + 1}")
        run.folder.mkdir(parents=True, exist_ok=True)
        print(f"\nfold {k + 1} of {count}", flush=True)
        held = run.folder / "valid.txt"
        write_text(held, "\n".join(sorted({name for name, n in zip(names, fold, strict=True) if n == k})) + "\n")
        learn = first_stage(settings.replace(valid=str(held), seed=k), weights, machine, run)
        checkpoints.append(fit_stage(learn, run))
    return checkpoints
