"""One stage of training: fit, save the best epoch, plot its results, print the next commands.

The best epoch is the one with the best score on the validation rows. The run's folder gets best.pth, history.csv,
report.html, results.png and batch.png (a training batch).
"""

import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from fastai.callback.core import Callback
from fastai.callback.tracker import EarlyStoppingCallback
from fastai.learner import ValueMetric

from landmarks_fastai import plots
from landmarks_fastai.data.align import report_unaligned
from landmarks_fastai.data.items import LabelledImage
from landmarks_fastai.data.split import sides_of
from landmarks_fastai.errors import UserError, one_line
from landmarks_fastai.inference.predictor import Predictor
from landmarks_fastai.inference.report import write_report
from landmarks_fastai.inference.row_errors import RowErrors
from landmarks_fastai.inference.scoring import Scores, plot_rows, score_rows
from landmarks_fastai.inference.torch_network import open_checkpoint
from landmarks_fastai.runs.checkpoint import Checkpoint, read_checkpoint, write_checkpoint
from landmarks_fastai.runs.run import Run, typed_as, versions
from landmarks_fastai.training import callbacks
from landmarks_fastai.training.callbacks.resume_state import SaveResumeState
from landmarks_fastai.training.components import fixed_threads
from landmarks_fastai.training.confidence import REGRESSION, add_confidence, time_needed
from landmarks_fastai.training.learner import LandmarkLearner, load_best
from landmarks_fastai.training.state import State
from landmarks_fastai.utils.distributed import barrier, is_first
from landmarks_fastai.utils.files import reason
from landmarks_fastai.utils.hardware import Machine
from landmarks_fastai.utils.memory import peak_memory, within_memory

RESULTS_SHOWN = (2, 2, 2)  # images in results.png: the worst, around the median, the best
BATCH_SHOWN = 9  # images in batch.png
FOREVER = 10_000  # epochs of a stage with a time limit
UNCERTAIN = 0.1  # standard error of a score, as a share of it, that a note is printed from
PICTURES = 5  # seconds for the plots at the end of a stage


def find_lr(learn: LandmarkLearner, run: Run) -> None:
    """Set the learning rate of the Learner's settings to the one that `lr_find` suggests, print it, and write lr.png.

    Raises `UserError` if the loss diverges within too few steps.
    """
    with callbacks.no_bars(learn), within_memory(learn):
        try:
            suggested = learn.lr_find(show_plot=False)
        except IndexError:  # fastai drops the first 10 and the last 5 steps
            steps = len(learn.recorder.losses)
            raise UserError(
                f"--lr find: the loss grew fourfold within {steps} steps, too few to find a learning rate: "
                "try a larger -b, or give a rate"
            ) from None
    rate = float(f"{suggested.minimum:.2g}")
    if is_first():
        learn.recorder.plot_lr_find(skip_end=0)
        plots.save_figure(run.folder / "lr.png")
    print(f"rate found: {rate:g}; look at {run.folder / 'lr.png'}", flush=True)
    learn.settings = learn.settings.replace(lr=rate)


def note_few_images(scores: Scores) -> None:
    "Print a note if the score of the validation images is uncertain."
    if scores.error > UNCERTAIN * scores.score:
        print(
            f"note: {scores.images} validation images are few: the standard error of the score is {scores.error:.2g}",
            flush=True,
        )


def score_loaded(learn: LandmarkLearner, previous: Checkpoint) -> tuple[float, float]:
    """Print and return score and NME of a loaded checkpoint on the validation rows, with the checkpoint's input.

    If the Learner has another input, the score with that input is printed too.
    """
    scores = score_rows(_predictor(learn, previous, learn.settings.tta), _validation_items(learn))
    reported = "" if previous.score is None else f"; its stage reported {previous.score:.6g}"
    report_unaligned(scores.unaligned, scores.images)
    counted = learn.dls.valid.items.counted
    print(f"loaded: score {scores.score:.6g}{counted} on the validation rows{reported}", flush=True)
    if learn.settings.of("input") != previous.settings.of("input"):
        flip_test = learn.settings.tta and bool(learn.facts.flip_indices)
        new = score_rows(learn.predictor(flip_test=flip_test), _validation_items(learn))
        was, now = (f"{s.size} px, {s.fit}" for s in (previous.settings, learn.settings))
        print(f"that is at {was}; at {now}, it scores {new.score:.6g}", flush=True)
    return scores.score, scores.nme


