"""Which landmark becomes which in the mirror: a permutation learned from the labels alone.

A mirrored picture of a face is a face, but its points have changed names: the left eye's corner is now the right one's.
MMPose, DeepLabCut, albumentations and YOLO ask for that table by hand; here it is found. The shapes are aligned
(generalised Procrustes analysis, Gower 1975), their mean is reflected, and the two sets of points are matched one to
one at the least sum of squared distances (Hungarian assignment).
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from landmarks_fastai.data.align import NoShape, procrustes_mean, rotation_onto
from landmarks_fastai.utils.files import atomic_write

ROWS = 2000  # shapes that the mean is taken of
MIN_POINTS = 5  # of 200 random sets of 3 points 45 fit their reflection by chance, of 4 points 7, of 5 points 1
MAX_POINTS = 4000  # the matrix of distances grows with the square
# A set of points without symmetry, matched as well as it can be, misses by 2.8 times the distance between neighbours
# (971 random points; 68: 1.7; 5: 0.5), and by 0.12 of the radius (68: 0.28; 5: 0.37). Real faces miss by 0.26 and 0.016,
# drawn ones by 0.12 and 0.008. Both limits are needed: many points lie so dense that a miss is small, few so sparse.
FIT_SPACING, FIT_RADIUS = 0.5, 0.08


class NoFlipMap(Exception):
    "The points have no flip map; the message says why."


@dataclass(frozen=True)
class FlipMap:
    "`flip_indices[k]` is the index of the mirrored k-th point; `shape` is the mean shape it was found on, for drawing."

    flip_indices: np.ndarray  # (n_points,) int64, its own inverse
    shape: np.ndarray  # (n_points, 2), centred, of radius 1, y down
    miss: float  # root mean square distance of a mirrored point from its partner, in radii of the shape


def learn_flip_map(
    shapes,  # (rows, n_points, 2), pixels of the images as stored: each shape at its own place, size and tilt
) -> FlipMap:
    "The flip map of the shapes. Raises `NoFlipMap` where they have none."
    shapes = np.asarray(shapes, np.float64)
    if shapes.shape[1] < MIN_POINTS:
        raise NoFlipMap(f"{shapes.shape[1]} points are too few to tell, {MIN_POINTS} are needed")
    if shapes.shape[1] > MAX_POINTS:
        raise NoFlipMap(f"{shapes.shape[1]} points are too many to match ({MAX_POINTS} at the most)")
    try:
        mean = procrustes_mean(shapes) @ [1, 1j]
    except NoShape as e:
        raise NoFlipMap(str(e)) from None
    flip_indices, miss, spacing = _best_reflection(mean)
    order = np.arange(len(flip_indices))
    if not np.array_equal(flip_indices[flip_indices], order):
        raise NoFlipMap("the match is not its own inverse")
    if np.array_equal(flip_indices, order):
        raise NoFlipMap("every point would be its own mirror image")
    if miss > FIT_RADIUS or miss > FIT_SPACING * spacing:
        raise NoFlipMap(
            f"mirrored points miss their partners by {miss:.3f} of the shape's radius; neighbours are {spacing:.3f} apart"
        )
    return FlipMap(flip_indices, _xy(mean), miss)


def _best_reflection(mean):
    """Pairs, miss and the median distance between neighbours, both in radii.

    A picture is mirrored left to right, so the axes within 30 degrees of upright are tried first; the others, for
    objects that lie at any angle, only where those do not fit.
    """
    from scipy.spatial import cKDTree

    tree, spacing = cKDTree(_xy(mean)), _spacing(mean)
    degrees = np.arange(-90, 90)
    # nearest neighbours are no match, but they tell where the axis is, a thousand times faster
    nearest = np.array([np.square(tree.query(_xy(_reflect(mean, d)))[0]).mean() for d in degrees])
    upright = _match(mean, degrees[np.where(abs(degrees) <= 30, nearest, np.inf).argmin()], tree)
    if upright[1] <= min(FIT_RADIUS, FIT_SPACING * spacing) or abs(degrees[nearest.argmin()]) <= 30:
        return *upright, spacing
    return *min(upright, _match(mean, degrees[nearest.argmin()], tree), key=lambda found: found[1]), spacing


def _reflect(mean, degrees):
    "The shape, mirrored on the axis through its centre that stands so many degrees off upright."
    return -mean.conj() * np.exp(2j * np.deg2rad(degrees))


def _match(mean, degrees, tree):
    "Match the shape with its reflection; the axis settles with the match, on nearest neighbours first."
    from scipy.optimize import linear_sum_assignment

    turn, flip_indices = np.exp(2j * np.deg2rad(degrees)), None
    for _ in range(20):
        near = tree.query(_xy(-mean.conj() * turn))[1]
        turn = rotation_onto(-mean.conj(), mean[near])
    for _ in range(5):
        before = flip_indices
        # rows: the points; columns: the reflected ones
        flip_indices = linear_sum_assignment(abs(mean[:, None] + mean.conj() * turn) ** 2)[1]
        turn = rotation_onto(-mean[flip_indices].conj(), mean)
        if before is not None and np.array_equal(flip_indices, before):
            break
    return flip_indices, float(np.sqrt((abs(mean + mean[flip_indices].conj() * turn) ** 2).mean()))


def _spacing(mean):
    from scipy.spatial import cKDTree

    xy = _xy(mean)
    return float(np.median(cKDTree(xy).query(xy, 2)[0][:, 1])) if len(xy) > 1 else 0.0


def _xy(shape):
    return np.stack([shape.real, shape.imag], -1)


def write_flip_indices(path: Path, flip_indices):
    "mirror.json: a list whose k-th entry is the index of the mirrored k-th point."
    with atomic_write(path) as f:
        json.dump([int(p) for p in flip_indices], f)


def predict_with_flip(
    model,  # images -> unit coordinates (batch, n_points, 2)
    images,  # (batch, 3, h, w), normalised
    flip_indices=(),  # of the flip map; empty: no flip test
):
    "Unit coordinates (batch, n_points, 2): the mean of what the model says of the images and of their mirror images."
    first = model(images)
    if not len(flip_indices):
        return first
    second = model(images.flip(-1))[:, torch.as_tensor(flip_indices, device=images.device)]
    return (first + second * torch.tensor([-1.0, 1.0], device=images.device)) / 2
