"The DataBlock of landmarks, and the DataLoaders that it makes of a folder or a DataFrame."

import os
import zlib
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from fastai.data.block import DataBlock, TransformBlock
from fastai.data.core import DataLoaders
from fastai.vision.data import ImageBlock

from landmarks_fastai.data.align import DIGITS, MIN_GAIN, NoShape, alignment_of, procrustes_mean
from landmarks_fastai.data.augment import Augment, BatchAugmentation
from landmarks_fastai.data.degrade import Degrade
from landmarks_fastai.data.flip import ROWS, NoFlipMap, learn_flip_map
from landmarks_fastai.data.image_cache import Inputs, open_cache
from landmarks_fastai.data.items import LabelledImages, labelled_images
from landmarks_fastai.data.loader import LandmarkDL
from landmarks_fastai.data.split import split_items
from landmarks_fastai.data.suspicions import check_labelled
from landmarks_fastai.data.transforms import OpenInput, PILInput, PointsToUnit, StoredPoints
from landmarks_fastai.errors import MissingImage, UserError
from landmarks_fastai.geometry import BOX_MARGIN, BOXED, PixelMap, input_to_unit, pixel_map
from landmarks_fastai.missing import MIN_POINTS, fill_missing, nan_mean
from landmarks_fastai.settings import DataFacts, Settings
from landmarks_fastai.utils.distributed import this_process
from landmarks_fastai.utils.hardware import Machine

MAX_OUTSIDE = 0.01  # share of the points outside of the input without a note; faces at an image's edge have some


def landmark_block(
    settings: Settings | None = None,  # None: the defaults
    facts: DataFacts | None = None,  # what `learn_facts` learned from the data; None: no flips, no aligned crops
    *,
    item_tfms: list | None = None,  # they get points in unit coordinates
    batch_tfms: list | None = None,
    inputs: Inputs | None = None,  # of the rows; None: read from the image files
    machine: Machine = Machine(),  # noqa: B008
    **changes: Any,  # fields of `Settings` by name: size=128, batch_size=32, fit="crop", …
) -> DataBlock:
    """Create a `DataBlock` of landmarks. Its source is that of `landmark_dataloaders`, except a DataFrame.

    Items are (PILImage, TensorPoint, TensorMap), batches (images, points (batch, n_points, 2), maps (batch, 6)). Points
    are in unit coordinates, [-1, 1] from edge to edge of the input (`geometry.py`). Raises `UserError` for a setting
    that does not exist or is out of range.
    """
    settings, facts = (settings or Settings()).replace(**changes), facts or DataFacts()
    augment: list[BatchAugmentation] = []
    if settings.aug or facts.flip_indices:
        augment.append(Augment(settings.aug, facts.flip_indices or None, settings.seed))
    if settings.degrade:
        augment.append(Degrade(settings.degrade, settings.seed))
    block = DataBlock(
        # not PointBlock: its PointScaler divides by the size alone, which takes a pixel's centre for its edge, half an input
        # pixel off; and workers that are not forked, Python 3.14's default, cannot pickle its TensorPoint.create
        blocks=[ImageBlock(PILInput), TransformBlock],  # pyright: ignore[reportArgumentType] (it annotates an instance)
        dl_type=LandmarkDL,  # pyright: ignore[reportArgumentType] (fastai annotates an instance, and takes a class)
        get_items=partial(labelled_images, on_bad=settings.on_bad, **settings.rows),
        get_x=OpenInput(inputs or Inputs(settings.fit, settings.size), alignment_of(settings, facts), settings),
        get_y=StoredPoints(),
        splitter=partial(split_items, settings=settings),
    )
    block.default_item_tfms += [PointsToUnit(settings.size)]
    block.default_batch_tfms += augment
    block.dls_kwargs = {
        "settings": settings,
        "facts": facts,
        "bs": settings.batch_size,
        "num_workers": machine.decoders,
        "device": torch.device(machine.device),
        "pin_memory": machine.pins,
    }
    return block.new(item_tfms, batch_tfms)


