"""The DataBlock: labelled images become items of (network input, unit points, map), and the public calls that build it.

`OpenInput` and `StoredPoints` are the getters in front of fastai's `ImageBlock` and `PointBlock`. `PointsToUnit`, the
first item transform, takes the points from pixels of the image as stored to unit coordinates, and hands on the image's
map: a `PixelMap`, by which metrics and predictions go back to the image as stored.
"""

import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from fastai.data.block import DataBlock
from fastai.data.core import DataLoaders
from fastai.data.load import SkipItemException
from fastai.torch_core import TensorBase
from fastai.vision.core import PILImage, PointScaler, TensorPoint
from fastai.vision.data import ImageBlock, PointBlock
from fastcore.foundation import L
from fasttransform import ItemTransform, Transform
from PIL import Image

from landmarks_fastai.augment import Augment
from landmarks_fastai.check import append_listing
from landmarks_fastai.errors import MissingImage, UserError
from landmarks_fastai.geometry import PixelMap, fit_image, input_to_unit, unit_to_input
from landmarks_fastai.images import Inputs, open_cache, to_rgb
from landmarks_fastai.items import LabelledImage, LabelledImages, labelled_images
from landmarks_fastai.loader import LandmarkDL
from landmarks_fastai.machine import Machine, bar
from landmarks_fastai.mirror import NoMirror, learn_mirror
from landmarks_fastai.settings import INPUT, Settings
from landmarks_fastai.split import RowSplitter

FLIP_ROWS = 2000  # shapes that a flip map is learned from


class TensorMap(TensorBase):
    "A `PixelMap` as four numbers, so that it collates with the item it belongs to."


class OpenInput(Transform):
    """The `get_x`: an item -> its image as the network's input, a `PILImage` with its map in `to_input`.

    Takes a `LabelledImage`, and at prediction a path, a PIL image or an array (h, w, 3) uint8. The image of a
    `LabelledImage` that cannot be used comes blank, with its `error`: fastai opens the first item to learn what items
    are, where nothing can be skipped. `PointsToUnit` skips or raises.
    """

    input_types = (LabelledImage, str, Path, Image.Image, np.ndarray)

    def __init__(self, inputs: Inputs):
        super().__init__()
        self.inputs = inputs

    def encodes(self, item):
        error = None
        if isinstance(item, LabelledImage):
            try:
                image, to_input = self.inputs(item.row, item.path, item.where)
            except UserError as e:
                image, to_input = Image.new("RGB", (self.inputs.size, self.inputs.size)), PixelMap(1.0, 1.0, 0.0, 0.0)
                error = item, e
        elif isinstance(item, (str, Path)):
            image, to_input = self.inputs.read(item)
        else:
            image = to_rgb(item if isinstance(item, Image.Image) else Image.fromarray(item))
            image, to_input = fit_image(image, self.inputs.fit, self.inputs.size)
        image = PILImage.create(image)
        image.to_input, image.error = to_input, error
        return image


class StoredPoints(Transform):
    "The `get_y`: the item's points, in pixels of the image as stored."

    input_types = (LabelledImage,)

    def encodes(self, item: LabelledImage):
        return item.points


class PointsToUnit(ItemTransform):
    """(input, points in pixels of the image as stored) -> (input, points in unit coordinates, map); without points likewise.

    It stands before the item transforms that a user adds: those see points in unit coordinates, as fastai's own do.
    An image that cannot be used is told and skipped, by fastai's `SkipItemException`, where `on_bad` allows it.
    """

    order = -10

    def __init__(self, size: int, on_bad: str = "stop"):
        super().__init__()
        self.size, self.on_bad, self.told = size, on_bad, set()

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
        if item.row not in self.told:
            self.told.add(item.row)
            tell_lost(item, error.line)
        raise SkipItemException(error.line)


def tell_lost(item: LabelledImage, why: str):
    "Warn that training goes on without an image, and list it; once a run, whichever of its processes finds it."
    if listing := item.images.listing:
        with suppress(OSError):  # a full disk must not end a run over a list
            if not append_listing(listing, item.problem(why)):
                return
    print(f"warning: {why}: the run goes on without it", file=sys.stderr, flush=True)


