"""The items of a `DataBlock`: labelled images from a folder in the competition's layout, or from a DataFrame.

All rows are checked before training. Bad rows stop the program with a list of all of them, or are skipped.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

import numpy as np
import pandas as pd

from landmarks_fastai.data.checks import LEAVES, check_images, write_listing
from landmarks_fastai.data.labels import Labels, Table, data_folder, open_labels
from landmarks_fastai.errors import SHOWN, BadData, Problem, UserError
from landmarks_fastai.utils.distributed import is_first


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
    def points(self) -> np.ndarray:
        "Float32 (n_points, 2), pixels of the image as stored."
        return self.images.labels.points(self.row)

    @property
    def where(self) -> str:
        "The first words of an error message about the image: file and line."
        return f"{self.images.labels.csv} line {self.images.labels.line(self.row)}: "

    def problem(self, text: str) -> Problem:
        return self.images.labels.problem(self.row, text.removeprefix(self.where))


class LabelledImages:
    """A sequence of `LabelledImage`s, each created when it is indexed.

    It has an `iloc`, like a DataFrame, so that fastcore's `L` does not convert it to a list: a list of 393,930 items
    would take 40 MB, and be copied into each worker page by page.
    """

    def __init__(
        self,
        labels: "Labels | FrameLabels",
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

    def sample(self, at_most: int) -> Iterator[LabelledImage]:
        "Yield at most that many images, evenly spaced."
        step = max(1, -(-len(self) // at_most))
        return (self[i] for i in range(0, len(self), step))


class FrameLabels(Table):
    """The rows of a DataFrame of file names and coordinates, with the methods of `Labels`.

    Raises `UserError` for a wrong number of columns, no rows, or a coordinate that is not a number.
    """

    def __init__(self, frame: pd.DataFrame):
        if frame.shape[1] < 3 or frame.shape[1] % 2 == 0 or not len(frame):
            found = f"{len(frame)} rows and {frame.shape[1]} columns"
            raise UserError(f"the DataFrame has {found}: a column of file names, then x0, y0, x1, y1, … expected")
        try:
            values = frame.iloc[:, 1:].to_numpy(np.float32)
        except (ValueError, TypeError) as e:
            raise UserError(f"the DataFrame holds a coordinate that is not a number ({e})") from None
        names: list[str] = frame.iloc[:, 0].astype(str).tolist()
        key = {"rows": len(names), "digest": hashlib.sha256("\n".join(names).encode()).hexdigest()}
        super().__init__(Path("DataFrame"), key, names, np.arange(len(names)))  # no file: image checks are not stored
        self.values = values.reshape(len(frame), -1, 2)
        self.n_points: int = self.values.shape[1]
        self.identity = {"rows": len(names), "points": self.n_points, "digest": key["digest"]}

    def points(self, row: int) -> np.ndarray:
        return self.values[row]

    def read_points(self, start: int, stop: int) -> np.ndarray:
        return self.values[start:stop]

    def faults(self) -> dict[int, str]:
        rows = np.flatnonzero(~np.isfinite(self.values).all((1, 2)))
        return dict.fromkeys(rows.tolist(), "a coordinate is NaN or infinite: fix or delete this row")


def labelled_images(
    source: str | Path | pd.DataFrame | LabelledImages,
    image_folder: str | Path | None = None,  # of a DataFrame's file names
    on_bad: str = "stop",
    listing: Path | None = None,
    left_out: np.ndarray | None = None,
) -> LabelledImages:
    """Check all rows of a folder in the competition's layout (`train/landmarks.csv`, `train/images/`) or of a DataFrame.

    Raises `BadData` with all bad rows; with `on_bad="skip"` it prints how many are left out, and lists them in `listing`.
    A resumed run passes the rows that it started without as `left_out`: it continues without those, whatever the check finds.
    """
    if isinstance(source, LabelledImages):
        return source
    if isinstance(source, pd.DataFrame):
        labels, folder = FrameLabels(source), Path(image_folder or ".")
    else:
        train = data_folder(source) / "train"
        if not os.path.isfile(train / "landmarks.csv"):  # False, not an error, for a folder without permission
            raise UserError(f"{train / 'landmarks.csv'} not found; -d must be the folder that holds train/ and test/")
        labels, folder = open_labels(train / "landmarks.csv"), train / "images"
    faults = labels.faults()
    found = check_images(labels, folder, labels.read_points, list(faults))
    if left_out is not None:
        if leaving := [r for r in found.rows.tolist() if found.faults[r] == LEAVES and r not in left_out]:
            raise BadData(map(found.problem, leaving), len(leaving))
        return LabelledImages(labels, folder, left_out, listing)
    rows = np.union1d(found.rows, list(faults)).astype(np.int64)
    problems = (labels.problem(r, faults[r]) if r in faults else found.problem(r) for r in rows.tolist())
    _report_bad_rows(len(rows), problems, len(labels), on_bad, listing)
    return LabelledImages(labels, folder, rows, listing)


def _report_bad_rows(n_bad: int, problems: Iterable[Problem], n_rows: int, on_bad: str, listing: Path | None) -> None:
    "Raise `BadData`, or list the bad rows and print how many are left out."
    stop = n_bad > 0 and (on_bad == "stop" or n_bad == n_rows)
    if not is_first():
        pass  # the first process writes the list
    elif listing and n_bad > (SHOWN if stop else 0):
        problems = list(problems)
        write_listing(listing, problems)
    elif listing:
        Path(listing).unlink(missing_ok=True)  # from an earlier start
    if stop:
        raise BadData(problems, n_bad, "--on-bad skip" if n_bad < n_rows else "", listing)
    if n_bad:
        print(f"{n_bad} of {n_rows} rows are bad and left out" + (f": {listing}" if listing else ""))
