"""One stage of training: score what was loaded, fit, keep the best, draw it, say what comes next.

A stage keeps the best epoch by the contest's score on the validation rows, and leaves in the run's folder best.pth,
history.csv, results.png, batch.png (what it trained on), and, where the landmarks have a mirror map, mirror.json and,
of the stage that learned it, mirror.png.
"""

import shlex
import time
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch
from fastai.callback.tracker import EarlyStoppingCallback

from landmarks_fastai import plots
from landmarks_fastai.data.block import landmark_dataloaders
from landmarks_fastai.errors import UserError
from landmarks_fastai.runs.checkpoint import Checkpoint, read_checkpoint, write_checkpoint
from landmarks_fastai.runs.run import Run, write_record
from landmarks_fastai.settings import INPUT, Settings
from landmarks_fastai.training import callbacks
from landmarks_fastai.training.callbacks.resume_state import Keep
from landmarks_fastai.training.learner import LandmarkLearner, landmark_learner, load_best
from landmarks_fastai.training.state import State
from landmarks_fastai.utils.hardware import Machine
from landmarks_fastai.utils.memory import batch_that_fits, check_shared_memory, check_worker_died, out_of_memory

RESULTS_SHOWN = 6  # faces in results.png
BATCH_SHOWN = 8  # and in batch.png
FOREVER = 10_000  # epochs of a stage that ends by the clock
LOW, FEW_STEPS = 0.25, 10_000  # of `note_low_rate`
PICTURES = 5  # seconds that the pictures at a stage's end take


def at_input_of(learn: LandmarkLearner, before: Checkpoint) -> LandmarkLearner:
    "The Learner itself, or, where the checkpoint has another input, one that sees what the checkpoint saw."
    there = learn.settings.replace(**before.settings.of(INPUT))
    if there == learn.settings:
        return learn
    dls = landmark_dataloaders(learn.dls.items.all_rows, there, machine=learn.machine)
    other = landmark_learner(dls, weights=None, machine=learn.machine, path=learn.path)
    return load_best(other, before.path)


def score_loaded(learn: LandmarkLearner, given: Checkpoint) -> tuple[float, float]:
    "Score and NME of what was loaded, on the validation rows as they are now, as the input that it was trained with."
    pairs = learn.settings.pairs if learn.settings.tta else ()
    own = at_input_of(learn, given)
    score, nme = score_now(own, pairs)
    reported = "" if given.score is None else f"; its stage reported {given.score:.6g}"
    print(f"loaded: score {score:.6g} on the validation rows{reported}", flush=True)
    if own is not learn:
        here, _ = score_now(learn, pairs)
        was, now = (f"{s.size} px, {s.fit}" for s in (given.settings, learn.settings))
        print(f"that is at {was}; at {now}, it scores {here:.6g}", flush=True)
    return score, nme


def score_now(learn: LandmarkLearner, pairs=()) -> tuple[float, float]:
    "Score and NME of the Learner's network on its validation rows, with the flip test where there are pairs."
    looks = callbacks.Looks("looks", learn.settings.size, lambda: learn.model, pairs)
    with callbacks.no_bars(learn), within_memory(learn):
        learn.validate(cbs=looks)
    return looks.score, looks.nme


def find_rate(learn: LandmarkLearner, run: Run):
    "Set the Learner's rate to the one that `lr_find` suggests; it is printed, and drawn to lr.png."
    with callbacks.no_bars(learn), within_memory(learn):
        try:
            found = learn.lr_find(show_plot=False)
        except IndexError:  # of fewer than 15 steps it has nothing left to look at
            steps = len(learn.recorder.losses)
            raise UserError(
                f"--lr find: the loss grew fourfold within {steps} steps, too few to read a rate from: "
                "try a larger -b, or give a rate"
            ) from None
    rate = float(f"{found.minimum:.2g}")
    plots.draw_rates(np.array(learn.recorder.lrs), np.array(learn.recorder.losses), rate)
    plots.save_figure(run.file("lr.png"))
    print(f"rate found: {rate:g}; look at {run.folder / 'lr.png'}", flush=True)
    learn.settings = learn.settings.replace(lr=rate)


def note_low_rate(learn: LandmarkLearner, default: float):
    """Print a line where the rate is far below the default and the stage has few steps.

    Measured: 670 steps on 2,175 photographs end at 7.74 with the published entry's 3e-4, at 3.93 with the default of 2e-3;
    1,780 steps on 19,000 drawn faces at 7.78 and 5.23. The entry's own 98,000 steps are many; between, nothing was.
    """
    steps = learn.settings.epochs * len(learn.dls.train) // learn.settings.accumulate
    if learn.settings.lr <= LOW * default and steps < FEW_STEPS and not learn.settings.minutes:
        print(
            f"note: {steps} steps are few for -lr {learn.settings.lr:g}: the network may still be far from its best at the "
            f"end; the default is -lr {default:g}",
            flush=True,
        )