def landmark_block(
    settings: Settings | None = None,  # None: the defaults
    *,
    item_tfms: list | None = None,  # see points in unit coordinates
    batch_tfms: list | None = None,
    machine: Machine = Machine(),  # noqa: B008
    **changes,  # fields of `Settings` by name: size=128, batch_size=32, fit="crop", …
) -> DataBlock:
    """A `DataBlock` of landmarks. Its source is what `landmark_dataloaders` takes, but a DataFrame.

    Items are (PILImage, TensorPoint, TensorMap), batches (images, points (batch, n_points, 2), maps (batch, 4)). Points
    are in unit coordinates, [-1, 1] from edge to edge of the input (`geometry.py`). Raises `UserError` for a setting
    that does not exist or is out of range.
    """
    settings = (settings or Settings()).replace(**changes)
    augment = []
    if settings.aug or settings.pairs:
        augment = [Augment(settings.aug, settings.pairs or None, settings.seed)]
    block = DataBlock(
        blocks=(ImageBlock, PointBlock),
        dl_type=LandmarkDL,
        get_items=labelled_images,
        get_x=OpenInput(Inputs(**settings.of(INPUT))),
        get_y=StoredPoints(),
        splitter=RowSplitter(settings),
    )
    # PointScaler divides by the size alone, which takes a pixel's centre for its edge: half an input pixel off
    block.default_item_tfms = L(t for t in block.default_item_tfms if not isinstance(t, PointScaler))
    block.default_item_tfms += [PointsToUnit(settings.size, settings.on_bad)]
    block.default_batch_tfms += augment
    block.dls_kwargs = {
        "settings": settings,
        "bs": settings.batch_size,
        "num_workers": machine.decoders,
        "device": torch.device(machine.device),
        "pin_memory": machine.pins,
    }
    return block.new(item_tfms, batch_tfms)


def landmark_dataloaders(
    source: "str | Path | pd.DataFrame | LabelledImages",  # a folder in the competition's layout, or file names and coordinates
    settings: Settings | None = None,  # None: the defaults
    *,
    image_folder: "str | Path | None" = None,  # of a DataFrame's file names
    item_tfms: list | None = None,
    batch_tfms: list | None = None,
    machine: Machine = Machine(),  # noqa: B008
    listing: Path | None = None,  # file that lists bad rows that are left out
    left_out: np.ndarray | None = None,  # rows that a resumed run began without
    progress=bar,
    **changes,  # fields of `Settings` by name: size=128, batch_size=32, …
) -> DataLoaders:
    """Training and validation `DataLoaders` of checked rows, their flip map learned from the training rows' points.

    `dls.settings` has the settings that they were made by, `dls.flip` the `MirrorMap` or the `NoMirror` that says why
    there is none, where it was learned. Raises `UserError`, and `BadData` with every bad row.

    >>> dls = landmark_dataloaders("faces", size=128, batch_size=32)
    """
    settings = (settings or Settings()).replace(**changes)
    images = labelled_images(source, image_folder, settings.on_bad, listing, left_out, progress)
    settings, flip = with_flip_map(settings.replace(n_points=images.labels.n_points), images)
    block = landmark_block(settings, item_tfms=item_tfms, batch_tfms=batch_tfms, machine=machine)
    if machine.cache:
        cache = open_cache(images.folder, len(images.labels), **settings.of(INPUT), key={"labels": images.labels.key})
        block.getters[0].inputs.cache = cache
    dls = block.dataloaders(images)
    dls.flip = flip
    return dls


def with_flip_map(settings: Settings, images: LabelledImages) -> "tuple[Settings, object]":
    "The settings with the indices of the mirrored points where they are wanted and not known yet, and what was found."
    if settings.mirror == "none":
        if settings.tta:
            raise UserError("--tta scores the mirrored image too, --mirror none forbids it: run without one of them")
        return settings.replace(pairs=()), None
    if settings.pairs:
        return settings, None
    train, _ = RowSplitter(settings)(images)
    try:
        found = learn_mirror(np.stack([item.points for item in images[train].sample(FLIP_ROWS)]))
    except NoMirror as e:
        return settings.replace(tta=False), e
    return settings.replace(pairs=tuple(found.pairs.tolist())), found
