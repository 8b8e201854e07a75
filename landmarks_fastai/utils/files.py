"Files that are whole or not there, and a lock that one process holds."

import errno
import hashlib
import os
import time
from contextlib import contextmanager, suppress
from pathlib import Path

from landmarks_fastai.errors import UserError

ON_WINDOWS = os.name == "nt"
# the disk is full, the quota is used up, the file too large, the disk read-only, closed or broken, a folder is there
REFUSALS = {
    getattr(errno, name)
    for name in ("ENOSPC", "EDQUOT", "EFBIG", "EROFS", "EACCES", "EPERM", "EIO", "EISDIR")
    if hasattr(errno, name)
}


class NotWritten(UserError, OSError):
    "A file that the system refuses to take: a line for the user, and an `OSError` for whoever has another place for it."


@contextmanager
def atomic_path(path: Path):
    """The name of a temporary sibling of `path`: what the block writes there takes its name when the block ends well.

    The folder that `path` is in is made where it is absent.

    Synced before it is renamed; named after the process, so that two that write one file at once do not mix.
    Raises `NotWritten`, which is a `UserError`, where there is no room.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    made = False
    try:
        with suppress(OSError):  # what is wrong with it, or that it is there, `open` finds out in the block
            path.parent.mkdir()
            made = True
        yield temporary
        with open(temporary, "rb+") as f:
            os.fsync(f.fileno())
        rename(temporary, path)
    except OSError as e:
        if e.errno not in REFUSALS and str(e.filename) != str(temporary):
            raise
        raise NotWritten(
            f"{path} cannot be written ({reason(e)}): make room, or choose another place with --out"
        ) from None
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
            if made:
                path.parent.rmdir()  # where nothing was written into it


@contextmanager
def atomic_write(path: Path, mode: str = "w"):
    "As `atomic_path`, opened to write."
    text = {} if "b" in mode else {"encoding": "utf-8", "newline": "\n"}
    with atomic_path(path) as temporary, open(temporary, mode, **text) as f:
        yield f


def rename(temporary: Path, path: Path, tries: int = 20):
    """Rename a file over `path`, or a folder to where none is.

    On Windows another program (a virus scanner, a viewer) may hold it open for a moment.
    """
    for left in reversed(range(tries)):
        try:
            os.replace(temporary, path)
            break
        except PermissionError:
            if not ON_WINDOWS or not left:
                raise
            time.sleep(0.1)
    if hasattr(os, "O_DIRECTORY"):  # so that the new name outlives a power cut; Windows cannot sync a folder
        with suppress(OSError):  # nor can some network folders
            folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)


@contextmanager
def process_lock(path: Path):
    """Yield whether this process got the lock of that name, for the time of the block; the file goes with it.

    It is the process's own: a POSIX record lock is not handed down to a forked worker, as `flock`'s is, so that a killed
    run's orphaned workers do not keep it.
    """
    try:
        f = open(path, "ab+", buffering=0)
    except OSError as e:
        raise UserError(f"{path} cannot be opened ({reason(e)}): move it away") from None
    held = _lock(f) and _is(path, f)  # it may have been removed since it was opened
    try:
        yield held
    finally:
        if held and not ON_WINDOWS:
            path.unlink(missing_ok=True)  # before it is let go: who waits for it must not lock a removed file
        f.close()
        if held and ON_WINDOWS:  # where an open file cannot be removed
            with suppress(OSError):
                path.unlink(missing_ok=True)


def _lock(f) -> bool:
    try:
        import fcntl

        fcntl.lockf(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:
        import msvcrt

        try:
            msvcrt.locking(f.fileno(), msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
    except OSError as e:  # a file system without locks: go on without
        return e.errno not in (errno.EACCES, errno.EAGAIN)
    return True


def _is(path: Path, f) -> bool:
    "Whether the open file still has that name."
    try:
        return os.path.samestat(os.stat(path), os.fstat(f.fileno()))
    except OSError:
        return False


def reason(error) -> str:
    "What went wrong, in one line."
    return getattr(error, "strerror", None) or (str(error).splitlines() or [type(error).__name__])[0][:200]


def read_at(f, length: int, place: int) -> bytes:
    "Bytes of an unbuffered file. A forked worker shares the file's position, so that must not matter."
    if hasattr(os, "pread"):
        return os.pread(f.fileno(), length, place)
    f.seek(place)  # Windows: a worker is spawned and has a file of its own
    return f.read(length)


def write_at(f, data, place: int):
    "Write all of `data` at a place of an unbuffered file; as `read_at`."
    if hasattr(os, "pwrite"):
        while data:
            done = os.pwrite(f.fileno(), data, place)
            data, place = data[done:], place + done
        return
    f.seek(place)
    f.write(data)


def cache_places(path: Path) -> list[Path]:
    "Where a cache of `path` may lie: beside it; then in the user's cache folder, under a name made from its path."
    home = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA") or os.path.expanduser("~/.cache")
    name = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:24]
    places = [path.with_name(path.name + ".cache"), Path(home) / "landmarks_fastai" / f"{name}.cache"]
    return places if os.path.isabs(home) else places[:1]  # a user without a home folder, as in many containers
