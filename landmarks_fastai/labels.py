"""`landmarks.csv`, read once into a file that later starts map into memory.

Contestants read 2 GB of text with a Python loop at every start: 20 minutes and gigabytes of memory.
Here the text is parsed block by block (rows.py), the numbers go to a binary file beside the CSV
(or in the user's cache folder where the data's own is read-only), and every later start only maps that file.
"""

import hashlib
import json
import os
from pathlib import Path

import numpy as np

from landmarks_fastai.errors import UserError
from landmarks_fastai.files import whole_file
from landmarks_fastai.rows import read_rows

FORMAT = 1  # of the cache file: another number in a file makes it stale
HEADER = 4096  # bytes kept for the header, so that the numbers behind it start on a page


class Labels:
    """The rows of a `landmarks.csv`, mapped from its cache file and never loaded whole.

    `len(labels)` rows of `labels.n_points` points. Coordinates are pixels of the image as stored.
    Pickles as the name of its file, so that a spawned data loader's worker maps it again.
    """

    def __init__(
        self,
        csv,  # the landmarks.csv that the rows came from
        cache,  # its cache file, as `read_labels` wrote it
    ):
        self.csv, self.cache = Path(csv), Path(cache)
        self._map()

    def _map(self):
        head = _read_header(self.cache)
        rows, n_points, width = head["rows"], head["n_points"], head["name_width"]
        dtype = np.dtype(head["dtype"])
        self.n_points = n_points
        self._points = np.memmap(self.cache, dtype, "r", HEADER, (rows, n_points, 2))
        offset = HEADER + rows * n_points * 2 * dtype.itemsize
        self._names = np.memmap(self.cache, f"S{width}", "r", offset, (rows,))
        self._lines = None
        if head["blank_lines"]:
            self._lines = np.memmap(self.cache, np.int64, "r", offset + rows * width, (rows,))

    def __getstate__(self):
        return {"csv": self.csv, "cache": self.cache}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._map()

    def __len__(self):
        return len(self._names)

    def name(self, row: int) -> str:
        "The row's file name."
        return self._names[row].decode("utf-8")

    def points(self, row: int) -> np.ndarray:
        "The row's landmarks, float32 (n_points, 2), in pixels of the image as stored."
        return self._points[row].astype(np.float32)

    def line(self, row: int) -> int:
        "The row's line in the CSV; the header line is 1."
        return row + 2 if self._lines is None else int(self._lines[row])


def read_labels(
    csv,  # path of a landmarks.csv: TAB-separated, one header line, file_name then x0 y0 x1 y1 …
) -> Labels:
    """Map the labels of `csv`, parsing it first where no cache file matches it as it now is.

    Raises `UserError` for a file that is missing, empty, changes while it is read, or has a row with
    the wrong number of fields, a field that is no number, or a value that does not fit.
    """
    csv = Path(csv)
    key = _identity(csv)
    for cache in _cache_places(csv):
        if _read_header(cache).get("key") == key:
            return Labels(csv, cache)
    refused = None
    for cache in _cache_places(csv):
        try:
            _write_cache(csv, cache, key)
        except OSError as e:  # a read-only or full place: try the next
            refused = e
        else:
            return Labels(csv, cache)
    raise UserError(f"{csv}: no room for its cache file, neither beside it nor in the cache folder: {refused}")


def _identity(csv: Path) -> dict:
    "What must be equal for a cache file to still be the CSV's: its stat and a digest of its two ends."
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
    digest = hashlib.sha256(ends).hexdigest()
    return {
        "format": FORMAT, "size": stat.st_size, "mtime": stat.st_mtime_ns,
        "ctime": stat.st_ctime_ns, "inode": stat.st_ino, "digest": digest,
    }  # fmt: skip


def _cache_places(csv: Path) -> list[Path]:
    "Beside the CSV first; then the user's cache folder, under a name made from the CSV's path."
    home = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA") or Path.home() / ".cache"
    name = hashlib.sha256(str(csv.resolve()).encode()).hexdigest()[:24]
    return [csv.with_name(csv.name + ".cache"), Path(home) / "landmarks_fastai" / f"{name}.cache"]


def _read_header(cache: Path) -> dict:
    "The header of a cache file; empty where the file is absent, foreign or torn."
    try:
        with open(cache, "rb") as f:
            head = json.loads(f.read(HEADER).rstrip(b"\0"))
            whole = os.fstat(f.fileno()).st_size == head["bytes"]
    except (OSError, ValueError, TypeError, KeyError):
        return {}
    return head if whole else {}


def _write_cache(csv: Path, cache: Path, key: dict):
    "Parse `csv` into `cache`: to a temporary file that is renamed when whole, so it is never seen torn."
    cache.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(cache, "w+b") as f:
        head = _parse_into(f, csv)
        if _identity(csv) != key:
            raise UserError(f"{csv} changed while it was read: wait until it is written, then start again")
        f.seek(0, os.SEEK_END)
        head |= {"key": key, "bytes": f.tell()}
        f.seek(0)
        f.write(json.dumps(head).encode().ljust(HEADER, b"\0"))


def _parse_into(out, csv: Path) -> dict:
    "Write the numbers, then the names, of `csv` behind the header's place in `out`; return the header's facts."
    out.write(bytes(HEADER))
    dtype, names, lines = np.dtype(np.int16), [], []
    for block_lines, block_names, values in read_rows(csv):
        if values.dtype.kind == "f" and dtype.kind == "i":  # the first decimals: what is there becomes float32
            dtype = np.dtype(np.float32)
            _widen(out, sum(map(len, names)) * values[0].size)
        out.write(np.ascontiguousarray(values, dtype).data)
        names.append(block_names)
        lines.append(block_lines)
    if not names:
        raise UserError(f"{csv} has a header but no rows: one line per image is needed")
    names, lines = np.concatenate(names), np.concatenate(lines)
    blank_lines = bool((lines != np.arange(len(lines)) + 2).any())
    out.write(names.data)
    if blank_lines:
        out.write(lines.astype(np.int64).data)
    return {
        "rows": len(names), "n_points": values.shape[1], "dtype": dtype.name,
        "name_width": names.dtype.itemsize, "blank_lines": blank_lines,
    }  # fmt: skip


def _widen(out, count: int, step: int = 1 << 20):
    "Turn the `count` int16 numbers behind the header's place of `out` into float32, from the end, in place."
    for start in range((count - 1) // step * step, -1, -step):
        n = min(step, count - start)
        out.seek(HEADER + 2 * start)
        numbers = np.frombuffer(out.read(2 * n), np.int16)
        out.seek(HEADER + 4 * start)
        out.write(numbers.astype(np.float32).data)
    out.seek(HEADER + 4 * count)
