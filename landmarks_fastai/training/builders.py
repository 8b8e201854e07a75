"Make the Learner of a stage: a first stage, a later stage, a resumed one."

import json
from collections.abc import Collection
from pathlib import Path

import numpy as np
from fastai.data.core import DataLoaders

from landmarks_fastai import plots
from landmarks_fastai.data.block import landmark_dataloaders
from landmarks_fastai.data.items import LabelledImages, labelled_images
from landmarks_fastai.data.labels import Sides
from landmarks_fastai.data.split import divided_rows
from landmarks_fastai.errors import UserError
from landmarks_fastai.models.networks import find_arch
from landmarks_fastai.runs.checkpoint import Checkpoint, read_checkpoint
from landmarks_fastai.runs.run import LISTING, Run
from landmarks_fastai.settings import DataFacts, Settings
from landmarks_fastai.training.components import fixed_threads
from landmarks_fastai.training.learner import LandmarkLearner, landmark_learner, load_best
from landmarks_fastai.training.length import choose_length, describe_length
from landmarks_fastai.training.state import State
from landmarks_fastai.utils.distributed import rank0_first, this_process
from landmarks_fastai.utils.files import write_text
from landmarks_fastai.utils.hardware import Machine


def first_stage(
    settings: Settings,
    weights: str,  # imagenet, none, or the path of a file
    machine: Machine,
    run: Run,
    typed: Collection[str] | None = None,  # names of settings that `choose_length` keeps; None: all
) -> LandmarkLearner:
    "A Learner of a first stage on the data of the settings, of a length that follows from the number of images."
    settings = settings.replace(split_seed=settings.seed)
    find_arch(settings.arch)  # an unknown one is refused before all rows are checked
    images = stage_images(settings, run)
    n = len(divided_rows(images, settings)[0])
    if typed is not None and n:
        settings = choose_length(settings, n, typed)
        print(describe_length(settings, n), flush=True)
    dls = rank0_first(lambda: landmark_dataloaders(images, settings, machine=machine))
    report_flip_map(dls, run)
    return rank0_first(lambda: landmark_learner(dls, weights=weights, machine=machine, path=run.out))


def later_stage(checkpoint: Checkpoint, settings: Settings, machine: Machine, run: Run) -> LandmarkLearner:
    "A Learner with the weights of a checkpoint, and the settings of a new stage. Raises `UserError` if they do not fit."
    images = stage_images(settings, run, checkpoint.sides)
    hint = f"; to train a new head on its body: train.py -d … --weights {checkpoint.path}"
    images = images.fitted(checkpoint.facts, checkpoint.path, hint)
    dls = rank0_first(lambda: landmark_dataloaders(images, settings, checkpoint.facts, machine=machine))
    report_flip_map(dls, run, checkpoint.facts)
    learn = landmark_learner(dls, weights=None, machine=machine, path=run.out)
    try:
        checkpoint.tensors(learn.model)  # raises `UserError` for a misfit, which fastai's `load` does not
    except UserError as e:
        if settings.size != checkpoint.settings.size:
            bound = f"{settings.arch} may be bound to the {checkpoint.settings.size} px it was trained at"
            raise UserError(f"--size {settings.size}: {bound} ({e}): run without --size") from None
        raise
    load_best(learn, checkpoint.path)
    return learn


def resumed_stage(state: State, machine: Machine, run: Run) -> LandmarkLearner:
    "A Learner for a stopped stage; `SaveResumeState` restores its weights when the fit begins."
    (epoch, batch), before, now = state.place, state.metadata["processes"], this_process().count
    changed = f"; {now} processes, {before} before: a step sees {now} times -b images" if now != before else ""
    print(f"resuming at epoch {epoch}, batch {batch}{changed}")
    try:
        settings, facts = Settings.from_dict(run.record.settings), DataFacts.from_dict(run.record.facts)
    except UserError as e:
        raise UserError(f"{run.folder / 'run.json'}: {e}; start over with --overwrite") from None
    settings = settings.replace(data=run.record.flags.get("data", settings.data))  # it may have been moved
    sides = read_checkpoint(run.record.checkpoint).sides if run.record.checkpoint else None
    images = stage_images(settings, run, sides, np.array(run.record.left_out, np.int64))
    images = images.fitted(facts, run.name, "; restore it, or start over with --overwrite")
    if images.labels.identity != run.record.labels:
        changed = f"{images.labels.csv} has changed since the run {run.name} was stopped"
        raise UserError(f"{changed}: restore it, or start over with --overwrite")
    dls = rank0_first(lambda: landmark_dataloaders(images, settings, facts, machine=machine))
    learn = landmark_learner(dls, weights=None, machine=machine, path=run.out)
    learn.begin = state.place
    if machine.device == "cpu" and (not (threads := fixed_threads(learn)) or threads != run.record.threads):
        print("note: equal to the last bit only with the same --threads N at the start and now", flush=True)
    return learn


def stage_images(
    settings: Settings,
    run: Run,
    sides: Sides | None = None,  # of the rows of the stage before
    left_out: np.ndarray | None = None,  # rows that a resumed run started without
) -> LabelledImages:
    "The checked images of a stage; those that an earlier stage had keep their side of the split."
    words = {"on_bad": settings.on_bad, "listing": run.folder / LISTING, "left_out": left_out}
    images = rank0_first(lambda: labelled_images(settings.data, **settings.rows, **words))
    images.labels.earlier = sides
    return images


def report_flip_map(dls: DataLoaders, run: Run, before: DataFacts | None = None) -> None:
    "Write mirror.json, and mirror.png if the map is new."
    facts = dls.facts
    if not facts.flip_indices:
        return
    if before is None or not before.flip_indices:
        run.write("mirror.png", lambda path: _draw_flip_map(facts, path))
        print(f"look at the flip map: {run.folder / 'mirror.png'}", flush=True)
    run.write("mirror.json", lambda path: write_text(path, json.dumps(facts.flip_indices)))


def _draw_flip_map(facts: DataFacts, path: Path) -> None:
    plots.plot_flip_map(np.array(facts.shape).reshape(-1, 2), np.array(facts.flip_indices))
    plots.save_figure(path)
