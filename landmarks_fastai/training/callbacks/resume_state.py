"Save the state of a stage while it trains, so that it can be stopped and resumed."
# fastai sets attributes when it runs, `learn` among them
# pyright: reportAttributeAccessIssue=false

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from fastai.callback.core import Callback

from landmarks_fastai.errors import UserError
from landmarks_fastai.runs.run import Run
from landmarks_fastai.training.callbacks.progress import History
from landmarks_fastai.training.state import State, capture_state, restore_state, write_state
from landmarks_fastai.utils.distributed import announce, announced, is_first, wait_for
from landmarks_fastai.utils.signals import SignalFlag, Stopped, signal_flag

STATE_SAVED = 20  # seconds that the other processes wait for the first to write; torchrun kills them after 30


class SaveResumeState(Callback):
    """Write the state every few minutes, at the end of each epoch, and when a signal stops the run.

    A step that has begun when the signal arrives is finished first.
    """

    order = 90  # after all callbacks that change what is saved

    def __init__(
        self,
        run: Run,
        history: History,
        every: float = 300.0,  # seconds between two states
        state: State | None = None,  # of the stopped run to resume
        spent: float = 0.0,  # seconds of the time limit that were used before this fit
    ):
        self.save_to, self.history, self.every, self.state, self.spent = run, history, every, state, spent
        self.flag = SignalFlag()

    def before_fit(self):
        self.began = self.written = time.monotonic()
        self.batch, self.at, self.validated = 0, self.learn.begin, -1

    def before_epoch(self):
        if self.state:  # not in `before_fit`, where `History` resets its text
            self.history.text = self.state.metadata["history"]
            self.history.write()

    def before_train(self):
        self.batch = self.learn.first_batch
        if self.state:
            try:
                restore_state(self.learn, self.state)
            except (RuntimeError, KeyError, ValueError, IndexError, AttributeError) as e:
                path = self.save_to.folder / "state.safetensors"
                raise UserError(
                    f"{path} does not fit the run ({type(e).__name__}): start over with --overwrite, and the same flags"
                ) from None
            self.state = None

    def after_batch(self):
        self.batch += self.training
        if not self.training:
            self.stop_validation()
        elif self.flag.agree():
            self.stop()
        elif time.monotonic() - self.written >= self.every:
            self.write(self.epoch, self.batch)

    def after_cancel_train(self):
        self.batch += 1  # `TimeLimit` ends an epoch behind a step, before this callback's `after_batch`

    def after_validate(self):
        self.validated = self.epoch

    def after_epoch(self):
        self.write(self.epoch + 1, 0)
        if self.flag.agree():
            self.stop()

    def after_cancel_fit(self):
        "`TimeLimit` or `--patience` ended the fit behind an epoch; the loss was NaN within one."
        if self.validated == self.epoch:
            self.write(self.epoch + 1, 0, ended=True)

    def write(self, epoch: int, batch: int, ended: bool = False) -> None:
        "Write the state; `ended`: nothing is left to train."
        seconds = self.spent + time.monotonic() - self.began
        now = capture_state(self.learn)
        place = {"epoch": epoch, "batch": batch, "seconds": seconds, "history": self.history.text, "ended": ended}
        write_state(self.save_to, State(now.metadata | place, now.tensors))
        self.written, self.at = time.monotonic(), (epoch, batch)

    def stop_validation(self) -> None:
        "Stop if a signal has arrived. Processes may have different numbers of batches: the first decides, the others follow."
        if is_first():
            stops = self.flag.number is not None or announced("signal")
        else:
            if self.flag.number:
                announce("signal")
            stops = announced("state saved")
        if stops:
            self.stop()

    def stop(self) -> NoReturn:
        "Write the state, unless it is written already, and raise `Stopped`."
        here = (self.epoch, self.batch)
        if self.at not in (here, (self.epoch + 1, 0)):
            self.write(*here)
        if is_first():
            announce("state saved")
        else:
            wait_for("state saved", STATE_SAVED)
        raise Stopped(code=self.flag.code)

    @contextmanager
    def stopping_on_signals(self) -> Iterator[None]:
        "A context in which Ctrl-C and SIGTERM end a fit between two steps."
        with signal_flag() as self.flag:
            try:
                yield
            except RuntimeError as e:
                # macOS: the signal ended a worker too; the last state that was written stays
                if self.flag.number and "DataLoader worker (pid" in str(e):
                    raise Stopped(code=self.flag.code) from None
                raise
            if self.flag.number:
                raise Stopped(code=self.flag.code)
