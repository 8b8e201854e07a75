"""The competition's score and the field's other figures, in pixels of the image as stored.

Not the training loss: each image has a scale of its own, so a loss in the network's input ranks models differently.
"""

import torch
from fastai.learner import Metric

from landmarks_fastai.geometry import PixelMap, unit_to_input


def points_in_image(
    unit,  # (batch, n, 2) unit coordinates
    maps,  # (batch, 4): each image's PixelMap
    size: int,  # of the network's input
):
    """The points (batch, n, 2), float64, in pixels of the images as stored, on the device of `unit`.

    float64: in float32 the score of a set is 2e-8 of itself off. MPS has none, there the CPU computes.
    """
    device = torch.device("cpu") if unit.device.type == "mps" else unit.device
    points = unit_to_input(_plain(unit, device), size)
    return PixelMap.from_batch(_plain(maps, device)).to_image(points)


def _plain(tensor, device):
    "Without fastai's type: its types do not mix in arithmetic."
    return tensor.detach().as_subclass(torch.Tensor).to(device).double()


def mean_squared_error(pred, truth):
    "The competition's score of each image: mean over all coordinates; (batch, n, 2) pixels -> (batch,)."
    return ((pred - truth) ** 2).mean(dim=(1, 2))


def nme_box_diag(pred, truth):
    """Mean point-to-point distance over the diagonal of the true points' box; (batch, n, 2) pixels -> (batch,).

    A box without size (one point, or all points equal) counts as one pixel: the figure is then the distance in pixels.
    """
    diagonal = (truth.amax(1) - truth.amin(1)).norm(dim=-1)
    return (pred - truth).norm(dim=-1).mean(1) / torch.where(diagonal > 0, diagonal, 1.0)


class ImageMetric(Metric):
    """The mean over images of `func(pred, truth)`, both in pixels of the image as stored, unrounded.

    The sum stays on the device until the value is asked for: nothing waits for a GPU from batch to batch.
    """

    def __init__(
        self,
        func,  # (batch, n, 2), (batch, n, 2) -> (batch,)
        name: str,  # its column in the table
        size: int,  # of the network's input
    ):
        self.func, self._name, self.size = func, name, size
        self.reset()

    def reset(self):
        self.total, self.count = 0.0, 0

    def accumulate(self, learn):
        self.add(learn.pred, learn.yb[0], learn.maps)

    def add(self, pred, truth, maps):
        "Unit coordinates of a batch, predicted and true, and its images' maps."
        truth = points_in_image(truth, maps, self.size)
        each = self.func(points_in_image(pred, maps, self.size), truth)
        self.total, self.count = self.total + each.sum(), self.count + len(each)

    @property
    def value(self):
        return float(self.total) / self.count if self.count else None

    @property
    def name(self):
        return self._name


def stage_metrics(size: int) -> list[ImageMetric]:
    "What every epoch shows: `score`, the competition's mean squared error, and `nme_box_diag`."
    return [ImageMetric(mean_squared_error, "score", size), ImageMetric(nme_box_diag, "nme_box_diag", size)]
