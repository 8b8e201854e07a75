"The DataBlock of landmarks, and the DataLoaders that it makes of a folder or a DataFrame."

import os
import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from fastai.data.block import DataBlock
from fastai.data.core import DataLoaders
from fastai.vision.core import PointScaler
from fastai.vision.data import ImageBlock, PointBlock
from fastcore.foundation import L

from landmarks_fastai.data.align import MIN_POINTS, NoShape, alignment_of, procrustes_mean, shape_setting
from landmarks_fastai.data.augment import Augment, BatchAugmentation
from landmarks_fastai.data.degrade import Degrade
from landmarks_fastai.data.flip import ROWS, FlipMap, NoFlipMap, learn_flip_map
from landmarks_fastai.data.image_cache import Inputs, open_cache
from landmarks_fastai.data.images import image_size
from landmarks_fastai.data.items import LabelledImages, labelled_images
from landmarks_fastai.data.loader import LandmarkDL
from landmarks_fastai.data.split import RowSplitter
from landmarks_fastai.data.transforms import OpenInput, PointsToUnit, StoredPoints
from landmarks_fastai.errors import MissingImage, UserError
from landmarks_fastai.geometry import PixelMap, input_to_unit, pixel_map
from landmarks_fastai.settings import INPUT, Settings
from landmarks_fastai.utils.distributed import this_process
from landmarks_fastai.utils.hardware import Machine

# Least factor by which aligned crops must reduce the spread of the points. Photographs of faces: 3.8; drawn faces: 5.1.
MIN_GAIN = 1.5


def landmark_block(
    settings: Settings | None = None,  # None: the defaults
    *,
    item_tfms: list | None = None,  # they get points in unit coordinates
    batch_tfms: list | None = None,
    machine: Machine = Machine(),  # noqa: B008
    **changes: Any,  # fields of `Settings` by name: size=128, batch_size=32, fit="crop", …
) -> DataBlock:
    """Create a `DataBlock` of landmarks. Its source is that of `landmark_dataloaders`, except a DataFrame.

    Items are (PILImage, TensorPoint, TensorMap), batches (images, points (batch, n_points, 2), maps (batch, 6)). Points
    are in unit coordinates, [-1, 1] from edge to edge of the input (`geometry.py`). Raises `UserError` for a setting
    that does not exist or is out of range.
    """
    settings = (settings or Settings()).replace(**changes)
    augment: list[BatchAugmentation] = []
    if settings.aug or settings.flip_indices:
        augment.append(Augment(settings.aug, settings.flip_indices or None, settings.seed))
    if settings.degrade:
        augment.append(Degrade(settings.degrade, settings.seed))
    block = DataBlock(
        blocks=[ImageBlock, PointBlock],
        dl_type=LandmarkDL,  # pyright: ignore[reportArgumentType] (fastai annotates an instance, and takes a class)
        get_items=partial(labelled_images, on_bad=settings.on_bad),
        get_x=OpenInput(Inputs(**settings.of(INPUT)), alignment_of(settings)),
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
    listing: Path | None = None,  # file that lists the bad rows that are left out
    left_out: np.ndarray | None = None,  # rows that a resumed run started without
    **changes: Any,  # fields of `Settings` by name: size=128, batch_size=32, …
) -> DataLoaders:
    """Create the training and validation `DataLoaders`; all rows are checked, and the flip map is learned from the training rows.

    `dls.settings` are the resulting settings. `dls.flip` is the `FlipMap`, or the `NoFlipMap` with the reason why there
    is none; None if it was not learned. `dls.align_gain` is the factor by which aligned crops reduce the spread of the
    points; None if it was not measured. Raises `UserError`, and `BadData` with every bad row.

    >>> dls = landmark_dataloaders("faces", size=128, batch_size=32)
    """
    settings = (settings or Settings()).replace(**changes)
    if isinstance(source, (str, Path)):
        settings = settings.replace(data=os.path.abspath(source or "."))
    images = labelled_images(source, image_folder, settings.on_bad, listing, left_out)
    settings, flip = with_flip_map(settings.replace(n_points=images.labels.n_points), images)
    train, _ = RowSplitter(settings)(images)
    sampled = list(points_and_maps(images[train], settings))
    settings = settings.replace(points_box=points_box(sampled, settings.size))
    settings, gain = with_alignment(settings, sampled, flip.shape if isinstance(flip, FlipMap) else None)
    block = landmark_block(settings, item_tfms=item_tfms, batch_tfms=batch_tfms, machine=machine)
    if machine.cache:
        rows, key, inputs = len(images.labels), {"labels": images.labels.identity}, block.getters[0].inputs
        inputs.cache = open_cache(images.folder, rows, settings.fit, settings.size, key)
        if settings.align:
            key |= {"shape": zlib.crc32(repr(settings.shape).encode())}
            inputs.crops = open_cache(images.folder, rows, f"align{settings.align:g}", settings.size, key, inputs.cache)
    dls = block.dataloaders(images)
    process = this_process()
    for dl in dls.loaders:
        dl.share = process.rank, process.count
    # attributes of their own, that fastai's DataLoaders do not declare
    dls.flip, dls.align_gain = flip, gain  # pyright: ignore[reportAttributeAccessIssue]
    return dls


