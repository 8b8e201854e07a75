"The warp: image and points move together, names change in the mirror, and only training sees any of it."

import numpy as np
import pytest
import torch
from fastai.vision.augment import Flip
from fastai.vision.core import TensorImage, TensorPoint
from PIL import Image

from landmarks_fastai.data.augment import Augment, invert, warp_images, warp_points
from landmarks_fastai.data.block import landmark_dataloaders
from landmarks_fastai.geometry import unit_to_input
from landmarks_fastai.settings import DataFacts, Settings
from landmarks_fastai.synthetic.sample import flip_indices_of_template
from landmarks_fastai.utils.hardware import Machine
from tests.helpers import N_POINTS, dot, write_labelled_images


def dots(points, size, spread=2.5):
    "An image (3, size, size) for each row of unit coordinates (n, 1, 2): a bright round dot at its point."
    at = unit_to_input(points[:, 0], size)
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    away = (x - at[:, 0, None, None]) ** 2 + (y - at[:, 1, None, None]) ** 2
    return torch.exp(-away / (2 * spread**2))[:, None].repeat(1, 3, 1, 1)


def centres(images, near):
    """The dots' centres of mass (n, 2), pixels, within 12 pixels of `near`.

    A dot may be seen twice, where a corner shows what is reflected in; and the light around it is no part of it.
    """
    light = images.as_subclass(torch.Tensor).mean(1).double()
    y, x = torch.meshgrid(*(torch.arange(s).double() for s in light.shape[1:]), indexing="ij")
    inside = (x - near[:, 0, None, None]) ** 2 + (y - near[:, 1, None, None]) ** 2 < 12**2
    light = torch.where(inside, light - light.amin((1, 2), keepdim=True), 0.0)
    light = torch.where(light > 0.02 * light.amax((1, 2), keepdim=True), light, 0.0)
    return torch.stack([(light * x).sum((1, 2)), (light * y).sum((1, 2))], 1) / light.sum((1, 2))[:, None]


@pytest.mark.parametrize("size", [64, 97])
@pytest.mark.parametrize("strength", [0.0, 1.0, 2.0])
def test_a_dot_is_where_its_point_is_after_warp_and_mirror(size, strength):
    points = (torch.rand(64, 1, 2, generator=torch.Generator().manual_seed(0)) - 0.5) * 0.8
    warp = Augment(strength, (0,), seed=3)
    images, moved = warp.encodes((TensorImage(dots(points, size)), TensorPoint(points)))
    expected = unit_to_input(moved[:, 0].as_subclass(torch.Tensor), size)
    assert centres(images, expected).numpy() == pytest.approx(expected.numpy(), abs=0.1)
    plain = torch.linalg.norm(moved.as_subclass(torch.Tensor) - points, dim=-1) > 0.02
    assert plain.float().mean() > (0.9 if strength else 0.3)  # they did move: half of them mirrored at strength 0


def test_the_dot_through_the_whole_dataloader(tmp_path):
    "From a file to a normalised, warped, mirrored batch."
    places = np.random.default_rng(0).uniform(60, 90, (24, 2)).round()
    lights = [np.rint(250 * dot(160, 140, x, y, 5.0)).astype(np.uint8) for x, y in places]
    write_labelled_images(tmp_path, [Image.fromarray(light).convert("RGB") for light in lights], places)
    facts, settings = DataFacts(1, flip_indices=(0,)), Settings(size=80, batch_size=16, aug=1.5)
    images, points, _ = landmark_dataloaders(tmp_path, settings, facts, machine=Machine(workers=0)).train.one_batch()
    expected = unit_to_input(points[:, 0].as_subclass(torch.Tensor), 80)
    assert centres(images, expected).numpy() == pytest.approx(expected.numpy(), abs=0.1)


def sides(points, flip_indices):
    "Share of pairs whose lower-numbered point lies left of its partner."
    points, k = points.as_subclass(torch.Tensor), torch.arange(len(flip_indices))
    left = k < flip_indices
    return (points[:, left, 0] < points[:, flip_indices[left], 0]).float().mean().item()


