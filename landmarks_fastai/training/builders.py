"Make the Learner of a stage: a first stage, a later stage, a resumed one."

import numpy as np
from fastai.data.core import DataLoaders

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
from landmarks_fastai.utils.distributed import in_turn, is_first
from landmarks_fastai.utils.hardware import Machine


def first_stage(settings: Settings, weights: str, machine: Machine, run: Run) -> LandmarkLearner:
    "A Learner of a first stage on the data of the settings; `weights` is imagenet, none, or the path of a file."
    settings = settings.replace(split_seed=settings.seed)
    dls = in_turn(lambda: landmark_dataloaders(settings.data, settings, machine=machine, listing=run.listing))
    report_flip_map(dls, run)
    report_alignment(dls)
    return in_turn(lambda: landmark_learner(dls, weights=weights, machine=machine, path=run.out))


def later_stage(checkpoint: Checkpoint, settings: Settings, machine: Machine, run: Run) -> LandmarkLearner:
    "A Learner with the weights of a checkpoint, and the settings of a new stage. Raises `UserError` if they do not fit."
    images = in_turn(lambda: labelled_images(settings.data, on_bad=settings.on_bad, listing=run.listing))
    if (found := images.labels.n_points) != settings.n_points:
        raise UserError(f"{images.labels.csv} has {found} points, {checkpoint.path} was trained on {settings.n_points}")
    dls = in_turn(lambda: landmark_dataloaders(images, settings, machine=machine))
    report_flip_map(dls, run)
    report_alignment(dls)
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
    source, listing = settings.data, run.listing
    dls = in_turn(lambda: landmark_dataloaders(source, settings, machine=machine, listing=listing, left_out=left_out))
    if dls.items.labels.identity != state.metadata["labels"]:
        changed = f"{dls.items.labels.csv} has changed since the run {run.name} was stopped"
        raise UserError(f"{changed}: restore it, or start over with --overwrite")
    learn = landmark_learner(dls, weights=None, machine=machine, path=run.out)
    learn.begin = state.place
    return learn


def report_alignment(dls: DataLoaders) -> None:
    "Print whether there is a second pass over aligned crops, where that was found out from the data."
    if dls.align_gain is None:
        return
    if not dls.align_gain:
        print("most objects are too small, or of no common shape, for aligned crops: no second pass")
        return
    less = f"aligned to their mean shape, the points spread {dls.align_gain:.2g} times less"
    print(f"{less}: a second pass over aligned crops" if dls.settings.align else f"{less}: no second pass")


def report_flip_map(dls: DataLoaders, run: Run) -> None:
    "Print how the flip map was learned; write mirror.json, and mirror.png if the map is new."
    flip_indices, found = dls.settings.flip_indices, dls.flip
    if isinstance(found, NoFlipMap):
        print(f"no flip map, images are not mirrored: {found}")
    if not is_first():
        return
    if isinstance(found, FlipMap):
        plots.plot_flip_map(found.shape, found.flip_indices)
        plots.save_figure(run.file("mirror.png"))
        on_axis = int((found.flip_indices == np.arange(len(found.flip_indices))).sum())
        print(
            f"flip map learned: {(len(found.flip_indices) - on_axis) // 2} pairs, {on_axis} points on the axis, "
            f"{found.miss:.3f} of the radius off; look at {run.folder / 'mirror.png'}"
        )
    if flip_indices:
        write_flip_indices(run.file("mirror.json"), flip_indices)
