"Describe labels in words and in a picture, and write them as a plain CSV or as COCO keypoints."

import csv
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from landmarks_fastai import plots
from landmarks_fastai.data.formats.written import DIGITS, coco_annotation, coco_category, csv_columns
from landmarks_fastai.data.images import open_undecoded
from landmarks_fastai.data.labels import Labels
from landmarks_fastai.data.pictures import Picture
from landmarks_fastai.geometry import square_map
from landmarks_fastai.utils.files import atomic_write

DRAWN, SIDE, MARGIN = 6, 480, 1.4  # rows; pixels of a view; times the size of the points' box
LISTED = 20  # names in a line


def names_of_points(labels: Labels) -> list[str]:
    "Return the names of the points, or their numbers."
    return list(labels.point_names) or [str(k) for k in range(labels.n_points)]


def _shown(names: Sequence[str]) -> str:
    return ", ".join(names if len(names) <= LISTED else [*names[:8], f"… ({len(names)} in all)"])


def describe(labels: Labels) -> Iterator[str]:
    "Yield lines: objects an image, points and how often each is missing, groups, validation rows, boxes."
    objects = Counter(Counter(map(labels.name, range(len(labels)))).values())
    yield "objects an image: " + ", ".join(f"{n} in {images} images" for n, images in sorted(objects.items()))
    missing, names = np.isnan(labels.stored).any(-1).sum(0), names_of_points(labels)
    gaps = [f"{name} {n}" for name, n in zip(names, missing.tolist(), strict=True) if n]
    yield f"points: {_shown(names)}"
    yield f"missing in {len(labels)} rows: {_shown(gaps) or 'none'}"
    for what, values in (("groups", labels.groups), ("validation rows", labels.valid), ("boxes", labels.boxes)):
        if isinstance(values, np.ndarray):
            yield f"{what}: {int((values if values.ndim == 1 else np.isfinite(values).all(1)).sum())}"
        elif values:
            counts = Counter(values).most_common()
            yield f"{what}: {_shown([f'{group} ({n} rows)' for group, n in counts])}"


def draw_rows(labels: Labels, folder: Path, rows: Sequence[int], path: Path) -> None:
    "Draw the points of a few evenly spaced rows, with their names, into a picture."
    panels = []
    for row in rows[:: -(-len(rows) // DRAWN)]:
        points = labels.points(row)
        view = square_map(points, MARGIN, SIDE, 32.0)
        ((pixels, to_input),) = Picture(folder / labels.name(row), exif=False).inputs([view], "pad", SIDE)
        panels.append((pixels, to_input.to_input(points), f"{labels.name(row)}, {labels.where(row)}"))
    plots.plot_names(panels, names_of_points(labels))
    plots.save_figure(path)


def write_labels(labels: Labels, folder: Path, rows: Sequence[int], path: Path) -> Path:
    """Write rows as a plain CSV, or as COCO keypoints if `path` ends in .json; `sources.py` reads both again.

    File names are relative to the file's folder if all images are in it, else to `folder`; returns which.
    """
    root, images = Path(path).resolve().parent, [(folder / labels.name(row)).resolve() for row in rows]
    if not all(image.is_relative_to(root) for image in images):
        root = folder.resolve()
    names = [Path(os.path.relpath(image, root)).as_posix() for image in images]
    with atomic_write(Path(path)) as f:
        if path.suffix.lower() == ".json":
            json.dump(_coco(labels, rows, names, images), f, ensure_ascii=False)
        else:
            csv.writer(f, lineterminator="\n").writerows(_cells(labels, rows, names))
    return root


def not_written(labels: Labels, path: Path) -> list[str]:
    "Return what the labels say and the file of `write_labels` does not."
    both = {"validation rows": labels.valid is not None, "flip indices": labels.flip_indices}
    of_csv = {"skeleton": labels.skeleton, "category": labels.category}
    rest = {"groups": labels.groups} if path.suffix.lower() == ".json" else of_csv
    return [what for what, value in (both | rest).items() if value]


def _cells(labels: Labels, rows: Sequence[int], names: Sequence[str]) -> Iterator[list[str]]:
    group = ["group"] if labels.groups else []
    box = ["left", "top", "right", "bottom"] if labels.boxes is not None else []
    yield ["file_name", *group, *box, *csv_columns(labels.point_names, labels.n_points)]
    for row, name in zip(rows, names, strict=True):
        numbers = [*(labels.boxes[row] if labels.boxes is not None else ()), *labels.points(row).ravel()]
        group = [labels.groups[row]] if labels.groups else []
        yield [name, *group, *("" if np.isnan(v) else f"{v:.{DIGITS}f}" for v in numbers)]


def _coco(labels: Labels, rows: Sequence[int], names: Sequence[str], paths: Sequence[Path]) -> dict[str, Any]:
    images: dict[str, Any] = {}
    annotations: list[Any] = []
    for row, name, path in zip(rows, names, paths, strict=True):
        if name not in images:
            with open_undecoded(path) as image:
                images[name] = {"id": len(images) + 1, "file_name": name, "width": image.width, "height": image.height}
        box = None if labels.boxes is None or np.isnan(labels.boxes[row]).any() else labels.boxes[row]
        annotations.append(coco_annotation(len(annotations) + 1, images[name]["id"], labels.points(row), box))
    category = coco_category(labels.point_names, labels.n_points, labels.skeleton, labels.category)
    return {"images": list(images.values()), "annotations": annotations, "categories": [category]}