def test_flip_renames_points_where_fastai_does_not(drawn):
    "In every drawn face one eye's points lie left of the other's. After `Flip` the names say the opposite."
    dls = landmark_dataloaders(drawn, size=48, aug=0.0, machine=Machine(workers=0))
    images, points, maps = dls.valid.one_batch()
    flip_indices = torch.from_numpy(flip_indices_of_template(N_POINTS))
    before = sides(points, flip_indices)
    side = before > 0.5
    assert abs(before - side) < 0.1  # all but a few near the axis
    flip = Flip(p=1.0)
    flip.before_call((images, points), 0)
    assert abs(sides(flip.encodes(points), flip_indices) - (not side)) < 0.1

    class Always(Augment):
        def sample_warp(self, rng, n):
            return torch.tensor([[-1.0, 0, 0], [0, 1, 0]]).repeat(n, 1, 1), torch.ones(n, dtype=bool)

    mirrored_images, mirrored, _ = Always(0.0, flip_indices).encodes((images, points, maps))
    assert torch.allclose(
        mirrored_images.as_subclass(torch.Tensor), images.flip(-1).as_subclass(torch.Tensor), atol=1e-5
    )
    assert sides(mirrored, flip_indices) == pytest.approx(before, abs=0.02)
    # and nothing but the names differs from what Flip made
    again = mirrored.as_subclass(torch.Tensor)[:, flip_indices]
    assert torch.allclose(again, flip.encodes(points).as_subclass(torch.Tensor), atol=1e-5)


def test_augmentation_is_a_function_of_seed_epoch_and_batch(drawn):
    def epoch(seed, number):
        train = landmark_dataloaders(drawn, size=32, batch_size=8, seed=seed, machine=Machine(workers=0)).train
        train.epoch = number
        return [torch.cat([p.as_subclass(torch.Tensor).flatten(1) for p in b[:2]], 1) for b in train]

    first = epoch(0, 0)
    assert all(torch.equal(a, b) for a, b in zip(first, epoch(0, 0), strict=True))
    assert not torch.equal(first[0], epoch(0, 1)[0]) and not torch.equal(first[0], epoch(1, 0)[0])
    warp = Augment(1.0)
    a, b = (warp.sample_warp(np.random.default_rng([0, 0, k]), 4)[0] for k in (0, 1))
    assert not torch.equal(a, b)


def test_validation_sees_the_images_as_they_are(drawn):
    plain, strong = (landmark_dataloaders(drawn, size=32, aug=aug, machine=Machine(workers=0)) for aug in (0.0, 2.0))
    assert all(map(torch.equal, plain.valid.one_batch(), strong.valid.one_batch()))


def test_no_black_corners():
    "What a turned or shifted picture lacks is reflected in."
    matrix, _ = Augment(2.0).sample_warp(np.random.default_rng(0), 32)
    assert warp_images(torch.ones(32, 3, 40, 40), invert(matrix)).min() > 0.999


def test_points_follow_the_matrix():
    quarter = torch.tensor([[[0.0, -1, 0.5], [1, 0, 0]]])
    assert warp_points(torch.tensor([[[1.0, 0.0], [0.0, 1.0]]]), quarter).tolist() == [[[0.5, 1.0], [-0.5, 0.0]]]


def test_colour_stays_in_range_and_changes():
    images, points = torch.rand(16, 3, 8, 8), torch.zeros(16, 1, 2)
    warp = Augment(2.0)
    warp.sample_warp = lambda rng, n: (torch.eye(2, 3).repeat(n, 1, 1), torch.zeros(n, dtype=bool))
    changed, _ = warp.encodes((TensorImage(images), TensorPoint(points)))
    assert 0 <= changed.min() and changed.max() <= 1
    assert (changed - images).abs().amax((1, 2, 3)).min() > 0.005
