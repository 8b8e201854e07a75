"""A Learner, and one stage of training.

A stage fits, keeps the best epoch by the contest's score on the validation rows, and leaves in the output folder
NAME_best.pth, NAME_best.json, NAME_history.csv, NAME_results.png, NAME_batch.png (what it trained on), and, where the
landmarks have a mirror map, NAME_mirror.json and, of the stage that learned it, NAME_mirror.png.
"""

import copy
import os
import shlex
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from fastai.callback.channelslast import ChannelsLast
from fastai.callback.progress import CSVLogger
from fastai.callback.schedule import SuggestionMethod
from fastai.callback.tracker import EarlyStoppingCallback
from fastai.callback.training import BnFreeze, GradientAccumulation
from fastai.learner import Learner, ValueMetric
from fastai.optimizer import OptimWrapper
from fastai.torch_core import params, set_seed

from landmarks_fastai import callbacks, drawing
from landmarks_fastai.checkpoint import Checkpoint, Run, read_checkpoint, write_checkpoint
from landmarks_fastai.contest import training_rows
from landmarks_fastai.data import make_dataloaders, mean_shape, some_shapes
from landmarks_fastai.errors import UserError
from landmarks_fastai.losses import loss_function
from landmarks_fastai.metrics import stage_metrics
from landmarks_fastai.mirror import NoMirror, learn_mirror, write_pairs
from landmarks_fastai.models import build_model, input_stats, load_weights, start_at
from landmarks_fastai.settings import OUT, Settings

RESULTS_SHOWN = 6  # faces in NAME_results.png
BATCH_SHOWN = 8  # and in NAME_batch.png
FOREVER = 10_000  # epochs of a stage that ends by the clock
PICTURES = 5  # seconds that the pictures at a stage's end take


def optimiser(settings: Settings):
    """The `opt_func` of a Learner: PyTorch's own optimiser through fastai's `OptimWrapper`.

    fastai's Adam has no amsgrad, which the seed's has. Through the wrapper every parameter decays, biases and norms
    too (`wd_bn_bias` has no effect there): that is what the seed's PyTorch loop did, and it is kept.
    """
    wd = settings.wd
    return {
        "adamw": partial(OptimWrapper, opt=partial(torch.optim.AdamW, amsgrad=True, weight_decay=wd)),
        "adam": partial(OptimWrapper, opt=partial(torch.optim.Adam, amsgrad=True, weight_decay=wd)),
        "sgd": partial(OptimWrapper, opt=partial(torch.optim.SGD, momentum=0.9, weight_decay=wd)),
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


def make_learner(
    settings: Settings,
    dls,  # as `data.make_dataloaders` gives them
    model,  # as `models.build_model` gives it
    out=".",  # folder of the run's files
) -> Learner:
    "A Learner on the contest's score; `learn.show_results` draws truth beside prediction."
    learn = Learner(
        dls,
        model,
        loss_func=loss_function(settings),
        opt_func=optimiser(settings),
        lr=settings.lr,
        wd=settings.wd,
        wd_bn_bias=True,
        train_bn=False,
        splitter=body_and_head,
        cbs=[callbacks.CarryMaps(), callbacks.OrderByEpoch(), ChannelsLast()],
        path=Path(out),
        model_dir=".",
    )
    learn.metrics = [*stage_metrics(settings.size), ValueMetric(lambda: learn.opt.hypers[0]["lr"], "lr")]
    learn.create_opt()  # so that `validate` and `show_results` find a rate before the first fit
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
    device: str,
    workers: int | None,
    run: Run,
) -> tuple[Learner, Settings]:
    "A Learner with a fresh head on the data that the settings name, and the settings made whole."
    mean, std = input_stats(settings.arch)
    settings = settings.replace(mean=mean, std=std, split_seed=settings.seed)
    labels, folder = training_rows(settings.data)
    settings = with_mirror(settings.replace(n_points=labels.n_points), labels, run)
    dls = make_dataloaders(settings, labels, folder, device, workers)
    set_seed(settings.seed, reproducible=True)
    model = build_model(settings.arch, settings.head, settings.n_points, settings.size, settings.targets)
    check_batch(model, settings)
    load_weights(model, settings.arch, weights, settings.size)
    if settings.start == "mean":
        start_at(model, mean_shape(settings, labels, folder))
    return make_learner(settings, dls, model, run.out), settings


