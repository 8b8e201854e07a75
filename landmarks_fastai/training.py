"""A Learner, and one stage of training.

A stage fits, keeps the best epoch by the contest's score on the validation rows, and leaves
NAME_best.pth, NAME_best.json, NAME_history.csv and NAME_results.png in the output folder.
"""

import copy
import os
import shlex
from functools import partial
from pathlib import Path

import torch
from fastai.callback.channelslast import ChannelsLast
from fastai.callback.progress import CSVLogger
from fastai.callback.training import BnFreeze
from fastai.learner import Learner, ValueMetric
from fastai.losses import MSELossFlat
from fastai.optimizer import OptimWrapper
from fastai.torch_core import params, set_seed

from landmarks_fastai import callbacks, drawing
from landmarks_fastai.checkpoint import Checkpoint, Run, read_checkpoint, write_checkpoint
from landmarks_fastai.contest import training_rows
from landmarks_fastai.data import make_dataloaders, mean_shape
from landmarks_fastai.errors import UserError
from landmarks_fastai.metrics import stage_metrics
from landmarks_fastai.models import build_model, input_stats, load_weights, start_at
from landmarks_fastai.settings import OUT, Settings

RESULTS_SHOWN = 6  # faces in NAME_results.png


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
    "The callbacks that change the rate between epochs."
    if settings.sched == "plateau":
        return [callbacks.PlateauLR()]
    return [callbacks.StepLR(settings.step_size, settings.gamma)] if settings.sched == "step" else []


def body_and_head(model) -> list:
    "The splitter: two parameter groups, so that the body can be frozen."
    return [params(model[0]), params(model[1])]


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
        loss_func=MSELossFlat(),
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
    learn.metrics = [*stage_metrics(settings.size), ValueMetric(lambda: learn.opt.hypers[-1]["lr"], "lr")]
    learn.create_opt()  # so that `validate` and `show_results` find a rate before the first fit
    learn.progress_cbs = callbacks.show_progress(learn)
    if settings.freeze:
        learn.freeze()
        learn.add_cb(BnFreeze())  # else the frozen body's running means would go on moving
    return learn


def first_stage(
    settings: Settings,  # n_points, mean and std are taken from the data and the network
    weights: str,  # imagenet, none, or a file
    device: str,
    workers: int | None,
    out,
) -> tuple[Learner, Settings]:
    "A Learner with a fresh head on the data that the settings name, and the settings made whole."
    mean, std = input_stats(settings.arch)
    settings = settings.replace(mean=mean, std=std, split_seed=settings.seed)
    labels, folder = training_rows(settings.data)
    settings = settings.replace(n_points=labels.n_points)
    dls = make_dataloaders(settings, labels, folder, device, workers)
    set_seed(settings.seed, reproducible=True)
    model = build_model(settings.arch, settings.head, settings.n_points, settings.size)
    check_batch(model, settings)
    load_weights(model, settings.arch, weights, settings.size)
    if settings.start == "mean":
        start_at(model, mean_shape(settings, labels, folder))
    return make_learner(settings, dls, model, out), settings


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
    out,
) -> Learner:
    "A Learner that has loaded the best of the stage before."
    labels, folder = training_rows(settings.data)
    if labels.n_points != settings.n_points:
        raise UserError(
            f"{labels.csv} has {labels.n_points} points, {checkpoint.path} was trained on {settings.n_points}"
        )
    dls = make_dataloaders(settings, labels, folder, device, workers)
    set_seed(settings.seed, reproducible=True)
    model = build_model(settings.arch, settings.head, settings.n_points, settings.size)
    check_batch(model, settings)
    checkpoint.tensors(model)  # refuses what does not fit, in one line, before fastai reads the file again
    learn = make_learner(settings, dls, model, out)
    return load_best(learn, checkpoint.path)


def load_best(learn: Learner, path: Path) -> Learner:
    "`learn.load`: fastai adds the .pth itself, and reads tensors only."
    return learn.load(os.path.abspath(path)[: -len(".pth")], with_opt=False)


def score_loaded(learn: Learner, given: Checkpoint) -> tuple[float, float]:
    "Score and NME of what was loaded, on the validation rows as they are now."
    _, score, nme, *_ = learn.validate()
    print(f"loaded: score {score:.6g} on the validation rows; its stage reported {given.score:.6g}", flush=True)
    return score, nme


def fit_stage(
    learn: Learner,
    settings: Settings,
    run: Run,
    given: Checkpoint | None = None,  # the loaded model; None in a first stage
    loaded: tuple[float, float] | None = None,  # its score and NME, as `score_loaded` found them
) -> Checkpoint:
    """Fit, load the best again, draw it.

    The best is that of the stage's epochs and of the given model: a stage never ends with worse than it was given.
    Raises `UserError` where no epoch gave a finite score and nothing was given.
    """
    watch = callbacks.StopOnNaN()
    save = callbacks.SaveBest(run, settings, loaded[0] if loaded else None)
    history = CSVLogger(run.file("history.csv").name)
    cbs = [watch, save, history, *scheduler(settings), *learn.progress_cbs]
    learn.fit(settings.epochs, lr=settings.lr, wd=settings.wd, cbs=cbs)
    where = f"the loss became NaN or infinite in epoch {watch.step[0]}, step {watch.step[1]}" if watch.step else ""
    if not save.saved:
        if given is None:
            raise UserError(f"{where or 'no epoch gave a finite score'}: nothing was saved; try a lower -lr")
        load_best(learn, given.path)
        write_checkpoint(run, learn.model, settings, *loaded, -1)
    if where:
        print(f"warning: {where}; the best before it is kept; try a lower -lr")
    best = read_checkpoint(run.file("best.pth"))
    load_best(learn, best.path)
    learn.show_results(max_n=RESULTS_SHOWN)
    drawing.save_figure(run.file("results.png"))
    return best


def report(run: Run, best: Checkpoint, device: str) -> str:
    "What a stage says last."
    when = f"epoch {best.epoch}" if best.epoch >= 0 else "the loaded model, which no epoch beat"
    out = "" if run.out == Path(OUT) else f" --out {shlex.quote(str(run.out))}"
    gpu = " --gpu" if device == "cuda" else ""
    pm = f"-pm {shlex.quote(run.file('best.pth').name)}{out}{gpu}"
    return (
        f"run {run.name}: score {best.score:.6g}, nme {best.nme:.4g} ({when})\n"
        f"look at {run.file('results.png')}; epochs in {run.file('history.csv')}\n"
        f"next stage:  python finetune.py {pm}\n"
        f"submission:  python predict.py {pm}"
    )
