"""What training minimises: a distance between points, in pixels of the network's input.

Pixels, not unit coordinates: the printed loss can be read (`l1` is how many pixels a coordinate is off), and the
widths of `smooth_l1` and `wing` mean what their papers mean.
"""

import math

import torch
from fastai.losses import BaseLoss
from torch import nn
from torch.nn import functional as F

from landmarks_fastai.settings import Settings

WING_WIDTH, WING_CURVE = 10 / 256, 2 / 256  # of the input's side: Feng et al. 2018 found 10 and 2 px at 256 px


class PointLoss(nn.Module):
    "`func(error)` of all coordinates; predictions and truth in unit coordinates, errors in input pixels."

    def __init__(self, func, size: int):
        super().__init__()
        self.of_error, self.half_side = (
            func,
            size / 2,
        )  # not `func`: `BaseLoss` takes over the attributes of what it wraps
        self.reduction = "mean"  # or none: fastai's `Interpretation` asks for the loss of each image

    def forward(self, pred, truth):
        each = self.of_error((pred - truth) * self.half_side)
        return each if self.reduction == "none" else each.mean()


def wing(error, width: float, curve: float):
    """Feng et al. 2018, "Wing Loss for Robust Facial Landmark Localisation", eq. 5.

    Logarithmic within `width` pixels, so that small errors keep pulling; linear beyond.
    """
    size = error.abs()
    jump = width - width * math.log1p(width / curve)
    return torch.where(size < width, width * torch.log1p(size / curve), size - jump)


def _smooth_l1(error):
    return F.smooth_l1_loss(error, torch.zeros_like(error), reduction="none")


def loss_function(settings: Settings):
    "The `loss_func` of a Learner, flattened as fastai's own."
    size = settings.size
    func = {
        "l1": torch.abs,
        "smooth_l1": _smooth_l1,
        "mse": torch.square,
        "wing": lambda error: wing(error, WING_WIDTH * size, WING_CURVE * size),
    }[settings.loss]
    return BaseLoss(PointLoss, func, size, axis=-1, floatify=True, is_2d=False)
