"The state of a stage, kept while it trains, so that it can be stopped at any moment and go on."
# fastai sets attributes when it runs, `learn` among them
# pyright: reportAttributeAccessIssue=false

import time
from contextlib import contextmanager

from fastai.callback.core import Callback

from landmarks_fastai.errors import UserError
from landmarks_fastai.runs.run import Run
from landmarks_fastai.training.state import State, capture_state, restore_state, write_state
from landmarks_fastai.utils.signals import SignalFlag, Stopped, signal_flag


class SaveResumeState(Callback):
    """Write the stage's state every few minutes, at each epoch's end and where a signal asks for it.

    At a signal the step under way is done first: what is written is a whole number of steps.
    """

    order = 90  # behind all that changes what is kept

    def __init__(
        self,
        run: Run,
        metadata: dict,  # what the stage adds to the state, once for all
        history,  # the callback whose `text` goes along
        every: float = 300.0,  # seconds from one writing to the next
        state: State | None = None,  # to go on from
        spent: float = 0.0,  # seconds that the stage's clock has run before this fit
    ):
        self.to, self.own, self.history, self.every, self.state = run, metadata, history, every, state
        self.spent, self.flag = spent, SignalFlag()

    def before_fit(self):
        self.began = self.written = time.monotonic()
        self.batch, self.at = 0, self.learn.begin

    def before_epoch(self):
        if self.state:  # behind every `before_fit`
            self.history.text = self.state.metadata["history"]
            self.history.write()

    def before_train(self):
        self.batch = self.learn.first_batch
        if self.state:
            try:
                restore_state(self.learn, self.state)
            except (RuntimeError, KeyError, ValueError, IndexError, AttributeError) as e:
                path = self.to.file("state.safetensors")
                raise UserError(
                    f"{path} does not fit the run ({type(e).__name__}): start over with --overwrite, and the same flags"
                ) from None
            self.state = None

    def after_batch(self):
        self.batch += self.training
        if self.flag.number:
            self.stop()
        elif self.training and time.monotonic() - self.written >= self.every:
            self.write(self.epoch, self.batch)

    def after_epoch(self):
        self.write(self.epoch + 1, 0)
        if self.flag.number:
            self.stop()

    def write(self, epoch: int, batch: int):
        seconds = self.spent + time.monotonic() - self.began
        now = capture_state(self.learn)
        place = {"epoch": epoch, "batch": batch, "seconds": seconds, "history": self.history.text}
        write_state(self.to, State(self.own | now.metadata | place, now.tensors))
        self.written, self.at = time.monotonic(), (epoch, batch)

    def stop(self):
        "Write where the stage is, if it is not written yet, and end the program."
        here = (self.epoch, self.batch)
        if self.at not in (here, (self.epoch + 1, 0)):
            self.write(*here)
        raise Stopped(code=self.flag.code)

    @contextmanager
    def stopping_on_signals(self):
        "For a fit: Ctrl-C and SIGTERM end it between two steps."
        with signal_flag() as self.flag:
            try:
                yield
            except RuntimeError as e:
                # macOS: the signal ended a worker; what was written last stands
                if self.flag.number and "DataLoader worker (pid" in str(e):
                    raise Stopped(code=self.flag.code) from None
                raise
            if self.flag.number:
                raise Stopped(code=self.flag.code)
