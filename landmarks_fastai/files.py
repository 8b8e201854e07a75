"Files that are whole or not there."

import hashlib
import os
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(path: Path, mode: str = "w"):
    """Open a temporary sibling of `path` that takes its name when the block ends well, and goes away when it does not.

    Synced before it is renamed; named after the process, so that two that write one file at once do not mix.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    text = {} if "b" in mode else {"encoding": "utf-8", "newline": "\n"}
    try:
        with open(temporary, mode, **text) as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


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
    home = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA") or Path.home() / ".cache"
    name = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:24]
    return [path.with_name(path.name + ".cache"), Path(home) / "landmarks_fastai" / f"{name}.cache"]