def _predictor(learn: LandmarkLearner, checkpoint: Checkpoint, flip_test: bool) -> Predictor:
    "A `Predictor` of a checkpoint, in float32 as predict.py has it."
    machine = replace(learn.machine, amp="off", compile=False)
    network = open_checkpoint(checkpoint, machine)
    return Predictor(network, machine=machine, batch_size=learn.settings.batch_size, flip_test=flip_test)


def _validation_items(learn: LandmarkLearner) -> list[LabelledImage]:
    "The validation rows of this process, without those whose image the last epoch could not read."
    return [learn.dls.valid.items[row] for row in learn.dls.valid.seen or learn.dls.valid.get_idxs()]


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
        if run.record:
            _write_record(learn, run, previous_scores)
        if is_first():
            with within_memory(learn):
                learn.dls.train.show_batch(max_n=BATCH_SHOWN, figsize=(12, 12))
            plots.save_figure(run.folder / "batch.png")
    unfinished = settings.replace(confidence=False)  # the spread is fitted to the best epoch at the end
    to_beat = previous_scores[0] if previous_scores else None
    save = callbacks.SaveBest(run, unfinished, to_beat, sides_of(learn.dls.items, settings))
    stop_on_nan, speed = callbacks.StopOnNaN(), callbacks.Speed()
    if state and (state.metadata.get("ended") or (state.place[0] >= settings.epochs and not settings.minutes)):
        save.best, save.saved = state.metadata["remembered"]["save_best"].values()
    else:
        _fit(learn, run, [stop_on_nan, save, speed], started, state)
    _check_saved(learn, run, save, stop_on_nan.step, previous, previous_scores)
    if save.scores:
        note_few_images(save.scores)
    return _report_best(learn, run, started, speed)


def _fit(learn: LandmarkLearner, run: Run, cbs: list[Callback], started: float, state: State | None) -> None:
    "Fit with the callbacks that the settings ask for and these; afterwards the Learner's metrics are as before."
    settings, metrics, history = learn.settings, learn.metrics, callbacks.History(run)
    cbs = [*cbs, history, *callbacks.show_progress(learn)]
    if settings.ema:
        cbs.append(callbacks.Average(settings.ema))
        learn.metrics = [*metrics, ValueMetric(partial(learn.evaluation.first_pass, 1), "ema")]
    if learn.machine.log:
        cbs.append(callbacks.TensorBoard(run, settings))
    if settings.patience:
        cbs.append(EarlyStoppingCallback("score", np.less, patience=settings.patience))
    if settings.minutes:
        cbs.append(_time_limit(learn, started, state))
    epochs = FOREVER if settings.minutes else settings.epochs
    fit = learn.fit_one_cycle if settings.sched == "onecycle" else learn.fit
    try:
        with within_memory(learn), _saving_state(learn, run, history, started, state) as state_cbs:
            fit(epochs, settings.lr, wd=settings.wd, cbs=[*cbs, *state_cbs])
    finally:
        learn.metrics = metrics


def _time_limit(learn: LandmarkLearner, started: float, state: State | None) -> callbacks.TimeLimit:
    settings = learn.settings
    after = 2.5 if learn.facts.flip_indices and not settings.tta else 1.2  # the pass of `_report_best`
    deadline = started + 60 * settings.minutes - PICTURES
    if settings.confidence:
        after, deadline = after + time_needed(learn), deadline - REGRESSION
    return callbacks.TimeLimit(deadline, after, state.metadata["seconds"] if state else 0.0)


def _write_record(learn: LandmarkLearner, run: Run, loaded: tuple[float, float] | None) -> None:
    "Add to run.json what --resume needs."
    images, chosen = learn.dls.items, {"settings": learn.settings.to_dict(), "facts": learn.facts.to_dict()}
    data = {"labels": images.labels.identity, "left_out": images.left_out.tolist(), "threads": fixed_threads(learn)}
    run.write_record(replace(run.record, loaded=loaded, versions=versions(), **chosen, **data))


