"One concern of the training loop each, as fastai's callbacks."

import math
import sys
import time
from contextlib import contextmanager
from itertools import chain

import numpy as np
import torch
from fastai.callback.core import Callback, CancelFitException, CancelTrainException
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.progress import CSVLogger, ProgressCallback
from fastai.callback.tracker import ReduceLROnPlateau, TerminateOnNaNCallback, TrackerCallback
from fastai.learner import Recorder, ValueMetric
from fastai.torch_core import set_seed
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from landmarks_fastai.checkpoint import write_checkpoint
from landmarks_fastai.files import whole_file
from landmarks_fastai.metrics import stage_metrics
from landmarks_fastai.mirror import two_looks
from landmarks_fastai.runs import Run
from landmarks_fastai.settings import Settings


class CarryMaps(Callback):
    "Take the images' maps off the batch, so that the loss sees points alone and the metrics find `learn.maps`."

    order = -5  # before CastToTensor and everything that reads yb

    def before_batch(self):
        *points, self.learn.maps = self.yb  # without labels, at prediction, the maps are alone
        self.learn.yb = tuple(points)


class Amp(MixedPrecision):
    """fastai's `MixedPrecision` of the training steps, on a CPU too.

    Validation computes in float32, as `predict.py` does: the scores of the network, of its running average and of the flip
    test compete, and half precision moves a score by 0.2%.
    """

    name = "mixed_precision"  # fastai's own parts look for it by this name

    def __init__(
        self,
        precision: str,  # bf16 or fp16
        device: str,  # cpu or cuda
    ):
        super().__init__(precision)
        self.where, self.dtype = device, {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]

    def before_fit(self):
        if self.where == "cuda":
            super().before_fit()
        else:  # fastai's own asks for CUDA, and warns
            self.learn.scaler, self.scales = torch.amp.GradScaler("cpu", enabled=False), []
            self.autocast = torch.autocast("cpu", self.dtype)

    def before_batch(self):
        if self.training:
            super().before_batch()

    def after_loss(self):
        if self.training:
            super().after_loss()


class Compile(Callback):
    "`torch.compile` the network, in place: names of weights, checkpoints and copies are as without it."

    order = 1  # behind ChannelsLast

    def before_fit(self):
        self.learn.model.compile()


class DrawByStep(Callback):
    """All that is random is a function of (seed, epoch, batch): a run that goes on needs no random states.

    The training loader is told its place; dropout, and whatever else a network draws, is seeded at each step.
    """

    def before_train(self):
        self.dls.train.epoch, self.dls.train.first = self.epoch, self.learn.first_batch

    def before_batch(self):
        if self.training:
            place = np.random.SeedSequence([self.learn.settings.seed, self.epoch, self.iter])
            set_seed(int(place.generate_state(1)[0]))


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
        if self.idx >= len(self.recorder.values[-1]):  # fastai ends the epoch of a `validate` that failed too
            return
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


class History(CSVLogger):
    "fastai's `CSVLogger`, whose file is whole at any moment, and which can go on from the lines of a stopped run."

    def __init__(self, run: Run):
        super().__init__("history.csv")
        self.of_run, self.text = run, ""

    def before_fit(self):
        self.text = ",".join(self.recorder.metric_names) + "\n"
        self.write()
        self.old_logger, self.learn.logger = self.logger, self._write_line

    def write(self):
        with whole_file(self.of_run.file(self.fname)) as f:
            f.write(self.text)

    def _write_line(self, log):
        self.text += ",".join(str(value) for value in log) + "\n"
        self.write()
        self.old_logger(log)

    def after_fit(self):
        self.learn.logger = self.old_logger


class Average(Callback):
    """An exponential average of the weights, and of the norms' running means, taken after every step.

    What counts or indexes is copied: PyTorch's `AveragedModel(use_buffers=True)` averages it too, and truncates. After 40
    steps a position index of swin_t was one off in each of its 12 blocks.

    Its memory grows with the stage, (1 + n) / (10 + n) after n steps, up to `decay`: a stage of fifty steps has a use
    for it too.
    """

    order = 45

    def __init__(self, decay: float):
        self.decay = decay

    def before_fit(self):
        self.twin = AveragedModel(self.model)

    @torch.no_grad()
    def after_step(self):
        n = int(self.twin.n_averaged)  # it lies on the CPU whatever the network's device: nothing waits for a GPU
        floats, others = [], []
        for pair in zip(_tensors(self.network), _tensors(self.model), strict=True):
            (floats if n and pair[0].is_floating_point() else others).append(pair)
        if floats:
            get_ema_multi_avg_fn(min(self.decay, (1 + n) / (10 + n)))(*zip(*floats, strict=True), n)
        if others:
            torch._foreach_copy_(*zip(*others, strict=True))
        self.twin.n_averaged += 1

    @property
    def network(self):
        return self.twin.module


def _tensors(network):
    return chain(network.parameters(), network.buffers())


