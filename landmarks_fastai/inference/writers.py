"""Files of predicted points: csv, json, coco, cvat, pts and npy.

Coordinates are pixels of the picture, and (0, 0) is the centre of its top-left pixel; in .pts files it is (1, 1), as in
those of 300-W, and for CVAT (0.5, 0.5). Results are written as they come. An object that has a spread for each point
(`confidence`) has it in every format.
"""

import csv
import json
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from itertools import chain, count
from pathlib import Path
from typing import IO, Any

import numpy as np

from landmarks_fastai.data.formats.table import EDGE
from landmarks_fastai.data.formats.written import DIGITS, coco_annotation, coco_category, csv_columns, rounded
from landmarks_fastai.inference.predictor import PictureResult, Prediction
from landmarks_fastai.runs.run import PREDICTIONS
from landmarks_fastai.settings import DataFacts
from landmarks_fastai.utils.files import atomic_write

Write = Callable[[PictureResult], None]


@contextmanager
def open_writer(
    kind: str,  # one of `WRITERS`
    folder: Path,  # gets the file of `PREDICTIONS`, or a folder of .pts files
    facts: DataFacts,  # of the network: number and names of the points
    confidence: bool,  # whether the objects have a spread
) -> Iterator[tuple[Write, Path]]:
    "Yield a function that writes a result, and the path of the file. Files are written completely or not at all."
    with ExitStack() as files:
        path = folder / PREDICTIONS[kind]
        yield WRITERS[kind](files, path, facts, confidence), path


def _csv(files: ExitStack, path: Path, facts: DataFacts, confidence: bool) -> Write:
    """One row an object: file_name, frame, object, x0, y0, …, then the spreads s0, …; empty cells for a picture without any.

    Columns of points that have names are NAME_x, NAME_y, NAME_s.
    """
    table = csv.writer(files.enter_context(atomic_write(path)), lineterminator="\n")
    columns = csv_columns(facts.point_names, facts.n_points)
    columns += csv_columns(facts.point_names, facts.n_points, "s") if confidence else []
    table.writerow(["file_name", "frame", "object", *columns])

    def write(result: PictureResult) -> None:
        for number, prediction in _numbered(result):
            numbers = chain(prediction.points.ravel(), () if prediction.confidence is None else prediction.confidence)
            table.writerow([result.source, result.frame, number, *(f"{v:.{DIGITS}f}" for v in numbers)])
        if not result.objects:
            table.writerow([result.source, result.frame, "", *([""] * len(columns))])

    return write


def _json(files: ExitStack, path: Path, facts: DataFacts, confidence: bool) -> Write:
    "A list with one entry a picture or frame, each with a list of its objects."
    add = _list(files, files.enter_context(atomic_write(path)))

    def write(result: PictureResult) -> None:
        objects = []
        for number, p in _numbered(result):
            entry = {"object": number, "box": rounded(p.box), "score": rounded(p.score)}
            objects.append(_without_none(entry | {"points": rounded(p.points), "confidence": rounded(p.confidence)}))
        entry = _image(result) | {"time": result.time, "exif_rotation_applied": result.rotated or None}
        add(_without_none(entry | {"error": result.error or None, "objects": objects}))

    return write


def _coco(files: ExitStack, path: Path, facts: DataFacts, confidence: bool, origin: float = 0.0) -> Write:
    """COCO's keypoint format: images, annotations with keypoints x, y, 2 (visible), one category.

    File names are relative to the folder that all pictures are in: CVAT compares their last parts with its own names.
    """
    file = files.enter_context(atomic_write(path))
    skeleton = list(zip(facts.skeleton[::2], facts.skeleton[1::2], strict=True))
    category = coco_category(facts.point_names, facts.n_points, skeleton, facts.category)
    file.write(f'{{"categories": {json.dumps([category])},\n"annotations": ')
    images: list[dict] = []  # without points: a hundred bytes a picture
    files.callback(lambda: file.write(f',\n"images": {json.dumps(_in_common_folder(images), ensure_ascii=False)}}}\n'))
    add, numbers = _list(files, file), count(1)

    def write(result: PictureResult) -> None:
        images.append(_without_none({"id": len(images) + 1} | _image(result)))
        for prediction in result.objects:
            entry = coco_annotation(next(numbers), len(images), prediction.points, origin=origin)
            add(_without_none(entry | {"score": prediction.score, "confidence": rounded(prediction.confidence)}))

    return write


