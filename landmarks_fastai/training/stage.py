"""One stage of training: fit, save the best epoch, plot its results, print the next commands.

The best epoch is the one with the best score on the validation rows. The run's folder gets best.pth, history.csv,
results.png and batch.png (a training batch).
"""

import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import product

import numpy as np
from fastai.callback.core import Callback
from fastai.callback.tracker import EarlyStoppingCallback

from landmarks_fastai import plots
from landmarks_fastai.errors import UserError
from landmarks_fastai.runs.checkpoint import Checkpoint, read_checkpoint, write_checkpoint
from landmarks_fastai.runs.run import Run, typed_as
from landmarks_fastai.settings import ALIGN, INPUT, Settings
from landmarks_fastai.training import callbacks
from landmarks_fastai.training.callbacks.resume_state import SaveResumeState
from landmarks_fastai.training.confidence import REGRESSION, add_confidence, time_needed
from landmarks_fastai.training.learner import LandmarkLearner, load_best
from landmarks_fastai.training.memory import within_memory
from landmarks_fastai.training.scoring import validation_scores, with_input_of
from landmarks_fastai.training.state import State
from landmarks_fastai.utils.distributed import barrier, is_first
from landmarks_fastai.utils.hardware import Machine

RESULTS_SHOWN = 6  # images in results.png
BATCH_SHOWN = 8  # images in batch.png
FOREVER = 10_000  # epochs of a stage with a time limit
LOW, FEW_STEPS = 0.25, 10_000  # of `note_low_lr`: share of the default learning rate, number of steps
PICTURES = 5  # seconds for the plots at the end of a stage


def find_lr(learn: LandmarkLearner, run: Run) -> None:
    """Set the learning rate to the suggestion of `lr_find`, print it, and write lr.png.

    Raises `UserError` if the loss diverges within too few steps.
    """
    with callbacks.no_bars(learn), within_memory(learn):
        try:
            found = learn.lr_find(show_plot=False)
        except IndexError:  # fastai drops the first 10 and the last 5 steps
            steps = len(learn.recorder.losses)
            raise UserError(
                f"--lr find: the loss grew fourfold within {steps} steps, too few to read a rate from: "
                "try a larger -b, or give a rate"
            ) from None
    rate = float(f"{found.minimum:.2g}")
    if is_first():
        plots.plot_lr_find(np.array(learn.recorder.lrs), np.array(learn.recorder.losses), rate)
        plots.save_figure(run.folder / "lr.png")
    print(f"rate found: {rate:g}; look at {run.folder / 'lr.png'}", flush=True)
    learn.settings = learn.settings.replace(lr=rate)


