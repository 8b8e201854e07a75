"Degraded training images: what is blurred, darkened and covered, how many, and that nothing else changes."

import numpy as np
import pytest
import torch
from fastai.vision.core import TensorImage, TensorPoint

from landmarks_fastai.data.block import landmark_dataloaders
from landmarks_fastai.data.degrade import COVER, DARK, Degrade
from landmarks_fastai.utils.hardware import Machine


def faces(n, size=32):
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(0)) * 0.5 + 0.25


@pytest.mark.parametrize("fraction", [0.0, 0.2, 1.0])
def test_each_kind_happens_to_its_fraction_of_the_images(fraction):
    images, points, maps = faces(500), torch.rand(500, 4, 2), torch.rand(500, 6)
    found, same_points, same_maps = Degrade(fraction).encodes((TensorImage(images), TensorPoint(points), maps))
    assert same_points is not None and torch.equal(same_points.as_subclass(torch.Tensor), points)
    assert torch.equal(same_maps, maps) and type(found) is TensorImage
    found = found.as_subclass(torch.Tensor)
    assert 0 <= found.min() and found.max() <= 1
    share = lambda which: float(which.float().mean())  # noqa: E731
    assert share((found != images).flatten(1).any(1)) == pytest.approx(1 - (1 - fraction) ** 3, abs=0.06)
    dark = found.flatten(1).median(1).values < 0.35
    assert share(dark) == pytest.approx(fraction * (1 - np.log(0.5 / 0.35) / DARK), abs=0.08)
    assert torch.equal(images, faces(500))  # the images that were passed


def test_another_epoch_is_degraded_otherwise_and_validation_never(drawn):
    def batches(**changes):
        return landmark_dataloaders(
            drawn, size=32, batch_size=8, aug=0.0, mirror="none", machine=Machine(workers=0), **changes
        )

    plain, degraded = batches(), batches(degrade=0.2)
    first = degraded.train.one_batch()[0]
    assert not torch.equal(first, plain.train.one_batch()[0])
    assert torch.equal(first, degraded.train.one_batch()[0])
    assert torch.equal(degraded.valid.one_batch()[0], plain.valid.one_batch()[0])
    degrade, images = Degrade(0.2), TensorImage(faces(8))
    found = []
    for epoch in (0, 1, 0):
        degrade.begin(epoch)
        found.append(degrade.encodes((images,))[0].as_subclass(torch.Tensor))
    assert torch.equal(found[0], found[2]) and not torch.equal(found[0], found[1])


def test_covered_rectangles_are_of_many_places_and_sizes():
    images = torch.full((400, 3, 40, 40), 0.5)
    found = Degrade(1.0, seed=3).encodes((TensorImage(images),))[0].as_subclass(torch.Tensor)
    corner = found.flatten(2).mode(2).values  # the colour of most pixels: the darkened grey
    covered = (found != corner[:, :, None, None]).any(1)
    for inside, image in zip(covered, found, strict=True):
        rows, columns = torch.nonzero(inside.any(1)).ravel(), torch.nonzero(inside.any(0)).ravel()
        assert inside.sum() == len(rows) * len(columns) and len(image[:, inside].unique(dim=1).T) <= 1
    areas = covered.flatten(1).float().mean(1)
    assert areas.max() <= (2 * COVER) ** 2 + 0.1 and areas.std() > 0.05
    assert covered.float().mean(0).min() > 0  # no place is never covered
