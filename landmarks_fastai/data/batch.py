"""Make a batch of labelled images at once, if the pipelines of an item hold this program's own transforms only.

The tensors are those of fastai's pipelines to the last bit (`tests/data/test_batch.py`). The pipelines take 0.9 ms an image
more (plum's dispatch, types, collation), where decoding and fitting a JPEG of 200 px takes 0.9 ms, and reading it from
`--cache` 0.06. With any other transform, or an image that cannot be read, the items pass the pipelines.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from fastai.data.core import Datasets, TfmdDL
from fastai.data.transforms import ToTensor
from fastai.vision.core import TensorImage, TensorPoint
from fasttransform import Transform

from landmarks_fastai.data.items import LabelledImages
from landmarks_fastai.data.transforms import OpenInput, PointsToUnit, StoredPoints, TensorMap
from landmarks_fastai.errors import UserError
from landmarks_fastai.geometry import PixelMap, input_to_unit

GETTERS = [
    [OpenInput, "PILBase.create"],
    [StoredPoints, "TensorPoint.create"],
]  # of `landmark_block`, inputs and points
AFTER_ITEM = [PointsToUnit, ToTensor]
METHODS = {"create_item", "create_batch", "do_batch", "retain"}  # of fastai's DataLoader, which a user can replace


def has_own_tfms(dl: TfmdDL) -> bool:
    "Return whether the items of a loader are labelled images, made and collated by this program's transforms only."
    data = dl.dataset
    return (
        isinstance(data, Datasets)
        and all(isinstance(tl.items, LabelledImages) for tl in data.tls)
        and [_kinds(tl.tfms) for tl in data.tls] == GETTERS
        and _kinds(dl.after_item) == AFTER_ITEM
        and not dl.before_batch.fs
        and METHODS.isdisjoint(vars(dl))
    )


def _kinds(pipeline: Any) -> list:
    return [f.name if type(f) is Transform else type(f) for f in pipeline.fs]


def read_batch(dl: TfmdDL, rows: Sequence[int]) -> tuple[TensorImage, TensorPoint, TensorMap] | None:
    """Return the batch of the rows, as `dl.do_batch` does; None if an image cannot be read.

    Images are (rows, 3, size, size) uint8, points (rows, n_points, 2) unit coordinates, maps (rows, 6).
    """
    inputs = dl.dataset.tls[0]
    open_input, items = inputs.tfms.fs[0], [inputs.items[row] for row in rows]
    size = open_input.inputs.size
    images, maps = np.empty((len(rows), 3, size, size), np.uint8), []
    try:
        for image, item in zip(images, items, strict=True):
            image[:], to_input = open_input.labelled(item)
            maps.append(to_input)
    except UserError:
        return None
    points, maps = np.stack([item.points for item in items]), np.array(maps, np.float32)
    points = input_to_unit(PixelMap(*maps.T[:, :, None]).to_input(points), size)
    return (
        TensorImage(torch.from_numpy(images)),
        TensorPoint(torch.from_numpy(points)),
        TensorMap(torch.from_numpy(maps)),
    )
