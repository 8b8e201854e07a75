"""The competition's score, NME, AUC and failure rate, in pixels of the image as stored.

A loss in pixels of the network's input would rank models differently: each image is resized by a factor of its own.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import numpy.typing as npt
import torch
from fastai.learner import Metric

from landmarks_fastai.errors import UserError
from landmarks_fastai.geometry import PixelMap, unit_to_input
from landmarks_fastai.utils.distributed import all_reduce

Points = torch.Tensor | npt.ArrayLike  # a tensor, an array or nested lists
Normaliser = str | tuple[int, int]  # of an NME: box_diag, image_diag, or the indices of two points


def points_in_image(
    unit: torch.Tensor,  # (batch, n, 2) unit coordinates
    maps: torch.Tensor,  # (batch, 6): each image's PixelMap
    size: int,  # of the network's input
) -> torch.Tensor:
    """The points (batch, n, 2), float64, in pixels of the images as stored, on the device of `unit`.

    float32 changes the score of a set by a factor of 2e-8. MPS has no float64: the points are moved to the CPU.
    """
    device = torch.device("cpu") if unit.device.type == "mps" else unit.device
    points = unit_to_input(_float64(unit, device), size)
    return PixelMap.from_batch(_float64(maps, device)).to_image(points)


def _float64(tensor, device):
    "A plain tensor: fastai's tensor types do not mix in arithmetic."
    return tensor.detach().as_subclass(torch.Tensor).to(device).double()


def mean_squared_error(pred: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    "The competition's score of each image: mean over all coordinates; (batch, n, 2) pixels -> (batch,)."
    return ((pred - truth) ** 2).mean(dim=(1, 2))


def nme(
    pred: Points,  # (images, n, 2) pixels of the image as stored
    truth: Points,  # the same
    normaliser: Normaliser = "box_diag",
    sizes: Points | None = None,  # (images, 2): width and height of the images as stored, for image_diag
) -> torch.Tensor:
    """Normalised mean error of each image, (images,): the mean distance of its points, divided by a length.

    The length is the diagonal of the box of the true points, the diagonal of the image, or the distance of two true
    points (inter-ocular: the outer corners of the eyes, 36 and 45 of 68 points). A length of 0 counts as one pixel.
    Raises `UserError` for image_diag without sizes, and for another normaliser.
    """
    pred, truth = torch.as_tensor(pred).double(), torch.as_tensor(truth).double()
    if normaliser == "box_diag":
        ends = truth.amax(1) - truth.amin(1)
    elif normaliser == "image_diag":
        if sizes is None:
            raise UserError("image_diag needs the images' sizes: call nme, auc or failure_rate with sizes=")
        ends = torch.as_tensor(sizes, device=truth.device).double()
    elif isinstance(normaliser, str):
        raise UserError(f"normaliser is {normaliser!r}: box_diag, image_diag or two point indices expected")
    else:
        ends = truth[:, normaliser[0]] - truth[:, normaliser[1]]
    length = ends.norm(dim=-1)
    return (pred - truth).norm(dim=-1).mean(1) / torch.where(length > 0, length, 1.0)


def auc(
    pred: Points,
    truth: Points,
    normaliser: Normaliser = "box_diag",
    threshold: float = 0.08,
    sizes: Points | None = None,
) -> torch.Tensor:
    """Area under the curve of the cumulative error distribution (CED) up to a threshold, divided by it; 0 to 1.

    The CED is the share of the images whose NME is at most x. An image of error e adds (threshold - e) / threshold to
    the area, or nothing: the area is exact, not a sum over steps. Arguments are those of `nme`.
    Yang et al. 2015, "An Empirical Study of Recent Face Alignment Methods"; 300-W and others take 0.08.
    """
    return (1 - nme(pred, truth, normaliser, sizes) / threshold).clamp(min=0).mean()


def failure_rate(
    pred: Points,
    truth: Points,
    normaliser: Normaliser = "box_diag",
    threshold: float = 0.08,
    sizes: Points | None = None,
) -> torch.Tensor:
    "The share of the images whose NME is above a threshold, 0 to 1. Arguments are those of `nme`."
    return (nme(pred, truth, normaliser, sizes) > threshold).double().mean()


class ImageMetric(Metric):
    """The mean over images of `func(pred, truth)`, both in pixels of the image as stored, not rounded.

    `Evaluation` (training/callbacks/evaluation.py) gives it the points of both passes after a validation. The sum stays on
    the device until `value` is read, so that no batch waits for the GPU.
    """

    def __init__(
        self,
        func: Callable,  # (batch, n, 2), (batch, n, 2) -> (batch,), or their mean
        name: str,  # of its column
    ):
        self.func, self._name = func, name
        self.reset()

    def reset(self) -> None:
        self.total, self.count = 0.0, 0

    def add(self, pred: torch.Tensor, truth: torch.Tensor) -> None:
        "Add predicted and true points (batch, n, 2), pixels of the images as stored."
        self.total, self.count = self.total + self.func(pred, truth).mean() * len(truth), self.count + len(truth)

    @property
    def value(self) -> float | None:
        return float(self.total) / self.count if self.count else None

    @property
    def name(self) -> str:
        return self._name


def sum_over_processes(metrics: Iterable[Any]) -> None:
    "Let metrics of `total` and `count`, as `ImageMetric` and fastai's `AvgLoss`, hold the sums over all processes."
    metrics = list(metrics)
    sums = all_reduce([float(value) for metric in metrics for value in (metric.total, metric.count)]).tolist()
    for metric, total, count in zip(metrics, sums[::2], sums[1::2], strict=True):
        metric.total, metric.count = total, int(count)


def _no_sizes(normaliser):
    if normaliser == "image_diag":
        raise UserError("a batch does not hold the images' sizes: image_diag is for the functions auc and failure_rate")
    return normaliser


class AUC(ImageMetric):
    "`auc` as a metric, in a column `auc`. Raises `UserError` for image_diag: a batch does not hold the images' sizes."

    def __init__(self, normaliser: Normaliser = "box_diag", threshold: float = 0.08):
        super().__init__(partial(auc, normaliser=_no_sizes(normaliser), threshold=threshold), "auc")


class FailureRate(ImageMetric):
    "`failure_rate` as a metric, in a column `failure_rate`. Raises `UserError` for image_diag, as `AUC`."

    def __init__(self, normaliser: Normaliser = "box_diag", threshold: float = 0.08):
        super().__init__(partial(failure_rate, normaliser=_no_sizes(normaliser), threshold=threshold), "failure_rate")


def default_metrics() -> list[ImageMetric]:
    "The metrics of every epoch: `score`, the competition's mean squared error, and `nme_box_diag`."
    return [ImageMetric(mean_squared_error, "score"), ImageMetric(nme, "nme_box_diag")]
