"""The items of a `DataBlock`: labelled images from a source of labels (`sources.py`), or from a DataFrame.

All rows are checked before training. Bad rows stop the program with a list of all of them, or are skipped.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import overload

import numpy as np
import pandas as pd

from landmarks_fastai.data.checks import check_images, write_listing
from landmarks_fastai.data.labels import Labels
from landmarks_fastai.data.pictures import Picture
from landmarks_fastai.data.sources import is_labels, join_valid, read_frame, read_source
from landmarks_fastai.data.suspicions import check_suspicions
from landmarks_fastai.errors import SHOWN, BadData, Problem, UserError
from landmarks_fastai.geometry import BOXED, Box, PixelMap, box_map
from landmarks_fastai.settings import DataFacts, Settings
from landmarks_fastai.utils.distributed import is_first
from landmarks_fastai.utils.files import read_names


@dataclass(frozen=True, slots=True)
class LabelledImage:
    "An image with its points: one row of `images.labels`, seen whole or through the crop that its points are aligned in."

    images: "LabelledImages"
    row: int
    aligned: bool = False

    @property
    def path(self) -> Path:
        return self.images.folder / self.images.labels.name(self.row)

    @property
    def picture(self) -> Picture:
        return Picture(self.path, exif=False, where=self.where)

    @property
    def points(self) -> np.ndarray:
        "Float32 (n_points, 2), pixels of the image as stored; NaN: missing."
        return self.images.labels.points(self.row)

    @property
    def box(self) -> Box:
        """Left, top, right, bottom of the object, pixel edges of the image as stored: the source's box, or that of its points.

        No side is less than a quarter of the other, or one pixel: the points may lie on a line.
        """
        boxes = self.images.labels.boxes
        if boxes is not None and not np.isnan(boxes[self.row]).any():
            low, high = boxes[self.row].reshape(2, 2).astype(float)
        else:
            low, high = np.fmin.reduce(self.points) + 0.5, np.fmax.reduce(self.points) + 0.5
        half = np.maximum(high - low, max(1.0, (high - low).max() / 4)) / 2
        left, top, right, bottom = (*((low + high) / 2 - half).tolist(), *((low + high) / 2 + half).tolist())
        return left, top, right, bottom

    def view(self, settings: Settings) -> PixelMap | None:
        "Return the map of the first pass to the network's input: of the object's box; None: of the whole image."
        return box_map(self.box, BOXED, settings.size) if settings.crop == "box" else None

    @property
    def where(self) -> str:
        "The first words of an error message about the image: file and line."
        return f"{self.images.labels.place(self.row)}: "

    def problem(self, text: str) -> Problem:
        return self.images.labels.problem(self.row, text.removeprefix(self.where))


class LabelledImages:
    """A sequence of `LabelledImage`s, each created when it is indexed.

    It has an `iloc`, like a DataFrame, so that fastcore's `L` does not convert it to a list: a list of 393,930 items
    would take 40 MB, and be copied into each worker page by page.
    """

    def __init__(
        self,
        labels: Labels,
        folder: Path,  # of the images
        left_out: np.ndarray | None = None,  # rows that are neither trained on nor validated on
        listing: Path | None = None,  # file that lists the rows that are left out
        rows: np.ndarray | None = None,  # None: all
    ):
        self.labels, self.folder, self.listing = labels, Path(folder), listing
        self.left_out = np.zeros(0, np.int64) if left_out is None else left_out
        self.rows = np.arange(len(labels)) if rows is None else rows

    @property
    def iloc(self) -> "LabelledImages":
        return self

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, i: int) -> LabelledImage: ...
    @overload
    def __getitem__(self, i: slice | Sequence | np.ndarray) -> "LabelledImages": ...
    def __getitem__(self, i: int | slice | Sequence | np.ndarray) -> "LabelledImage | LabelledImages":
        if isinstance(i, (int, np.integer)):
            return LabelledImage(self, int(self.rows[i]))
        return LabelledImages(self.labels, self.folder, self.left_out, self.listing, self.rows[i])

    @property
    def all_rows(self) -> "LabelledImages":
        "All images of the table that these are a part of."
        return LabelledImages(self.labels, self.folder, self.left_out, self.listing)

    def fitted(self, facts: DataFacts, who: str | Path, hint: str = "") -> "LabelledImages":
        """Return these images with their points in the order of a network's `facts`, where both name them.

        Prints that the order is another. Raises `UserError` if the network, `who`, predicts other points.
        """
        labels = self.labels
        ordered = labels.in_order(facts.point_names, facts.n_points, str(who), hint)
        if ordered is labels:
            return self
        print(f"{labels.csv} has its points in another order than {who}: they are put in that order", flush=True)
        return LabelledImages(ordered, self.folder, self.left_out, self.listing, self.rows)

    @property
    def counted(self) -> str:
        "Words beside a score of these images: how many points it counts; empty if no point is missing."
        stored, total = self.labels.stored, len(self) * self.labels.n_points
        if stored.dtype.kind != "f":  # integers have no NaN
            return ""
        n = sum(int((~np.isnan(stored[row, :, 0])).sum()) for row in self.rows)
        return "" if n == total else f" ({n} of {total} points)"

    def sample(self, at_most: int) -> Iterator[LabelledImage]:
        "Yield at most that many images, evenly spaced."
        step = max(1, -(-len(self) // at_most))
        return (self[i] for i in range(0, len(self), step))


def labelled_images(
    source: str | Path | pd.DataFrame | LabelledImages,
    image_folder: str | Path | None = None,  # of a DataFrame's file names
    on_bad: str = "stop",
    listing: Path | None = None,
    left_out: np.ndarray | None = None,
    category: str = "",  # of the objects, where the source has several
    valid: str = "",  # another source, whose rows validate; a text file of names is for `split.py`
    exclude: str | Path = "",  # file that names rows to leave out
) -> LabelledImages:
    """Check all rows of a source: a file or folder of labels in one of the formats of docs/labels.md, or a DataFrame.

    Raises `BadData` with all bad rows; with `on_bad="skip"` it prints how many are left out, and lists them in `listing`.
    A resumed run passes the rows that it started without as `left_out`: it continues without those, whatever the check finds.
    """
    if isinstance(source, LabelledImages):
        return source
    if isinstance(source, pd.DataFrame):
        labels, folder = read_frame(source), Path(image_folder or ".")
    elif not isinstance(source, (str, Path)):
        raise UserError(f"labels are a path or a DataFrame; {type(source).__name__} found")
    else:
        labels, folder = read_source(Path(source or "."), category, Path(image_folder) if image_folder else None)
    if valid and is_labels(Path(valid)):
        labels, folder = join_valid(labels, folder, Path(valid), category)
    check_suspicions(labels)
    image_faults = check_images(labels, folder)
    if left_out is not None:
        return LabelledImages(labels, folder, left_out, listing)
    excluded = excluded_rows(exclude, labels) if exclude else np.zeros(0, np.int64)
    unseen = set(excluded.tolist())
    faults = {row: fault for row, fault in sorted((labels.faults | image_faults).items()) if row not in unseen}
    _report_faults(labels, faults, on_bad, listing)
    return LabelledImages(labels, folder, np.union1d(np.array(list(faults), np.int64), excluded), listing)


def _report_faults(labels: Labels, faults: dict[int, str], on_bad: str, listing: Path | None) -> None:
    "Raise `BadData` with all faults, or print how many rows are left out; `listing` has them."
    problems = [labels.problem(row, text) for row, text in faults.items()]
    stop = on_bad == "stop" or len(faults) == len(labels)
    if listing and is_first():  # the first process writes the list
        if len(faults) > (SHOWN if stop else 0):
            write_listing(listing, problems)
        else:
            Path(listing).unlink(missing_ok=True)  # from an earlier start
    if faults and stop:
        raise BadData(problems, len(faults), "--on-bad skip" if len(faults) < len(labels) else "", listing)
    if faults:
        print(f"{len(faults)} of {len(labels)} rows are bad and left out" + (f": {listing}" if listing else ""))


def excluded_rows(path: str | Path, labels: Labels) -> np.ndarray:
    """Return the rows that a text file names, and print how many.

    A line is a file name, for all rows of the image, or one row's `row_key`. Raises `UserError` for any other line.
    """
    rows: dict[str, set[int]] = defaultdict(set)
    for row, names in enumerate(zip(labels.all_names(), row_keys(labels), strict=True)):
        for name in names:
            rows[name].add(row)
    excluded = set()
    for number, line in enumerate(read_names("--exclude", path).split("\n"), 1):
        name = line.rstrip("\r")
        if name.strip() and name not in rows:
            hint = f"{labels.csv} has no row {name.strip()[:80]!r}: remove the line"
            raise UserError(f"--exclude {path} line {number}: {hint}")
        excluded |= rows[name]
    print(f"{len(excluded)} of {len(labels)} rows are excluded by {path}", flush=True)
    return np.array(sorted(excluded), np.int64)


def row_keys(labels: Labels) -> list[str]:
    "Return what names each row in a file of --exclude: file name; of several objects of an image TAB and a number from 1 too."
    names = labels.all_names()
    total, numbers = Counter(names), defaultdict(lambda: count(1))
    return [f"{name}\t{next(numbers[name])}" if total[name] > 1 else name for name in names]