def landmark_dataloaders(
    source: "str | Path | pd.DataFrame | LabelledImages",  # labels of any format of docs/labels.md
    settings: Settings | None = None,  # None: the defaults
    facts: DataFacts | None = None,  # of an earlier stage: its mean shape and flip map are kept
    *,
    image_folder: "str | Path | None" = None,  # of the file names; None: they are searched
    item_tfms: list | None = None,
    batch_tfms: list | None = None,
    machine: Machine = Machine(),  # noqa: B008
    listing: Path | None = None,  # file that lists the bad rows that are left out
    left_out: np.ndarray | None = None,  # rows that a resumed run started without
    **changes: Any,  # fields of `Settings` by name: size=128, batch_size=32, …
) -> DataLoaders:
    """Create the training and validation `DataLoaders`; all rows are checked, and `dls.facts` learned from the training rows.

    Prints what was learned. `dls.settings` are the settings. Raises `UserError`, and `BadData` with every bad row.

    >>> dls = landmark_dataloaders("faces", size=128, batch_size=32)
    """
    settings = (settings or Settings()).replace(**changes)
    if isinstance(source, (str, Path)):
        settings = settings.replace(data=os.path.abspath(source or "."))
    images = labelled_images(source, image_folder, settings.on_bad, listing, left_out, **settings.rows)
    if facts and facts.n_points:
        images = images.fitted(facts, "the network of these facts")
    settings = settings.replace(crop=first_view(images, settings))
    facts = learn_facts(images, settings, facts)
    inputs = cached_inputs(images, settings, facts) if machine.cache else None
    block = landmark_block(settings, facts, item_tfms=item_tfms, batch_tfms=batch_tfms, inputs=inputs, machine=machine)
    dls, process = block.dataloaders(images), this_process()
    for dl in dls.loaders:
        dl.share = process.rank, process.count
    return dls


def first_view(images: LabelledImages, settings: Settings) -> str:
    "Return what the first pass sees, `image` or `box`, and print it if it is a box."
    crop = settings.crop
    if crop == "auto":
        crop = "box" if images.labels.several else "image"
    if crop == "box":
        kind = "the points'" if images.labels.boxes is None else "the source's"
        print(f"objects are cut from {kind} boxes, {BOX_MARGIN} times as large; predictions need boxes too", flush=True)
    return crop


def cached_inputs(images: LabelledImages, settings: Settings, facts: DataFacts) -> Inputs:
    "The network inputs of the rows, with a cache of the whole images, and one of the aligned crops if there are any."
    folder, rows, key = images.folder, len(images.labels), {"labels": images.labels.identity}
    images_cache = open_cache(folder, rows, "box" if settings.crop == "box" else settings.fit, settings.size, key)
    crops = None
    if alignment_of(settings, facts):
        key |= {"shape": zlib.crc32(repr(facts.shape).encode())}
        crops = open_cache(folder, rows, f"align{settings.align:g}", settings.size, key, images_cache)
    return Inputs(settings.fit, settings.size, images_cache, crops)


def learn_facts(images: LabelledImages, settings: Settings, known: DataFacts | None = None) -> DataFacts:
    """Learn the flip map, the mean shape and the points' box from the training rows, and print what comes out.

    Mean shape and flip map are kept where they are `known`. The source's flip indices are not believed if each point is its
    own mirror image: many files have those as a filler. Raises `UserError` for `tta` without mirroring.
    """
    images, labels = images[split_items(images, settings)[0]], images.labels
    facts = (known or DataFacts()).replace(n_points=labels.n_points)
    if not facts.point_names:
        facts = facts.replace(point_names=tuple(labels.point_names), skeleton=tuple(chain(*labels.skeleton)))
    if not facts.category:
        facts = facts.replace(category=labels.category)
    mean = np.array(facts.shape).reshape(-1, 2) if facts.shape else None
    check_labelled(labels, images.rows)
    filler = not facts.flip_indices and labels.flip_indices == tuple(range(labels.n_points))
    if not facts.flip_indices:
        facts = facts.replace(flip_indices=labels.flip_indices)
    if settings.mirror == "none":
        if settings.tta:
            raise UserError("--tta scores the mirrored image too, --mirror none forbids it: run without one of them")
        facts = facts.replace(flip_indices=())
    elif filler or not facts.flip_indices:
        try:
            flip = learn_flip_map(np.stack([item.points for item in images.sample(ROWS)]))
            mean = flip.shape if mean is None else mean
            facts = facts.replace(flip_indices=tuple(flip.flip_indices.tolist()))
            on_axis = sum(k == mirrored for k, mirrored in enumerate(facts.flip_indices))
            pairs = (facts.n_points - on_axis) // 2
            print(f"flip map learned: {pairs} pairs, {on_axis} points on the axis, {flip.miss:.3f} of the radius off")
        except NoFlipMap as e:
            without = "that of the source is used, which exchanges no points" if filler else "images are not mirrored"
            print(f"no flip map, {without}: {e}")
    points, maps = points_and_maps(images, settings)
    note_points_outside(unit_points(points, maps, settings.size), settings)
    if mean is None and facts.n_points >= MIN_POINTS and maps:  # training reports that no image can be read
        with suppress(NoShape):
            mean = procrustes_mean(points)
    box = BOXED if settings.crop == "box" else points_box(points, maps, settings.size, mean)
    facts = facts.replace(points_box=tuple(round(edge, DIGITS) for edge in box))
    return facts if mean is None or not maps else learn_alignment(facts, settings, points, maps, mean)


