"""The competition's score, NME, AUC and failure rate, in pixels of the image as stored.

A loss in pixels of the network's input would rank models differently: each image is resized by a factor of its own.
"""

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from fastai.learner import Metric

from landmarks_fastai.errors import UserError
from landmarks_fastai.geometry import PixelMap, unit_to_input
from landmarks_fastai.missing import fill_missing, labelled_mean
from landmarks_fastai.utils.distributed import all_reduce

THRESHOLD = 0.08  # of AUC and failure rate; 300-W and others take it
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
    "The competition's score of each image: mean over its labelled coordinates; (batch, n, 2) pixels -> (batch,)."
    return labelled_mean((pred - truth) ** 2, ~truth.isnan(), (1, 2))


def image_score(pred: np.ndarray, truth: np.ndarray) -> float:
    "`mean_squared_error` of one image, of points (n, 2) in pixels."
    return float(mean_squared_error(torch.from_numpy(pred[None]), torch.from_numpy(truth[None])))


def nme(
    pred: Points,  # (images, n, 2) pixels of the image as stored
    truth: Points,  # the same
    normaliser: Normaliser = "box_diag",
    sizes: Points | None = None,  # (images, 2): width and height of the images as stored, for image_diag
    shape: Points = (),  # mean shape (n, 2) of the training rows, `facts.shape`, for box_diag where points are missing
    boxes: Points | None = None,  # (images, 4) annotated: left, top, right, bottom, for box_diag; NaN: none
) -> torch.Tensor:
    """Normalised mean error of each image, (images,): the mean distance of its labelled points, divided by a length.

    The length is the diagonal of the annotated box, or else of the box of the true points; the diagonal of the image; or
    the distance of two true points (inter-ocular: the outer corners of the eyes, 36 and 45 of 68 points). A length of 0
    counts as one pixel. Missing points of a box are those of the mean shape laid onto the others: the box of half a drawn
    face has 0.82 of the face's diagonal, so completed 1.00. An image whose length is unknown has NaN.
    Raises `UserError` for image_diag without sizes, and for another normaliser.
    """
    pred, truth = torch.as_tensor(pred).double(), torch.as_tensor(truth).double()
    if normaliser == "box_diag":
        shape = torch.as_tensor(shape, dtype=truth.dtype, device=truth.device).reshape(-1, 2)
        corners = fill_missing(truth, shape) if len(shape) else truth
        ends = corners.amax(1) - corners.amin(1)
        if boxes is not None:
            annotated = torch.as_tensor(boxes, device=truth.device).double()
            ends = torch.where(annotated.isnan().any(1, keepdim=True), ends, annotated[:, 2:] - annotated[:, :2])
    elif normaliser == "image_diag":
        if sizes is None:
            raise UserError("image_diag needs the images' sizes: call nme, auc or failure_rate with sizes=")
        ends = torch.as_tensor(sizes, device=truth.device).double()
    elif isinstance(normaliser, str):
        raise UserError(f"normaliser is {normaliser!r}: box_diag, image_diag or two point indices expected")
    else:
        ends = truth[:, normaliser[0]] - truth[:, normaliser[1]]
    length = ends.norm(dim=-1)
    mean_distance = labelled_mean((pred - truth).norm(dim=-1), ~truth.isnan().any(-1), 1)
    return mean_distance / torch.where(length == 0, 1.0, length)