def _report_best(learn: LandmarkLearner, run: Run, started: float, speed: callbacks.Speed) -> Checkpoint:
    "Load the best, add the confidence, score it with the flip test, write results.png, report.html and the record's results."
    barrier()  # the first process has written the checkpoint
    best = read_checkpoint(run.folder / "best.pth")
    if best.settings.of("input") == learn.settings.of("input"):
        load_best(learn, best.path)
    if learn.settings.confidence:
        if is_first():
            add_confidence(learn, run, best)
        barrier()
        best = read_checkpoint(run.folder / "best.pth")
    flips, valid = bool(best.facts.flip_indices), learn.dls.valid.items
    predictor, errors = _predictor(learn, best, flips), RowErrors(valid, best.facts)
    began = time.monotonic()
    scores = score_rows(predictor, _validation_items(learn), collect=errors.add)
    rates = {"train_images_s": speed.images_s, "predict_images_s": scores.images / max(1e-9, time.monotonic() - began)}
    errors.gather()
    if flips and not best.settings.tta:
        report_unaligned(scores.unaligned, scores.images)
        print(f"with the flip test it scores {scores.score:.6g}{valid.counted}")
    if is_first():
        plot_rows(predictor, [valid[place] for places in errors.chosen(*RESULTS_SHOWN) for place in places])
        plots.save_figure(run.folder / "results.png")
        if learn.machine.log:
            callbacks.add_results(run, best.settings.epochs)
        _write_page(run, best, predictor, errors, scores)
    if run.record:
        results = {"score": best.score, "nme_box_diag": best.nme, "minutes": (time.monotonic() - started) / 60} | rates
        size = {"parameters": sum(p.numel() for p in learn.model.parameters())}
        run.write_record(replace(run.record, results=results | size | {"memory_mb": peak_memory(learn.machine.device)}))
    barrier()  # a process that ends while another is at work aborts in gloo's threads
    return best


def _write_page(run: Run, best: Checkpoint, predictor: Predictor, errors: RowErrors, scores: Scores) -> None:
    "Write report.html; print a warning if that fails: the stage is not lost by it."
    try:
        write_report(run.folder / "report.html", best, predictor, errors, scores)
    except Exception as e:
        print(
            f"warning: {run.folder / 'report.html'} was not written: {one_line(reason(e))}", file=sys.stderr, flush=True
        )


def _check_saved(
    learn: LandmarkLearner,
    run: Run,
    save: callbacks.SaveBest,
    nan_step: tuple[int, int] | None,  # epoch and step of a loss that was NaN or infinite
    previous: Checkpoint | None,
    previous_scores: tuple[float, float] | None,
) -> None:
    "If no epoch was saved, save the loaded model, or raise `UserError`; print a warning if the loss was NaN or infinite."
    where = f"the loss became NaN or infinite in epoch {nan_step[0]}, step {nan_step[1]}" if nan_step else ""
    try_this = "try a lower -lr" + (", or --amp off" if learn.machine.precision != "off" else "")
    if not save.saved:
        if previous is None or previous_scores is None:
            (run.folder / "state.safetensors").unlink(missing_ok=True)  # a resumed run would fail in the same way
            raise UserError(f"{where or 'no epoch gave a finite score'}: nothing was saved; {try_this}")
        loaded = previous.settings.of("input")
        settings = learn.settings.replace(**loaded, align=previous.settings.align, confidence=False)
        model = previous.model()
        model.spread = None
        facts = previous.facts.replace(flip_indices=learn.facts.flip_indices)  # none with --mirror none
        write_checkpoint(run, model, settings, facts, *previous_scores, -1, save.sides)
    if where:
        print(f"warning: {where}; the best before it is kept; {try_this}")


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
    learn.evaluation.between = save_state.stop_validation
    try:
        with save_state.stopping_on_signals():
            yield [save_state]
    finally:
        del learn.evaluation.between


def report(run: Run, best: Checkpoint, machine: Machine, counted: str = "") -> str:
    "Return the last lines that a stage prints: its score, its files, and the commands that can follow."
    when = "the loaded model, which no epoch beat" if best.epoch == -1 else f"epoch {best.epoch}"
    gpu = " --gpu" if machine.device != "cpu" else ""
    pm = f"-pm {shlex.quote(run.name)}{run.out_flag}{gpu}"
    nme = "" if best.nme is None else f", nme_box_diag {best.nme:.4g}"
    held = " on rows that were trained on" if best.settings.all_rows else ""
    test = Path(best.settings.data, "test").is_dir()
    last = "submission:  " if test else "predictions: "
    pictures = "" if test else " PICTURES" + (" --boxes CSV" if best.settings.crop == "box" else "")
    return (
        f"run {run.name}: score {best.score:.6g}{counted}{nme}{held} ({when})\n"
        f"look at {run.folder / 'report.html'} and results.png; epochs in {run.folder / 'history.csv'}\n"
        f"next stage:  {typed_as('finetune.py')} {pm}\n"
        f"{last}{typed_as('predict.py')} {pm}{pictures}"
    )
