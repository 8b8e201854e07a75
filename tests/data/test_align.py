"Aligned crops: the similarity is the right one, what makes no shape has none, and points come back through the crop."

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from landmarks_fastai.data.align import Alignment, NoShape, alignment_of, procrustes_mean
from landmarks_fastai.data.block import landmark_dataloaders
from landmarks_fastai.data.image_cache import Inputs
from landmarks_fastai.data.transforms import OpenInput
from landmarks_fastai.geometry import unit_to_input
from landmarks_fastai.metrics import points_in_image
from landmarks_fastai.settings import Settings
from landmarks_fastai.synthetic.face_template import landmark_layout
from tests.helpers import N_POINTS


def shapes(n, seed=0, noise=0.0):
    "The mean shape of a face at random places, sizes and turns, (n, 68, 2) pixels."
    rng = np.random.default_rng(seed)
    mean = landmark_layout(N_POINTS)[0][:, :2] @ [1, 1j]
    turn = rng.uniform(20, 80, (n, 1)) * np.exp(1j * rng.normal(0, 0.3, (n, 1)))
    z = turn * mean + rng.uniform(50, 200, (n, 2)) @ np.array([[1], [1j]])
    z = z + noise * (rng.standard_normal(z.shape) + 1j * rng.standard_normal(z.shape))
    return np.stack([z.real, z.imag], -1)


def test_crop_shows_every_shape_at_the_same_place():
    points = shapes(30)
    alignment = Alignment(procrustes_mean(points), 1.3, 96)
    aligned = np.array([m.to_input(p) for m, p in zip(alignment.maps(points), points, strict=True)])
    assert np.ptp(aligned, axis=0).max() < 1e-6
    low, high = aligned[0].min(0), aligned[0].max(0)
    assert (high - low).max() == pytest.approx(96 / 1.3)  # the margin
    assert (low + high) / 2 == pytest.approx([47.5, 47.5])  # in the middle


def test_alignment_is_the_least_squares_similarity():
    points = shapes(1, noise=4.0)[0]
    alignment = Alignment(procrustes_mean(shapes(30)), 1.3, 96)
    (found,) = alignment.maps(points[None])
    target = Alignment(alignment.shape, 1.3, 96).maps(alignment.shape[None] * 50)[0].to_input(alignment.shape * 50)
    mean, z = target @ [1, 1j], points @ [1, 1j]
    # points = factor * mean + offset, solved by numpy
    (factor, offset), *_ = np.linalg.lstsq(np.stack([mean, np.ones_like(mean)], 1), z, rcond=None)
    expected = (z - offset) / factor
    assert found.to_input(points) @ [1, 1j] == pytest.approx(expected, abs=1e-6)


def test_points_without_a_plausible_shape_have_no_crop():
    rng = np.random.default_rng(0)
    alignment = Alignment(procrustes_mean(shapes(30)), 1.3, 96)
    scattered, equal = rng.uniform(0, 100, (N_POINTS, 2)), np.full((N_POINTS, 2), 7.0)
    tiny, good = shapes(1)[0] / 50, shapes(1)[0]
    ruined = good.copy()
    ruined[3] = np.nan
    found = alignment.maps(np.stack([scattered, equal, tiny, ruined, good]))
    assert [m is None for m in found] == [True, True, True, True, False]


def test_equal_points_have_no_mean_shape():
    with pytest.raises(NoShape):
        procrustes_mean(np.ones((5, N_POINTS, 2)))


def test_every_fourth_image_of_a_training_batch_is_whole(drawn):
    dls = landmark_dataloaders(drawn, size=64, batch_size=8, aug=0.0, mirror="none", align=1.05)
    rows, (_, _, maps) = dls.train.get_idxs(), dls.train.one_batch()
    whole = [OpenInput(Inputs("crop", 64)).encodes(dls.train.items[row]).to_input for row in rows[:8]]
    assert [tuple(m) == pytest.approx(w) for m, w in zip(maps.tolist(), whole, strict=True)] == [True, *[False] * 3] * 2
    assert sorted(rows) == sorted(range(len(dls.train_ds)))
    assert not any(dls.valid.is_aligned(place) for place in range(8))


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_points_of_a_batch_of_crops_map_back_to_the_labels(drawn, workers):
    from landmarks_fastai.utils.hardware import Machine

    machine = Machine(workers=workers)
    dls = landmark_dataloaders(drawn, size=64, batch_size=8, aug=0.0, mirror="none", align=1.05, machine=machine)
    _, points, maps = dls.train.one_batch()
    found = points_in_image(points, maps, 64)
    truth = torch.stack([torch.from_numpy(dls.train.dataset.items[int(i)].points) for i in dls.train.get_idxs()[:8]])
    assert torch.allclose(found.float(), truth, atol=1e-3)
    crops = unit_to_input(points.as_subclass(torch.Tensor), 64)[1:4]
    assert (crops.amax(1) - crops.amin(1)).amax(1).min() > 64 / 1.05 * 0.8  # they fill the input


