"Atomic writes, and the places of cache files."

import errno
import hashlib
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from landmarks_fastai.errors import UserError

ON_WINDOWS = os.name == "nt"
# disk full, quota used up, file too large, disk read-only, no permission, disk broken, a folder of that name
REFUSALS = {getattr(errno, name, 0) for name in "ENOSPC EDQUOT EFBIG EROFS EACCES EPERM EIO EISDIR".split()}


class NotWritten(UserError, OSError):
    "A file that the system refuses to write: a line for the user, and an `OSError` for code that can try another place."


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield the name of a temporary file beside `path`, which replaces `path` when the block ends without an error.

    Creates the parent folder if needed. The file is synced before it is renamed, and named after the process, so that two
    processes can write one file. Raises `NotWritten` if the system refuses to write it.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    created = False
    try:
        with suppress(OSError):  # if it exists, or cannot be created, `open` in the block finds out
            path.parent.mkdir()
            created = True
        yield temporary
        with open(temporary, "rb+") as f:
            os.fsync(f.fileno())
        rename(temporary, path)
    except OSError as e:
        if e.errno not in REFUSALS and str(e.filename) != str(temporary):
            raise
        raise NotWritten(f"{path} cannot be written ({reason(e)}): make room, or choose another --out") from None
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
            if created:
                path.parent.rmdir()  # fails unless nothing was written into it


@contextmanager
def atomic_write(path: Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Open a file that replaces `path` when the block ends without an error. Raises like `atomic_path`.

    Text is UTF-8. A byte of a file's name that is not UTF-8 is written as `\\udcXX`, as JSON escapes it.
    """
    text: dict[str, Any] = {} if "b" in mode else {"encoding": "utf-8", "newline": "\n", "errors": "backslashreplace"}
    with atomic_path(path) as temporary, open(temporary, mode, **text) as f:
        yield f


def remove_temporary_files(folder: Path) -> None:
    "Remove the files that `atomic_path` has left in a folder and below, of processes of this machine that were killed."
    for path in folder.rglob("*.tmp"):
        if name := re.fullmatch(r".+\.(\d+)\.tmp", path.name):
            with suppress(OSError):  # on Windows: of a running process
                if ON_WINDOWS or not _is_running(int(name[1])):
                    path.unlink()


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # of another user
        pass
    return True


def write_text(path: Path, text: str) -> None:
    "Write a text file with `atomic_write`."
    with atomic_write(path) as f:
        f.write(text)


def rename(temporary: Path, path: Path, tries: int = 20) -> None:
    "Rename a file over `path`, or a folder to a free name; on Windows retry while another program (a virus scanner) holds it."
    for left in reversed(range(tries)):
        try:
            os.replace(temporary, path)
            break
        except PermissionError:
            if not ON_WINDOWS or not left:
                raise
            time.sleep(0.1)
    if hasattr(os, "O_DIRECTORY"):  # the new name must survive a power failure; Windows cannot sync a folder
        with suppress(OSError):  # nor can some network folders
            folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)


def reason(error: BaseException) -> str:
    "Describe an error in one line of at most 200 characters."
    return getattr(error, "strerror", None) or (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def check_folder(folder: Path, hint: str) -> Path:
    "Return a folder. Raises `UserError`, which ends with `hint`, if it does not exist or cannot be read."
    try:
        os.listdir(folder)
        return folder
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{folder}: no such folder; {hint}") from None
    except (OSError, ValueError) as e:
        raise UserError(f"{folder} cannot be read ({reason(e)}); {hint}") from None


def cache_places(path: Path) -> list[Path]:
    "Return the possible cache files of `path`: one beside it; one in the user's cache folder, named by a hash of the path."
    home = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA") or os.path.expanduser("~/.cache")
    name = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:24]
    places = [path.with_name(path.name + ".cache"), Path(home) / "landmarks_fastai" / f"{name}.cache"]
    return places if os.path.isabs(home) else places[:1]  # a user without a home folder, as in many containers


def read_names(flag: str, path: str | Path) -> str:
    "Return the text of a file of file names that a flag names. Raises `UserError` if it cannot be read."
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"{flag} {path} cannot be read ({reason(e)}): a text file of file names expected") from None
