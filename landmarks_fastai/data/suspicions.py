"""Labels that can be read but are probably not the points that they are taken for. Each is one line before training.

They are found in the numbers of at most 2,000 rows. Where no right reading is likely, the line is an error.
"""

import numpy as np

from landmarks_fastai.data.labels import Labels
from landmarks_fastai.errors import UserError

SAMPLE = 2000  # rows
FEW = 4  # rows: too few to tell
COLUMNS = "name the columns, as in nose_x, nose_y, nose_visible"


def check_suspicions(labels: Labels) -> None:
    "Raise `UserError` for the first suspicion: these numbers are not points (x, y) in pixels."
    if texts := suspicions(labels):
        raise UserError(f"{labels.csv}: {texts[0]}")


def suspicions(labels: Labels) -> list[str]:
    "Return what the labels probably are instead of points in pixels."
    rows = [row for row in range(0, len(labels), max(1, len(labels) // SAMPLE)) if row not in labels.faults]
    if len(rows) < FEW:
        return []
    points = labels.stored[rows].astype(np.float64)
    missing = _missing_numbers(points)
    if not missing and (text := _fractions(points)):  # the other tests count in pixels
        return [text]
    return [text for text in (_visibility(points), missing, _planar(points), _box(points)) if text]


def check_labelled(labels: Labels, rows: np.ndarray) -> None:
    "Raise `UserError` for a point that none of the rows to train on has."
    if labels.stored.dtype != np.float32:  # whole numbers: of a file without gaps
        return
    rows, unseen = np.setdiff1d(rows, list(labels.faults)), np.ones(labels.n_points, bool)
    for start in range(0, len(rows), SAMPLE):  # of most files the first rows have every point
        unseen &= np.isnan(labels.stored[rows[start : start + SAMPLE]]).any(-1).all(0)
        if not unseen.any():
            return
    if len(rows):
        missing = np.flatnonzero(unseen)
        names = [labels.point_names[k] if labels.point_names else str(k) for k in missing]
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        raise UserError(
            f"{labels.csv}: no training row has point {', '.join(names[:5])}{more}: remove it from the labels"
        )


def _visibility(points: np.ndarray) -> str:
    "x, y, visible of each point, taken as x, y."
    values = points.reshape(len(points), -1)
    if values.shape[1] % 3 or values.shape[1] < 6 or np.isnan(values).any():
        return ""
    third, others = values[:, 2::3], np.delete(values, np.s_[2::3], axis=1)
    if third.min() < 0 or third.max() > 2 or np.median(abs(others)) <= 2:
        return ""
    return f"every third number is from 0 to 2, as x, y, visible of {values.shape[1] // 3} points: {COLUMNS}"


def _missing_numbers(points: np.ndarray) -> str:
    "(0, 0) or (-1, -1) for a missing point: of many of all, or of half of a landmark's."
    same, labelled = (points[..., 0] == points[..., 1]) & (points[..., 0] <= 0), np.isfinite(points[..., 0])
    count, n = same.sum(), labelled.sum()
    constant = (same.sum(0) >= 3) & (2 * same.sum(0) >= labelled.sum(0))
    if count < 3 or (count < 0.005 * n and not constant.any()):
        return ""
    value = np.unique(points[same][:, 0])[0]
    said = f"{count} of {n} points are exactly ({value:g}, {value:g})"
    return f"{said}, as a missing point is written: leave its cells empty, or add a column nose_visible with 0"


def _fractions(points: np.ndarray) -> str:
    "Fractions of the image's sides; points outside of the image are a little below 0, or above 1."
    if np.nanmedian(np.nanmax(abs(points), axis=(1, 2))) > 2:
        return ""
    return "most rows have no coordinate beyond 2, as fractions of the image's sides, or from -1 to 1: write them in pixels"


def _planar(points: np.ndarray) -> str:
    """x of all points, then y of all points.

    Read as pairs, these are either much larger (x and y of a place far from the diagonal are mixed), or of no common shape.
    """
    values = points.reshape(len(points), -1)
    values = values[np.isfinite(values).all(1)]
    if len(values) < FEW or points.shape[1] < 3:
        return ""
    half = values.shape[1] // 2
    pairs, planar = values[:, 0::2] + 1j * values[:, 1::2], values[:, :half] + 1j * values[:, half:]
    growth = np.median(pairs.var(1)) / max(1e-9, np.median(planar.var(1)))
    shapeless = _residual(pairs) > max(0.02, 4 * _residual(planar))
    if growth < 2.25 and not (shapeless and growth > 0.7):
        return ""
    return f"the objects have a common shape only if x of all points stands before y of all points: {COLUMNS}"


def _residual(shapes: np.ndarray) -> float:
    "Return how far shapes, complex (rows, n_points), are from their mean shape once they are aligned: 0 to 1."
    shapes = shapes - shapes.mean(1, keepdims=True)
    shapes = shapes / np.maximum(1e-9, np.linalg.norm(shapes, axis=1, keepdims=True))
    mean = shapes[0]
    for _ in range(5):
        turn = (shapes @ mean.conj())[:, None]
        mean = (shapes * turn.conj() / np.maximum(1e-9, abs(turn))).mean(0)
        mean = mean / max(1e-9, float(np.linalg.norm(mean)))
    return float(1 - np.mean(abs(shapes @ mean.conj()) ** 2))


def _box(points: np.ndarray) -> str:
    "A box before or after the points: two corners, or a corner and a size. It fits the others closely in each row."
    if points.shape[1] < 6 or len(points) < 10:
        return ""
    sides = ("first", points[:, :2], points[:, 2:]), ("last", points[:, -2:], points[:, :-2])
    for where, box, rest in sides:
        low, high = np.nanmin(rest, axis=1), np.nanmax(rest, axis=1)
        slack = (high - low) / 2 + 2
        for corner in (box[:, 1], box[:, 0] + box[:, 1]):
            before, after = low - box[:, 0], corner - high
            if min(before.min(), after.min()) >= -1 and (before < slack).all() and (after < slack).all():
                said = f"the {where} four numbers are a box around the others"
                return f"{said}: name the columns left, top, right, bottom"
    return ""
