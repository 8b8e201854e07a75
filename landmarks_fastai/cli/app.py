"Running a script: errors and signals become one line and an exit code."

import errno
import io
import os
import sys
import time
import warnings

from landmarks_fastai.errors import UserError
from landmarks_fastai.utils.files import reason
from landmarks_fastai.utils.signals import UNREAD, exit_on_sigterm

# how the system's loader says that there is no memory for a library
UNMAPPED = ("failed to map segment", "cannot allocate memory", "Cannot allocate memory")
STARTED = time.monotonic()  # --minutes counts the imports too


def started(state) -> float:
    "When the stage's minutes began to count: those that it trained before it was stopped are gone."
    return STARTED - (state.metadata["seconds"] if state else 0.0)


def resume_message(state) -> str:
    epoch, batch = state.place
    return f"resuming at epoch {epoch}, batch {batch}"


def run_main(main):
    "Run a script's main function: a user's mistake becomes one line on stderr and exit code 1, Ctrl-C 130, `| head` 141."
    # What torch and fastai say of their own parts is not for this program's user to act upon.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch")
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    # None where it was closed, as by a daemon; no other file may get its number
    for name in ("stdin", "stdout", "stderr"):
        setattr(sys, name, getattr(sys, name) or open(os.devnull, "r" if name == "stdin" else "w"))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(
            stream, io.TextIOWrapper
        ):  # a Cyrillic name must not stop a run in a terminal of another encoding
            stream.reconfigure(errors="replace")
    exit_on_sigterm()
    try:
        main()
        sys.stdout.flush()
    except UserError as e:
        for line in e.lines:
            print(f"error: {line}", file=sys.stderr)
        sys.exit(1)
    except ModuleNotFoundError as e:
        if (e.name or "landmarks_fastai").startswith("landmarks_fastai"):
            raise
        print(f"error: {e.name} is not installed: pip install 'landmarks-fastai[train]'", file=sys.stderr)
        sys.exit(1)
    except (ImportError, MemoryError) as e:
        if isinstance(e, ImportError) and not any(text in str(e) for text in UNMAPPED):
            raise
        way = "allow the process more (ulimit -v), or take a larger machine"
        print(f"error: not enough memory ({reason(e)}): {way}", file=sys.stderr)
        sys.exit(1)
    except (KeyboardInterrupt, BrokenPipeError) as e:
        _let_go_of_unread()
        if sys.stdout.isatty():
            print()  # below the bar
        text = str(e) if isinstance(e, KeyboardInterrupt) else "its output is read no more"
        print(f"stopped: {text}" if text else "stopped", file=sys.stderr)
        sys.exit(getattr(e, "code", 130 if isinstance(e, KeyboardInterrupt) else UNREAD))
    except OSError as e:
        if e.errno != errno.ENOSPC or e.filename:
            raise
        _let_go_of_unread()
        print(f"error: the output cannot be written ({e.strerror}): make room where it goes", file=sys.stderr)
        sys.exit(1)


def _let_go_of_unread():
    "Python would try again at its end to write what nobody reads."
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
