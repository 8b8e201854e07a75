"Callbacks of a prediction: the flip test, and points in pixels of the images as stored."
# fastai sets attributes when it runs, `learn` among them
# pyright: reportAttributeAccessIssue=false

from collections.abc import Sequence

import numpy as np
from fastai.callback.core import Callback

from landmarks_fastai.data.flip import predict_with_flip
from landmarks_fastai.metrics import points_in_image


class FlipTest(Callback):
    "Replace each prediction by the mean of the image's and its mirror image's."

    def __init__(self, flip_indices: Sequence[int]):
        self.flip_indices = flip_indices

    def after_pred(self):
        (images,) = self.xb
        self.learn.pred = predict_with_flip(self.learn.model, images, self.flip_indices, self.pred)


class CollectPoints(Callback):
    "Collect the points of each batch, float32 (batch, n_points, 2), in pixels of the images as stored."

    order = 1  # after FlipTest

    def __init__(self, size: int):
        self.size = size
        self.points: list[np.ndarray] = []

    def after_pred(self):
        self.points.append(points_in_image(self.pred, self.learn.maps, self.size).cpu().numpy().astype(np.float32))
