"""The flip map: which landmark becomes which in a mirrored image, learned from the labels.

In a mirrored face the left eye's corner is labelled as the right one's. MMPose, DeepLabCut, albumentations and YOLO take
this permutation from a table written by hand; here it is learned. The shapes are aligned (generalised Procrustes
analysis, Gower 1975), their mean is reflected, and the two sets of points are matched one to one at the least sum of
squared distances (Hungarian assignment).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt

from landmarks_fastai.data.align import NoShape, as_points, procrustes_mean, rotation_onto

if TYPE_CHECKING:  # predictions with ONNX Runtime need no torch
    import torch

Values = TypeVar("Values", np.ndarray, "torch.Tensor")  # what goes in as an array comes out as one
ROWS = 2000  # shapes in the mean
MIN_POINTS = 5  # of 200 random sets of 3 points 45 match their reflection by chance, of 4 points 7, of 5 points 1
MAX_POINTS = 4000  # the matrix of distances grows quadratically
# Largest root mean square distance between a mirrored point and its match, in distances between neighbours and in radii
# of the shape. The best match of 971 random points, without symmetry, has 2.8 and 0.12 (68 points: 1.7 and 0.28; 5: 0.5
# and 0.37); real faces have 0.26 and 0.016, drawn ones 0.12 and 0.008. With few points the first limit is weak, with many
# the second: both are needed.
FIT_SPACING, FIT_RADIUS = 0.5, 0.08


class NoFlipMap(Exception):
    "The landmarks have no flip map; the message is the reason."


@dataclass(frozen=True)
class FlipMap:
    "A flip map: `flip_indices[k]` is the index of the mirrored k-th point. Aligned crops are cut to its mean `shape`."

    flip_indices: np.ndarray  # (n_points,) int64, its own inverse
    shape: np.ndarray  # (n_points, 2), centred, of radius 1, y down
    miss: float  # root mean square distance of the mirrored points from their matches, in radii of the shape


def learn_flip_map(
    shapes: npt.ArrayLike,  # (rows, n_points, 2), pixels of the images as stored
) -> FlipMap:
    "Learn the flip map from shapes of any position, size and rotation. Raises `NoFlipMap` if they have none."
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
    return FlipMap(flip_indices, as_points(mean), miss)


def _best_reflection(mean: np.ndarray) -> tuple[np.ndarray, float, float]:
    """Return the flip indices, their `miss` and the median distance between neighbours, both in radii of the shape.

    Images are mirrored left to right, so axes within 30 degrees of upright are tried first; the others, for objects
    that lie at any angle, only if those do not fit.
    """
    # scipy's type information lacks this name
    from scipy.spatial import cKDTree  # pyright: ignore[reportAttributeAccessIssue]

    xy = as_points(mean)
    tree = cKDTree(xy)
    spacing = float(np.median(tree.query(xy, 2)[0][:, 1]))
    degrees = np.arange(-90, 90)
    # nearest neighbours find the axis a thousand times faster than one-to-one matches
    nearest = np.array([np.square(tree.query(as_points(_reflect(mean, d)))[0]).mean() for d in degrees])
    upright = _match(mean, degrees[np.where(abs(degrees) <= 30, nearest, np.inf).argmin()], tree)
    if upright[1] <= min(FIT_RADIUS, FIT_SPACING * spacing) or abs(degrees[nearest.argmin()]) <= 30:
        return *upright, spacing
    return *min(upright, _match(mean, degrees[nearest.argmin()], tree), key=lambda match: match[1]), spacing


def _reflect(mean: np.ndarray, degrees: Any) -> np.ndarray:
    "Reflect the shape across the axis through its centre, `degrees` from upright."
    return -mean.conj() * np.exp(2j * np.deg2rad(degrees))


def _match(mean: np.ndarray, degrees: Any, tree: Any) -> tuple[np.ndarray, float]:
    "Match the shape with its reflection, and refine the axis: first on nearest neighbours, then on the match itself."
    from scipy.optimize import linear_sum_assignment

    turn, flip_indices = np.exp(2j * np.deg2rad(degrees)), np.empty(0, np.int64)
    for _ in range(20):
        near = tree.query(as_points(-mean.conj() * turn))[1]
        turn = rotation_onto(-mean.conj(), mean[near])
    for _ in range(5):
        before = flip_indices
        # rows: the points; columns: the reflected ones
        flip_indices = linear_sum_assignment(abs(mean[:, None] + mean.conj() * turn) ** 2)[1]
        turn = rotation_onto(-mean[flip_indices].conj(), mean)
        if np.array_equal(flip_indices, before):
            break
    return flip_indices, float(np.sqrt((abs(mean + mean[flip_indices].conj() * turn) ** 2).mean()))


def average_flipped(points: Values, mirrored: Values, flip_indices: Sequence[int]) -> Values:
    """Average the predictions of images with those of their mirror images: the flip test.

    Both are arrays or tensors: points (batch, n_points, 2) in unit coordinates, or their spreads (batch, n_points).
    """
    mirrored = mirrored[:, list(flip_indices)]  # a copy
    if mirrored.ndim == 3:
        mirrored[..., 0] *= -1  # pyright: ignore[reportArgumentType] (an array or a tensor, as `mirrored` is)
    return (points + mirrored) / 2
