"""The rows of a `landmarks.csv`, parsed once into a cache file whose points later starts map into memory.

Parsing the competition's 3 GB of text takes most of a minute. The cache file is beside the CSV, or in the user's cache
folder if the data is read-only. It holds the points, then a `.npz` with the rest, whose checksums zipfile compares. Each
row of points has a checksum of its own, which is compared when the row is read.
"""

import hashlib
import json
import os
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.lib.npyio import NpzFile

from landmarks_fastai.data.landmarks_csv import find_point_faults, read_rows
from landmarks_fastai.errors import BadData, Problem, UserError
from landmarks_fastai.utils.files import atomic_write, cache_places, check_folder

if TYPE_CHECKING:
    import pandas as pd

SEVERAL = 0.05  # share of the rows beyond one an image from which they are taken for several objects, not for a mistake
FORMAT = 5  # of the cache file; a file with another number is parsed again
PER_ROW = ("names", "lines", "stored", "places", "boxes", "groups", "valid", "turned")  # the fields of `Labels` by row


class Sides(NamedTuple):
    "Digests of the file names of a stage's rows, int64: later stages leave each on its side of the split."

    trained: np.ndarray
    validated: np.ndarray


@dataclass(eq=False)
class Labels:
    """Rows that name images, with their points: of a `landmarks.csv`, a DataFrame or another source.

    Labels with a cache file pickle as the CSV's path: a spawned worker opens the file again. The rows do not change if
    another process replaces the file.
    """

    csv: Path
    names: Sequence[str] | np.ndarray  # (rows,) file names; an array holds UTF-8
    lines: np.ndarray  # (rows,) line numbers in the CSV; the header is line 1
    # (rows, n_points, 2) int16, or float32 with NaN where a point is missing; pixels as stored
    stored: np.ndarray
    faults: dict[int, str] = field(default_factory=dict)  # row -> what is wrong with its text
    checksums: np.ndarray | None = None  # (rows,) crc32 of the points in a cache file; None: the points are in memory
    point_names: tuple[str, ...] = ()  # () if the source names none
    places: Sequence[str] | None = None  # where each row stands, "annotation 17"; None: a line of the CSV
    boxes: np.ndarray | None = None  # float32 (rows, 4) left, top, right, bottom, pixel edges; NaN: the row has none
    groups: Sequence[str] | None = None  # of the rows
    valid: np.ndarray | None = None  # bool (rows,), the source's own validation rows
    flip_indices: tuple[int, ...] = ()  # that the source gives
    skeleton: tuple[tuple[int, int], ...] = ()  # pairs of points that are joined
    category: str = ""  # of the objects; "" if the source names none
    turned: np.ndarray | None = None  # bool (rows,), whose points were turned back to the pixels as stored
    earlier: "Sides | None" = None  # of the stage that this one starts from
    held: dict[str, np.ndarray] = field(default_factory=dict)  # settings of the split -> which rows validate
    absolute: bool = False  # paths are allowed: the names are from the user's Python code, not from a file

    def __len__(self) -> int:
        return len(self.names)

    def __reduce_ex__(self, protocol: Any) -> Any:
        in_memory = self.checksums is None
        if in_memory:
            return super().__reduce_ex__(protocol)
        return _renew, (open_labels, self.csv, self.identity), {"point_names": self.point_names}

    @property
    def n_points(self) -> int:
        return self.stored.shape[1]

    @cached_property
    def several(self) -> bool:
        "Whether many images have several rows."
        return len(self) - len(np.unique(np.asarray(self.names))) > SEVERAL * len(self)

    @cached_property
    def identity(self) -> dict[str, Any]:
        "The number of rows and points, and a digest of names and points: it does not depend on the file's time and place."
        names = self.names
        digest = hashlib.sha256(
            names.data if isinstance(names, np.ndarray) else "\n".join(names).encode("utf-8", "replace")
        )
        digest.update((self.stored if self.checksums is None else self.checksums).data)
        if self.boxes is not None:
            digest.update(np.ascontiguousarray(self.boxes).data)
        return {"rows": len(self), "points": self.n_points, "digest": digest.hexdigest()}

    def name(self, row: int) -> str:
        "Return the file name of a row."
        name = self.names[row]
        return name if isinstance(name, str) else name.decode("utf-8", "replace")

    def all_names(self) -> list[str]:
        "Return the file names of all rows."
        return [self.name(row) for row in range(len(self))]

    def where(self, row: int) -> str:
        "Return where a row stands in its source: `line 3`, `annotation 17`."
        return self.places[row] if self.places else f"line {self.lines[row]}"

    def place(self, row: int) -> str:
        "Return the source and the place of a row, for messages."
        return f"{self.csv} {self.where(row)}"

    def problem(self, row: int, text: str) -> Problem:
        "Return a `Problem` of a row."
        return Problem(self.csv, self.where(row), self.name(row), text)

    def points(self, row: int) -> np.ndarray:
        "Return the points of a row, float32 (n_points, 2), pixels of the image as stored; NaN: missing. Makes a damaged cache again."
        for renew in (open_labels, _parse):  # another process may have made it again already
            if self.checksums is None or zlib.crc32(self.stored[row]) == self.checksums[row]:
                break
            self.stored = _renew(renew, self.csv, self.identity).stored
        return self.stored[row].astype(np.float32)

    def at(self, rows: np.ndarray) -> "Labels":
        "Return the labels of some rows, in memory."
        fields = {name: getattr(self, name) for name in PER_ROW}
        some = {k: v[rows] if isinstance(v, np.ndarray) else v and [v[row] for row in rows] for k, v in fields.items()}
        faults = {k: self.faults[row] for k, row in enumerate(rows.tolist()) if row in self.faults}
        return replace(self, faults=faults, checksums=None, **some)

    def in_order(self, names: Sequence[str], n_points: int, who: str, hint: str = "") -> "Labels":
        """Return the labels with their points in the order of `names`; as they are if these or those have no names.

        Raises `UserError` if the points that the network `who` predicts are others.
        """
        known, place = tuple(self.point_names), {name: k for k, name in enumerate(names)}
        if known and names and set(known) != set(names):
            pairs = (known, names), (names, known)
            said = [", ".join([name for name in a if name not in b][:9]) or f"{len(a)} points" for a, b in pairs]
            raise UserError(f"{self.csv} has other points ({said[0]}) than {who} ({said[1]}){hint}")
        if self.n_points != n_points:
            raise UserError(f"{self.csv} has {self.n_points} points, {who} predicts {n_points}{hint}")
        if not known or not names or known == tuple(names):
            return self
        order = [known.index(name) for name in names]
        return replace(
            self,
            stored=np.take(self.stored, order, 1),
            checksums=None,  # they are of the order in the cache file
            point_names=tuple(names),
            flip_indices=tuple(place[known[self.flip_indices[k]]] for k in order) if self.flip_indices else (),
            skeleton=tuple((place[known[a]], place[known[b]]) for a, b in self.skeleton),
        )


