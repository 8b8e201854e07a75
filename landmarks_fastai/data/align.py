"""Aligned crops: a second pass of the network over each object, turned upright and scaled to fill the input.

The points of the first pass, or in training the labelled ones, are laid onto the mean shape by the similarity with the
least squared distances (Procrustes analysis, Gower 1975). The crop shows the mean shape's box, `margin` times as large.
The flip test makes a third pass, over crops by the second's points.
"""

from dataclasses import dataclass

import numpy as np

from landmarks_fastai.geometry import PixelMap, unit_to_input
from landmarks_fastai.missing import MIN_POINTS, fill_missing, nan_mean
from landmarks_fastai.settings import DataFacts, Settings

PASSES, GAPPY_PASSES = 10, 100  # of `procrustes_mean`; halves of faces need 40, 30% missing at random 6
CONVERGED = 1e-4  # radii by which the last pass moves a point of the mean shape
# Root mean square distance from the mean shape, in radii of the fitted shape, from which points are not taken for the
# object. Real faces: 0.11 in the median, 0.35 at the 99th percentile, 0.51 at the most; points drawn at random: 8.
MAX_MISFIT = 1.0
MAX_SCALE = 16.0  # pixels of the input in one stored pixel: a crop of 8 stored pixels at 128 px shows nothing
DIGITS = 4  # of the mean shape in the facts
# Least factor by which aligned crops must reduce the spread of the points. Photographs of faces: 3.8; drawn faces: 5.1.
MIN_GAIN = 1.5


class NoShape(Exception):
    "The labelled points have no shape to align; the message says why."


@dataclass(frozen=True)
class Alignment:
    "Where the mean shape lies in an aligned crop."

    shape: np.ndarray  # (n_points, 2), centred, of radius 1, y down
    margin: float  # side of the crop, in sides of the shape's box
    size: int  # of the network's input

    def maps_of_labels(self, points: np.ndarray) -> list[PixelMap | None]:
        "As `maps`; missing points are filled in from the mean shape. A predicted NaN has no crop."
        return self.maps(fill_missing(points, self.shape))

    def maps(self, points: np.ndarray) -> list[PixelMap | None]:
        """The maps from the images as stored to their aligned crops; None where the points make no plausible shape.

        `points` (images, n_points, 2) are pixels of the images as stored.
        """
        mean = self.shape @ [1, 1j]
        low, high = self.shape.min(0), self.shape.max(0)
        zoom = self.size / (self.margin * (high - low).max())  # pixels of the input in one radius of the shape
        middle = (low + high) / 2 @ [1, 1j]
        with np.errstate(all="ignore"):  # points that are not finite have no map
            z = np.asarray(points, np.float64) @ [1, 1j]
            centre = z.mean(1)
            factor = (z - centre[:, None]) @ mean.conj() / (abs(mean) ** 2).sum()  # points = factor * mean + centre
            misfit = np.sqrt((abs(z - centre[:, None] - factor[:, None] * mean) ** 2).mean(1)) / abs(factor)
            turn = zoom / factor
            shift = unit_to_input(np.zeros(2), self.size) @ [1, 1j] - zoom * middle - turn * centre
        plausible = (misfit <= MAX_MISFIT) & (abs(turn) <= MAX_SCALE)  # False for NaN
        return [
            PixelMap(*map(float, (t.real, -t.imag, s.real, t.imag, t.real, s.imag))) if ok else None
            for t, s, ok in zip(turn, shift, plausible, strict=True)
        ]


def alignment_of(settings: Settings, facts: DataFacts) -> Alignment | None:
    "Return the alignment of the aligned crops; None if there is no second pass."
    if not settings.align or facts.align_gain < MIN_GAIN:
        return None
    return Alignment(np.array(facts.shape).reshape(-1, 2), settings.align, settings.size)


def report_unaligned(n: int, total: int) -> None:
    "Print how many objects have no crop, where there are some."
    if n:
        print(f"no plausible shape after a pass in {n} of {total} objects: that pass's points are used", flush=True)


def procrustes_mean(shapes: np.ndarray) -> np.ndarray:
    """Mean shape (n, 2) of shapes (rows, n, 2): centred, of radius 1, as upright as they are on average.

    Generalised Procrustes analysis (Gower 1975). Missing points are filled in from the last mean to place a row, and do
    not count in the next. Raises `NoShape` where in every row all points are equal.
    """
    points = np.asarray(shapes, np.float64)
    missing = np.isnan(points[..., 0])
    enough = (~missing).sum(1) >= min(MIN_POINTS, points.shape[1])
    turned = normalised(points[enough])
    different = np.isfinite(turned).any(1)
    points, missing, turned = points[enough][different], missing[enough][different], turned[different]
    if not len(points):
        raise NoShape("in every row all points are equal")
    mean = nan_mean(turned, 0)
    if np.nanmax(abs(mean)) < 1e-9:
        mean = turned[0]
    mean = np.where(np.isnan(mean), 0, mean)  # a point that no row has
    gaps, turn = bool(missing.any()), np.empty(0)
    for _ in range(GAPPY_PASSES if gaps else PASSES):
        before = mean
        if gaps:
            turned = np.where(missing, np.nan, normalised(fill_missing(points, as_points(mean))))
        turn = rotation_onto(turned, mean)
        aligned = turned * turn[:, None]
        far = nan_mean(abs(aligned - mean), 1)
        mean = nan_mean(aligned[far <= 3 * np.nanmedian(far)], 0)  # a row with shifted labels has no vote
        if gaps:
            mean = np.where(np.isnan(mean), before, mean)
            mean = mean - mean.mean()
        mean = mean / np.sqrt((abs(mean) ** 2).mean())
        if gaps and abs(mean - before).max() < CONVERGED:
            break
    upright = nan_mean(turn.conj())
    mean = mean * (upright / abs(upright) if abs(upright) > 1e-6 else 1)
    return as_points(mean)


def as_points(shape: np.ndarray) -> np.ndarray:
    "Points (…, n, 2) of a complex shape (…, n)."
    return np.stack([np.real(shape), np.imag(shape)], -1)


def normalised(points: np.ndarray) -> np.ndarray:
    "Complex shapes (rows, n), centred and of radius 1, of points (rows, n, 2); NaN where all points of a row are equal."
    shapes = points @ [1, 1j]
    shapes = shapes - nan_mean(shapes, 1)[:, None]
    radius = np.sqrt(nan_mean(abs(shapes) ** 2, 1))[:, None]
    with np.errstate(invalid="ignore", divide="ignore"):
        return shapes / np.where(radius > 0, radius, np.nan)


def rotation_onto(shapes: np.ndarray, onto: np.ndarray) -> np.ndarray:
    "Rotations, complex numbers of length 1, that turn each complex shape (…, n) onto another."
    inner = np.nansum(onto * shapes.conj(), -1)
    return inner / np.maximum(abs(inner), 1e-12)
