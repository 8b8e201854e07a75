"Ctrl-C and SIGTERM: a step that is under way is done before they are heeded, a second one is heeded at once."

import multiprocessing
import os
import signal
import threading
from contextlib import contextmanager, suppress

# Ctrl-C, a scheduler's or the system's stop, a terminal that was closed
STOPPING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]

UNREAD = 141  # exit code where who reads the output is gone, as of a program that SIGPIPE ends


class Stopped(KeyboardInterrupt):
    "The user, or the machine, stopped the program; the text says what is kept. `code` is the exit code."

    def __init__(self, text: str = "", code: int = 130):
        super().__init__(text)
        self.code = code


class SignalFlag:
    "Which signal came first; None: none did."

    number: int | None = None

    def __call__(self, number, frame):
        if self.number is not None:
            raise Stopped(code=128 + number)
        self.number = number
        # On macOS the signal may have ended the data loader's workers too. torch would then raise in the middle of a step.
        if hasattr(signal, "SIGCHLD"):
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)

    @property
    def code(self) -> int:
        return 128 + self.number


@contextmanager
def signal_flag():
    "For a while, `Asked` takes Ctrl-C and SIGTERM. Only a program's main thread can have that: elsewhere it stays empty."
    flag = SignalFlag()
    if threading.current_thread() is not threading.main_thread():
        yield flag
        return
    handled = [number for number in STOPPING if signal.getsignal(number) != signal.SIG_IGN]  # as `nohup` sets SIGHUP
    old = {number: signal.signal(number, flag) for number in handled}
    try:
        yield flag
    finally:
        for number, handler in old.items():
            with suppress(TypeError):  # None: a handler that was not set from Python
                signal.signal(number, handler)


def exit_on_sigterm():
    "Let SIGTERM end the program as Ctrl-C does, with its own exit code."

    def stop(number, frame):
        raise Stopped(code=128 + number)

    with suppress(ValueError):  # not the main thread
        for number in STOPPING[1:]:
            if signal.getsignal(number) != signal.SIG_IGN:  # as `nohup` sets SIGHUP
                signal.signal(number, stop)


@contextmanager
def signals_blocked():
    """For the start of workers: each inherits the block, so that no signal can end it before it leaves them to its parent.

    What comes meanwhile reaches this process when the block ends.
    """
    if not hasattr(signal, "sigtimedwait"):  # macOS, which cannot tell a signal's sender, and Windows
        yield
        return
    old = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, old)


def leave_signals_to_parent(number: int = 0):
    """In a worker that `signals_blocked` started: Ctrl-C and a scheduler's SIGTERM reach every process of a run.

    A worker that died of one would end the run with an error, where the main process finishes its step and saves. The
    worker ends at once, whatever it is reading, when the main process sends it a signal or is there no more.
    """
    if hasattr(signal, "sigtimedwait"):
        threading.Thread(target=_end_with_parent, daemon=True).start()
    else:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def _end_with_parent():
    parent, sender = multiprocessing.parent_process().pid, None
    while os.getppid() == parent and sender != parent:
        info = signal.sigtimedwait(STOPPING, 1)
        sender = info and info.si_pid
    os._exit(0)
