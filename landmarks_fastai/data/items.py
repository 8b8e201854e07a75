"""The items of a `DataBlock`: labelled images, taken from a folder in the competition's layout or from a DataFrame.

Every row is checked before training: all that is wrong is told at once, or left out with `on_bad="skip"`.
"""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from landmarks_fastai.data.checks import LEAVES, check_images, write_listing
from landmarks_fastai.data.labels import Labels, data_folder, open_labels
from landmarks_fastai.errors import SHOWN, BadData, Problem, UserError
from landmarks_fastai.geometry import PixelMap
from landmarks_fastai.utils.parallel import bar


class CropIndex(int):
    """An index of an item that is seen through an aligned crop, where a plain index gives the whole image.

    `to_input` is the map of the crop; None takes the one of the item's own points.
    """

    to_input: PixelMap | None = None

    def __bool__(self) -> bool:
        return True  # fastai asks for `dataset[index or 0]`, which would make the crop of item 0 the plain item 0

    @classmethod
    def of(cls, index: int, to_input: PixelMap | None = None) -> "CropIndex":
        found = cls(index)
        found.to_input = to_input
        return found


@dataclass(frozen=True, slots=True)
class LabelledImage:
    "One row of a table of labels, seen whole or through an aligned crop."

    images: "LabelledImages"
    row: int
    crop: CropIndex | None = None

    @property
    def path(self) -> Path:
        return self.images.folder / self.images.labels.name(self.row)

    @property
    def points(self) -> np.ndarray:
        "Float32 (n_points, 2), pixels of the image as stored."
        return self.images.labels.points(self.row)

    @property
    def where(self) -> str:
        "How an error about the image begins."
        return f"{self.images.labels.csv} line {self.images.labels.line(self.row)}: "

    def problem(self, text: str) -> Problem:
        return self.images.labels.problem(self.row, text.removeprefix(self.where))


class LabelledImages:
    """Rows of a table of labels as `LabelledImage`s, each made when it is asked for.

    fastcore's `L`, which every list of fastai is, leaves what has an `iloc` as it is: so it takes a DataFrame, and so it
    takes this. A list of 393,930 items would take 40 MB, and be copied into each worker page by page.
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

    def __getitem__(self, i):
        if isinstance(i, (int, np.integer)):
            return LabelledImage(self, int(self.rows[i]), i if isinstance(i, CropIndex) else None)
        return LabelledImages(self.labels, self.folder, self.left_out, self.listing, self.rows[i])

    @property
    def all_rows(self) -> "LabelledImages":
        "Of the same table, whatever part this is."
        return LabelledImages(self.labels, self.folder, self.left_out, self.listing)

    def sample(self, at_most: int) -> Iterator[LabelledImage]:
        "At most so many of them, evenly spaced."
        step = max(1, -(-len(self) // at_most))
        return (self[i] for i in range(0, len(self), step))


class FrameLabels:
    "A DataFrame of file names and coordinates, with the methods of `Labels`."

    csv = Path("DataFrame")  # no file: what is found of its images is not kept for a later start

    def __init__(self, frame: pd.DataFrame):
        if frame.shape[1] < 3 or frame.shape[1] % 2 == 0 or not len(frame):
            raise UserError(
                f"the DataFrame has {len(frame)} rows and {frame.shape[1]} columns: a column of file names, then x0, y0, x1, y1, … expected"
            )
        try:
            values = frame.iloc[:, 1:].to_numpy(np.float32)
        except (ValueError, TypeError) as e:
            raise UserError(f"the DataFrame holds a coordinate that is no number ({e})") from None
        self.names, self.values = frame.iloc[:, 0].astype(str).tolist(), values.reshape(len(frame), -1, 2)
        self.n_points = self.values.shape[1]
        names = "\n".join(self.names).encode()
        self.key = {"rows": len(self.names), "digest": hashlib.sha256(names).hexdigest()}

    @property
    def identity(self) -> dict:
        return {"rows": len(self), "points": self.n_points, "digest": self.key["digest"]}

    def __len__(self) -> int:
        return len(self.names)

    def name(self, row: int) -> str:
        return self.names[row]

    def line(self, row: int) -> int:
        return row

    def lines_and_names(self) -> Iterator[tuple[int, str]]:
        return enumerate(self.names)

    def points(self, row: int) -> np.ndarray:
        return self.values[row]

    def some_points(self, start: int, stop: int) -> np.ndarray:
        return self.values[start:stop]

    def faults(self) -> dict[int, str]:
        rows = np.flatnonzero(~np.isfinite(self.values).all((1, 2)))
        return dict.fromkeys(rows.tolist(), "a coordinate is NaN or infinite: fix or delete this row")

    def problem(self, row: int, text: str) -> Problem:
        return Problem(self.csv, row, self.names[row], text)


def labelled_images(
    source: "str | Path | pd.DataFrame | LabelledImages",
    image_folder: "str | Path | None" = None,  # of a DataFrame's file names
    on_bad: str = "stop",
    listing: Path | None = None,
    left_out: np.ndarray | None = None,
    progress=bar,
) -> LabelledImages:
    """The rows of a folder in the competition's layout (`train/landmarks.csv`, `train/images/`) or of a DataFrame, checked.

    Raises `BadData` with all that is wrong; with `on_bad="skip"` it prints how many rows are left out, and lists them in
    `listing`. A resumed run names the rows that it began without in `left_out`: it goes on without those, whatever is
    wrong now.
    """
    if isinstance(source, LabelledImages):
        return source
    if isinstance(source, pd.DataFrame):
        labels, folder = FrameLabels(source), Path(image_folder or ".")
    else:
        side = data_folder(source) / "train"
        if not os.path.isfile(side / "landmarks.csv"):  # False, not an error, where a folder is closed
            raise UserError(f"{side / 'landmarks.csv'} not found; -d wants the folder that holds train/ and test/")
        labels, folder = open_labels(side / "landmarks.csv"), side / "images"
    faults = labels.faults()
    found = check_images(labels, folder, labels.some_points, list(faults), progress)
    if left_out is not None:
        leaving = [r for r in found.rows.tolist() if found.faults[r] == LEAVES and r not in left_out]
        if leaving:
            raise BadData(map(found.problem, leaving), len(leaving))
        return LabelledImages(labels, folder, left_out, listing)
    rows = np.union1d(found.rows, list(faults)).astype(np.int64)
    problems = (labels.problem(r, faults[r]) if r in faults else found.problem(r) for r in rows.tolist())
    _report_bad_rows(rows, problems, labels, on_bad, listing)
    return LabelledImages(labels, folder, rows, listing)


def _report_bad_rows(rows, problems, labels, on_bad, listing):
    "Stop with the bad rows, or list them and print how many are left out."
    stops = len(rows) > 0 and (on_bad == "stop" or len(rows) == len(labels))
    if listing and len(rows) > (SHOWN if stops else 0):
        problems = list(problems)
        write_listing(listing, problems)
    elif listing:
        Path(listing).unlink(missing_ok=True)  # of an earlier start
    if stops:
        raise BadData(problems, len(rows), "--on-bad skip" if len(rows) < len(labels) else "", listing)
    if len(rows):
        print(f"{len(rows)} of {len(labels)} rows are bad and left out" + (f": {listing}" if listing else ""))