def fit_stage(
    learn: LandmarkLearner,
    run: Run,
    given: Checkpoint | None = None,  # the loaded model; None in a first stage
    loaded: tuple[float, float] | None = None,  # its score and NME, as `score_loaded` found them
    started: float | None = None,  # `time.monotonic` when the minutes began to count
    state: State | None = None,  # of the stopped run that goes on
) -> Checkpoint:
    """Fit, load the best again, draw it. The state of a run that was claimed is kept while it trains.

    The best is that of the stage's epochs and of the given model: a stage never ends with worse than it was given.
    Raises `UserError` where no epoch gave a finite score and nothing was given.
    """
    started, settings = started or time.monotonic(), learn.settings
    if not state:
        if run.record:  # what --resume goes on with
            write_record(run, replace(run.record, settings=settings.to_dict()))
        learn.dls.train.show_batch(max_n=BATCH_SHOWN)
        plots.save_figure(run.file("batch.png"))
    own, watch = learn.metrics, callbacks.StopOnNaN()
    bars = callbacks.show_progress(learn)
    looks = extra_looks(learn, settings)
    save = callbacks.SaveBest(run, settings, loaded[0] if loaded else None, looks)
    history = callbacks.History(run)
    cbs = [watch, save, history, *bars]
    if settings.patience:
        learn.metrics = [*learn.metrics, save.column]
        cbs.append(EarlyStoppingCallback("kept", np.less, patience=settings.patience))
    if state and state.place[0] >= settings.epochs and not settings.minutes:  # stopped behind its last epoch
        save.best, save.saved = state.facts["remembered"]["save_best"].values()
    else:
        kept = _kept(learn, run, history, loaded, started, state)
        with within_memory(learn), kept as keep:
            _fit(learn, [*cbs, *keep], started, state)
    learn.remove_cbs([callbacks.Average, callbacks.Looks])
    learn.metrics = own
    _check_saved(learn, run, save.saved, watch.step, given, loaded)
    best = read_checkpoint(run.file("best.pth"))
    learn = at_input_of(learn, best)
    best.tensors(learn.model)  # refuses, in one line, a file that another put there since
    load_best(learn, best.path)
    learn.show_results(max_n=RESULTS_SHOWN)
    plots.save_figure(run.file("results.png"))
    if settings.pairs and not settings.tta:
        print(f"with the flip test it scores {score_now(learn, settings.pairs)[0]:.6g}")
    return best


def _check_saved(learn, run, saved: bool, nan_step, given, loaded):
    "Where no epoch was saved, save the loaded model, or raise `UserError`; warn of a loss that was no number."
    where = f"the loss became NaN or infinite in epoch {nan_step[0]}, step {nan_step[1]}" if nan_step else ""
    try_this = "try a lower -lr" + (", or --amp off" if learn.machine.precision != "off" else "")
    if not saved:
        if given is None:
            run.file("state.safetensors").unlink(missing_ok=True)  # it would come to the same end
            raise UserError(f"{where or 'no epoch gave a finite score'}: nothing was saved; {try_this}")
        write_checkpoint(run, given.model(), learn.settings.replace(**given.settings.of(INPUT)), *loaded, -1)
    if where:
        print(f"warning: {where}; the best before it is kept; {try_this}")


def extra_looks(learn: LandmarkLearner, settings: Settings) -> list:
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
def within_memory(learn: LandmarkLearner):
    "Where the memory is too small for a batch, say so in one line, with the size that was tried and fits."
    settings, machine = learn.settings, learn.machine

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
        check_worker_died(e)
        if not out_of_memory(e):
            raise
        learn.release_batch()
        size, fits = settings.batch_size, batch_that_fits(e, one_step, settings.batch_size)
        way = "no smaller one fits: try a smaller --size or another --arch"
        if fits:
            way = f"-b {fits} fits (tried here); with --accumulate {-(-size * settings.accumulate // fits)} it makes the same steps"
        raise UserError(f"-b {size}: not enough memory for such a batch: {way}") from None


@contextmanager
def _kept(learn, run, history, loaded, started, state):
    "The callbacks that keep the stage's state, for the time of a fit; none for a run that nobody claimed."
    if not run.record:
        yield []
        return
    images = learn.dls.items
    facts = {"loaded": loaded, "labels": images.labels.identity, "left_out": images.left_out.tolist()}
    keep = Keep(run, facts, history, 60 * learn.machine.save_every, state, time.monotonic() - started)
    with keep.heeding_signals():
        yield [keep]


def _fit(learn, cbs, started, state):
    settings, epochs = learn.settings, learn.settings.epochs
    if settings.minutes:
        second_look = 2.5 if settings.pairs and not settings.tta else 0.0
        deadline = started + 60 * settings.minutes - PICTURES
        cbs = [*cbs, callbacks.TimeLimit(deadline, second_look, state.facts["seconds"] if state else 0.0)]
        epochs = FOREVER
    fit = learn.fit_one_cycle if settings.sched == "onecycle" else learn.fit
    fit(epochs, settings.lr, wd=settings.wd, cbs=cbs)


def report(run: Run, best: Checkpoint, machine: Machine) -> str:
    "What a stage says last."
    when = f"epoch {best.epoch}" if best.epoch >= 0 else "the loaded model, which no epoch beat"
    gpu = " --gpu" if machine.device == "cuda" else ""
    pm = f"-pm {shlex.quote(run.name)}{run.out_flag}{gpu}"
    held = " on rows that were trained on" if best.settings.all_rows else ""
    return (
        f"run {run.name}: score {best.score:.6g}, nme {best.nme:.4g}{held} ({when})\n"
        f"look at {run.file('results.png')}; epochs in {run.file('history.csv')}\n"
        f"next stage:  python finetune.py {pm}\n"
        f"submission:  python predict.py {pm}"
    )
