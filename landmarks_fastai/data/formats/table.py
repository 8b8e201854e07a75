"""The table that every reader returns, and what the readers share.

Where a tool counts from differs: (0, 0) is the centre of the top-left pixel (`CENTRE`), its corner (`EDGE`), or the
centre is (1, 1) (`ONE`). Each reader names its own, and `stored_pixels.py` subtracts it. Boxes are pixel edges in all of them.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from landmarks_fastai.data.labels import Labels
from landmarks_fastai.data.landmarks_csv import EXPECTED, LIMIT, not_a_number
from landmarks_fastai.errors import UserError

CENTRE, EDGE, ONE = 0.0, 0.5, 1.0  # coordinates of the centre of the top-left pixel
MAX_BYTES = 1 << 29  # of a JSON file: Python's objects take ten times as much; COCO's largest has 240 MB
# What a damaged or foreign file makes a reader raise.
DAMAGE = (KeyError, IndexError, TypeError, AttributeError, ValueError, ArithmeticError, RecursionError, OSError)
Box = Sequence[Any]  # left, top, right, bottom


@dataclass
class LabelTable:
    "The labels of a source in its own coordinates. `stored_pixels.py` turns them into pixels of the images as stored."

    labels: Labels
    kind: str  # of source, for the user: "COCO keypoints"
    left_out: dict[str, int]  # what no row is made of -> how many
    origin: float = CENTRE
    upright: bool = False  # the tool shows pictures with their EXIF rotation, and labels them so
    fractions: bool = False  # points and boxes are fractions of the picture's sides
    sizes: np.ndarray | None = None  # (rows, 2) width and height that the source says; 0 if it does not


@dataclass(slots=True)
class _Row:
    file: str
    names: tuple[str, ...]
    points: np.ndarray  # (len(names), 2)
    place: str
    box: Box | None
    group: str
    valid: bool
    category: str
    size: Sequence[Any]
    fault: str


class Rows:
    "Collects the rows of a source; `place` says where its reader is, for the message about a damaged file."

    kind, origin, upright = "labels", CENTRE, False  # as in `LabelTable`; each reader sets its own

    def __init__(self, source: Path, category: str = ""):
        self.source, self.category = source, category
        self.rows: list[_Row] = []
        self.left_out: Counter[str] = Counter()
        self.place = ""
        self.names: dict[str, Sequence[str]] = {}  # category -> its points, where the source lists them
        self.skeletons: dict[str, Iterable[Sequence[int]]] = {}

    @property
    def root(self) -> Path:
        "The folder that the file names are relative to."
        return self.source if self.source.is_dir() else self.source.parent

    def locate(self, path: Path, line: int) -> None:
        "Set `place` to a line of a file, which is named if it is one of several."
        self.place = f"line {line}" if path == self.source else f"{path.relative_to(self.root).as_posix()} line {line}"

    def add(
        self,
        file: Any,
        points: Mapping[str, Sequence[Any]] | Sequence[Sequence[Any]],  # of named points, those that are not missing
        box: Box | None = None,
        group: str = "",
        valid: bool = False,
        category: str = "",
        size: Sequence[Any] = (0, 0),
        fault: str = "",
    ) -> None:
        "Add the row of an object. One without a point is counted instead."
        if not isinstance(file, str):
            raise TypeError("the file name is not a text")
        named = isinstance(points, Mapping)
        names = tuple(points) if named else ()
        values = list(points.values() if named else points)
        if not values and not fault:
            self.left_out["objects without a point"] += 1
            return
        numbers = np.full((len(values), 2), np.nan, np.float32)
        problems = []
        for k, xy in enumerate(values):
            for axis, value in enumerate(xy[:2]):
                numbers[k, axis], problem = checked(value, missing=not named)
                if problem:
                    problems.append(f"point {names[k] if named else k}'s {'xy'[axis]} is {problem}")
        problems += [f"its box holds {problem}" for value in box or () if (problem := checked(value)[1])]
        fault = fault or next(iter(problems), "")
        self.rows.append(_Row(file, names, numbers, self.place, box, group, valid, str(category), size, fault))

    def table(self, order: Iterable[str] = ()) -> LabelTable:
        """Return the table of the rows of one category. Raises `UserError` if there are several, or none.

        `order` sorts the names of points where the source does not list those of a category.
        """
        category = self._chosen_category()
        rows = [row for row in self.rows if row.category == category]
        seen = dict.fromkeys(name for row in rows for name in row.names)
        listed = self.names.get(category, ()) if seen else ()
        names = tuple(dict.fromkeys([*listed, *(name for name in order if name in seen), *seen]))
        points, boxes, faults = self._arrays(rows, names)
        bones = [tuple(int(v) for v in bone) for bone in self.skeletons.get(category, ())]
        labels = Labels(
            self.source,
            [row.file for row in rows],
            np.arange(len(rows)),
            points,
            faults,
            point_names=names,
            places=[row.place for row in rows],
            boxes=None if np.isnan(boxes).all() else boxes,
            groups=[row.group for row in rows] if any(row.group for row in rows) else None,
            valid=np.array([row.valid for row in rows]) if any(row.valid for row in rows) else None,
            skeleton=tuple((a, b) for a, b in bones if 0 <= min(a, b) and max(a, b) < points.shape[1]),
            category=category,
        )
        sizes = np.array([[checked(v, True)[0] for v in row.size] for row in rows])
        return LabelTable(labels, self.kind, dict(self.left_out), self.origin, self.upright, sizes=sizes)

    def sorted_names(self) -> list[str]:
        "Return the names of all points, sorted."
        return sorted({name for row in self.rows for name in row.names}, key=natural)

    def _arrays(self, rows: list[_Row], names: Sequence[str]) -> tuple[np.ndarray, np.ndarray, dict[int, str]]:
        "Return the points, boxes and faults of rows, whose points are named, or as many as in most of them."
        n_points = len(names) or Counter(len(row.points) for row in rows).most_common(1)[0][0]
        if n_points * len(rows) > 1 << 28:  # 2 GB: of a file that gives every object points of its own
            shape = f"{n_points} different points in {len(rows)} rows"
            raise UserError(f"{self.source}: {shape}: is each point named alike?")
        index, faults = {name: k for k, name in enumerate(names)}, {}
        points = np.full((len(rows), n_points, 2), np.nan, np.float32)
        boxes = np.full((len(rows), 4), np.nan, np.float32)
        for k, row in enumerate(rows):
            if not names and len(row.points) != n_points:
                row.fault = row.fault or f"it has {len(row.points)} points, {n_points} as in most rows expected"
            if row.fault:
                faults[k] = f"{row.fault}: fix or remove it"
                points[k] = 0
                continue
            points[k, [index[name] for name in row.names] if names else slice(None)] = row.points
            if row.box is not None:
                left, top, right, bottom = map(float, row.box)
                boxes[k] = (left, top, right, bottom) if right > left and bottom > top else np.nan
        return points, boxes, faults

    def _chosen_category(self) -> str:
        category, counts = self.category, Counter(row.category for row in self.rows)
        said = ", ".join(f"{name} ({n} rows)" for name, n in counts.most_common(20))
        if not counts:
            why = "; left out: " + counted(self.left_out) if self.left_out else ""
            raise UserError(f"{self.source}: no object with points in it{why}")
        if category and category not in counts:
            raise UserError(f"--category {category}: {self.source} has points of {said or 'one unnamed category'}")
        if not category and len(counts) > 1:
            raise UserError(f"{self.source} has several categories: {said}: choose one with --category NAME")
        return category or next(iter(counts))


def checked(value: Any, missing: bool = False) -> tuple[float, str]:
    "Return a number and what is wrong with it, or an empty text. NaN is accepted if it stands for a missing point."
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return 0.0, not_a_number(str(value))
    right = abs(number) <= LIMIT or (missing and number != number)
    return (number, "") if right else (0.0, f"{str(value)[:40]}, {EXPECTED}")


def counted(left_out: Mapping[str, int]) -> str:
    "Say what is left out: `2 crowds, 1 without a point`."
    return ", ".join(f"{n} {what}" for what, n in left_out.items() if n)


def group_points(
    points: Iterable[tuple[str, Any, Any, Any]],  # name, x, y, key of the object; None if the tool does not say
    boxes: Mapping[Any, Box],  # of objects, by key
) -> list[tuple[dict[str, tuple[Any, Any]], Box | None, str]]:
    """Return points by name, box and fault of each object of an image.

    A point without a key belongs to the smallest box that it lies in, or to the only one. In one object a name can stand once.
    Points in none of several boxes are a fault if another is in one: they are hardly an object without a box.
    """
    objects: dict[Any, dict[str, tuple[Any, Any]]] = {key: {} for key in boxes}
    faults: dict[Any, str] = {}
    for name, x, y, key in points:
        if key is None and boxes:
            around = next(iter(boxes.values())) if len(boxes) == 1 else box_around([(x, y)], boxes.values())
            key = next((k for k, box in boxes.items() if box is around), None)
        if name in objects.setdefault(key, {}):
            faults[key] = f"point {name!r} is labelled twice in one object: give each object its own group or box"
        objects[key][name] = x, y
    if objects.get(None) and len(boxes) > 1 and any(objects[key] for key in boxes):
        where = f"point {next(iter(objects[None]))!r} lies in none of {len(boxes)} boxes"
        faults.setdefault(None, f"{where}: give each object its own group")
    return [(named, boxes.get(key), faults.get(key, "")) for key, named in objects.items() if named]


def box_around(points: Iterable[Sequence[Any]], boxes: Iterable[Box]) -> Box | None:
    "Return the smallest box that all of the points lie in."
    points = list(points)
    around = [b for b in boxes if all(b[0] <= x <= b[2] and b[1] <= y <= b[3] for x, y in points)]
    return min(around, key=lambda b: (b[2] - b[0]) * (b[3] - b[1]), default=None) if points else None


def rotated_box(x: float, y: float, width: float, height: float, degrees: float, about: tuple[float, float]) -> Box:
    "Return the upright box around a box that is turned clockwise about a point."
    if not degrees:
        return x, y, x + width, y + height
    angle = np.radians(degrees)
    corners = np.subtract([(x, y), (x + width, y), (x, y + height), (x + width, y + height)], about)
    with np.errstate(invalid="ignore"):  # of a file that says infinite: `checked` finds it
        turned = corners @ np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]]) + about
    return [*turned.min(0).tolist(), *turned.max(0).tolist()]


def natural(name: str) -> list[Any]:
    "The key that sorts names with their numbers by value: 2 before 10."
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d{1,18})", name)]


def read_bytes(path: Path) -> bytes:
    "Read a file. Raises `UserError` if it cannot be read or is too large."
    try:
        if path.stat().st_size > MAX_BYTES:
            raise UserError(f"{path} has more than {MAX_BYTES >> 20} MB: split it")
        return path.read_bytes()
    except OSError as e:
        raise UserError(f"{path} cannot be read: {e.strerror}") from None


def read_text(path: Path) -> str:
    "Read a UTF-8 text file, with or without a mark. Raises `UserError`."
    try:
        return read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text") from None


@lru_cache(maxsize=1)  # it is parsed to tell its format, then to read it; `sources.py` clears it
def read_json(path: Path) -> Any:
    "Parse a JSON file. Raises `UserError` with the place of a fault."
    try:
        return json.loads(read_bytes(path))
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path} is damaged, or not JSON ({str(e)[:100]})") from None
