"""A Learner, fresh or from a checkpoint: optimiser, rates, scheduler, mirror map, the network's start."""

import copy
import os
from functools import partial
from pathlib import Path

import numpy as np
import torch
from fastai.callback.channelslast import ChannelsLast
from fastai.callback.training import BnFreeze, GradientAccumulation
from fastai.learner import Learner, ValueMetric
from fastai.optimizer import OptimWrapper
from fastai.torch_core import params, set_seed

from landmarks_fastai import callbacks, drawing
from landmarks_fastai.checkpoint import Checkpoint, checkpoint_metadata
from landmarks_fastai.contest import training_rows
from landmarks_fastai.data import make_dataloaders, mean_shape, some_shapes
from landmarks_fastai.errors import UserError
from landmarks_fastai.keep import StageLearner
from landmarks_fastai.losses import loss_function
from landmarks_fastai.machine import Machine
from landmarks_fastai.metrics import stage_metrics
from landmarks_fastai.mirror import NoMirror, learn_mirror, write_pairs
from landmarks_fastai.models import build_model, input_stats, load_weights, start_at
from landmarks_fastai.runs import Run
from landmarks_fastai.settings import Settings
from landmarks_fastai.state import State


def optimiser(settings: Settings):
    """The `opt_func` of a Learner: PyTorch's own optimiser through fastai's `OptimWrapper`.

    fastai's Adam has no amsgrad, which the seed's has. Through the wrapper every parameter decays, biases and norms
    too (`wd_bn_bias` has no effect there): that is what the seed's PyTorch loop did, and it is kept.
    """
    # fused: a step of resnext50's weights in 20 ms, not 54, on two cores
    kwargs = {"weight_decay": settings.wd, "fused": True}
    return {
        "adamw": partial(OptimWrapper, opt=partial(torch.optim.AdamW, amsgrad=True, **kwargs)),
        "adam": partial(OptimWrapper, opt=partial(torch.optim.Adam, amsgrad=True, **kwargs)),
        "sgd": partial(OptimWrapper, opt=partial(torch.optim.SGD, momentum=0.9, **kwargs)),
    }[settings.opt]


def scheduler(settings: Settings) -> list:
    "The callbacks that change the rate between epochs. `onecycle` changes it at every step: fastai's own does that."
    if settings.sched == "plateau":
        return [callbacks.PlateauLR()]
    return [callbacks.StepLR(settings.step_size, settings.gamma)] if settings.sched == "step" else []


def body_and_head(model) -> list:
    "The splitter: two parameter groups, so that the body can be frozen."
    return [params(model[0]), params(model[1])]


def rates(settings: Settings) -> np.ndarray:
    """The rates of body and head.

    The head's is the smaller one. What enters it is a vector of some thousand features, none of them negative, and
    Adam moves every weight by the rate: all points of a face then jump by the rate times the sum of the features.
    """
    return np.array([settings.lr, settings.lr * settings.head_rate])


def on_machine(machine: Machine) -> list:
    "The callbacks that fit training to the machine."
    cbs = [ChannelsLast()] if machine.channels_last else []
    if machine.precision != "off":
        cbs.append(callbacks.Amp(machine.precision, machine.device))
    return [*cbs, callbacks.Compile()] if machine.compile else cbs


def make_learner(
    settings: Settings,
    dls,  # as `data.make_dataloaders` gives them
    model,  # as `models.build_model` gives it
    out=".",  # folder of the run's files
    machine: Machine = Machine(),  # noqa: B008
) -> Learner:
    "A Learner on the contest's score; `learn.show_results` draws truth beside prediction."
    model.metadata = checkpoint_metadata(settings)  # so that predict.py can use what `learn.save` writes
    learn = StageLearner(
        dls,
        model,
        loss_func=loss_function(settings),
        opt_func=optimiser(settings),
        lr=settings.lr,
        wd=settings.wd,
        wd_bn_bias=True,
        train_bn=False,
        splitter=body_and_head,
        cbs=[callbacks.CarryMaps(), callbacks.DrawByStep(), *on_machine(machine)],
        path=Path(out),
        model_dir=".",
    )
    learn.metrics = [*stage_metrics(settings.size), ValueMetric(lambda: learn.opt.hypers[0]["lr"], "lr")]
    learn.create_opt()  # so that `validate` and `show_results` find a rate before the first fit
    if settings.accumulate > len(dls.train):
        raise UserError(
            f"--accumulate {settings.accumulate}: an epoch has {len(dls.train)} batches, no step would ever be made: lower it"
        )
    learn.progress_cbs = callbacks.show_progress(learn)
    if settings.freeze:
        learn.freeze()
        learn.add_cb(BnFreeze())  # else the frozen body's running means would go on moving
    if settings.accumulate > 1:
        learn.add_cb(GradientAccumulation(settings.accumulate * settings.batch_size))
    return learn