def note_low_lr(learn: LandmarkLearner, default: float) -> None:
    """Print a note if the learning rate is far below the default and the stage has few steps.

    Measured scores with the published entry's 3e-4 and the default of 2e-3: 7.74 and 3.93 after 670 steps on 2,175
    photographs, 7.78 and 5.23 after 1,780 steps on 19,000 drawn faces. The entry made 98,000 steps; nothing between was
    measured.
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
    previous: Checkpoint | None = None,  # the loaded checkpoint; None in a first stage
    previous_scores: tuple[float, float] | None = None,  # its score and NME, from `score_loaded`
    started: float | None = None,  # `time.monotonic` at the start of the time limit
    state: State | None = None,  # of the stopped run to resume
) -> Checkpoint:
    """Fit, load the best epoch and plot it; returns its checkpoint. A run with a record saves its state while it trains.

    If no epoch is better than the loaded model, that is saved: a stage never ends with a worse model. Raises `UserError`
    if there is none, and no epoch has a finite score.
    """
    started, settings = started or time.monotonic(), learn.settings
    if not state:
        if run.record:  # for --resume
            images = learn.dls.items
            data = {"labels": images.labels.identity, "left_out": images.left_out.tolist()}
            run.write_record(replace(run.record, settings=settings.to_dict(), loaded=previous_scores, **data))
        if is_first():
            learn.dls.train.show_batch(max_n=BATCH_SHOWN)
            plots.save_figure(run.folder / "batch.png")
    metrics, stop_on_nan, history = learn.metrics, callbacks.StopOnNaN(), callbacks.History(run)
    bars = callbacks.show_progress(learn)
    evaluations = add_evaluations(learn, settings)
    unfinished = settings.replace(confidence=False)  # the spread is fitted to the best epoch at the end
    save = callbacks.SaveBest(run, unfinished, previous_scores[0] if previous_scores else None, evaluations)
    cbs = [stop_on_nan, save, history, *bars]
    if settings.patience or settings.align:
        learn.metrics = [*learn.metrics, save.column]
    if settings.patience:
        cbs.append(EarlyStoppingCallback("best", np.less, patience=settings.patience))
    if state and (state.metadata.get("ended") or (state.place[0] >= settings.epochs and not settings.minutes)):
        save.best, save.saved = state.metadata["remembered"]["save_best"].values()
    else:
        saving_state = _saving_state(learn, run, history, started, state)
        with within_memory(learn), saving_state as state_cbs:
            for evaluation, save_state in product(evaluations, state_cbs):
                evaluation.after_crops = save_state.stop_validation
            _fit(learn, [*cbs, *state_cbs], started, state)
    learn.remove_cbs([callbacks.Average, callbacks.EvaluateModel])
    learn.metrics = metrics
    _check_saved(learn, run, save.saved, stop_on_nan.step, previous, previous_scores)
    return _load_and_plot_best(learn, run)


def _load_and_plot_best(learn: LandmarkLearner, run: Run) -> Checkpoint:
    "Load the run's checkpoint, write results.png, print the score with the flip test, and add the confidence."
    barrier()  # the first process has written the checkpoint
    best, flip_indices, tta = read_checkpoint(run.folder / "best.pth"), learn.settings.flip_indices, learn.settings.tta
    learn = with_input_of(learn, best)
    best.tensors(learn.model)  # raises `UserError` if the file was replaced since
    load_best(learn, best.path)
    learn.settings = learn.settings.replace(**best.settings.of(ALIGN))
    if is_first():
        learn.show_results(max_n=RESULTS_SHOWN)
        plots.save_figure(run.folder / "results.png")
    if flip_indices and not tta:
        print(f"with the flip test it scores {validation_scores(learn, flip_indices)[0]:.6g}")
    if learn.settings.confidence:
        if is_first():
            add_confidence(learn, run, best)
        barrier()
        best = read_checkpoint(run.folder / "best.pth")
    return best


def _check_saved(
    learn: LandmarkLearner,
    run: Run,
    saved: bool,  # whether an epoch was saved
    nan_step: tuple[int, int] | None,  # epoch and step of a loss that was NaN or infinite
    previous: Checkpoint | None,
    previous_scores: tuple[float, float] | None,
) -> None:
    "If no epoch was saved, save the loaded model, or raise `UserError`; print a warning if the loss was NaN or infinite."
    where = f"the loss became NaN or infinite in epoch {nan_step[0]}, step {nan_step[1]}" if nan_step else ""
    try_this = "try a lower -lr" + (", or --amp off" if learn.machine.precision != "off" else "")
    if not saved:
        if previous is None or previous_scores is None:
            (run.folder / "state.safetensors").unlink(missing_ok=True)  # a resumed run would fail in the same way
            raise UserError(f"{where or 'no epoch gave a finite score'}: nothing was saved; {try_this}")
        of_input = previous.settings.of((*INPUT, *ALIGN, "points_box"))
        settings = learn.settings.replace(**of_input, confidence=False)
        model = previous.model()
        model.spread = None
        write_checkpoint(run, model, settings, *previous_scores, -1)
    if where:
        print(f"warning: {where}; the best before it is kept; {try_this}")


def add_evaluations(learn: LandmarkLearner, settings: Settings) -> list[callbacks.EvaluateModel]:
    """Add evaluations with the flip test and of the averaged weights, each with a column; returns those of `SaveBest`.

    With `align` they include one of the network itself, whose first pass is the score column already.
    """
    flip_indices = settings.flip_indices if settings.tta else ()
    evaluations: list[callbacks.EvaluateModel] = []
    if settings.tta:
        evaluations.append(callbacks.EvaluateModel("flip_score", settings, None, flip_indices))
    if settings.ema:
        average = callbacks.Average(settings.ema)
        learn.add_cb(average)
        evaluations.append(callbacks.EvaluateModel("ema", settings, lambda: average.network, flip_indices))
    learn.add_cbs(evaluations)
    learn.metrics = [*learn.metrics, *(evaluation.column for evaluation in evaluations)]
    if settings.align and not settings.tta:
        evaluations.insert(0, first_pass := callbacks.EvaluateModel("first_pass", settings))
        learn.add_cb(first_pass)
    return evaluations


@contextmanager
def _saving_state(
    learn: LandmarkLearner,
    run: Run,
    history: callbacks.History,
    started: float,
    state: State | None,
) -> Iterator[list[SaveResumeState]]:
    "A context of a fit, with the callback that saves the stage's state; none if the run has no record."
    if not run.record:
        yield []
        return
    spent = time.monotonic() - started
    save_state = SaveResumeState(run, history, 60 * learn.machine.save_every, state, spent)
    with save_state.stopping_on_signals():
        yield [save_state]


def _fit(learn: LandmarkLearner, cbs: list[Callback], started: float, state: State | None) -> None:
    settings, epochs = learn.settings, learn.settings.epochs
    if settings.minutes:
        after = 2.5 if settings.flip_indices and not settings.tta else 0.0
        deadline = started + 60 * settings.minutes - PICTURES
        if settings.confidence:
            after, deadline = after + time_needed(learn), deadline - REGRESSION
        cbs = [*cbs, callbacks.TimeLimit(deadline, after, state.metadata["seconds"] if state else 0.0)]
        epochs = FOREVER
    fit = learn.fit_one_cycle if settings.sched == "onecycle" else learn.fit
    fit(epochs, settings.lr, wd=settings.wd, cbs=cbs)


def report(run: Run, best: Checkpoint, machine: Machine) -> str:
    "Return the last lines that a stage prints: its score, its files, and the commands that can follow."
    when = "the loaded model, which no epoch beat" if best.epoch == -1 else f"epoch {best.epoch}"
    gpu = " --gpu" if machine.device != "cpu" else ""
    pm = f"-pm {shlex.quote(run.name)}{run.out_flag}{gpu}"
    held = " on rows that were trained on" if best.settings.all_rows else ""
    return (
        f"run {run.name}: score {best.score:.6g}, nme_box_diag {best.nme:.4g}{held} ({when})\n"
        f"look at {run.folder / 'results.png'}; epochs in {run.folder / 'history.csv'}\n"
        f"next stage:  {typed_as('finetune.py')} {pm}\n"
        f"submission:  {typed_as('predict.py')} {pm}"
    )
