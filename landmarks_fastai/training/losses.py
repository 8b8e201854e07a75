"""Losses: distances between points in pixels of the network's input.

In pixels, `l1` is the mean error of a coordinate, and the widths of `smooth_l1` and `wing` are those of their papers.
"""

import math
from collections.abc import Callable

import torch
from fastai.losses import BaseLoss
from torch import nn
from torch.nn import functional as F

from landmarks_fastai.missing import labelled_mean
from landmarks_fastai.settings import Settings

WING_WIDTH, WING_CURVE = 10 / 256, 2 / 256  # of the input's side: Feng et al. 2018 found 10 and 2 px at 256 px


class PointLoss(nn.Module):
    """The mean of `func(error)` over the labelled coordinates; points in unit coordinates, errors in pixels of the input.

    Truth is NaN where a point is missing. Not reduced, each image's mean is over its labelled coordinates.
    """

    def __init__(self, func: Callable[[torch.Tensor], torch.Tensor], size: int):
        super().__init__()
        self.of_error, self.half_side = func, size / 2  # not `func`, which is an attribute of `BaseLoss`
        self.reduction = "mean"  # or none, set by fastai's `Interpretation`

    def forward(self, pred: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
        truth = truth.reshape(pred.shape)
        labelled = ~truth.isnan()
        error = torch.where(labelled, (pred - truth) * self.half_side, 0)  # the gradient would hold 0 * NaN
        loss = self.of_error(error)
        if self.reduction == "none":
            n = labelled.to(loss.dtype).flatten(1).mean(1).clamp(min=1e-6)
            return torch.where(labelled, loss, 0) / n.view(-1, *[1] * (loss.ndim - 1))
        return labelled_mean(loss, labelled)


def wing(error: torch.Tensor, width: float, curve: float) -> torch.Tensor:
    """Feng et al. 2018, "Wing Loss for Robust Facial Landmark Localisation", eq. 5, of each coordinate, in pixels.

    Logarithmic within `width` pixels, which gives small errors a larger gradient; linear beyond.
    """
    size = error.abs()
    jump = width - width * math.log1p(width / curve)
    return torch.where(size < width, width * torch.log1p(size / curve), size - jump)


def _smooth_l1(error):
    return F.smooth_l1_loss(error, torch.zeros_like(error), reduction="none")


def loss_function(settings: Settings) -> BaseLoss:
    "The `loss_func` of a Learner: the loss named in the settings, in fastai's `BaseLoss`."
    size = settings.size
    func = {
        "l1": torch.abs,
        "smooth_l1": _smooth_l1,
        "mse": torch.square,
        "wing": lambda error: wing(error, WING_WIDTH * size, WING_CURVE * size),
    }[settings.loss]
    return BaseLoss(PointLoss, func, size, axis=-1, floatify=True, flatten=False)
