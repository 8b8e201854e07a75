"One concern of the training loop each, as fastai's callbacks."

import sys

import numpy as np
from fastai.callback.core import Callback, CancelFitException
from fastai.callback.progress import ProgressCallback
from fastai.callback.tracker import ReduceLROnPlateau, TerminateOnNaNCallback, TrackerCallback
from fastai.learner import Recorder

from landmarks_fastai.checkpoint import Run, write_checkpoint
from landmarks_fastai.settings import Settings


class CarryMaps(Callback):
    "Take the images' maps off the batch, so that the loss sees points alone and the metrics find `learn.maps`."

    order = -5  # before CastToTensor and everything that reads yb

    def before_batch(self):
        if len(self.yb) == 2:
            self.learn.maps, self.learn.yb = self.yb[1], self.yb[:1]


class OrderByEpoch(Callback):
    "Tell the training loader its epoch: the order of the images is a function of (seed, epoch)."

    def before_train(self):
        self.dls.train.epoch = self.epoch


class PlateauLR(ReduceLROnPlateau):
    """fastai's `ReduceLROnPlateau` with the effect of PyTorch's at the seed's `patience=1, factor=0.31622`.

    fastai's divides by `factor`, reduces one bad epoch earlier, takes any decrease for better, and edits
    `opt.hypers`, which an `OptimWrapper` makes anew at every look: there it silently changes nothing.
    """

    def __init__(
        self,
        monitor="score",
        patience=1,  # bad epochs that are let pass
        factor=0.31622,  # that the rate is multiplied with: the seed's, the root of 0.1
        threshold=1e-4,  # an epoch is better when it is below best * (1 - threshold)
        eps=1e-8,  # a smaller change of the rate is not made
    ):
        super().__init__(monitor=monitor, comp=np.less, patience=patience, factor=factor)
        self.threshold, self.eps = threshold, eps

    def after_epoch(self):
        value = self.recorder.values[-1][self.idx]
        if value < self.best * (1 - self.threshold):
            self.best, self.wait = value, 0
            return
        self.wait += 1
        if self.wait > self.patience:
            self.wait = 0
            old = [h["lr"] for h in self.opt.hypers]
            new = [lr * self.factor for lr in old]
            self.opt.set_hyper("lr", [n if o - n > self.eps else o for o, n in zip(old, new, strict=True)])


class StepLR(Callback):
    "Multiply the rate with `gamma` after every `step_size` epochs, as PyTorch's `StepLR`."

    order = TrackerCallback.order + 2

    def __init__(self, step_size: int, gamma: float):
        self.step_size, self.gamma = step_size, gamma

    def after_epoch(self):
        if (self.epoch + 1) % self.step_size == 0:
            self.opt.set_hyper("lr", [h["lr"] * self.gamma for h in self.opt.hypers])


class SaveBest(TrackerCallback):
    """Write the run's checkpoint when the score is better than the best so far.

    fastai's `SaveModelCallback` reads its file back as a pickle; here the stage itself loads the best, tensors only.
    """

    order = TrackerCallback.order + 1

    def __init__(
        self,
        run: Run,
        settings: Settings,
        best: float | None = None,  # score to beat: the loaded model's
    ):
        super().__init__(monitor="score", comp=np.less, reset_on_fit=False)
        self.save_to, self.settings, self.best, self.saved = run, settings, best, False

    def after_epoch(self):
        super().after_epoch()
        if self.new_best:
            self.saved = True
            nme = self.recorder.values[-1][self.idx + 1]
            write_checkpoint(self.save_to, self.model, self.settings, self.best, nme, self.epoch)


class StopOnNaN(TerminateOnNaNCallback):
    "fastai's `TerminateOnNaNCallback`, that remembers the step whose loss was no finite number."

    step = None

    def after_batch(self):
        try:
            super().after_batch()
        except CancelFitException:
            self.step = (self.epoch, self.iter)
            raise


class ProgressTable(ProgressCallback):
    "fastai's bars, with numbers short enough that the table's columns do not touch."

    name = "progress"  # fastai's own parts look for it by this name

    def _write_stats(self, log):
        if getattr(self, "mbar", False):
            self.mbar.write([_cell(v) for v in log], table=True)


class PlainLines(Callback):
    "The names above the lines that `plain_line` prints."

    order = Recorder.order + 1  # which makes the names

    def before_fit(self):
        plain_line(self.recorder.metric_names)


def _cell(value) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def plain_line(values):
    "One line of a log file."
    print("  ".join(f"{_cell(v):>10}" for v in values), flush=True)


def show_progress(learn) -> list:
    "Bars in a terminal, plain lines in a log file; returns the callbacks that `fit` needs for it."
    learn.remove_cbs(ProgressCallback)
    if sys.stdout.isatty():
        learn.add_cb(ProgressTable())
        return []
    learn.logger = plain_line
    return [PlainLines()]
