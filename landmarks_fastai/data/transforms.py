"""The transforms of an item: a labelled image -> (network input, unit points, map).

`OpenInput` and `StoredPoints` are the getters in front of fastai's `ImageBlock` and `PointBlock`. `PointsToUnit`, the
first item transform, takes the points from pixels of the image as stored to unit coordinates, and hands on the image's
map: a `PixelMap`, by which metrics and predictions go back to the image as stored.
"""

import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

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
from landmarks_fastai.data.images import read_crop, to_rgb
from landmarks_fastai.data.items import LabelledImage
from landmarks_fastai.errors import MissingImage, UserError
from landmarks_fastai.geometry import PixelMap, cut_image, fit_image, input_to_unit, unit_to_input

UNMOUNTED = 4  # lost images in a row, in batches that lose most of theirs


class TensorMap(TensorBase):
    "A `PixelMap` as four numbers, so that it collates with the item it belongs to."


@dataclass
class CroppedImage:
    "An image at prediction, seen through an aligned crop."

    image: "str | Path | Image.Image | np.ndarray"
    to_input: PixelMap


class OpenInput(Transform):
    """The `get_x`: an item -> its image as the network's input, a `PILImage` with its map in `to_input`.

    Takes a `LabelledImage`, and at prediction a path, a PIL image or an array (h, w, 3) uint8. The image of a
    `LabelledImage` that cannot be used comes blank, with its `error`: fastai opens the first item to learn what items
    are, where nothing can be skipped. `PointsToUnit` skips or raises.
    """

    input_types = (LabelledImage, CroppedImage, str, Path, Image.Image, np.ndarray)

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
                to_input = PixelMap(1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
                error = item, e
        else:
            image, to_input = self.unlabelled(item)
        image = PILImage.create(image)
        image.to_input, image.error = to_input, error
        return image

    def unlabelled(self, item) -> tuple[Image.Image, PixelMap]:
        "The input and map of a path, a PIL image, an array, or a crop of one of these."
        item, to_input = (item.image, item.to_input) if isinstance(item, CroppedImage) else (item, None)
        if isinstance(item, (str, Path)):
            return (read_crop(item, to_input, self.inputs.size), to_input) if to_input else self.inputs.read(item)
        image = to_rgb(item if isinstance(item, Image.Image) else Image.fromarray(item))
        if to_input:
            return cut_image(image, to_input, self.inputs.size), to_input
        return fit_image(image, self.inputs.fit, self.inputs.size)

    def labelled(self, item: LabelledImage) -> tuple[Image.Image, PixelMap]:
        "The item's input and map: whole, or the aligned crop where it is asked for and its points have a shape."
        if item.crop is not None:
            own = item.crop.to_input is None
            to_input = self.alignment.maps(item.points[None])[0] if own else item.crop.to_input
            if to_input:
                return self.inputs.crop(item.row, item.path, to_input, item.where, cached=own)
        return self.inputs(item.row, item.path, item.where)


class StoredPoints(Transform):
    "The `get_y`: the item's points, in pixels of the image as stored."

    input_types = (LabelledImage,)

    def encodes(self, item: LabelledImage):
        return item.points


class LostImages:
    "The images that training goes on without: each is told once a run, and listed."

    def __init__(self):
        self.batch, self.in_a_row, self.told = [], 0, set()

    def add(self, item: LabelledImage, why: str):
        self.batch.append((item, why))

    def end_batch(self, size: int):
        "Tell those of a batch. Raises `UserError` where most of it, or of some small ones, is gone: a folder is, not an image."
        lost, self.batch = self.batch, []
        self.in_a_row = self.in_a_row + len(lost) if 2 * len(lost) > size else 0
        if self.in_a_row >= UNMOUNTED:
            raise UserError(f"{lost[0][1]}; so are {len(lost)} of a batch of {size}: is the folder still there?")
        for item, why in lost:
            if item.row not in self.told:
                self.told.add(item.row)
                self.tell(item, why)

    @staticmethod
    def tell(item: LabelledImage, why: str):
        if listing := item.images.listing:
            with suppress(OSError):  # a full disk must not end a run over a list
                if not append_listing(listing, item.problem(why)):
                    return  # another worker has told it
        print(f"warning: {why}: the run goes on without it", file=sys.stderr, flush=True)


class PointsToUnit(ItemTransform):
    """(input, points in pixels of the image as stored) -> (input, points in unit coordinates, map); without points likewise.

    It stands before the item transforms that a user adds: those see points in unit coordinates, as fastai's own do.
    An image that cannot be used is skipped, by fastai's `SkipItemException`, where `on_bad` allows it; `lost` has it then.
    """

    order = -10

    def __init__(self, size: int, on_bad: str = "stop"):
        super().__init__()
        self.size, self.on_bad, self.lost = size, on_bad, LostImages()

    def setups(self, dl):
        if len(dl.dataset):  # what `get_c(dls)` gives: numbers of a prediction
            self.c = dl.dataset.tls[1][0].numel()

    def encodes(self, item):
        image, *points = item
        if image.error:
            self.skip_or_raise(*image.error)
        to_input = image.to_input
        points = [p.as_subclass(torch.Tensor) for p in points]  # fastai's types make each of the next operations slower
        points = [TensorPoint(input_to_unit(to_input.to_input(p), self.size)) for p in points]
        return image, *points, TensorMap(torch.tensor(to_input))

    def decodes(self, item):
        image, *rest = item
        return image, *(TensorPoint(unit_to_input(p, self.size)) for p in rest if isinstance(p, TensorPoint))

    def skip_or_raise(self, item: LabelledImage, error: UserError):
        if self.on_bad != "skip" and not isinstance(error, MissingImage):
            raise error
        self.lost.add(item, error.line)
        raise SkipItemException(error.line)
