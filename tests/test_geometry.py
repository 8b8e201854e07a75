"A dot drawn at a point must be found at the mapped point, to a twentieth of a pixel, through every map."

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import affine_grid, grid_sample

from landmarks_fastai.geometry import PixelMap, cut_image, fit_image, input_to_unit, pixel_map, unit_to_input
from landmarks_fastai.settings import FITS

SIZES = [(200, 160), (160, 200), (97, 131), (300, 64), (128, 128), (45, 33)]


def dot(width, height, x, y, sigma):
    "A float image, black but for a Gaussian dot centred on pixel coordinates (x, y)."
    v, u = np.mgrid[:height, :width]
    return np.exp(-((u - x) ** 2 + (v - y) ** 2) / (2 * sigma**2)).astype(np.float32) * 1000


def centroid(pixels):
    v, u = np.mgrid[: pixels.shape[0], : pixels.shape[1]]
    return np.array([(u * pixels).sum(), (v * pixels).sum()]) / pixels.sum()


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("width,height", SIZES)
@pytest.mark.parametrize("size", [64, 128])
def test_a_dot_lies_where_its_point_is_mapped(fit, width, height, size):
    side = min(width, height)
    for dx, dy in [(0, 0), (0.21, -0.17), (-0.18, 0.2)]:
        point = np.array([width / 2 + dx * side, height / 2 + dy * side])
        # wide enough not to alias in the input, narrow enough to stay inside the picture
        sigma = max(2.0, 1.5 * max(width, height) / size) if fit != "crop" else max(1.5, 1.5 * side / size)
        picture = Image.fromarray(dot(width, height, *point, min(sigma, side / 12)), mode="F")
        fitted, to_input = fit_image(picture, fit, size)
        assert to_input == pixel_map(width, height, fit, size)
        assert centroid(np.asarray(fitted)) == pytest.approx(to_input.to_input(point), abs=0.05)


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("width,height", [*SIZES, (1, 1), (1, 4000), (4001, 3)])
def test_there_and_back(fit, width, height):
    points = np.random.default_rng(0).uniform(-100, 4200, (50, 2))
    to_input = pixel_map(width, height, fit, 128)
    assert to_input.to_image(to_input.to_input(points)) == pytest.approx(points, abs=1e-6)
    assert unit_to_input(input_to_unit(points, 128), 128) == pytest.approx(points, abs=1e-6)


def turned(scale, degrees, point, size):
    "The map that turns and scales about `point`, which comes to lie a little off the middle of the input."
    t = scale * np.exp(1j * np.deg2rad(degrees))
    shift = complex(size / 2 + 3.3, size / 2 - 5.8) - t * complex(*point)
    return PixelMap(t.real, -t.imag, shift.real, t.imag, t.real, shift.imag)


@pytest.mark.parametrize("scale", [0.13, 0.4, 0.8, 1.0, 1.7, 4.0])
@pytest.mark.parametrize("degrees", [0, 10, -75, 180])
def test_dot_lies_where_a_turned_map_puts_its_point(scale, degrees):
    point, size = np.array([301.3, 222.6]), 96
    picture = Image.fromarray(dot(640, 480, *point, max(2.0, 2 / scale)), mode="F")
    to_input = turned(scale, degrees, point, size)
    cut = np.asarray(cut_image(picture, to_input, size))
    assert cut.shape == (size, size)
    assert centroid(cut) == pytest.approx(to_input.to_input(point), abs=0.05)
    assert to_input.to_image(to_input.to_input(point)) == pytest.approx(point, abs=1e-9)
    assert to_input.scale == pytest.approx(scale)