def auc(
    pred: Points,
    truth: Points,
    normaliser: Normaliser = "box_diag",
    threshold: float = THRESHOLD,
    sizes: Points | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """Area under the curve of the cumulative error distribution (CED) up to a threshold, divided by it; 0 to 1.

    The CED is the share of the images whose NME is at most x. An image of error e adds (threshold - e) / threshold to
    the area, or nothing: the area is exact, not a sum over steps. Arguments are those of `nme`; an image without an NME
    is left out. Yang et al. 2015, "An Empirical Study of Recent Face Alignment Methods"; 300-W and others take 0.08.
    """
    return _mean_over_images(_area, pred, truth, normaliser=normaliser, threshold=threshold, sizes=sizes, **kwargs)


def failure_rate(
    pred: Points,
    truth: Points,
    normaliser: Normaliser = "box_diag",
    threshold: float = THRESHOLD,
    sizes: Points | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    "The share of the images whose NME is above a threshold, 0 to 1. Arguments are those of `nme`; see `auc`."
    return _mean_over_images(_failed, pred, truth, normaliser=normaliser, threshold=threshold, sizes=sizes, **kwargs)


def _area(pred, truth, threshold, **kwargs):
    return (1 - nme(pred, truth, **kwargs) / threshold).clamp(min=0)


def _failed(pred, truth, threshold, **kwargs):
    error = nme(pred, truth, **kwargs)
    return torch.where(error.isnan(), error, (error > threshold).double())


def _mean_over_images(func, pred, truth, **kwargs):
    values = func(pred, truth, **kwargs)
    return labelled_mean(values, _has_value(values, torch.as_tensor(pred)))


def _has_value(values, pred):
    "Whether images have a value: it is NaN where the labels do not give one. A NaN that was predicted counts."
    return ~(values.isnan() & pred.isfinite().all())


class ImageMetric(Metric):
    """The mean over images of `func(pred, truth)`, both in pixels of the image as stored, not rounded.

    `Evaluation` (training/callbacks/evaluation.py) gives it the points of both passes after a validation. The sums stay on
    the device until `value` is read, so that no batch waits for the GPU. An image whose value is NaN is left out. Pooled,
    an image weighs by the share of its points that is labelled: the mean is over all labelled points.
    """

    shape: Points = ()  # mean shape of the training rows, set by `Evaluation`

    def __init__(
        self,
        func: Callable,  # (batch, n, 2), (batch, n, 2) -> (batch,), or their mean
        name: str,  # of its column
        pooled: bool = False,
    ):
        self.func, self._name, self.pooled = func, name, pooled
        self.reset()

    def reset(self) -> None:
        self.total, self.squares, self.weight, self.count = 0.0, 0.0, 0.0, 0  # count: images

    def add(self, pred: torch.Tensor, truth: torch.Tensor) -> None:
        "Add predicted and true points (batch, n, 2), pixels of the images as stored."
        values, n = self.values(pred, truth), len(truth)
        weights = _has_value(values, pred).to(values.dtype)
        if self.pooled:
            weights = weights * (~truth.isnan()).to(values.dtype).mean((1, 2))
        self.total = self.total + torch.where(weights > 0, values * weights, 0).mean() * n
        self.squares = self.squares + torch.where(weights > 0, values**2 * weights, 0).mean() * n
        self.weight, self.count = self.weight + weights.mean() * n, self.count + n

    def values(self, pred: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
        return self.func(pred, truth)

    @property
    def value(self) -> float | None:
        return float(self.total) / weight if (weight := float(self.weight)) else None

    @property
    def error(self) -> float:
        "Standard error of the mean, from the spread over the images; infinite for fewer than two."
        if self.count < 2 or self.value is None:
            return math.inf
        variance = max(0.0, float(self.squares) / float(self.weight) - self.value**2)
        return math.sqrt(variance / (self.count - 1))

    @property
    def name(self) -> str:
        return self._name


class NMEMetric(ImageMetric):
    "An `ImageMetric` of a function with the arguments of `nme`: missing points of a box are filled in from `shape`."

    def values(self, pred: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
        return self.func(pred, truth, shape=self.shape)


def sum_over_processes(metrics: Iterable[Any]) -> None:
    "Let metrics of `total` and `count`, as `ImageMetric` and fastai's `AvgLoss`, hold the sums over all processes."
    names = [
        (metric, name)
        for metric in metrics
        for name in ("total", "squares", "weight", "count")
        if hasattr(metric, name)
    ]
    sums = all_reduce([float(getattr(*name)) for name in names]).tolist()
    for (metric, name), value in zip(names, sums, strict=True):
        setattr(metric, name, int(value) if name == "count" else value)


def _no_sizes(normaliser):
    if normaliser == "image_diag":
        raise UserError("a batch does not hold the images' sizes: image_diag is for the functions auc and failure_rate")
    return normaliser


class AUC(NMEMetric):
    "`auc` as a metric, in a column `auc`. Raises `UserError` for image_diag: a batch does not hold the images' sizes."

    def __init__(self, normaliser: Normaliser = "box_diag", threshold: float = THRESHOLD):
        super().__init__(partial(_area, normaliser=_no_sizes(normaliser), threshold=threshold), "auc")


class FailureRate(NMEMetric):
    "`failure_rate` as a metric, in a column `failure_rate`. Raises `UserError` for image_diag, as `AUC`."

    def __init__(self, normaliser: Normaliser = "box_diag", threshold: float = THRESHOLD):
        super().__init__(partial(_failed, normaliser=_no_sizes(normaliser), threshold=threshold), "failure_rate")


def default_metrics(
    shape: Points = (),  # mean shape of the training rows
) -> list[ImageMetric]:
    "The metrics of every epoch: `score`, the competition's mean squared error, and `nme_box_diag`."
    metrics = [ImageMetric(mean_squared_error, "score", pooled=True), NMEMetric(nme, "nme_box_diag")]
    metrics[1].shape = shape
    return metrics
