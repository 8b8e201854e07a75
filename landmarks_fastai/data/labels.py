"""`landmarks.csv`, read once into a file of binary rows that later starts only open.

Contestants read 2 GB of text with a Python loop at every start: 20 minutes and gigabytes of memory.
Here the text is parsed block by block (rows.py), the numbers go to a binary file beside the CSV
(or in the user's cache folder where the data's own is read-only), and every later start reads from that file the rows that it is asked for.
"""

import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path

import numpy as np

from landmarks_fastai.data.landmarks_csv import KEPT, read_rows
from landmarks_fastai.errors import BadData, Problem, UserError
from landmarks_fastai.utils.files import atomic_write, cache_places, read_at

FORMAT = 2  # of the cache file: another number in a file makes it stale
HEADER = 4096  # bytes kept for the header, so that the numbers behind it start on a page


class StaleCache(Exception):
    "A cache file that is torn, foreign, or of a CSV that has changed since."


class Labels:
    """The rows of a `landmarks.csv`, read one by one from its cache file and never loaded whole.

    `len(labels)` rows of `labels.n_points` points. Coordinates are pixels of the image as stored.
    Pickles as the name of its file, so that a spawned data loader's worker opens it again.
    """

    def __init__(
        self,
        csv,  # the landmarks.csv that the rows came from
        cache,  # its cache file, as `read_labels` wrote it
        key: dict,  # the identity of the CSV that the cache file must have been made of
    ):
        self.csv, self.cache, self.key = Path(csv), Path(cache), key
        self._open()

    def _open(self):
        # Kept open: the rows stay those that were found, whoever writes the cache anew meanwhile.
        self._file = open(self.cache, "rb", buffering=0)
        head = _read_header(self._file)
        if head.get("key") != self.key:
            raise StaleCache(f"{self.cache} is no cache of {self.csv} as it was")
        self._rows, self.n_points = head["rows"], head["n_points"]
        self._dtype, self._width, self._blank_lines = np.dtype(head["dtype"]), head["name_width"], head["blank_lines"]
        self._faulty, self._texts = head["faulty"], head["texts"]

    def __getstate__(self):
        return {k: v for k, v in self.__dict__.items() if k[0] != "_"}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._open()

    def __len__(self):
        return self._rows

    @property
    def identity(self) -> dict:
        "What tells these labels from others, wherever the file lies. (The digest is of its two ends.)"
        return {"rows": len(self), "points": self.n_points, **{k: self.key[k] for k in ("size", "mtime", "digest")}}

    def points(self, row: int) -> np.ndarray:
        "The row's landmarks, float32 (n_points, 2), in pixels of the image as stored."
        return self.some_points(row, row + 1)[0].astype(np.float32)

    def some_points(self, start: int, stop: int) -> np.ndarray:
        "The landmarks of rows `start` to `stop`, (rows, n_points, 2), as they are kept: int16 or float32."
        return self._read(0, self._dtype, 2 * self.n_points, start, stop).reshape(stop - start, -1, 2)

    def name(self, row: int) -> str:
        "The row's file name."
        return self._names(row, row + 1)[0].decode("utf-8")

    def line(self, row: int) -> int:
        "The row's line in the CSV; the header line is 1."
        return int(self._lines(row, row + 1)[0])

    def lines_and_names(self):
        "Yield each row's line and file name: many at a time are read, few are kept."
        for start in range(0, len(self), 4096):
            stop = min(start + 4096, len(self))
            for line, name in zip(self._lines(start, stop).tolist(), self._names(start, stop).tolist(), strict=True):
                yield line, name.decode("utf-8")

    def faults(self) -> dict[int, str]:
        "What is wrong with the CSV's text, by row; of more than a thousand rows the others' texts say no more than that."
        place = HEADER + self._points_bytes + self._rows * (self._width + (8 if self._blank_lines else 0))
        rows = np.frombuffer(read_at(self._file, 8 * self._faulty, place), np.int64).tolist()
        texts = json.loads(read_at(self._file, self._texts, place + 8 * self._faulty))
        return dict.fromkeys(rows, "malformed, like others: fix or remove the line") | dict(texts)

    def problem(self, row: int, text: str) -> Problem:
        return Problem(self.csv, self.line(row), self.name(row), text)

    def _names(self, start, stop):
        return self._read(self._points_bytes, np.dtype(f"S{self._width}"), 1, start, stop)[:, 0]

    def _lines(self, start, stop):
        if not self._blank_lines:
            return np.arange(start, stop) + 2
        return self._read(self._points_bytes + self._rows * self._width, np.dtype(np.int64), 1, start, stop)[:, 0]

    @property
    def _points_bytes(self):
        return self._rows * 2 * self.n_points * self._dtype.itemsize

    def _read(self, offset, dtype, columns, start, stop):
        """Rows `start` to `stop` of the table that begins `offset` bytes behind the header.

        Read, not mapped: the kernel maps up to 2 MB around each page that is touched, and all of it counts as this
        process's memory; a random row of 4 kB costs 5 us either way.
        """
        step = columns * dtype.itemsize
        if not (0 <= start and stop <= self._rows):
            raise IndexError(f"row {start} of {self._rows}")
        place, length = HEADER + offset + start * step, (stop - start) * step
        data = read_at(self._file, length, place)
        return np.frombuffer(data, dtype).reshape(stop - start, columns)


