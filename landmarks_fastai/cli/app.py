"Running a script: errors and signals become one line on stderr and an exit code."

import errno
import io
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable
from typing import NoReturn

from landmarks_fastai.errors import UserError
from landmarks_fastai.utils import distributed
from landmarks_fastai.utils.files import reason
from landmarks_fastai.utils.parallel import THREADS
from landmarks_fastai.utils.signals import UNREAD, ignore_signals, stop_on_signal

# in the message of an ImportError: the loader found no memory for a library
NO_MEMORY = ("failed to map segment", "cannot allocate memory", "Cannot allocate memory")
STARTED = time.monotonic()  # of the script: --minutes includes the imports that it makes


def run_main(main: Callable[[], None]) -> None:
    "Run a script's main function, and exit with a code of docs/operating.md if it raises."
    global STARTED
    STARTED = time.monotonic()  # a notebook's `%run` may be the second of its process
    _prepare_process()
    with stop_on_signal.handling():
        _run(main)


def _run(main: Callable[[], None]) -> None:
    try:
        distributed.start()
        main()
        sys.stdout.flush()
    except UserError as e:
        _fail(*e.lines)
    except ModuleNotFoundError as e:
        if (e.name or "landmarks_fastai").startswith("landmarks_fastai"):
            raise
        _fail(f"{e.name} is not installed: pip install -r requirements.txt")
    except (ImportError, MemoryError) as e:
        if isinstance(e, ImportError) and not any(text in str(e) for text in NO_MEMORY):
            raise
        _fail(f"not enough memory ({reason(e)}): allow the process more (ulimit -v), or take a larger machine")
    except (KeyboardInterrupt, BrokenPipeError, RuntimeError) as e:
        text, code = str(e), getattr(e, "code", 130)  # of a `Stopped`
        if isinstance(e, BrokenPipeError):
            text, code = "the program that reads its output has ended", UNREAD
        elif isinstance(e, RuntimeError):
            if not distributed.process_ended(e):
                raise
            text, code = "another process of the run has ended", 1
        ignore_signals()
        _discard_output()
        if sys.stdout.isatty():
            print()  # below the progress bar
        if distributed.prints_line(first_prints=True):
            print(f"stopped: {text}" if text else "stopped", file=sys.stderr, flush=True)
        if any(thread.name.startswith(THREADS) for thread in threading.enumerate()):
            os._exit(code)  # Python's own end would wait for a thread in a read that hangs
        sys.exit(code)
    except OSError as e:
        if e.filename:
            _fail(f"{e.filename} cannot be used ({reason(e)}): check its place, its permissions and the free space")
        if e.errno != errno.ENOSPC:
            raise
        _discard_output()
        _fail(f"the output cannot be written ({e.strerror}): make room where it goes")


def _prepare_process() -> None:
    # IPython's `%run` leaves it out; spawned processes read it
    vars(sys.modules["__main__"]).setdefault("__spec__", None)
    if "ipykernel" not in sys.modules:  # not in the process of a notebook, by `%run`: its figures would disappear
        # scripts only write files; a kernel exports a backend to `!python train.py` that may be absent there
        os.environ["MPLBACKEND"] = "agg"
    # warnings of torch and fastai about their own code are nothing that a user can act on; workers that are not forked, as on
    # Python 3.14, import them again
    os.environ.setdefault("PYTHONWARNINGS", "ignore::FutureWarning,ignore::DeprecationWarning")
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch")
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    for name in ("stdin", "stdout", "stderr"):  # None if closed, as in a daemon; no other file may get its number
        setattr(sys, name, getattr(sys, name) or open(os.devnull, "r" if name == "stdin" else "w"))
    if isinstance(sys.stdin, io.TextIOWrapper):  # a list of names, which need not be UTF-8
        sys.stdin.reconfigure(errors="surrogateescape")
    for stream in (sys.stdout, sys.stderr):
        # a name in Cyrillic must not stop a run in a terminal of another encoding
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    if os.environ.get("RANK", "0") != "0" and "TORCHELASTIC_RUN_ID" in os.environ:
        sys.stdout = open(os.devnull, "w")  # the first process prints for all


def _fail(*lines: str) -> NoReturn:
    if distributed.prints_line():
        for line in lines:
            print(f"error: {line}", file=sys.stderr, flush=True)
    sys.exit(1)


def _discard_output() -> None:
    "Drop output that cannot be written: at its end Python would try again."
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
