"Pictures as viewers show them, at every reduction; which files a path means; boxes."

import os

import numpy as np
import pytest
from PIL import Image, ImageOps

from landmarks_fastai.data.pictures import Picture, find_pictures, read_boxes
from landmarks_fastai.errors import UserError
from tests.helpers import LINUX


def centroid(image):
    values = np.asarray(image, float)
    values = values.mean(-1) if values.ndim == 3 else values
    values[values < 30] = 0
    y, x = np.mgrid[: values.shape[0], : values.shape[1]]
    return np.array([(values * x).sum(), (values * y).sum()]) / values.sum()


@pytest.mark.parametrize("side", [1025, 1032, 1027])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turns_a_reduced_jpeg_to_half_a_pixel(tmp_path, side, orientation):
    "In all three ways in: the whole picture, a crop of it, and what the detector sees."
    y, x = np.mgrid[:side, : side + 8]
    blob = 255 * np.exp(-((x - 0.47 * side) ** 2 + (y - 0.55 * side) ** 2) / (2 * 60**2))
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(blob.astype(np.uint8)).convert("RGB").save(tmp_path / "x.jpg", quality=95, exif=exif)
    truth = centroid(ImageOps.exif_transpose(Image.open(tmp_path / "x.jpg")).convert("L"))
    picture = Picture(tmp_path / "x.jpg")
    ((whole, to_whole),) = picture.inputs([None], "crop", 64)
    ((crop, to_crop),) = picture.inputs([to_whole.after_resize(1.5, left=100, top=90)], "crop", 64)
    reduced, factor = picture.reduced(100)
    for pixels, found in (
        (whole, to_whole.to_image(centroid(whole)[None])[0]),
        (crop, to_crop.to_image(centroid(crop)[None])[0]),
    ):
        assert np.abs(found - truth).max() < 0.5 + 0.4 * (pixels.shape[0] == 64)  # a pixel of the input is 16 of these
    assert np.abs((centroid(reduced) + 0.5) * factor - 0.5 - truth).max() < 0.5


@pytest.mark.parametrize("bits,shift", [(8, 0), (10, 2), (12, 4), (16, 8)])
def test_grey_images_of_16_bits_are_scaled_by_what_they_use(tmp_path, bits, shift):
    grey = np.linspace(0, (1 << bits) - 1, 64 * 64).astype(np.uint16).reshape(64, 64)
    for suffix in ("png", "tif"):
        Image.fromarray(grey).save(tmp_path / f"x.{suffix}")
        pixels = np.asarray(Picture(tmp_path / f"x.{suffix}").image())
        assert np.array_equal(pixels[..., 0], grey >> shift)


@LINUX
def test_a_fifo_named_like_a_picture_is_an_error(tmp_path):
    os.mkfifo(tmp_path / "p.jpg")
    with pytest.raises(UserError, match="p.jpg is a folder or not a plain file"):
        Picture(tmp_path / "p.jpg").image()


def test_folders_with_brackets_and_stereo_pictures(tmp_path):
    folder = tmp_path / "set [1]"
    folder.mkdir()
    for name in ("a.mpo", "b.jpg"):
        Image.new("RGB", (8, 8)).save(folder / name, "JPEG")
    assert [p.name for p in find_pictures([f"{folder}/*"])] == ["a.mpo", "b.jpg"]
    assert [p.name for p in find_pictures([f"{folder}/*.mpo"])] == ["a.mpo"]


def test_what_the_program_wrote_is_left_out(tmp_path, capsys):
    for name in ("a.png", "runs/m/overlay/a.png.jpg", "runs/m/results.png", "runs/drawn_faces/b.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    left_out = [tmp_path / "runs/m"]
    assert sorted(p.name for p in find_pictures([str(tmp_path)], left_out=left_out)) == ["a.png", "b.png"]
    assert "2 files that this program wrote are left out" in capsys.readouterr().err
    with pytest.raises(UserError, match="no picture"):
        find_pictures([str(tmp_path / "runs/m")], left_out=left_out)
    named = tmp_path / "runs/m/results.png"
    assert list(find_pictures([str(named)], left_out=left_out)) == [named]


@pytest.mark.parametrize("edges", ["0,0,1e154,1e154", "1e308,0,1.1e308,5", "0,0,1e-200,1e-200", "nan,0,5,5", "5,0,5,9"])
def test_boxes_without_an_area_or_beyond_every_picture_are_refused(tmp_path, edges):
    (tmp_path / "b.csv").write_text(f"\nfile_name,left,top,right,bottom\na.png,{edges}\n")
    with pytest.raises(UserError, match="b.csv line 3: .*left < right and top < bottom expected"):
        read_boxes(tmp_path / "b.csv")


def test_a_list_of_boxes_that_is_not_utf_8_is_named(tmp_path):
    (tmp_path / "b.csv").write_text("file_name,left,top,right,bottom\na.png,0,0,5,5\n", encoding="utf-16")
    with pytest.raises(UserError, match="b.csv"):
        read_boxes(tmp_path / "b.csv")