def test_second_pass_is_on_where_it_narrows_the_spread_of_the_points(drawn, tmp_path):
    dls = landmark_dataloaders(drawn, size=64)
    assert dls.settings.align == Settings().align > 1 and dls.facts.align_gain > 1.5
    assert len(dls.facts.shape) == 2 * N_POINTS and alignment_of(dls.settings, dls.facts)
    # objects that already lie the same way in every image
    points = np.tile(shapes(1)[0].ravel(), (20, 1)) + np.random.default_rng(0).normal(0, 2, (20, 2 * N_POINTS))
    for i in range(20):
        Image.new("RGB", (200, 200)).save(tmp_path / f"{i}.png")
    frame = pd.DataFrame(points)
    frame.insert(0, "file_name", [f"{i}.png" for i in range(20)])
    dls = landmark_dataloaders(frame, image_folder=tmp_path, size=64, batch_size=8)
    assert 0 < dls.facts.align_gain < 1.5 and alignment_of(dls.settings, dls.facts) is None


def test_objects_too_small_for_a_crop_have_no_second_pass(drawn, capsys):
    dls = landmark_dataloaders(drawn, size=4096)
    assert dls.facts.align_gain == 0 and alignment_of(dls.settings, dls.facts) is None
    assert capsys.readouterr().out.endswith("for aligned crops: no second pass\n")


def test_two_points_have_no_second_pass(drawn):
    frame = pd.read_csv(drawn / "train/landmarks.csv", sep="\t").iloc[:, :5]
    dls = landmark_dataloaders(frame, image_folder=drawn / "train/images", size=64)
    assert dls.facts.shape == () and alignment_of(dls.settings, dls.facts) is None


def gappy(points, share=0.3, seed=0):
    "The same, without that share of the points of each shape."
    missing = np.random.default_rng(seed).random(points.shape[:2]) < share
    return np.where(missing[..., None], np.nan, points)


def halves(points, seed=0):
    "The left or the right half of each shape."
    left = points[..., 0] < np.median(points[..., 0], 1, keepdims=True)
    missing = left == (np.random.default_rng(seed).random((len(points), 1)) < 0.5)
    return np.where(missing[..., None], np.nan, points)


@pytest.mark.parametrize("change", [gappy, halves])
def test_mean_shape_and_crops_of_labels_with_missing_points(change):
    points = shapes(60, noise=1.0)
    mean, gaps = procrustes_mean(points), change(points)
    assert np.isnan(gaps).any((1, 2)).all()  # no row is complete
    assert np.linalg.norm(procrustes_mean(gaps) - mean, axis=1).max() < 0.03
    alignment = Alignment(mean, 1.3, 96)
    crops = alignment.maps_of_labels(gaps), alignment.maps(points)
    for row, crop, full in zip(points, *crops, strict=True):
        assert np.abs(crop.to_input(row) - full.to_input(row)).max() < 4
    assert alignment.maps(gaps[:1]) == [None]  # predicted, NaN has no crop
    # the least squares over the labelled points alone
    labelled = ~np.isnan(gaps[0, :, 0])
    (expected,) = Alignment(mean[labelled], 1.3, 96).maps(points[:1, labelled])
    (found,) = alignment.maps_of_labels(gaps[:1])
    assert [found.a, found.b] == pytest.approx(
        np.array([expected.a, expected.b]) * found.scale / expected.scale, rel=1e-6
    )


def test_two_labelled_points_are_not_enough():
    points = shapes(3)
    points[:, 2:] = np.nan
    with pytest.raises(NoShape):
        procrustes_mean(points)
    assert Alignment(procrustes_mean(shapes(3)), 1.3, 96).maps_of_labels(points) == [None] * 3
