"Progress bars, lines of a log, history.csv."
# fastai sets attributes when it runs, `learn` among them
# pyright: reportAttributeAccessIssue=false, reportAssignmentType=false

import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from fastai.callback.core import Callback
from fastai.callback.progress import CSVLogger, ProgressCallback
from fastai.learner import Learner, Recorder

from landmarks_fastai.runs.run import Run
from landmarks_fastai.utils.distributed import this_process
from landmarks_fastai.utils.files import write_text


class History(Callback):
    "As fastai's `CSVLogger`, with a file that is replaced atomically. A resumed run sets `text` to the lines of the stopped run."

    order = CSVLogger.order

    def __init__(self, run: Run):
        self.target, self.text = run, ""

    def before_fit(self):
        self.text = ",".join(self.recorder.metric_names) + "\n"
        self.write()
        self.old_logger, self.learn.logger = self.logger, self._write_line

    def write(self) -> None:
        self.target.write("history.csv", lambda path: write_text(path, self.text))

    def _write_line(self, log):
        self.text += ",".join(str(value) for value in log) + "\n"
        self.write()
        self.old_logger(log)

    def after_fit(self):
        self.learn.logger = self.old_logger


class Speed(Callback):
    "Count the training images of all processes, and the seconds from the reading of their batches to the step."

    images, seconds = 0, 0.0

    def before_train(self):
        self.began = time.monotonic()

    def after_batch(self):
        if self.training:
            self.images += len(self.xb[0]) * this_process().count

    def after_train(self):
        self.seconds += time.monotonic() - self.began

    @property
    def images_s(self) -> float | None:
        "Images a second; None before the first."
        return self.images / self.seconds if self.seconds else None


class ProgressTable(ProgressCallback):
    "fastai's progress bars, with numbers of 6 digits: longer ones fill the columns of the table."

    name = "progress"  # fastai looks it up by this name

    def before_fit(self):
        super().before_fit()
        if getattr(self, "mbar", False):
            self.mbar.update(0)  # the bar of a resumed run starts at another epoch, and needs a first update at 0
            self.learn.logger = self.write_row

    def write_row(self, log: Iterable) -> None:
        self.mbar.write([_cell(v) for v in log], table=True)


class PlainLines(Callback):
    "Print the column names above the lines of `plain_line`."

    order = Recorder.order + 1  # the Recorder makes the names

    def before_fit(self):
        plain_line(self.recorder.metric_names)


def _cell(value) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def plain_line(values: Iterable) -> None:
    "Print one line of a log."
    print("  ".join(f"{_cell(v):>10}" for v in values), flush=True)


@contextmanager
def no_bars(learn: Learner) -> Iterator[Learner]:
    "As fastai's `no_bar`, which would replace `ProgressTable` by fastai's class."
    with learn.removed_cbs([cb for cb in learn.cbs if isinstance(cb, ProgressCallback)]):
        yield learn


def show_progress(learn: Learner) -> list[Callback]:
    "Show bars in a terminal, plain lines elsewhere. Returns callbacks to pass to `fit`."
    learn.remove_cbs(ProgressCallback)
    if sys.stdout.isatty():
        learn.add_cb(ProgressTable())
        return []
    learn.logger = plain_line
    return [PlainLines()]
