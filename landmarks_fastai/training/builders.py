"Make the Learner of a stage: a first stage, a later stage, a resumed one."

import numpy as np
from fastai.data.core import DataLoaders

from landmarks_fastai import plots
from landmarks_fastai.data.block import landmark_dataloaders
from landmarks_fastai.data.flip import write_flip_indices
from landmarks_fastai.data.items import labelled_images
from landmarks_fastai.errors import UserError
from landmarks_fastai.runs.checkpoint import Checkpoint
from landmarks_fastai.runs.run import Run
from landmarks_fastai.settings import DataFacts, Settings
from landmarks_fastai.training.learner import LandmarkLearner, landmark_learner, load_best
from landmarks_fastai.training.state import State
from landmarks_fastai.utils.distributed import in_turn, is_first
from landmarks_fastai.utils.hardware import Machine


def first_stage(settings: Settings, weights: str, machine: Machine, run: Run) -> LandmarkLearner:
    "A Learner of a first stage on the data of the settings; `weights` is imagenet, none, or the path of a file."
    settings = settings.replace(split_seed=settings.seed)
    dls = in_turn(lambda: landmark_dataloaders(settings.data, settings, machine=machine, listing=run.listing))
    report_flip_map(dls, run)
    return in_turn(lambda: landmark_learner(dls, weights=weights, machine=machine, path=run.out))


def later_stage(checkpoint: Checkpoint, settings: Settings, machine: Machine, run: Run) -> LandmarkLearner:
    "A Learner with the weights of a checkpoint, and the settings of a new stage. Raises `UserError` if they do not fit."
    images = in_turn(lambda: labelled_images(settings.data, on_bad=settings.on_bad, listing=run.listing))
    if (n_points := images.labels.n_points) != (trained_on := checkpoint.facts.n_points):
        raise UserError(f"{images.labels.csv} has {n_points} points, {checkpoint.path} was trained on {trained_on}")
    dls = in_turn(lambda: landmark_dataloaders(images, settings, checkpoint.facts, machine=machine))
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
    settings, left_out = run.settings, np.array(state.metadata["left_out"], np.int64)
    source, listing, facts = settings.data, run.listing, DataFacts.from_dict(run.record and run.record.facts)
    dls = in_turn(
        lambda: landmark_dataloaders(source, settings, facts, machine=machine, listing=listing, left_out=left_out)
    )
    if dls.items.labels.identity != state.metadata["labels"]:
        changed = f"{dls.items.labels.csv} has changed since the run {run.name} was stopped"
        raise UserError(f"{changed}: restore it, or start over with --overwrite")
    learn = landmark_learner(dls, weights=None, machine=machine, path=run.out)
    learn.begin = state.place
    return learn


def report_flip_map(dls: DataLoaders, run: Run, before: DataFacts | None = None) -> None:
    "Write mirror.json, and mirror.png if the map is new."
    flip_indices = dls.facts.flip_indices
    if not flip_indices or not is_first():
        return
    if before is None or not before.flip_indices:
        plots.plot_flip_map(np.array(dls.facts.shape).reshape(-1, 2), np.array(flip_indices))
        plots.save_figure(run.file("mirror.png"))
        print(f"look at the flip map: {run.folder / 'mirror.png'}", flush=True)
    write_flip_indices(run.file("mirror.json"), flip_indices)
