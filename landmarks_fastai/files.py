"Files that are whole or not there."

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