def first_stage(
    settings: Settings,  # n_points, mean, std and pairs are taken from the data and the network
    weights: str,  # imagenet, none, or a file
    machine: Machine,
    run: Run,
) -> tuple[Learner, Settings]:
    "A Learner with a fresh head on the data that the settings name, and the settings made whole."
    mean, std = input_stats(settings.arch)
    settings = settings.replace(mean=mean, std=std, split_seed=settings.seed)
    labels, folder = training_rows(settings.data, settings.on_bad, run.listing)
    settings = with_mirror(settings.replace(n_points=labels.n_points), labels, run)
    dls = make_dataloaders(settings, labels, folder, machine)
    set_seed(settings.seed, reproducible=machine.device == "cpu")
    model = build_model(settings.arch, settings.head, settings.n_points, settings.size, settings.targets)
    check_batch(model, settings)
    load_weights(model, settings.arch, weights, settings.size)
    if settings.start == "mean":
        start_at(model, mean_shape(settings, labels, folder))
    return make_learner(settings, dls, model, run.out, machine), settings


def resumed_stage(state: State, machine: Machine, run: Run) -> tuple[Learner, Settings]:
    "A Learner for a stopped stage, and the settings it had: its weights are put back when its fit begins again."
    settings = run.settings
    # an image that was lost since costs that image, as it would have in the run
    left_out = np.array(state.facts["left_out"], np.int64)
    labels, folder = training_rows(settings.data, listing=run.listing, left_out=left_out)
    if labels.identity != state.facts["labels"]:
        raise UserError(
            f"{labels.csv} has changed since the run {run.name} was stopped: put it back, or start over with --overwrite"
        )
    dls = make_dataloaders(settings, labels, folder, machine)
    set_seed(settings.seed, reproducible=machine.device == "cpu")
    model = build_model(settings.arch, settings.head, settings.n_points, settings.size, settings.targets)
    learn = make_learner(settings, dls, model, run.out, machine)
    learn.begin = state.place
    return learn, settings


def with_mirror(settings: Settings, labels, run: Run) -> Settings:
    "The settings with a mirror map where one is wanted, known or to be learned; it is written and drawn with the run."
    if settings.mirror == "none":
        if settings.tta:
            raise UserError("--tta looks at the mirrored image, --mirror none forbids it: leave one of them away")
        return settings.replace(pairs=())
    if not settings.pairs:
        try:
            found = learn_mirror(some_shapes(settings, labels))
        except NoMirror as e:
            print(f"no mirror map, images are not mirrored: {e}")
            return settings.replace(tta=False)
        drawing.draw_mirror(found.shape, found.pairs)
        drawing.save_figure(run.file("mirror.png"))
        own = int((found.pairs == np.arange(len(found.pairs))).sum())
        print(
            f"mirror map learned: {(len(found.pairs) - own) // 2} pairs, {own} points on the axis, "
            f"{found.miss:.3f} of the radius off; look at {run.folder / 'mirror.png'}"
        )
        settings = settings.replace(pairs=tuple(found.pairs.tolist()))
    write_pairs(run.file("mirror.json"), settings.pairs)
    return settings


def check_batch(model, settings: Settings):
    "Refuse a batch of one image where a norm then has a single value to take its variance of."
    if settings.batch_size > 1:
        return
    twin = copy.deepcopy(model).train()
    try:
        with torch.no_grad():
            twin(torch.zeros(1, 3, settings.size, settings.size))
    except ValueError as e:
        raise UserError(
            f"-b 1: {settings.arch} has norms that need two images at least ({e}): use -b 2 or more"
        ) from None


def later_stage(
    checkpoint: Checkpoint,
    settings: Settings,  # of the new stage
    machine: Machine,
    run: Run,
) -> tuple[Learner, Settings]:
    "A Learner that has loaded the best of the stage before, and the settings made whole."
    labels, folder = training_rows(settings.data, settings.on_bad, run.listing)
    if labels.n_points != settings.n_points:
        raise UserError(
            f"{labels.csv} has {labels.n_points} points, {checkpoint.path} was trained on {settings.n_points}"
        )
    settings = with_mirror(settings, labels, run)
    dls = make_dataloaders(settings, labels, folder, machine)
    set_seed(settings.seed, reproducible=machine.device == "cpu")
    model = build_model(settings.arch, settings.head, settings.n_points, settings.size, settings.targets)
    check_batch(model, settings)
    try:
        checkpoint.tensors(model)  # refuses what does not fit, in one line, before fastai reads the file again
    except UserError as e:
        if settings.size != checkpoint.settings.size:
            was = f"the {checkpoint.settings.size} px it was trained at"
            raise UserError(
                f"--size {settings.size}: {settings.arch} may be bound to {was} ({e}): leave --size away"
            ) from None
        raise
    learn = make_learner(settings, dls, model, run.out, machine)
    return load_best(learn, checkpoint.path), settings


def load_best(learn: Learner, path: Path) -> Learner:
    "`learn.load`: fastai adds the .pth itself, and reads tensors only."
    return learn.load(os.path.abspath(path)[: -len(".pth")], with_opt=False)