def with_flip_map(settings: Settings, images: LabelledImages) -> tuple[Settings, FlipMap | NoFlipMap | None]:
    """Return the settings with the flip indices, and the map that was learned, or the reason why there is none.

    It is None where nothing was learned: mirroring is off, or the settings have flip indices. Raises `UserError` for
    `tta` without mirroring.
    """
    if settings.mirror == "none":
        if settings.tta:
            raise UserError("--tta scores the mirrored image too, --mirror none forbids it: run without one of them")
        return settings.replace(flip_indices=()), None
    if settings.flip_indices:
        return settings, None
    train, _ = RowSplitter(settings)(images)
    try:
        found = learn_flip_map(np.stack([item.points for item in images[train].sample(ROWS)]))
    except NoFlipMap as e:
        return settings.replace(tta=False), e
    return settings.replace(flip_indices=tuple(found.flip_indices.tolist())), found


def with_alignment(
    settings: Settings,
    sampled: Sequence[tuple[np.ndarray, PixelMap]],  # of the training rows, from `points_and_maps`
    mean: np.ndarray | None = None,  # `procrustes_mean` of the training rows, if it is known from the flip map
) -> tuple[Settings, float | None]:
    """Return the settings with the mean shape, and the factor by which aligned crops reduce the spread of the points.

    The factor is None where it was not measured, and 0 where most objects are too small for a crop. If it is too small, a
    second pass is of no use: `align` becomes 0.
    """
    if not settings.align or settings.shape:
        return settings if settings.align else settings.replace(shape=()), None
    off = settings.replace(align=0.0, shape=())
    if settings.n_points < MIN_POINTS or not sampled:  # training reports that no image can be read
        return off, None
    points, whole = zip(*sampled, strict=True)
    try:
        mean = procrustes_mean(np.stack(points)) if mean is None else mean
    except NoShape:
        return off, None
    settings = settings.replace(shape=shape_setting(mean))
    alignment = alignment_of(settings)
    assert alignment is not None
    crops = alignment.maps(np.stack(points))
    usable = [(p, w, m) for p, w, m in zip(points, whole, crops, strict=True) if m]
    if 2 * len(usable) < len(points):
        return off, 0.0
    points, whole, crops = zip(*usable, strict=True)
    gain = spread(points, whole) / max(1e-9, spread(points, crops))
    return (settings if gain >= MIN_GAIN else off), gain


def points_and_maps(images: LabelledImages, settings: Settings) -> Iterator[tuple[np.ndarray, PixelMap]]:
    """Yield the points of at most 2,000 evenly spaced images, (n_points, 2) pixels as stored, and the map of the whole image.

    Only the images' headers are read. Images that training leaves out with a warning are left out here: those that do not
    exist, and with `on_bad="skip"` all that cannot be read.
    """
    for item in images.sample(ROWS):
        with suppress(UserError if settings.on_bad == "skip" else MissingImage):
            yield item.points, pixel_map(*image_size(item.path, item.where), settings.fit, settings.size)


def points_box(sampled: Sequence[tuple[np.ndarray, PixelMap]], size: int) -> tuple[float, ...]:
    "Return the mean box of the points in the input: left, top, right, bottom in unit coordinates; empty without images."
    boxes = [
        np.stack([p.min(0), p.max(0)]) for points, m in sampled if (p := input_to_unit(m.to_input(points), size)).size
    ]
    box = np.mean(boxes, axis=0).ravel().round(4).tolist() if boxes else []
    return tuple(box) if boxes and box[2] > box[0] and box[3] > box[1] else ()  # no box: one point, or all on a line


def spread(points: Sequence[np.ndarray], maps: Sequence[PixelMap]) -> float:
    "Root mean square distance of the points from their mean position in the input, in pixels of the images as stored."
    pairs = list(zip(points, maps, strict=True))
    mean = np.mean([m.to_input(p) for p, m in pairs], axis=0)
    return float(np.sqrt(np.mean([((m.to_image(mean) - p) ** 2).sum(-1).mean() for p, m in pairs])))
