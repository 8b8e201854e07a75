"What the files of labels and of predictions have in common: columns of a CSV, entries of COCO keypoints."

from collections.abc import Sequence
from typing import Any

import numpy as np

DIGITS = 3  # of a coordinate: a thousandth of a pixel


def csv_columns(
    names: Sequence[str],  # of the points; empty: they have numbers
    n_points: int,
    axes: str = "xy",
) -> list[str]:
    "Return the columns of points: nose_x, nose_y, …; without names x0, y0, …"
    if names:
        return [f"{name}_{axis}" for name in names for axis in axes]
    return [f"{axis}{k}" for k in range(n_points) for axis in axes]


def coco_category(
    names: Sequence[str],  # of the points; empty: they have numbers
    n_points: int,
    skeleton: Sequence[Sequence[int]],  # pairs of points that a line joins
    name: str = "",
) -> dict[str, Any]:
    "Return the one category of a COCO file, whose skeleton counts from 1."
    keypoints = list(names) or [str(k) for k in range(n_points)]
    bones = [[a + 1, b + 1] for a, b in skeleton]
    return {"id": 1, "name": name or "object", "keypoints": keypoints, "skeleton": bones}


def coco_annotation(
    number: int,
    image: int,  # number of the image
    points: np.ndarray,  # (n_points, 2) pixels; NaN: missing
    box: Sequence[float] | np.ndarray | None = None,  # left, top, right, bottom, pixel edges; None: of the points
    origin: float = 0.0,  # coordinate of the centre of the top-left pixel, in the file
) -> dict[str, Any]:
    """Return the annotation of an object: a missing point is 0, 0, 0, another has the visibility 2.

    CVAT's importer refuses annotations without a segmentation, and takes an empty one.
    """
    labelled = ~np.isnan(points).any(1)
    edges = np.concatenate([np.nanmin(points, axis=0), np.nanmax(points, axis=0)]) + 0.5 if box is None else box
    left, top, right, bottom = np.asarray(edges, np.float64).tolist()
    keypoints = np.column_stack([np.nan_to_num(points + origin), 2 * labelled]).ravel()
    entry = {"id": number, "image_id": image, "category_id": 1, "iscrowd": 0, "segmentation": []}
    entry |= {
        "bbox": rounded([left, top, right - left, bottom - top]),
        "area": rounded((right - left) * (bottom - top)),
    }
    return entry | {"num_keypoints": int(labelled.sum()), "keypoints": rounded(keypoints)}


def rounded(values: Any) -> Any:
    "Return numbers as JSON types, rounded; None for None."
    return None if values is None else np.asarray(values, np.float64).round(DIGITS).tolist()