def concatenate(parts: Sequence[Labels]) -> Labels:
    "Return the rows of several labels of the same points, in memory; what is not of a row is that of the first."

    def joined(name: str) -> Any:
        values = [getattr(part, name) for part in parts]
        like = next((v for v in values if v is not None), None)
        if isinstance(like, np.ndarray):
            missing = np.nan if like.dtype.kind == "f" else 0
            shapes = [(len(part), *like.shape[1:]) for part in parts]
            pairs = zip(values, shapes, strict=True)
            return np.concatenate([np.full(s, missing, like.dtype) if v is None else v for v, s in pairs])
        if like is None:
            return None
        return [v for part, vs in zip(parts, values, strict=True) for v in vs or [""] * len(part)]

    starts = np.cumsum([0, *map(len, parts)]).tolist()
    faults = {
        start + row: text for start, part in zip(starts, parts, strict=False) for row, text in part.faults.items()
    }
    return replace(parts[0], faults=faults, checksums=None, **{name: joined(name) for name in PER_ROW})


def _renew(renew: Callable[[Path], Labels], csv: Path, identity: dict[str, Any]) -> Labels:
    labels = renew(csv)
    if labels.identity != identity:
        raise UserError(f"{csv} has changed since it was opened: start again")
    return labels


def frame_labels(frame: "pd.DataFrame") -> Labels:
    """Return the labels of a DataFrame: a column of file names, then x0, y0, x1, y1, …; NaN or NA: the point is missing.

    Raises `UserError` for a wrong number of columns, no rows, or a coordinate that is not a number.
    """
    if frame.shape[1] < 3 or frame.shape[1] % 2 == 0 or not len(frame):
        shape = f"{len(frame)} rows and {frame.shape[1]} columns"
        raise UserError(f"the DataFrame has {shape}: a column of file names, then x0, y0, x1, y1, … expected")
    try:
        values = frame.iloc[:, 1:].to_numpy(np.float32, na_value=np.nan)
    except (ValueError, TypeError) as e:
        raise UserError(f"the DataFrame holds a coordinate that is not a number ({e})") from None
    points = np.ascontiguousarray(values).reshape(len(frame), -1, 2)
    names = frame.iloc[:, 0].astype(object).where(frame.iloc[:, 0].notna(), "").astype(str).tolist()
    nameless = {k: "the file name is empty: fix or remove the line" for k, name in enumerate(names) if not name.strip()}
    rows, faults = np.arange(len(frame)), nameless | find_point_faults(points)
    return Labels(Path("DataFrame"), names, rows, points, faults, places=[f"row {k}" for k in rows], absolute=True)


