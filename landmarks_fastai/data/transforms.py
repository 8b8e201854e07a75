"""The transforms of an item: a labelled image -> (network input, unit points, map).

`OpenInput` and `StoredPoints` are the getters of fastai's `ImageBlock` and `PointBlock`. `PointsToUnit`, the first item
transform, converts the points from pixels of the image as stored to unit coordinates, and adds the image's `PixelMap` to
the item: metrics and predictions use its inverse.

The annotations of `encodes` and `decodes` are no hints: fastai selects the method by them, and converts what it returns.
"""

import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from fastai.data.load import SkipItemException
from fastai.torch_core import TensorBase
from fastai.vision.core import PILImage, TensorPoint
from fasttransform import ItemTransform, Transform
from PIL import Image

from landmarks_fastai.data.align import Alignment
from landmarks_fastai.data.checks import append_listing
from landmarks_fastai.data.image_cache import Inputs
from landmarks_fastai.data.items import LabelledImage
from landmarks_fastai.data.pictures import Picture
from landmarks_fastai.errors import MissingImage, UserError
from landmarks_fastai.geometry import IDENTITY, PixelMap, input_to_unit, unit_to_input

UNMOUNTED = 4  # unreadable images in a row of batches, each with more than half unreadable: the run stops


class TensorMap(TensorBase):
    "A `PixelMap` as a tensor of its six numbers, which is collated with its item."


class OpenInput(Transform):
    """The `get_x`: an item -> the network's input, a `PILImage` with its map in `to_input`.

    An item is a `LabelledImage`, or in a prediction a path, a PIL image or an array (h, w, 3) uint8. If the file of a
    `LabelledImage` cannot be used, the image is blank and has an `error`, which `PointsToUnit` raises or skips: fastai
    opens the first item to find the types, where it can skip nothing.
    """

    input_types = (LabelledImage, str, Path, Image.Image, np.ndarray)

    def __init__(self, inputs: Inputs, alignment: Alignment | None = None):
        super().__init__()
        self.inputs, self.alignment = inputs, alignment

    def encodes(self, item):
        error = None
        if isinstance(item, LabelledImage):
            try:
                image, to_input = self.labelled(item)
            except UserError as e:
                image = Image.new("RGB", (self.inputs.size, self.inputs.size))
                to_input, error = IDENTITY, (item, e)
        else:
            image, to_input = Picture(item, exif=False).whole(self.inputs.fit, self.inputs.size)
        fitted: Any = PILImage.create(image)
        fitted.to_input, fitted.error = to_input, error
        return fitted

    def labelled(self, item: LabelledImage) -> tuple[Image.Image, PixelMap]:
        "Return the item's input and map: of the aligned crop if the item is `aligned`, else of the whole image."
        if item.aligned and self.alignment:
            if to_input := self.alignment.maps(item.points[None])[0]:  # None: the points have no plausible shape
                return self.inputs.crop(item.row, item.path, to_input, item.where)
        return self.inputs(item.row, item.path, item.where)


class StoredPoints(Transform):
    "The `get_y`: the item's points, in pixels of the image as stored."

    input_types = (LabelledImage,)

    def encodes(self, item: LabelledImage):
        return item.points


class LostImages:
    "The images that became unreadable during training: a warning is printed once for each, and it is added to the listing."

    def __init__(self):
        self.batch: list[tuple[LabelledImage, str]] = []
        self.in_a_row = 0
        self.told: set[int] = set()  # rows that a warning was printed for

    def add(self, item: LabelledImage, why: str) -> None:
        "Add an image of the current batch."
        self.batch.append((item, why))

    def end_batch(self, size: int) -> None:
        """Print the warnings of a batch of `size` images.

        Raises `UserError` if consecutive batches lose most of their images: then the folder is gone, not an image.
        """
        lost, self.batch = self.batch, []
        self.in_a_row = self.in_a_row + len(lost) if 2 * len(lost) > size else 0
        if self.in_a_row >= UNMOUNTED:
            raise UserError(
                f"{lost[0][1]}; {len(lost)} of {size} images of the batch are missing: is the folder still there?"
            )
        for item, why in lost:
            if item.row not in self.told:
                self.told.add(item.row)
                self.tell(item, why)

    @staticmethod
    def tell(item: LabelledImage, why: str) -> None:
        "Add an image to the listing, and print a warning unless another worker did."
        if listing := item.images.listing:
            with suppress(OSError):  # a full disk must not stop the run here
                if not append_listing(listing, item.problem(why)):
                    return
        print(f"warning: {why}: the run goes on without it", file=sys.stderr, flush=True)


class PointsToUnit(ItemTransform):
    """(input, points in pixels of the image as stored) -> (input, points in unit coordinates, map); points are optional.

    It runs before the item transforms of a user: they get points in unit coordinates, like fastai's own transforms.
    An image that cannot be used is skipped with fastai's `SkipItemException` and added to `lost`, if it is missing or
    `on_bad` is "skip"; otherwise its `UserError` is raised.
    """

    order = -10

    def __init__(self, size: int, on_bad: str = "stop"):
        super().__init__()
        self.size, self.on_bad, self.lost = size, on_bad, LostImages()

    def setups(self, dl):
        if len(dl.dataset):  # the value of `get_c(dls)`: the network's number of outputs
            self.c = dl.dataset.tls[1][0].numel()

    def encodes(self, item):
        image, *points = item
        if image.error:
            self.skip_or_raise(*image.error)
        to_input = image.to_input
        points = [p.numpy() for p in points]  # on so few numbers numpy takes half of the time of torch
        points = [TensorPoint(torch.from_numpy(input_to_unit(to_input.to_input(p), self.size))) for p in points]
        return image, *points, TensorMap(torch.tensor(to_input))

    def decodes(self, item):
        image, *rest = item
        return image, *(TensorPoint(unit_to_input(p, self.size)) for p in rest if isinstance(p, TensorPoint))

    def skip_or_raise(self, item: LabelledImage, error: UserError) -> NoReturn:
        if self.on_bad != "skip" and not isinstance(error, MissingImage):
            raise error
        self.lost.add(item, error.line)
        raise SkipItemException(error.line)