def note_points_outside(units: np.ndarray, settings: Settings) -> None:
    "Print a note if the input shows too few of the points, as the middle square of a wide image may."
    outside = np.where(np.isnan(units), np.nan, abs(units) > 1).max(-1)
    share = float(nan_mean(outside)) if len(units) else 0.0
    if share > MAX_OUTSIDE:
        hint = "--fit crop cuts the middle square: try --fit pad" if settings.fit == "crop" else "are the labels right?"
        print(f"note: {share:.1%} of the points lie outside of what the network sees; {hint}", flush=True)


def learn_alignment(
    facts: DataFacts,
    settings: Settings,
    points: np.ndarray,  # of the training rows, with their maps, from `points_and_maps`
    maps: Sequence[PixelMap],
    mean: np.ndarray,  # `procrustes_mean` of the training rows
) -> DataFacts:
    """Return the facts with the mean shape and the factor by which aligned crops reduce the spread of the points.

    The factor stays 0 if most objects are too small for a crop, or have no shape in common.
    """
    facts = facts.replace(shape=tuple(round(float(v), DIGITS) for v in mean.ravel()))
    if not settings.align or facts.align_gain:
        return facts
    alignment = alignment_of(settings, facts.replace(align_gain=MIN_GAIN))
    assert alignment is not None
    crops = alignment.maps_of_labels(points)
    usable = [k for k, crop in enumerate(crops) if crop]
    if 2 * len(usable) < len(points):
        print("most objects are too small, or of no common shape, for aligned crops: no second pass")
        return facts
    points = points[usable]
    gain = spread(points, [maps[k] for k in usable]) / max(1e-9, spread(points, list(filter(None, crops))))
    second = "a second pass over aligned crops" if gain >= MIN_GAIN else "no second pass"
    print(f"aligned to their mean shape, the points spread {gain:.2g} times less: {second}", flush=True)
    return facts.replace(align_gain=round(gain, DIGITS))


def points_and_maps(images: LabelledImages, settings: Settings) -> tuple[np.ndarray, list[PixelMap]]:
    """Return the points of at most 2,000 evenly spaced images, (images, n_points, 2) pixels as stored, and their first views.

    Only the images' headers are read. Images that training leaves out with a warning are left out here: those that do not
    exist, and with `on_bad="skip"` all that cannot be read.
    """
    points, maps = [], []
    for item in images.sample(ROWS):
        with suppress(UserError if settings.on_bad == "skip" else MissingImage):
            size, _ = item.picture.size_and_rotated()
            points.append(item.points)
            maps.append(item.view(settings) or pixel_map(*size, settings.fit, settings.size))
    return np.array(points, np.float32).reshape(-1, images.labels.n_points, 2), maps


def unit_points(points: np.ndarray, maps: Sequence[PixelMap], size: int) -> np.ndarray:
    "Return points (images, n, 2) of pixels as stored in unit coordinates of the input that each image's map leads to."
    units = [input_to_unit(m.to_input(p.astype(np.float64)), size) for p, m in zip(points, maps, strict=True)]
    return np.reshape(units, points.shape)


def mean_shape(images: LabelledImages, settings: Settings, shape: npt.ArrayLike = ()) -> np.ndarray:
    """Return the mean landmarks of the images, (n_points, 2) in unit coordinates of the input.

    Of at most 2,000 images: with more the mean changes by less than a hundredth of a face. Missing points are filled in
    from a mean `shape`: a landmark that few images have would start where those few faces are.
    """
    points, maps = points_and_maps(images, settings)
    if not maps:
        return np.zeros(points.shape[1:])
    shape = np.reshape(shape, (-1, 2))
    mean = nan_mean(unit_points(fill_missing(points, shape) if len(shape) else points, maps, settings.size), 0)
    return np.nan_to_num(np.where(np.isnan(mean), nan_mean(mean, 0), mean))  # a landmark of no image: the middle


def points_box(
    points: np.ndarray,  # with their maps, from `points_and_maps`
    maps: Sequence[PixelMap],
    size: int,
    shape: np.ndarray | None,  # the mean shape, which missing points are filled in from
) -> tuple[float, ...]:
    "Return the mean box of the points in the input: left, top, right, bottom in unit coordinates; empty without images."
    units = unit_points(points if shape is None else fill_missing(points, shape), maps, size)
    units = units if shape is None else units[~np.isnan(units).any((1, 2))]
    if not len(units):
        return ()
    low, high = np.fmin.reduce(units, 1).mean(0), np.fmax.reduce(units, 1).mean(0)
    return (*low.tolist(), *high.tolist()) if (high > low).all() else ()  # no box: one point, or all on a line


def spread(points: np.ndarray, maps: Sequence[PixelMap]) -> float:
    "Root mean square distance of the points from their mean position in the input, in pixels of the images as stored."
    mean = nan_mean(np.array([m.to_input(p) for p, m in zip(points, maps, strict=True)]), 0)
    squares = ((np.array([m.to_image(mean) for m in maps]) - points) ** 2).sum(-1)
    return float(np.sqrt(np.mean(nan_mean(squares, 1))))