def with_mirror(settings: Settings, labels, run: Run) -> Settings:
    "The settings with a mirror map where one is wanted, known or to be learned; it is written and drawn with the run."
    if settings.mirror == "none":
        return settings.replace(pairs=())
    if not settings.pairs:
        try:
            found = learn_mirror(some_shapes(settings, labels))
        except NoMirror as e:
            print(f"no mirror map, images are not mirrored: {e}")
            return settings
        drawing.draw_mirror(found.shape, found.pairs)
        drawing.save_figure(run.file("mirror.png"))
        own = int((found.pairs == np.arange(len(found.pairs))).sum())
        print(
            f"mirror map learned: {(len(found.pairs) - own) // 2} pairs, {own} points on the axis, "
            f"{found.miss:.3f} of the radius off; look at {run.file('mirror.png')}"
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
    device: str,
    workers: int | None,
    run: Run,
) -> tuple[Learner, Settings]:
    "A Learner that has loaded the best of the stage before, and the settings made whole."
    labels, folder = training_rows(settings.data)
    if labels.n_points != settings.n_points:
        raise UserError(
            f"{labels.csv} has {labels.n_points} points, {checkpoint.path} was trained on {settings.n_points}"
        )
    settings = with_mirror(settings, labels, run)
    dls = make_dataloaders(settings, labels, folder, device, workers)
    set_seed(settings.seed, reproducible=True)
    model = build_model(settings.arch, settings.head, settings.n_points, settings.size, settings.targets)
    check_batch(model, settings)
    checkpoint.tensors(model)  # refuses what does not fit, in one line, before fastai reads the file again
    learn = make_learner(settings, dls, model, run.out)
    return load_best(learn, checkpoint.path), settings


def at_input_of(learn: Learner, settings: Settings, before: Checkpoint, workers: int | None) -> Learner:
    "The Learner itself, or, where the checkpoint has another size or fit, one that sees what the checkpoint saw."
    there = settings.replace(size=before.settings.size, fit=before.settings.fit)
    if there == settings:
        return learn
    labels, folder = training_rows(settings.data)
    dls = make_dataloaders(there, labels, folder, learn.dls.device.type, workers)
    return make_learner(there, dls, before.model(), learn.path)


def load_best(learn: Learner, path: Path) -> Learner:
    "`learn.load`: fastai adds the .pth itself, and reads tensors only."
    return learn.load(os.path.abspath(path)[: -len(".pth")], with_opt=False)


def score_loaded(
    learn: Learner, given: Checkpoint, settings: Settings, workers: int | None = None
) -> tuple[float, float]:
    "Score and NME of what was loaded, on the validation rows as they are now, at the size and fit it was trained with."
    own = at_input_of(learn, settings, given, workers)
    score, nme = score_now(own, given.settings.size, settings.pairs if settings.tta else ())
    print(f"loaded: score {score:.6g} on the validation rows; its stage reported {given.score:.6g}", flush=True)
    if own is not learn:
        here, _ = score_now(learn, settings.size, settings.pairs if settings.tta else ())
        was = f"{given.settings.size} px, {given.settings.fit}"
        print(f"that is at {was}; at {settings.size} px, {settings.fit}, it scores {here:.6g}", flush=True)
    return score, nme


def score_now(learn: Learner, size: int, pairs=()) -> tuple[float, float]:
    "Score and NME of the Learner's network on its validation rows, by two looks where there are pairs."
    looks = callbacks.Looks("looks", size, lambda: learn.model, pairs)
    with learn.no_bar(), learn.no_logging():
        learn.validate(cbs=looks)
    return looks.score, looks.nme


def find_rate(learn: Learner, settings: Settings, run: Run) -> Settings:
    "The settings with the rate that fastai's `lr_find` suggests for the body; printed, and drawn to NAME_lr.png."
    shares = np.array([1.0, settings.head_rate])
    with learn.no_bar():
        found = learn.lr_find(1e-6 * shares, 1.0 * shares, show_plot=False, suggest_funcs=SuggestionMethod.Valley)
    rate = float(f"{found.valley / settings.head_rate:.2g}")
    drawing.draw_rates(np.array(learn.recorder.lrs) / settings.head_rate, np.array(learn.recorder.losses), rate)
    drawing.save_figure(run.file("lr.png"))
    print(f"rate found: {rate:g}; look at {run.file('lr.png')}", flush=True)
    return settings.replace(lr=rate)


