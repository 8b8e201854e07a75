"The Learner of a stage: the first, a later one that loads the best of the stage before, one that was stopped."

import numpy as np

from landmarks_fastai import plots
from landmarks_fastai.data.block import landmark_dataloaders
from landmarks_fastai.data.flip import FlipMap, NoFlipMap, write_flip_indices
from landmarks_fastai.data.items import labelled_images
from landmarks_fastai.errors import UserError
from landmarks_fastai.runs.checkpoint import Checkpoint
from landmarks_fastai.runs.run import Run
from landmarks_fastai.settings import Settings
from landmarks_fastai.training.learner import LandmarkLearner, landmark_learner, load_best
from landmarks_fastai.training.state import State
from landmarks_fastai.utils.hardware import Machine


def first_stage(settings: Settings, weights: str, machine: Machine, run: Run) -> LandmarkLearner:
    "A Learner with a fresh head on the data that the settings name; `weights` is imagenet, none, or a file."
    settings = settings.replace(split_seed=settings.seed)
    dls = landmark_dataloaders(settings.data, settings, machine=machine, listing=run.listing)
    report_flip_map(dls, run)
    return landmark_learner(dls, weights=weights, machine=machine, path=run.out)


def later_stage(checkpoint: Checkpoint, settings: Settings, machine: Machine, run: Run) -> LandmarkLearner:
    "A Learner that has loaded the best of the stage before; `settings` are the new stage's."
    images = labelled_images(settings.data, on_bad=settings.on_bad, listing=run.listing)
    if (found := images.labels.n_points) != settings.n_points:
        raise UserError(f"{images.labels.csv} has {found} points, {checkpoint.path} was trained on {settings.n_points}")
    dls = landmark_dataloaders(images, settings, machine=machine)
    report_flip_map(dls, run)
    learn = landmark_learner(dls, weights=None, machine=machine, path=run.out)
    try:
        checkpoint.tensors(learn.model)  # refuses what does not fit, in one line, before fastai reads the file again
    except UserError as e:
        if settings.size != checkpoint.settings.size:
            was = f"the {checkpoint.settings.size} px it was trained at"
            raise UserError(
                f"--size {settings.size}: {settings.arch} may be bound to {was} ({e}): run without --size"
            ) from None
        raise
    load_best(learn, checkpoint.path)
    return learn


def resumed_stage(state: State, machine: Machine, run: Run) -> LandmarkLearner:
    "A Learner for a stopped stage: its weights are put back when its fit begins again."
    settings = run.settings
    dls = landmark_dataloaders(
        settings.data,
        settings,
        machine=machine,
        listing=run.listing,
        left_out=np.array(state.metadata["left_out"], np.int64),
    )
    if dls.items.labels.identity != state.metadata["labels"]:
        raise UserError(
            f"{dls.items.labels.csv} has changed since the run {run.name} was stopped: put it back, or start over with --overwrite"
        )
    learn = landmark_learner(dls, weights=None, machine=machine, path=run.out)
    learn.begin = state.place
    return learn


def report_flip_map(dls, run: Run):
    "Say what was found of a flip map, and write and draw it."
    flip_indices, found = dls.settings.flip_indices, dls.flip
    if isinstance(found, NoFlipMap):
        print(f"no flip map, images are not mirrored: {found}")
    if isinstance(found, FlipMap):
        plots.plot_flip_map(found.shape, found.flip_indices)
        plots.save_figure(run.file("mirror.png"))
        own = int((found.flip_indices == np.arange(len(found.flip_indices))).sum())
        print(
            f"flip map learned: {(len(found.flip_indices) - own) // 2} pairs, {own} points on the axis, "
            f"{found.miss:.3f} of the radius off; look at {run.folder / 'mirror.png'}"
        )
    if flip_indices:
        write_flip_indices(run.file("mirror.json"), flip_indices)