@pytest.mark.parametrize("reduced", [1, 2, 4])
def test_cut_of_an_image_that_was_decoded_smaller_has_the_same_map(reduced):
    point, size = np.array([301.3, 222.6]), 96
    small = (point + 0.5) / reduced - 0.5
    picture = Image.fromarray(dot(640 // reduced, 480 // reduced, *small, 10 / reduced), mode="F")
    to_input = turned(0.2, 25, point, size)
    cut = np.asarray(cut_image(picture, to_input, size, reduced))
    assert centroid(cut) == pytest.approx(to_input.to_input(point), abs=0.05)


def test_cut_does_not_alias_where_it_reduces():
    "A checkerboard of single pixels becomes even grey; without a filter it would be black or white."
    board = (np.indices((400, 400)).sum(0) % 2 * 255).astype(np.uint8)
    cut = np.asarray(cut_image(Image.fromarray(board), turned(0.25, 20, np.array([200.0, 200.0]), 48), 48))
    assert cut[10:-10, 10:-10].std() < 3 and abs(cut[10:-10, 10:-10].mean() - 127.5) < 3


def test_cut_is_black_outside_of_the_image():
    cut = np.asarray(cut_image(Image.new("RGB", (50, 50), "white"), PixelMap(1.0, 0.0, 30.0, 0.0, 1.0, 0.0), 64))
    assert cut[:, :28].max() == 0 and cut[5:45, 34:].min() == 255
    away = cut_image(Image.new("RGB", (50, 50), "white"), PixelMap(0.5, 0.0, 900.0, 0.0, 0.5, 0.0), 64)
    assert np.asarray(away).max() == 0


def test_each_fit_keeps_what_it_says():
    corners = np.array([[-0.5, -0.5], [199.5, 99.5]])  # the edges of a 200 x 100 image
    crop, pad, squish = (pixel_map(200, 100, fit, 50).to_input(corners) for fit in FITS)
    assert crop.tolist() == [[-25.5, -0.5], [74.5, 49.5]]  # the short side fills the input, the middle is kept
    assert pad.tolist() == [[-0.5, 12.0], [49.5, 37.0]]  # the long side fills it
    assert squish.tolist() == [[-0.5, -0.5], [49.5, 49.5]]


def test_padding_is_black_and_leaves_the_picture_whole():
    picture = np.asarray(fit_image(Image.new("RGB", (60, 30), "white"), "pad", 60)[0])
    assert picture[:14].max() == 0 and picture[-14:].max() == 0 and picture[16:44].min() == 255


@pytest.mark.parametrize(
    "angle,scale,shift", [(0.0, 1.0, (0.0, 0.0)), (0.3, 1.0, (0.1, -0.05)), (-0.7, 1.3, (0.0, 0.2))]
)
@pytest.mark.parametrize("mirror", [False, True])
def test_unit_coordinates_are_those_that_grid_sample_warps_by(angle, scale, shift, mirror):
    "A warp and a mirror in unit coordinates, with align_corners=False, move the picture as they move the points."
    size, point = 64, np.array([36.4, 25.9])
    turn = torch.tensor([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) * scale
    if mirror:
        turn = turn @ torch.diag(torch.tensor([-1.0, 1.0], dtype=turn.dtype))
    warp = torch.cat([turn, torch.tensor(shift)[:, None]], 1).float()  # output unit -> input unit
    picture = torch.from_numpy(dot(size, size, *point, 2.0))[None, None]
    warped = grid_sample(picture, affine_grid(warp[None], (1, 1, size, size), align_corners=False), align_corners=False)
    unit = input_to_unit(torch.tensor(point), size) - torch.tensor(shift, dtype=torch.float64)
    expected = unit_to_input(torch.linalg.solve(turn.double(), unit), size)
    assert centroid(warped[0, 0].numpy()) == pytest.approx(expected.numpy(), abs=0.05)


def test_batch_of_maps_applies_each_map_to_its_image():
    maps = [pixel_map(w, h, "crop", 64) for w, h in SIZES]
    points = torch.rand(len(SIZES), 9, 2, dtype=torch.float64) * 64
    together = PixelMap.from_batch(torch.tensor(maps, dtype=torch.float64)).to_image(points)
    for one, own, p in zip(together, maps, points, strict=True):
        assert one.numpy() == pytest.approx(own.to_image(p.numpy()))


@pytest.mark.parametrize("reduced", [1, 2, 4, 8])
def test_a_map_from_a_smaller_image_leads_from_the_stored_one(reduced):
    "A block of stored pixels is one pixel of the smaller image: its middle goes where that pixel's centre goes."
    smaller = PixelMap(0.5, 0.0, 3.0, 0.0, 0.7, -2.0)
    block = np.array([[5 * reduced + (reduced - 1) / 2, 9 * reduced + (reduced - 1) / 2]])
    assert smaller.after_resize(1 / reduced).to_input(block) == pytest.approx(smaller.to_input(np.array([[5.0, 9.0]])))