class Looks(Callback):
    "Score another network, or the Learner's own by two looks, on the validation batches that the Learner goes through."

    order = 46  # before the Recorder reads what was found

    def __init__(
        self,
        name: str,  # of its column
        size: int,  # of the network's input
        network,  # called without arguments: the network to score
        pairs=(),  # of the mirror map, for two looks
    ):
        self.figures, self.network, self.pairs = stage_metrics(size), network, pairs
        self.column = ValueMetric(lambda: self.score, name)

    def before_validate(self):
        for figure in self.figures:
            figure.reset()
        self.network().eval()

    def after_batch(self):
        if not self.training:
            unit = two_looks(self.network(), *self.xb, self.pairs)
            for figure in self.figures:
                figure.add(unit, self.yb[0], self.learn.maps)

    @property
    def score(self):
        return self.figures[0].value

    @property
    def nme(self):
        return self.figures[1].value


class SaveBest(Callback):
    """Write the run's checkpoint when a score is better than the best so far: the network's or its average's.

    fastai's `SaveModelCallback` reads its file back as a pickle; here the stage itself loads the best, tensors only.
    """

    order = 47  # behind the `Looks`, before the Recorder asks for the column

    def __init__(
        self,
        run: Run,
        settings: Settings,
        best: float | None = None,  # score to beat: the loaded model's
        looks: list | None = None,  # `Looks` that compete; none: the Learner's own score does
    ):
        self.save_to, self.settings, self.looks = run, settings, looks or []
        self.best, self.saved = math.inf if best is None else best, False
        self.column = ValueMetric(lambda: self.found[0], "kept")  # the better of the epoch's scores

    def after_validate(self):
        found = [(look.score, look.nme, look.network()) for look in self.looks]
        if not self.settings.tta:
            own = {m.name: m.value for m in self.learn.metrics if m.name in ("score", "nme")}
            found.insert(0, (own["score"], own["nme"], self.model))
        self.found = min(found, key=lambda f: math.inf if math.isnan(f[0]) else f[0])

    def after_epoch(self):
        score, nme, network = self.found
        if score < self.best:
            self.best, self.saved = score, True
            write_checkpoint(self.save_to, network, self.settings, score, nme, self.epoch)


class TimeLimit(Callback):
    """End a fit at a time, what follows it included; a schedule by share of the training follows the clock.

    An epoch is cut short at the limit, and none begins where less than a tenth of one's time is left. `pct_train` is what
    fastai's `ParamScheduler` goes by, so `fit_one_cycle` ends its cycle at the limit.
    """

    order = TrackerCallback.order - 1  # before ParamScheduler, which has the order of the trackers

    def __init__(
        self,
        deadline: float,  # seconds of `time.monotonic`
        after: float = 0.0,  # how long the work behind the fit takes, in validations
        spent: float = 0.0,  # seconds that a run which goes on has trained before
    ):
        self.deadline, self.after, self.spent = deadline, after, spent

    def before_fit(self):
        self.start, self.steps, self.validation, self.cut = time.monotonic(), 0, 0.0, False

    @property
    def left(self) -> float:
        "Seconds left for training. Until a validation was timed, one of its batches counts as a training step."
        step = (time.monotonic() - self.start) / max(1, self.steps)
        validation = 1.1 * self.validation or step * len(self.dls.valid)
        return self.deadline - time.monotonic() - validation * (1 + self.after)

    def before_train(self):
        self.train_start = time.monotonic()

    def before_batch(self):
        if self.training:
            passed = self.spent + time.monotonic() - self.start
            self.learn.pct_train = min(1.0, passed / max(1e-9, passed + max(0.0, self.left)))

    def after_batch(self):
        if self.training:
            self.steps += 1
            if self.left <= 0:
                self.cut = True
                raise CancelTrainException()

    def after_cancel_train(self):
        # else the Recorder leaves this epoch's training loss out, and every later number is under a wrong name
        self.learn.recorder.cancel_train = False

    def before_validate(self):
        self.validation_start = time.monotonic()
        self.trained = self.validation_start - self.train_start

    def after_validate(self):
        self.validation = max(self.validation, time.monotonic() - self.validation_start)

    def after_epoch(self):
        if self.cut or self.left <= 0.1 * self.trained:
            raise CancelFitException()


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

    def before_fit(self):
        super().before_fit()
        if getattr(self, "mbar", False):
            self.mbar.update(0)  # a bar whose first value is another, in a run that goes on, has no start to count from

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


@contextmanager
def no_bars(learn):
    "For a while no bars. fastai's own `no_bar` puts back its plain `ProgressCallback`."
    with learn.removed_cbs([cb for cb in learn.cbs if isinstance(cb, ProgressCallback)]):
        yield learn


def show_progress(learn) -> list:
    "Bars in a terminal, plain lines in a log file; returns the callbacks that `fit` needs for it."
    learn.remove_cbs(ProgressCallback)
    if sys.stdout.isatty():
        learn.add_cb(ProgressTable())
        return []
    learn.logger = plain_line
    return [PlainLines()]