def _pts(files: ExitStack, path: Path, facts: DataFacts, confidence: bool) -> Write:
    "A text file an object, as those of 300-W; spreads are the third number of a line. Earlier files are deleted."
    for earlier in path.rglob("*.pts"):
        earlier.unlink()
    names, n_points = OutputNames(path), facts.n_points

    def write(result: PictureResult) -> None:
        frame = "" if result.frame is None else f"_{result.frame:06}"
        for k, prediction in _numbered(result):
            number = f"_{k}" if len(result.objects) > 1 or prediction.track is not None else ""
            columns = [prediction.points + 1] + ([] if prediction.confidence is None else [prediction.confidence])
            head = f"version: 1\nn_points: {n_points}\n{{"
            with atomic_write(names(result.source, f"{frame}{number}.pts")) as file:
                np.savetxt(file, np.column_stack(columns), f"%.{DIGITS}f", header=head, footer="}", comments="")

    return write


def _npy(files: ExitStack, path: Path, facts: DataFacts, confidence: bool) -> Write:
    "predictions.npy (objects, n_points, 2) and predictions.names.json, the file, frame and object of each row; NaN for none."
    n_points = facts.n_points
    rows = files.enter_context(npy_file(path, (n_points, 2)))
    spreads = files.enter_context(npy_file(path.with_suffix(".confidence.npy"), (n_points,))) if confidence else None
    add = _list(files, files.enter_context(atomic_write(path.with_suffix(".names.json"))))
    none = Prediction(np.full((n_points, 2), np.nan))

    def write(result: PictureResult) -> None:
        for number, prediction in _numbered(result) or [(None, none)]:
            rows(prediction.points)
            if spreads:
                spreads(np.full(n_points, np.nan) if prediction.confidence is None else prediction.confidence)
            add([result.source, result.frame, number])

    return write


# CVAT imports COCO keypoints as they are, and counts from the pixel's edge
WRITERS = {"csv": _csv, "json": _json, "coco": _coco, "cvat": partial(_coco, origin=EDGE), "pts": _pts, "npy": _npy}


@contextmanager
def npy_file(path: Path, shape: tuple[int, ...]) -> Iterator[Callable[[np.ndarray], None]]:
    "A .npy of an unknown number of rows: numpy's header has room for the number, which is written at the end."
    count = 0
    with atomic_write(path, "wb") as file:

        def header() -> None:
            head = {"descr": "<f4", "fortran_order": False, "shape": (count, *shape)}
            np.lib.format.write_array_header_1_0(file, head)

        def write(row: np.ndarray) -> None:
            nonlocal count
            count += 1
            file.write(np.ascontiguousarray(row, "<f4").data)

        header()
        yield write
        file.seek(0)
        header()


def _list(files: ExitStack, file: IO[str]) -> Callable[[Any], None]:
    "A JSON list whose entries are written as they come."
    separator = "[\n"

    def add(entry: Any) -> None:
        nonlocal separator
        file.write(separator + json.dumps(entry, ensure_ascii=False))
        separator = ",\n"

    files.callback(lambda: file.write("\n]" if separator != "[\n" else "[]"))
    return add


class OutputNames:
    """The files of a folder that are made of pictures and videos, each with a name of its own.

    A file has the picture's path below the folder, without drive and root; `..` becomes `__`. Where another picture has that
    name already, it is the picture's whole name, or has a number: a.pts, a.png.pts, a_2.pts.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.sources: dict[Path, str] = {}  # of each file

    def __call__(self, source: str, suffix: str) -> Path:
        "Return the path of the file with this suffix of a picture. Its folder is created."
        path = Path(source or "picture")
        folder = self.folder.joinpath(
            *("__" if part == ".." else part for part in path.parts[:-1] if part != path.anchor)
        )
        for name in chain((path.stem, path.name), (f"{path.stem}_{k}" for k in count(2))):
            made = folder / (name + suffix)
            if self.sources.setdefault(made, source) == source:
                folder.mkdir(parents=True, exist_ok=True)
                return made
        raise AssertionError


def _in_common_folder(images: list[dict]) -> list[dict]:
    "Return the images with file names relative to the folder that all are in, where there is one."
    with suppress(ValueError):  # no images, absolute and relative paths, several drives
        common = os.path.commonpath([os.path.dirname(image["file_name"]) for image in images])
        return [image | {"file_name": Path(image["file_name"]).relative_to(common).as_posix()} for image in images]
    return images


def _image(result: PictureResult) -> dict[str, Any]:
    width, height = result.size
    return {"file_name": result.source, "width": width, "height": height, "frame": result.frame}


def _numbered(result: PictureResult) -> list[tuple[int, Prediction]]:
    return [(k if p.track is None else p.track, p) for k, p in enumerate(result.objects)]


def _without_none(entry: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in entry.items() if value is not None}
