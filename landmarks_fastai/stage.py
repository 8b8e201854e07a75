"""One stage of training: score what was loaded, fit, keep the best, draw it, say what comes next.

A stage keeps the best epoch by the contest's score on the validation rows, and leaves in the output folder
NAME_best.pth, NAME_best.json, NAME_history.csv, NAME_results.png, NAME_batch.png (what it trained on), and, where the
landmarks have a mirror map, NAME_mirror.json and, of the stage that learned it, NAME_mirror.png.
"""

import shlex
import time
from contextlib import contextmanager

import numpy as np
import torch
from fastai.callback.schedule import SuggestionMethod
from fastai.callback.tracker import EarlyStoppingCallback
from fastai.learner import Learner

from landmarks_fastai import callbacks, drawing
from landmarks_fastai.checkpoint import Checkpoint, read_checkpoint, write_checkpoint
from landmarks_fastai.data import make_dataloaders
from landmarks_fastai.errors import UserError
from landmarks_fastai.keep import Keep
from landmarks_fastai.machine import Machine, batch_that_fits, check_bus_error, check_shared_memory, out_of_memory
from landmarks_fastai.runs import Run
from landmarks_fastai.settings import INPUT, Settings
from landmarks_fastai.state import State, discard_state
from landmarks_fastai.training import load_best, make_learner, rates, scheduler

RESULTS_SHOWN = 6  # faces in NAME_results.png
BATCH_SHOWN = 8  # and in NAME_batch.png
FOREVER = 10_000  # epochs of a stage that ends by the clock
PICTURES = 5  # seconds that the pictures at a stage's end take


def at_input_of(learn: Learner, settings: Settings, before: Checkpoint, machine: Machine) -> Learner:
    "The Learner itself, or, where the checkpoint has another input, one that sees what the checkpoint saw."
    there = settings.replace(**before.settings.of(INPUT))
    if there == settings:
        return learn
    _, labels, folder, _ = learn.dls.train.recipe  # the rows that were found at the start
    dls = make_dataloaders(there, labels, folder, machine)
    return make_learner(there, dls, before.model(), learn.path, machine)


def score_loaded(learn: Learner, given: Checkpoint, settings: Settings, machine: Machine) -> tuple[float, float]:
    "Score and NME of what was loaded, on the validation rows as they are now, as the input that it was trained with."
    own = at_input_of(learn, settings, given, machine)
    score, nme = score_now(own, given.settings.size, settings.pairs if settings.tta else ())
    print(f"loaded: score {score:.6g} on the validation rows; its stage reported {given.score:.6g}", flush=True)
    if own is not learn:
        here, _ = score_now(learn, settings.size, settings.pairs if settings.tta else ())
        was, now = (f"{s.size} px, {s.fit}" for s in (given.settings, settings))
        print(f"that is at {was}; at {now}, it scores {here:.6g}", flush=True)
    return score, nme


def score_now(learn: Learner, size: int, pairs=()) -> tuple[float, float]:
    "Score and NME of the Learner's network on its validation rows, by two looks where there are pairs."
    looks = callbacks.Looks("looks", size, lambda: learn.model, pairs)
    with callbacks.no_bars(learn), within_memory(learn):
        learn.validate(cbs=looks)
    return looks.score, looks.nme


def find_rate(learn: Learner, settings: Settings, run: Run) -> Settings:
    """The settings with the rate that fastai's `lr_find` suggests for the body; printed, and drawn to NAME_lr.png.

    Its `Minimum`: a tenth of the rate at which the loss was lowest. Where a network starts at the mean shape, a hundred
    steps lower the loss by a tenth only, and `Valley`, fastai's default, ends where it is flat: at 0.014 on 2,175 photographs
    at 64 px, where `Minimum` says 0.005 and the best of a sweep is 0.002.
    """
    shares = np.array([1.0, settings.head_rate])
    with callbacks.no_bars(learn), within_memory(learn):
        try:
            found = learn.lr_find(1e-5 * shares, 0.1 * shares, show_plot=False, suggest_funcs=SuggestionMethod.Minimum)
        except IndexError:  # of fewer than 15 steps it has nothing left to look at
            steps = len(learn.recorder.losses)
            raise UserError(
                f"--lr find: the loss grew fourfold within {steps} steps, too few to read a rate from: "
                "try a larger -b, or give a rate"
            ) from None
    rate = float(f"{found.minimum / settings.head_rate:.2g}")
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
    machine: Machine = Machine(),  # noqa: B008
    state: State | None = None,  # of the stopped run that goes on
) -> Checkpoint:
    """Fit, load the best again, draw it. The state of a run that was claimed is kept while it trains.

    The best is that of the stage's epochs and of the given model: a stage never ends with worse than it was given.
    Raises `UserError` where no epoch gave a finite score and nothing was given.
    """
    started = started or time.monotonic()
    if not state:
        learn.dls.train.show_batch(max_n=BATCH_SHOWN)
        drawing.save_figure(run.file("batch.png"))
    own, watch = learn.metrics, callbacks.StopOnNaN()
    looks = extra_looks(learn, settings)
    save = callbacks.SaveBest(run, settings, loaded[0] if loaded else None, looks)
    history = callbacks.History(run.file("history.csv"))
    cbs = [watch, save, history, *scheduler(settings), *learn.progress_cbs]
    if settings.patience:
        learn.metrics = [*learn.metrics, save.column]
        cbs.append(EarlyStoppingCallback("kept", np.less, patience=settings.patience))
    if state and state.place[0] >= settings.epochs and not settings.minutes:  # stopped behind its last epoch
        save.best, save.saved = state.facts["remembered"]["save_best"].values()
    else:
        kept = _kept(learn, settings, run, history, loaded, started, machine, state)
        with within_memory(learn), kept as keep:
            _fit(learn, settings, [*cbs, *keep], started, state)
    learn.remove_cbs([callbacks.Average, callbacks.Looks])
    learn.metrics = own
    where = f"the loss became NaN or infinite in epoch {watch.step[0]}, step {watch.step[1]}" if watch.step else ""
    try_this = "try a lower -lr" + (", or --amp off" if machine.precision != "off" else "")
    if not save.saved:
        if given is None:
            discard_state(run)  # it would come to the same end
            raise UserError(f"{where or 'no epoch gave a finite score'}: nothing was saved; {try_this}")
        kept = settings.replace(**given.settings.of(INPUT))
        write_checkpoint(run, given.model(), kept, *loaded, -1)
    if where:
        print(f"warning: {where}; the best before it is kept; {try_this}")
    best = read_checkpoint(run.file("best.pth"))
    learn = at_input_of(learn, settings, best, machine)
    best.tensors(learn.model)  # refuses, in one line, a file that another put there since
    load_best(learn, best.path)
    learn.show_results(max_n=RESULTS_SHOWN)
    drawing.save_figure(run.file("results.png"))
    if settings.pairs and not settings.tta:
        print(f"with a mirrored second look it scores {score_now(learn, best.settings.size, settings.pairs)[0]:.6g}")
    return best


