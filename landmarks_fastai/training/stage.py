"""One stage of training: score what was loaded, fit, keep the best, draw it, say what comes next.

A stage keeps the best epoch by the competition's score on the validation rows, and leaves in the run's folder best.pth,
history.csv, results.png, batch.png (what it trained on), and, where the landmarks have a flip map, mirror.json and,
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
from landmarks_fastai.data.align import report_unaligned
from landmarks_fastai.data.block import landmark_dataloaders
from landmarks_fastai.errors import UserError
from landmarks_fastai.runs.checkpoint import Checkpoint, read_checkpoint, write_checkpoint
from landmarks_fastai.runs.run import Run, write_record
from landmarks_fastai.settings import ALIGN, INPUT, Settings
from landmarks_fastai.training import callbacks
from landmarks_fastai.training.callbacks.resume_state import SaveResumeState
from landmarks_fastai.training.learner import LandmarkLearner, landmark_learner, load_best
from landmarks_fastai.training.state import State
from landmarks_fastai.utils.hardware import Machine
from landmarks_fastai.utils.memory import batch_that_fits, check_shared_memory, check_worker_died, out_of_memory

RESULTS_SHOWN = 6  # faces in results.png
BATCH_SHOWN = 8  # and in batch.png
FOREVER = 10_000  # epochs of a stage that ends by the clock
LOW, FEW_STEPS = 0.25, 10_000  # of `note_low_lr`
PICTURES = 5  # seconds that the pictures at a stage's end take


def with_input_of(learn: LandmarkLearner, before: Checkpoint) -> LandmarkLearner:
    "The Learner itself, or, where the checkpoint has another input, one that sees what the checkpoint saw."
    checkpoint_settings = learn.settings.replace(**before.settings.of(INPUT))
    if checkpoint_settings == learn.settings:
        return learn
    dls = landmark_dataloaders(learn.dls.items.all_rows, checkpoint_settings, machine=learn.machine)
    other = landmark_learner(dls, weights=None, machine=learn.machine, path=learn.path)
    return load_best(other, before.path)


def score_loaded(learn: LandmarkLearner, previous: Checkpoint) -> tuple[float, float]:
    "Score and NME of what was loaded, on the validation rows as they are now, as the input that it was trained with."
    flip_indices = learn.settings.flip_indices if learn.settings.tta else ()
    own = with_input_of(learn, previous)
    score, nme = validation_scores(own, flip_indices, previous.settings)
    reported = "" if previous.score is None else f"; its stage reported {previous.score:.6g}"
    print(f"loaded: score {score:.6g} on the validation rows{reported}", flush=True)
    if own is not learn:
        here, _ = validation_scores(learn, flip_indices, previous.settings)
        was, now = (f"{s.size} px, {s.fit}" for s in (previous.settings, learn.settings))
        print(f"that is at {was}; at {now}, it scores {here:.6g}", flush=True)
    return score, nme


def validation_scores(learn: LandmarkLearner, flip_indices=(), of: Settings | None = None) -> tuple[float, float]:
    """Score and NME of the Learner's network on its validation rows, with the flip test where there are flip indices.

    `of` says whether there is a second pass; None: the Learner's settings do.
    """
    settings = learn.settings.replace(**of.of(ALIGN)) if of else learn.settings
    evaluation = callbacks.EvaluateModel("score", settings, None, flip_indices)
    with callbacks.no_bars(learn), within_memory(learn):
        learn.validate(cbs=evaluation)
        if not evaluation.alignment:
            return evaluation.score, evaluation.nme
        report_unaligned(evaluation.crops.count(None), len(evaluation.crops))
        return evaluation.second_pass(learn)


def find_lr(learn: LandmarkLearner, run: Run):
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
    plots.plot_lr_find(np.array(learn.recorder.lrs), np.array(learn.recorder.losses), rate)
    plots.save_figure(run.file("lr.png"))
    print(f"rate found: {rate:g}; look at {run.folder / 'lr.png'}", flush=True)
    learn.settings = learn.settings.replace(lr=rate)


def note_low_lr(learn: LandmarkLearner, default: float):
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
    previous: Checkpoint | None = None,  # the loaded model; None in a first stage
    previous_scores: tuple[float, float] | None = None,  # its score and NME, as `score_loaded` found them
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
    evaluations = extra_evaluations(learn, settings)
    save = callbacks.SaveBest(run, settings, previous_scores[0] if previous_scores else None, evaluations)
    history = callbacks.History(run)
    cbs = [watch, save, history, *bars]
    if settings.patience or settings.align:
        learn.metrics = [*learn.metrics, save.column]
    if settings.patience:
        cbs.append(EarlyStoppingCallback("best", np.less, patience=settings.patience))
    if state and state.place[0] >= settings.epochs and not settings.minutes:  # stopped behind its last epoch
        save.best, save.saved = state.metadata["remembered"]["save_best"].values()
    else:
        kept = _kept(learn, run, history, previous_scores, started, state)
        with within_memory(learn), kept as keep:
            _fit(learn, [*cbs, *keep], started, state)
    learn.remove_cbs([callbacks.Average, callbacks.EvaluateModel])
    learn.metrics = own
    _check_saved(learn, run, save.saved, watch.step, previous, previous_scores)
    best = read_checkpoint(run.file("best.pth"))
    learn = with_input_of(learn, best)
    best.tensors(learn.model)  # refuses, in one line, a file that another put there since
    load_best(learn, best.path)
    learn.settings = learn.settings.replace(**best.settings.of(ALIGN))
    learn.show_results(max_n=RESULTS_SHOWN)
    plots.save_figure(run.file("results.png"))
    if settings.flip_indices and not settings.tta:
        print(f"with the flip test it scores {validation_scores(learn, settings.flip_indices)[0]:.6g}")
    return best


def _check_saved(learn, run, saved: bool, nan_step, previous, previous_scores):
    "Where no epoch was saved, save the loaded model, or raise `UserError`; warn of a loss that was no number."
    where = f"the loss became NaN or infinite in epoch {nan_step[0]}, step {nan_step[1]}" if nan_step else ""
    try_this = "try a lower -lr" + (", or --amp off" if learn.machine.precision != "off" else "")
    if not saved:
        if previous is None:
            run.file("state.safetensors").unlink(missing_ok=True)  # it would come to the same end
            raise UserError(f"{where or 'no epoch gave a finite score'}: nothing was saved; {try_this}")
        write_checkpoint(
            run, previous.model(), learn.settings.replace(**previous.settings.of(INPUT + ALIGN)), *previous_scores, -1
        )
    if where:
        print(f"warning: {where}; the best before it is kept; {try_this}")


def extra_evaluations(learn: LandmarkLearner, settings: Settings) -> list:
    "What is scored beside the network itself, each with a column of its own: with the flip test, and the running average."
    flip_indices, evaluations = settings.flip_indices if settings.tta else (), []
    if settings.tta:
        evaluations.append(callbacks.EvaluateModel("flip_score", settings, None, flip_indices))
    if settings.ema:
        average = callbacks.Average(settings.ema)
        learn.add_cb(average)
        evaluations.append(callbacks.EvaluateModel("ema", settings, lambda: average.network, flip_indices))
    learn.add_cbs(evaluations)
    learn.metrics = [*learn.metrics, *(evaluation.column for evaluation in evaluations)]
    if settings.align and not settings.tta:  # the Learner's own first pass is the score column already
        evaluations.insert(0, own := callbacks.EvaluateModel("own", settings))
        learn.add_cb(own)
    return evaluations


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
def _kept(learn, run, history, previous_scores, started, state):
    "The callbacks that keep the stage's state, for the time of a fit; none for a run that nobody claimed."
    if not run.record:
        yield []
        return
    images = learn.dls.items
    metadata = {"loaded": previous_scores, "labels": images.labels.identity, "left_out": images.left_out.tolist()}
    keep = SaveResumeState(run, metadata, history, 60 * learn.machine.save_every, state, time.monotonic() - started)
    with keep.stopping_on_signals():
        yield [keep]


def _fit(learn, cbs, started, state):
    settings, epochs = learn.settings, learn.settings.epochs
    if settings.minutes:
        flip_test = 2.5 if settings.flip_indices and not settings.tta else 0.0
        deadline = started + 60 * settings.minutes - PICTURES
        cbs = [*cbs, callbacks.TimeLimit(deadline, flip_test, state.metadata["seconds"] if state else 0.0)]
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
        f"run {run.name}: score {best.score:.6g}, nme_box_diag {best.nme:.4g}{held} ({when})\n"
        f"look at {run.file('results.png')}; epochs in {run.file('history.csv')}\n"
        f"next stage:  python finetune.py {pm}\n"
        f"submission:  python predict.py {pm}"
    )
