"""The rows of a `landmarks.csv`, parsed once into a binary cache file that later starts only open.

A Python loop over the 2 GB of text takes minutes and gigabytes of memory at every start. Here `landmarks_csv.py` parses the
text block by block. The points are written to a cache file beside the CSV, or in the user's cache folder if the data is
read-only, and single rows are read from that file when they are needed.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

import numpy as np

from landmarks_fastai.data.landmarks_csv import MAX_TEXTS, read_rows
from landmarks_fastai.errors import BadData, Problem, UserError
from landmarks_fastai.utils.files import atomic_write, cache_places, check_folder, read_at

FORMAT = 3  # of the cache file; a file with another number is parsed again
HEADER = 4096  # bytes reserved for the header, so that the numbers behind it start on a page


class Table:
    "Rows that name images: file names, and their lines in a CSV."

    def __init__(self, csv: Path, key: dict, names: Sequence[str] | np.ndarray, lines: np.ndarray):
        self.csv, self.key, self.names, self.lines = csv, key, names, lines  # the key identifies the content

    def __len__(self) -> int:
        return len(self.names)

    def name(self, row: int) -> str:
        "Return the file name of a row."
        name = self.names[row]
        return name if isinstance(name, str) else name.decode("utf-8", "replace")

    def line(self, row: int) -> int:
        "Return the line number of a row in the CSV; the header is line 1."
        return int(self.lines[row])

    def lines_and_names(self) -> Iterator[tuple[int, str]]:
        "Yield the line number and file name of each row."
        return ((self.line(row), self.name(row)) for row in range(len(self)))

    def problem(self, row: int, text: str) -> Problem:
        "Return a `Problem` of a row."
        return Problem(self.csv, self.line(row), self.name(row), text)


class Labels(Table):
    """The rows of a `landmarks.csv`, with points that are read from its cache file when they are needed.

    `len(labels)` rows of `labels.n_points` points, in pixels of the image as stored. Pickles as the file's name: a spawned
    worker process opens it again. `cache` is the file that `read_labels` wrote, `key` the CSV's `file_identity`. Raises
    `ValueError` if the cache was not made from that content.
    """

    def __init__(self, csv: str | Path, cache: str | Path, key: dict):
        # Stays open: the rows do not change if another process writes the cache file again.
        self._file = open(cache, "rb", buffering=0)
        header = json.loads(self._file.read(HEADER).rstrip(b"\0"))
        if header["key"] != key or header["bytes"] != os.fstat(self._file.fileno()).st_size:
            raise ValueError(f"{cache} is not a complete cache of {csv}")
        n_rows, width = header["rows"], header["name_width"]
        self.cache, self.n_points, self._dtype = Path(cache), int(header["n_points"]), np.dtype(header["dtype"])
        self._row_bytes = 2 * self.n_points * self._dtype.itemsize
        self._file.seek(HEADER + n_rows * self._row_bytes)
        names = np.frombuffer(self._file.read(n_rows * width), f"S{width}")
        lines = np.frombuffer(self._file.read(8 * n_rows), np.int64)
        self._faults_at, self._faults_bytes = self._file.tell(), header["fault_bytes"]
        super().__init__(Path(csv), key, names, lines)

    def __reduce__(self) -> tuple:
        return Labels, (self.csv, self.cache, self.key)

    @property
    def identity(self) -> dict:
        "Size, time and digest of the file, wherever it is. (The digest is of its first and last 64 kB.)"
        return {"rows": len(self), "points": self.n_points, **{k: self.key[k] for k in ("size", "mtime", "digest")}}

    def points(self, row: int) -> np.ndarray:
        "Read the points of a row, float32 (n_points, 2), pixels of the image as stored."
        return self.read_points(row, row + 1)[0].astype(np.float32)

    def read_points(self, start: int, stop: int) -> np.ndarray:
        """Read the points of rows `start` to `stop`, int16 or float32 (rows, n_points, 2), pixels of the image as stored.

        Read, not mapped: the kernel maps up to 2 MB around each page that is touched, and all of it counts as this
        process's memory; a random row of 4 kB costs 5 us either way. Raises `IndexError` for rows that do not exist.
        """
        if not (0 <= start and stop <= len(self)):
            raise IndexError(f"row {start} of {len(self)}")
        data = read_at(self._file, (stop - start) * self._row_bytes, HEADER + start * self._row_bytes)
        return np.frombuffer(data, self._dtype).reshape(stop - start, -1, 2)

    def faults(self) -> dict[int, str]:
        "Read what is wrong with the text of faulty rows, by row. Only the first thousand have a text of their own."
        return dict(json.loads(read_at(self._file, self._faults_bytes, self._faults_at)))


def read_labels(csv: str | Path) -> Labels:
    """Open the labels of a `landmarks.csv`; parse it first if no cache file matches it.

    The file is TAB-separated, with one header line, and file_name, then x0 y0 x1 y1 … in each row.
    Raises `UserError` for a file that is missing, empty, or changes while it is read, and `BadData` if rows have
    the wrong number of fields, a field that is not a number, a value that does not fit, or all points in one place.
    """
    labels = open_labels(csv)
    if faults := labels.faults():
        raise BadData((labels.problem(row, text) for row, text in faults.items()), len(faults))
    return labels


def open_labels(csv: str | Path) -> Labels:
    "Like `read_labels`, but accept faulty rows: `labels.faults()` has them."
    csv = Path(csv)
    key = file_identity(csv)
    for cache in cache_places(csv):
        with suppress(OSError, ValueError, TypeError, KeyError):  # missing, damaged, of another format or content
            return Labels(csv, cache, key)
    for cache in cache_places(csv):
        with suppress(OSError):  # read-only or full: try the next folder
            _write_cache(csv, cache, key)
            return Labels(csv, cache, key)
    raise UserError(
        f"{csv}: no cache can be written beside it or in your cache folder: make room, or set XDG_CACHE_HOME"
    )


def file_identity(csv: Path) -> dict:
    "Identify a file's content by its stat and a digest of its first and last 64 kB. Raises `UserError` if it cannot be read."
    try:
        with open(csv, "rb") as f:
            stat = os.fstat(f.fileno())
            ends = f.read(1 << 16)
            f.seek(max(0, stat.st_size - (1 << 16)))
            ends += f.read(1 << 16)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{csv} not found") from None
    except OSError as e:
        raise UserError(f"{csv} cannot be read: {e.strerror}") from None
    return {
        "format": FORMAT, "size": stat.st_size, "mtime": stat.st_mtime_ns, "ctime": stat.st_ctime_ns,
        "inode": stat.st_ino, "digest": hashlib.sha256(ends).hexdigest(),
    }  # fmt: skip


def _write_cache(csv: Path, cache: Path, key: dict) -> None:
    "Parse `csv` into a complete cache file, or none."
    cache.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(cache, "w+b") as f:
        header = _write_rows(f, csv)
        if file_identity(csv) != key:
            raise UserError(f"{csv} changed while it was read: wait until it is written, then start again")
        header |= {"key": key, "bytes": f.seek(0, os.SEEK_END)}
        f.seek(0)
        f.write(json.dumps(header).encode().ljust(HEADER, b"\0"))


def _write_rows(out: IO[bytes], csv: Path, dtype: str = "int16") -> dict:
    "Write the points, file names, line numbers and faults of `csv` behind the header; return the header's fields."
    out.seek(HEADER)
    names, lines, faults, n_points, n_rows = [], [], {}, 0, 0
    for rows in read_rows(csv):
        if dtype == "int16" and rows.points.dtype.kind == "f":
            return _write_rows(out, csv, "float32")  # start again at the file's first decimals
        out.write(np.ascontiguousarray(rows.points, dtype).data)
        names.append(rows.names)
        lines.append(rows.lines.astype(np.int64))
        for k, text in sorted(rows.faults.items()):
            kept = text and len(faults) < MAX_TEXTS
            faults[n_rows + k] = text if kept else "malformed, like others: fix or remove the line"
        n_points, n_rows = rows.points.shape[1], n_rows + len(rows.names)
    if not n_rows:
        raise UserError(f"{csv} has a header but no rows: one line per image is needed")
    names, text = np.concatenate(names), json.dumps(list(faults.items())).encode()
    for data in (names.data, np.concatenate(lines).data, text):
        out.write(data)
    width = names.dtype.itemsize
    return {"rows": n_rows, "n_points": n_points, "dtype": dtype, "name_width": width, "fault_bytes": len(text)}


def data_folder(data: str | Path | None) -> Path:
    "Return the folder that `-d` names; empty is the current directory. Raises `UserError` if it is missing or cannot be read."
    return check_folder(Path(data or "."), "-d must be the folder that holds train/ and test/")