def extra_looks(learn: Learner, settings: Settings) -> list:
    "What is scored beside the network itself, each with a column of its own: by two looks, and the running average."
    pairs, looks = settings.pairs if settings.tta else (), []
    if settings.tta:
        looks.append(callbacks.Looks("looks", settings.size, lambda: learn.model, pairs))
    if settings.ema:
        average = callbacks.Average(settings.ema)
        learn.add_cb(average)
        looks.append(callbacks.Looks("ema", settings.size, lambda: average.network, pairs))
    learn.add_cbs(looks)
    learn.metrics = [*learn.metrics, *(look.column for look in looks)]
    return looks


@contextmanager
def within_memory(learn: Learner):
    "Where the memory is too small for a batch, say so in one line, with the size that was tried and fits."
    settings, _, _, machine = learn.dls.train.recipe

    def one_step(n):
        learn.model.train()
        learn.opt.zero_grad()
        images = torch.zeros(n, 3, settings.size, settings.size, device=learn.dls.device)
        with machine.autocast():
            pred = learn.model(images.contiguous(memory_format=machine.memory_format))
            loss = learn.loss_func(pred, torch.zeros(n, settings.n_points, 2, device=learn.dls.device))
        loss.backward()
        learn.opt.step()

    check_shared_memory(machine, settings.batch_size * (3 * settings.size**2 + 8 * settings.n_points))
    try:
        yield
    except Exception as e:
        check_bus_error(e)
        if not out_of_memory(e):
            raise
        learn._end_cleanup()
        learn.loss_grad = None
        size, fits = settings.batch_size, batch_that_fits(e, one_step, settings.batch_size)
        way = "no smaller one fits: try a smaller --size or another --arch"
        if fits:
            way = f"-b {fits} fits (tried here); with --accumulate {-(-size * settings.accumulate // fits)} it makes the same steps"
        raise UserError(f"-b {size}: not enough memory for such a batch: {way}") from None


@contextmanager
def _kept(learn, settings, run, history, loaded, started, machine, state):
    "The callbacks that keep the stage's state, for the time of a fit; none for a run that nobody claimed."
    if not run.record:
        yield []
        return
    labels = learn.dls.train.recipe[1]
    facts = {"settings": settings.to_dict(), "loaded": loaded, "labels": labels.identity}
    facts["left_out"] = labels.left_out.tolist()
    keep = Keep(run, facts, history, 60 * machine.save_every, state, time.monotonic() - started)
    with keep.heeding_signals():
        yield [keep]


def _fit(learn, settings, cbs, started, state):
    epochs = settings.epochs
    if settings.minutes:
        second_look = 2.5 if settings.pairs and not settings.tta else 0.0
        deadline = started + 60 * settings.minutes - PICTURES
        clock = callbacks.EndInTime(deadline, second_look, state.facts["seconds"] if state else 0.0)
        cbs, epochs = [*cbs, clock, callbacks.StopInTime(clock)], FOREVER
    if settings.sched == "onecycle":
        learn.fit_one_cycle(epochs, lr_max=rates(settings), wd=settings.wd, cbs=cbs)
    else:
        learn.fit(epochs, lr=rates(settings), wd=settings.wd, cbs=cbs)


def report(run: Run, best: Checkpoint, machine: Machine) -> str:
    "What a stage says last."
    when = f"epoch {best.epoch}" if best.epoch >= 0 else "the loaded model, which no epoch beat"
    gpu = " --gpu" if machine.device == "cuda" else ""
    pm = f"-pm {shlex.quote(run.file('best.pth').name)}{run.out_flag}{gpu}"
    held = " on rows that were trained on" if best.settings.all_rows else ""
    return (
        f"run {run.name}: score {best.score:.6g}, nme {best.nme:.4g}{held} ({when})\n"
        f"look at {run.file('results.png')}; epochs in {run.file('history.csv')}\n"
        f"next stage:  python finetune.py {pm}\n"
        f"submission:  python predict.py {pm}"
    )