def read_labels(
    csv,  # path of a landmarks.csv: TAB-separated, one header line, file_name then x0 y0 x1 y1 …
) -> Labels:
    """Open the labels of `csv`, parsing it first where no cache file matches it as it now is.

    Raises `UserError` for a file that is missing, empty, or changes while it is read, and `BadData` where rows have
    the wrong number of fields, a field that is no number, a value that does not fit, or all points in one place.
    """
    labels = open_labels(csv)
    if faults := labels.faults():
        raise BadData((labels.problem(row, text) for row, text in faults.items()), len(faults))
    return labels


def open_labels(csv) -> Labels:
    "As `read_labels`, but that faulty rows are left to the caller: `labels.faults()` has them."
    csv = Path(csv)
    key = identity(csv)
    for cache in cache_places(csv):
        with suppress(OSError, StaleCache):
            return Labels(csv, cache, key)
    for cache in cache_places(csv):
        with suppress(OSError):  # a read-only or full place: try the next
            _write_cache(csv, cache, key)
            return Labels(csv, cache, key)
    raise UserError(
        f"{csv}: its cache file can be written neither beside it nor in your cache folder: make room, or set "
        "XDG_CACHE_HOME to a folder that can be written to"
    )


def identity(csv: Path) -> dict:
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


def _read_header(f) -> dict:
    "The header of an open cache file; empty where it is foreign or torn."
    try:
        head = json.loads(f.read(HEADER).rstrip(b"\0"))
        whole = os.fstat(f.fileno()).st_size == head["bytes"]
    except (ValueError, TypeError, KeyError):
        return {}
    return head if whole else {}


def _write_cache(csv: Path, cache: Path, key: dict):
    "Parse `csv` into `cache`: to a temporary file that is renamed when whole, so it is never seen torn."
    cache.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(cache, "w+b") as f:
        head = _parse_into(f, csv)
        if identity(csv) != key:
            raise UserError(f"{csv} changed while it was read: wait until it is written, then start again")
        f.seek(0, os.SEEK_END)
        head |= {"key": key, "bytes": f.tell()}
        f.seek(0)
        f.write(json.dumps(head).encode().ljust(HEADER, b"\0"))


def _parse_into(out, csv: Path) -> dict:
    "Write the numbers, then the names, of `csv` behind the header's place in `out`; return the header's facts."
    out.write(bytes(HEADER))
    dtype, names, lines, faulty, texts, row = np.dtype(np.int16), [], [], [np.zeros(0, np.int64)], {}, 0
    for some_lines, some_names, values, (rows, some_texts) in read_rows(csv):
        if values.dtype.kind == "f" and dtype.kind == "i":  # the first decimals: what is there becomes float32
            dtype = np.dtype(np.float32)
            _widen(out, sum(map(len, names)) * values[0].size)
        out.write(np.ascontiguousarray(values, dtype).data)
        names.append(some_names)
        lines.append(some_lines)
        faulty.append(row + rows)
        if len(texts) < KEPT:
            texts |= {row + k: text for k, text in some_texts.items()}
        row += len(some_names)
    if not names:
        raise UserError(f"{csv} has a header but no rows: one line per image is needed")
    names, lines = np.concatenate(names), np.concatenate(lines)
    blank_lines = bool((lines != np.arange(len(lines)) + 2).any())
    out.write(names.data)
    if blank_lines:
        out.write(lines.astype(np.int64).data)
    faulty = np.concatenate(faulty)
    out.write(faulty.data)
    texts = json.dumps(sorted(texts.items())[:KEPT]).encode()
    out.write(texts)
    return {
        "rows": len(names), "n_points": values.shape[1], "dtype": dtype.name,
        "name_width": names.dtype.itemsize, "blank_lines": blank_lines, "faulty": len(faulty), "texts": len(texts),
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


def data_folder(data) -> Path:
    "The competition's folder that `-d` names; an empty name is the current directory. Raises `UserError` where there is none."
    folder = Path(data or ".")
    try:
        os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{folder}: no such folder; -d wants the folder that holds train/ and test/") from None
    except (OSError, ValueError) as e:
        raise UserError(f"{folder} cannot be read ({e}); -d wants the folder that holds train/ and test/") from None
    return folder
