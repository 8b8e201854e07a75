"Learning rate schedules, the time limit, and a stop at NaN."
# fastai sets attributes when it runs, `learn` among them
# pyright: reportAttributeAccessIssue=false

import time

from fastai.callback.core import Callback, CancelFitException, CancelTrainException
from fastai.callback.tracker import TerminateOnNaNCallback, TrackerCallback
from torch.optim.lr_scheduler import ReduceLROnPlateau

from landmarks_fastai.utils.distributed import broadcast


class PlateauLR(Callback):
    """PyTorch's `ReduceLROnPlateau` on the score of `Evaluation`, with the published entry's `patience=1, factor=0.31622`.

    fastai's divides by `factor`, reduces one epoch earlier, has a threshold of 0, and edits `opt.hypers`, which are a copy in
    an `OptimWrapper`: there it changes nothing.
    """

    order = TrackerCallback.order
    plateau: ReduceLROnPlateau | None = None
    _stateattrs = ("plateau",)  # fastai's: not pickled by `export`; it holds the optimiser, three quarters of the file

    def __init__(self, patience: int = 1, factor: float = 0.31622):
        self.patience, self.factor = patience, factor

    def before_fit(self):
        self.run = not hasattr(self.learn, "lr_finder") and not hasattr(
            self.learn, "gather_preds"
        )  # as fastai's trackers
        if self.run and self.opt:  # an exported Learner has none
            self.plateau = ReduceLROnPlateau(self.opt.opt, factor=self.factor, patience=self.patience)

    def after_epoch(self):
        if self.plateau and (scores := self.learn.evaluation.scores):
            self.plateau.step(scores.score)


class StepLR(Callback):
    "Multiply the rate by `gamma` after every `step_size` epochs, as PyTorch's `StepLR`."

    order = TrackerCallback.order + 2

    def __init__(self, step_size: int, gamma: float):
        self.step_size, self.gamma = step_size, gamma

    def after_epoch(self):
        if (self.epoch + 1) % self.step_size == 0:
            self.opt.set_hyper("lr", [h["lr"] * self.gamma for h in self.opt.hypers])


class TimeLimit(Callback):
    """End a fit at a deadline, with time left for what follows it.

    An epoch is cut short at the deadline, and none begins if less than a tenth of its time is left. `pct_train` follows
    the clock, so that `fit_one_cycle` ends its cycle at the deadline. Of several processes the first one's clock counts.
    """

    order = TrackerCallback.order - 1  # before ParamScheduler, which has the order of the trackers

    def __init__(
        self,
        deadline: float,  # seconds of `time.monotonic`
        after: float = 0.0,  # time of the work after the fit, as a multiple of a validation
        spent: float = 0.0,  # seconds that a resumed run has trained before
    ):
        self.deadline, self.after, self.spent = deadline, after, spent

    def before_fit(self):
        self.start, self.steps, self.validation, self.cut = time.monotonic(), 0, 0.0, False

    @property
    def left(self) -> float:
        "Seconds left for training. Before the first validation, its batches are taken to be as slow as training steps."
        step = (time.monotonic() - self.start) / max(1, self.steps)
        validation = 1.1 * self.validation or step * len(self.dls.valid)
        return self.deadline - time.monotonic() - validation * (1 + self.after)

    def before_train(self):
        self.train_start = time.monotonic()

    def before_batch(self):
        if self.training:
            passed = self.spent + time.monotonic() - self.start
            self.learn.pct_train = broadcast(min(1.0, passed / max(1e-9, passed + max(0.0, self.left))))

    def after_batch(self):
        if self.training:
            self.steps += 1
            if broadcast(self.left <= 0):
                self.cut = True
                raise CancelTrainException()

    def after_cancel_train(self):
        # or the Recorder leaves out this epoch's training loss, and all later values are in the wrong columns
        self.learn.recorder.cancel_train = False

    def before_validate(self):
        self.validation_start = time.monotonic()
        self.trained = self.validation_start - self.train_start

    def after_validate(self):
        self.validation = max(self.validation, time.monotonic() - self.validation_start)

    def after_epoch(self):
        if broadcast(self.cut or self.left <= 0.1 * self.trained):
            raise CancelFitException()


class StopOnNaN(TerminateOnNaNCallback):
    "fastai's `TerminateOnNaNCallback`, in training only; `step` is the (epoch, step) whose loss was not finite."

    step: tuple[int, int] | None = None

    def after_batch(self):
        if not self.training:
            return
        try:
            super().after_batch()
        except CancelFitException:
            self.step = (self.epoch, self.iter)
            raise
