"Bars, lines and history.csv."
# fastai sets attributes when it runs, `learn` among them
# pyright: reportAttributeAccessIssue=false, reportAssignmentType=false

import sys
from contextlib import contextmanager

from fastai.callback.core import Callback
from fastai.callback.progress import CSVLogger, ProgressCallback
from fastai.learner import Recorder

from landmarks_fastai.runs.run import Run
from landmarks_fastai.utils.files import atomic_write


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
        with atomic_write(self.of_run.file("history.csv")) as f:
            f.write(self.text)

    def _write_line(self, log):
        self.text += ",".join(str(value) for value in log) + "\n"
        self.write()
        self.old_logger(log)

    def after_fit(self):
        self.learn.logger = self.old_logger


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