def read_labels(csv: str | Path) -> Labels:
    """Open the labels of a `landmarks.csv`; parse it first if no cache file matches it.

    The file is TAB-separated, with one header line, and file_name, then x0 y0 x1 y1 … in each row.
    Raises `UserError` for a file that is missing, empty, or changes while it is read, and `BadData` if rows have
    the wrong number of fields, a field that is not a number or a gap, a value that does not fit, half a point, no
    point, or all points in one place.
    """
    labels = open_labels(csv)
    if labels.faults:
        raise BadData((labels.problem(row, text) for row, text in labels.faults.items()), len(labels.faults))
    return labels


def open_labels(csv: str | Path) -> Labels:
    "Like `read_labels`, but accept faulty rows: `labels.faults` has them."
    csv = Path(csv)
    key = _cache_key(csv)
    for cache in cache_places(csv):
        with suppress(Exception):  # missing, of another content, or damaged, which raises many kinds of error
            return _open_cache(csv, cache, key)
    return _parse(csv)


def _cache_key(csv: Path) -> list[int]:
    "Return what a cache file must have been made from. Raises `UserError` if the CSV cannot be read."
    try:
        with open(csv, "rb") as f:
            stat = os.fstat(f.fileno())
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{csv} not found") from None
    except OSError as e:
        raise UserError(f"{csv} cannot be read: {e.strerror}") from None
    return [FORMAT, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def _open_cache(csv: Path, cache: Path, key: list[int]) -> Labels:
    "Map a cache file. Raises `ValueError`, or whatever numpy and zipfile raise, if it was not made from that content."
    with open(cache, "rb") as f, NpzFile(f) as rest:
        about, lines = json.loads(rest["about"].item()), rest["lines"]
        if about["key"] != key:
            raise ValueError(f"{cache} was not made from {csv}")
        points = np.memmap(f, about["dtype"], "r", shape=(len(lines), about["n_points"], 2)).view(np.ndarray)
        return Labels(csv, rest["names"], lines, points, dict(about["faults"]), rest["checksums"])


def _parse(csv: Path) -> Labels:
    "Parse `csv` into a cache file, and open it. Raises `UserError` if it changes meanwhile, or no cache can be written."
    key = _cache_key(csv)
    for cache in cache_places(csv):
        with suppress(OSError):  # read-only or full: try the next folder
            cache.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(cache, "wb") as f:
                _write_cache(f, csv, key)
                if _cache_key(csv) != key:
                    raise UserError(f"{csv} changed while it was read: wait until it is written, then start again")
            return _open_cache(csv, cache, key)
    raise UserError(
        f"{csv}: no cache can be written beside it or in your cache folder: make room, or set XDG_CACHE_HOME"
    )


def _write_cache(f: IO[bytes], csv: Path, key: list[int], dtype: str = "int16") -> None:
    names, lines, checksums, faults, n_points = [], [], [], [], 0
    for rows in read_rows(csv):
        with np.errstate(invalid="ignore"):  # NaN is not equal to what it becomes
            points = rows.points.astype(dtype)
        if dtype == "int16" and (points != rows.points).any():
            f.seek(0)
            return _write_cache(f, csv, key, "float32")  # start again at the file's first decimals
        f.write(points.data)
        faults += [(len(checksums) + row, rows.faults[row]) for row in sorted(rows.faults)]
        names.append(rows.names)
        lines.append(rows.lines)
        checksums += map(zlib.crc32, points)
        n_points = points.shape[1]
    if not names:
        raise UserError(f"{csv} has a header but no rows: one line per image is needed")
    about = json.dumps({"key": key, "dtype": dtype, "n_points": n_points, "faults": faults}).encode()
    names, lines = np.concatenate(names), np.concatenate(lines)
    np.savez(f, about=np.array(about), names=names, lines=lines, checksums=np.array(checksums, np.uint32))


def data_folder(data: str | Path | None) -> Path:
    "Return the folder that `-d` names; empty is the current directory. Raises `UserError` if it is missing or cannot be read."
    return check_folder(Path(data or "."), "-d must be the folder that holds train/ and test/")