def fit_stage(
    learn: Learner,
    settings: Settings,
    run: Run,
    given: Checkpoint | None = None,  # the loaded model; None in a first stage
    loaded: tuple[float, float] | None = None,  # its score and NME, as `score_loaded` found them
    started: float | None = None,  # `time.monotonic` when the minutes began to count
    workers: int | None = None,
) -> Checkpoint:
    """Fit, load the best again, draw it.

    The best is that of the stage's epochs and of the given model: a stage never ends with worse than it was given.
    Raises `UserError` where no epoch gave a finite score and nothing was given.
    """
    learn.dls.train.show_batch(max_n=BATCH_SHOWN)
    drawing.save_figure(run.file("batch.png"))
    watch, looks = callbacks.StopOnNaN(), extra_looks(learn, settings)
    save = callbacks.SaveBest(run, settings, loaded[0] if loaded else None, looks)
    cbs = [watch, save, CSVLogger(run.file("history.csv").name), *scheduler(settings), *learn.progress_cbs]
    _fit(learn, settings, cbs, started)
    where = f"the loss became NaN or infinite in epoch {watch.step[0]}, step {watch.step[1]}" if watch.step else ""
    if not save.saved:
        if given is None:
            raise UserError(f"{where or 'no epoch gave a finite score'}: nothing was saved; try a lower -lr")
        kept = settings.replace(size=given.settings.size, fit=given.settings.fit)
        write_checkpoint(run, given.model(), kept, *loaded, -1)
    if where:
        print(f"warning: {where}; the best before it is kept; try a lower -lr")
    best = read_checkpoint(run.file("best.pth"))
    learn = at_input_of(learn, settings, best, workers)
    load_best(learn, best.path)
    learn.show_results(max_n=RESULTS_SHOWN)
    drawing.save_figure(run.file("results.png"))
    if settings.pairs and not settings.tta:
        print(f"with a mirrored second look it scores {score_now(learn, best.settings.size, settings.pairs)[0]:.6g}")
    return best


def extra_looks(learn: Learner, settings: Settings) -> list:
    "What is scored beside the network itself, each with a column of its own: by two looks, and the running average."
    pairs, looks = settings.pairs if settings.tta else (), []
    learn.remove_cbs([callbacks.Average, callbacks.Looks])
    if settings.tta:
        looks.append(callbacks.Looks("looks", settings.size, lambda: learn.model, pairs))
    if settings.ema:
        average = callbacks.Average(settings.ema)
        learn.add_cb(average)
        looks.append(callbacks.Looks("ema", settings.size, lambda: average.network, pairs))
    learn.add_cbs(looks)
    learn.metrics = [m for m in learn.metrics if m.name not in ("looks", "ema")] + [look.column for look in looks]
    return looks


def _fit(learn, settings, cbs, started):
    epochs = settings.epochs
    if settings.patience:
        cbs = [*cbs, EarlyStoppingCallback("score", np.less, patience=settings.patience)]
    if settings.minutes:
        clock = callbacks.EndInTime((started or time.monotonic()) + 60 * settings.minutes - PICTURES)
        cbs, epochs = [*cbs, clock, callbacks.StopInTime(clock)], FOREVER
    if settings.sched == "onecycle":
        learn.fit_one_cycle(epochs, lr_max=rates(settings), wd=settings.wd, cbs=cbs)
    else:
        learn.fit(epochs, lr=rates(settings), wd=settings.wd, cbs=cbs)
    learn.remove_cbs([callbacks.Average, callbacks.Looks])


def report(run: Run, best: Checkpoint, device: str) -> str:
    "What a stage says last."
    when = f"epoch {best.epoch}" if best.epoch >= 0 else "the loaded model, which no epoch beat"
    out = "" if run.out == Path(OUT) else f" --out {shlex.quote(str(run.out))}"
    gpu = " --gpu" if device == "cuda" else ""
    pm = f"-pm {shlex.quote(run.file('best.pth').name)}{out}{gpu}"
    held = " on rows that were trained on" if best.settings.all_rows else ""
    return (
        f"run {run.name}: score {best.score:.6g}, nme {best.nme:.4g}{held} ({when})\n"
        f"look at {run.file('results.png')}; epochs in {run.file('history.csv')}\n"
        f"next stage:  python finetune.py {pm}\n"
        f"submission:  python predict.py {pm}"
    )
