"Ctrl-C and SIGTERM: the first one lets the current step finish, a second one stops at once."

import math
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from landmarks_fastai.utils.distributed import all_reduce, this_process

# Ctrl-C; the stop of a scheduler or the system; a closed terminal
STOPPING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]

SAME_STOP = 1.0  # seconds in which a second signal is the same stop: a scheduler's and torchrun's, an impatient Ctrl-C

UNREAD = 141  # exit code when the reader of the output is gone, as of a program that SIGPIPE ends


class Stopped(KeyboardInterrupt):
    "The user or the system stopped the program. The text says what is saved; `code` is the exit code."

    def __init__(self, text: str = "", code: int = 130):
        super().__init__(text)
        self.code = code


class SignalFlag:
    "A signal handler that stores the first signal, and raises `Stopped` at the second."

    number: int | None = None  # of the first signal

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.number is not None and not this_process().store:  # Ctrl-C comes from the terminal and from torchrun
            raise Stopped(code=128 + number)
        self.number = number

    def agree(self) -> bool:
        "Return whether any process has a signal; a signal that arrives meanwhile counts the next time."
        agreed = int(all_reduce([self.number or 0], "MAX"))
        self.number = agreed or self.number
        return agreed > 0

    @property
    def code(self) -> int:
        "The exit code after the first signal."
        return 128 + (self.number or signal.SIGTERM)  # if another process got it


class StopOnSignal:
    """A signal handler of a script that raises `Stopped`, and stores the signal.

    Python drops an exception in a destructor or in a callback of a weak reference, and libraries drop it in `except:`: of
    87 Ctrl-C's in the first six seconds of a stage one was lost so. `check` raises it again.
    """

    number: int | None = None
    at = -math.inf  # when the signal arrived, as `time.monotonic`

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.number, before, self.at = number, self.at, time.monotonic()
        if self.at - before > SAME_STOP:
            self.check()

    def check(self) -> None:
        "Raise `Stopped` if a signal has arrived."
        if self.number is not None:
            raise Stopped(code=128 + self.number)

    @contextmanager
    def handling(self) -> Iterator[None]:
        "Handle Ctrl-C and SIGTERM with it for the time of the block; in the main thread only, others cannot."
        self.number, self.at, old_hook = None, -math.inf, sys.unraisablehook

        def print_unless_stopped(dropped: "sys.UnraisableHookArgs") -> None:
            if not isinstance(dropped.exc_value, Stopped):
                old_hook(dropped)

        with _handled_by(self):
            sys.unraisablehook = print_unless_stopped
            try:
                yield
            finally:
                sys.unraisablehook, self.number = old_hook, None


stop_on_signal = StopOnSignal()


@contextmanager
def signal_flag() -> Iterator[SignalFlag]:
    "Handle Ctrl-C and SIGTERM with a `SignalFlag` for the time of the block; in the main thread only, others cannot."
    flag = SignalFlag()
    flag.number = stop_on_signal.number
    with _handled_by(flag):
        try:
            yield flag
        finally:
            if flag.number:
                stop_on_signal.at = time.monotonic()


@contextmanager
def _handled_by(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handled = [number for number in STOPPING if signal.getsignal(number) != signal.SIG_IGN]  # `nohup` ignores SIGHUP
    old = {number: signal.signal(number, handler) for number in handled}
    try:
        yield
    finally:
        for number, before in old.items():
            if signal.getsignal(number) is handler:  # not after `ignore_signals`
                with suppress(TypeError):  # None: a handler that was not set from Python
                    signal.signal(number, before)


def ignore_signals() -> None:
    "Ignore further signals while the program ends."
    if threading.current_thread() is threading.main_thread():
        for number in STOPPING:
            signal.signal(number, signal.SIG_IGN)


@contextmanager
def signals_blocked() -> Iterator[None]:
    "Block signals while workers start and inherit the block; signals that arrive reach this process when the block ends."
    if not hasattr(signal, "sigtimedwait"):  # macOS, which cannot tell the sender of a signal, and Windows
        yield
        return
    old = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, old)


def leave_signals_to_parent() -> None:
    """Make a worker that started in `signals_blocked` ignore signals, except from its parent.

    Ctrl-C and a scheduler's SIGTERM reach all processes of a run. A worker that died of one would end the run with an
    error, while the main process finishes its step and saves. The worker ends at once when its parent signals it or dies.
    """
    if hasattr(signal, "sigtimedwait"):
        signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)  # the worker of a fork server has not inherited it
        threading.Thread(target=_exit_with_parent, daemon=True).start()
    else:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def _exit_with_parent() -> None:
    parent, starter, sender = multiprocessing.parent_process(), os.getppid(), None
    assert parent is not None
    # a forked worker has another parent when its own dies; a fork server stays, and the pipe to its client ends
    while os.getppid() == starter and parent.is_alive() and sender != parent.pid:
        info = signal.sigtimedwait(STOPPING, 1)
        sender = info and info.si_pid
    os._exit(0)
