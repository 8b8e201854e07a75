"""Missing points: NaN in both coordinates, from the labels to the loss and the score.

Maps, warps and flips carry NaN unchanged. What counts points leaves it out by these functions.
"""

from typing import TYPE_CHECKING, Any, cast

import numpy as np

from landmarks_fastai.geometry import Coordinates

if TYPE_CHECKING:  # predictions with ONNX Runtime need no torch
    import torch

MIN_POINTS = 3  # fewer have no shape


def nan_mean(values: np.ndarray, axis: int | None = None) -> np.ndarray:
    "Mean of what is not NaN; NaN, without numpy's warning, where nothing is."
    labelled = ~np.isnan(values)
    if labelled.all():
        return values.mean(axis)
    with np.errstate(invalid="ignore"):
        return np.where(labelled, values, 0).mean(axis) / labelled.mean(axis)


def labelled_mean(
    values: "torch.Tensor", labelled: "torch.Tensor", dim: "int | tuple[int, ...] | None" = None
) -> "torch.Tensor":
    """Mean of the values that are `labelled`; NaN where none is. Of complete values it is `mean` to the bit.

    torch's `nanmean` would leave out a NaN that a network predicts too, and adds in another order.
    """
    import torch

    return torch.where(labelled, values, 0).mean(dim) / labelled.to(values.dtype).mean(dim)


def fill_missing(
    points: Coordinates,  # (rows, n, 2)
    shape: Coordinates,  # (n, 2), without NaN
) -> Coordinates:
    """Replace missing points by those of a shape that is laid onto the labelled ones.

    It is laid by the similarity of least squared distances (Procrustes analysis, Gower 1975). Points that are filled in do
    not change that similarity. A row with fewer than three labelled points keeps its NaN.
    """
    where: Any = np.where
    xy, mean = cast(Any, points), cast(Any, shape)
    if not isinstance(points, np.ndarray):
        import torch

        where = torch.where
    missing = xy != xy  # NaN
    if isinstance(points, np.ndarray) and not missing.any():  # of a tensor it would wait for the GPU
        return points
    with np.errstate(all="ignore"):
        n = (~missing).sum(-2)[:, None]
        centre = where(missing, 0.0, xy).sum(-2)[:, None] / n
        centred = mean - where(missing, 0.0, mean).sum(-2)[:, None] / n  # about the labelled points of each row
        offset, fitted = where(missing, 0.0, xy - centre), where(missing, 0.0, centred)
        square = (fitted**2).sum(-1).sum(-1)
        # points = [[a, -b], [b, a]] shape + centre
        a = ((offset * fitted).sum(-1).sum(-1) / square)[:, None, None]
        b = ((offset[..., 1] * fitted[..., 0] - offset[..., 0] * fitted[..., 1]).sum(-1) / square)[:, None]
        turned = a * centred + centre
        turned[..., 0] -= b * centred[..., 1]
        turned[..., 1] += b * centred[..., 0]
    return where(missing, where(n >= MIN_POINTS, turned, float("nan")), xy)
