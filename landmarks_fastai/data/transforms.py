"""The transforms of an item: a labelled image -> (network input, unit points, map).

`OpenInput` and `StoredPoints` are the getters: of fastai's `ImageBlock`, and of the points. `PointsToUnit`, the first item
transform, converts the points from pixels of the image as stored to unit coordinates, and adds the image's `PixelMap` to
the item: metrics and predictions use its inverse.

The annotations of `encodes` and `decodes` are not hints: fastai selects the method by them, and converts what it returns.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from fastai.torch_core import TensorBase
from fastai.vision.core import PILImage, TensorPoint
from fasttransform import ItemTransform, Transform
from PIL import Image

from landmarks_fastai.data.align import Alignment
from landmarks_fastai.data.image_cache import Inputs
from landmarks_fastai.data.items import LabelledImage
from landmarks_fastai.data.pictures import Picture
from landmarks_fastai.errors import UserError
from landmarks_fastai.geometry import IDENTITY, PixelMap, input_to_unit, unit_to_input
from landmarks_fastai.settings import Settings


class PILInput(PILImage):
    "The input of a network; blank if there is an `error`."

    to_input: PixelMap = IDENTITY  # from pixels of the image as stored
    error: UserError | None = None  # why the image could not be read


class ShownPoints(TensorPoint):
    "Points as `show_batch` draws them: 971 of fastai's own dots hide a face."

    _show_args = {"s": 6, "marker": ".", "c": "#00ff66", "linewidths": 0}


class TensorMap(TensorBase):
    "A `PixelMap` as a tensor of its six numbers, which is collated with its item."


class OpenInput(Transform):
    """The `get_x`: an item -> the network's input, of the item's aligned crop if it is `aligned`, else of the whole image.

    An item is a `LabelledImage`, or in a prediction a path, a PIL image or an array (h, w, 3) uint8. The error of an image
    that cannot be used is raised by `PointsToUnit`: fastai opens the first item to find the types, where it can skip nothing.
    """

    input_types = (LabelledImage, str, Path, Image.Image, np.ndarray)

    def __init__(self, inputs: Inputs, alignment: Alignment | None = None, settings: Settings | None = None):
        super().__init__()
        self.inputs, self.alignment, self.settings = inputs, alignment, settings or Settings()

    def encodes(self, item):
        try:
            pixels, to_input = self.read(item)
        except UserError as e:
            image = PILInput.create(Image.new("RGB", (self.inputs.size, self.inputs.size)))
            image.error = e
            return image
        image = PILInput.create(pixels)
        image.to_input = to_input
        return image

    def read(self, item: Any) -> tuple[np.ndarray, PixelMap]:
        "Return an item's input, uint8 (size, size, 3) RGB, and its map. Raises `UserError`."
        if not isinstance(item, LabelledImage):
            return Picture(item, exif=False).inputs([None], self.inputs.fit, self.inputs.size)[0]
        crop = None
        if item.aligned and self.alignment:
            (crop,) = self.alignment.maps_of_labels(item.points[None])  # None: they have no plausible shape
        return self.inputs(item.row, item.path, item.where, crop, item.view(self.settings))


class StoredPoints(Transform):
    "The `get_y`: the item's points, in pixels of the image as stored."

    input_types = (LabelledImage,)

    def encodes(self, item: LabelledImage):
        return TensorPoint(torch.from_numpy(item.points).float())


class PointsToUnit(ItemTransform):
    """(input, points in pixels of the image as stored) -> (input, points in unit coordinates, map); points are optional.

    It runs before the item transforms of a user: they get points in unit coordinates, like fastai's own transforms.
    """

    order = -10

    def __init__(self, size: int):
        super().__init__()
        self.size = size

    def setups(self, dl):
        if len(dl.dataset):  # the value of `get_c(dls)`: the network's number of outputs
            self.c = dl.dataset.tls[1][0].numel()

    def encodes(self, item):
        image, *points = item
        if image.error:
            raise image.error
        to_input = image.to_input
        points = [p.numpy() for p in points]  # on so few numbers numpy takes half of the time of torch
        points = [TensorPoint(torch.from_numpy(input_to_unit(to_input.to_input(p), self.size))) for p in points]
        return image, *points, TensorMap(torch.tensor(to_input))

    def decodes(self, item):
        image, *rest = item
        return image, *(ShownPoints(unit_to_input(p, self.size)) for p in rest if isinstance(p, TensorPoint))
