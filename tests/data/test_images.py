"Decoding images at reduced size, and the cache of fitted images."

import os
import pickle

import numpy as np
import pytest
from PIL import Image

from landmarks_fastai.data import image_cache, pictures
from landmarks_fastai.data.image_cache import Inputs, image_stamp, open_cache
from landmarks_fastai.data.pictures import Picture
from landmarks_fastai.errors import UserError
from landmarks_fastai.geometry import pixel_map
from landmarks_fastai.settings import FITS
from tests.helpers import QUICK, RUNS, check_refused, dot, equal_tensors, finish, python


def save_dot(path, width, height, x, y, sigma=24.0):
    Image.fromarray(np.rint(250 * dot(width, height, x, y, sigma)).astype(np.uint8)).convert("RGB").save(
        path, quality=97
    )
    return path


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("width,height", [(1024, 768), (767, 1023), (601, 605), (1201, 640)])
def test_reduced_jpeg_shows_a_dot_where_its_point_is_mapped(tmp_path, fit, width, height):
    point = np.array([0.52 * width, 0.47 * height])
    path = save_dot(tmp_path / "x.jpg", width, height, *point)
    ((fitted, to_input),) = Picture(path, exif=False).inputs([None], fit, 64)
    grey = fitted.astype(float).mean(2)
    grey[grey < 3] = 0  # JPEG's dust in the black
    v, u = np.mgrid[:64, :64]
    centre = np.array([(u * grey).sum(), (v * grey).sum()]) / grey.sum()
    assert centre == pytest.approx(to_input.to_input(point), abs=0.05)
    whole = pixel_map(width, height, fit, 64)
    assert to_input.to_input(point) == pytest.approx(whole.to_input(point), abs=0.2)  # two stored pixels at the most


@pytest.mark.parametrize("fit", FITS)
def test_a_reduced_strip_is_mapped_by_its_long_side(tmp_path, fit):
    "A side of 9 pixels has 2 at an eighth, which is not 4.5 times fewer."
    Image.new("RGB", (9, 4000)).save(tmp_path / "x.jpg")
    ((_, to_input),) = Picture(tmp_path / "x.jpg", exif=False).inputs([None], fit, 128)
    bottom, stored = np.array([4.0, 3999.0]), pixel_map(9, 4000, fit, 128)
    scale = max(abs(stored.a), abs(stored.e))
    assert to_input.to_input(bottom) == pytest.approx(stored.to_input(bottom), abs=8 * scale)


def test_large_jpeg_is_decoded_reduced_and_looks_the_same(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    soft = Image.fromarray(rng.integers(0, 255, (12, 16, 3), dtype=np.uint8)).resize((1600, 1200), Image.BICUBIC)
    soft.save(tmp_path / "x.jpg", quality=95)
    soft.save(tmp_path / "x.png")
    decoded = []
    real = pictures.fit_image
    monkeypatch.setattr(pictures, "fit_image", lambda image, *more: decoded.append(image.size) or real(image, *more))
    ((small, _),), ((whole, _),) = (
        Picture(tmp_path / f"x.{kind}").inputs([None], "crop", 128) for kind in ("jpg", "png")
    )
    assert decoded == [(400, 300), (1600, 1200)]  # no fewer than twice the input's side
    assert abs(small.astype(int) - whole).mean() < 2
    Picture(tmp_path / "x.jpg").inputs([None], "pad", 700)
    assert decoded[-1] == (1600, 1200)


def faces(tmp_path, n=6):
    folder = tmp_path / "images"
    folder.mkdir(exist_ok=True)
    for i in range(n):
        pixels = np.random.default_rng(i).integers(0, 255, (50 + i, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.jpg")
    return folder


def cached(tmp_path, key=None, n=6):
    folder = faces(tmp_path, n) if not (tmp_path / "images").exists() else tmp_path / "images"
    return folder, Inputs("crop", 32, open_cache(folder, n, "crop", 32, key or {"labels": 1}))


def record(cache, row, path):
    return cache.get(row, image_stamp(path))


def same(a, b):
    return np.array_equal(np.asarray(a[0]), np.asarray(b[0])) and a[1] == b[1]


def test_cached_inputs_equal_decoded_ones_bit_for_bit(tmp_path, monkeypatch):
    folder, inputs = cached(tmp_path)
    plain = Inputs("crop", 32)
    first = [inputs(i, folder / f"{i}.jpg") for i in range(6)]
    assert all(same(first[i], plain(i, folder / f"{i}.jpg")) for i in range(6))
    monkeypatch.setattr(image_cache, "Picture", None)  # nothing is decoded any more: not here, not in another process
    assert all(same(first[i], inputs(i, folder / f"{i}.jpg")) for i in range(6))
    again = pickle.loads(pickle.dumps(cached(tmp_path)[1]))
    assert all(same(first[i], again(i, folder / f"{i}.jpg")) for i in range(6))


def test_changed_image_damaged_record_or_other_key_is_decoded_again(tmp_path):
    folder, inputs = cached(tmp_path)
    old = [inputs(i, folder / f"{i}.jpg") for i in range(6)]
    (folder / "0.jpg").write_bytes((folder / "5.jpg").read_bytes())
    assert np.array_equal(np.asarray(inputs(0, folder / "0.jpg")[0]), np.asarray(old[5][0]))
    cache = inputs.cache.path
    for field, damage in [("pixels", 7), ("map", 0.5), ("stamp", 9), ("checksum", 1)]:
        np.load(cache, mmap_mode="r+")[field][1] = damage
        assert record(inputs.cache, 1, folder / "1.jpg") is None
        assert same(inputs(1, folder / "1.jpg"), old[1]) and same(record(inputs.cache, 1, folder / "1.jpg"), old[1])
    other = cached(tmp_path, {"labels": 2})[1]
    assert record(other.cache, 1, folder / "1.jpg") is None
    assert same(inputs(1, folder / "1.jpg"), old[1])  # another program with the first key still reads its records
    for content in (b"short", b"", bytes(9999), cache.read_bytes()[:-1]):
        cache.write_bytes(content)
        assert same(inputs(3, folder / "3.jpg"), old[3])  # of who opened the file before
        assert same(cached(tmp_path)[1](3, folder / "3.jpg"), old[3])


def test_cache_of_another_shape_replaces_the_file_and_is_not_written_to(tmp_path):
    folder, inputs = cached(tmp_path)
    larger = open_cache(folder, 7, "crop", 32, {"labels": 1})
    content = larger.path.read_bytes()
    inputs(2, folder / "2.jpg")
    assert larger.path.read_bytes() == content and record(inputs.cache, 2, folder / "2.jpg") is None


@pytest.mark.skipif(not hasattr(os.stat("."), "st_blocks"), reason="the system does not tell what a file takes")
def test_cache_takes_the_space_of_its_records_and_a_full_one_needs_no_space(tmp_path, monkeypatch):
    folder, inputs = cached(tmp_path, n=40)
    cache = inputs.cache
    needed, one = cache.missing_bytes, cache.record.itemsize
    assert 36 * one < needed <= 40 * one + 4096 and cache.path.stat().st_size == cache.bytes
    inputs(20, folder / "20.jpg")  # in the middle
    assert needed - 2 * 4096 <= cache.missing_bytes < needed
    assert record(cache, 1, folder / "1.jpg") is None and record(cache, 39, folder / "39.jpg") is None
    for i in range(40):
        inputs(i, folder / f"{i}.jpg")
    monkeypatch.setattr(image_cache.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 0}))
    assert cached(tmp_path, n=40)[1].cache.missing_bytes == 0


def test_deleted_image_is_reported_although_it_is_cached(tmp_path):
    folder, inputs = cached(tmp_path)
    inputs(0, folder / "0.jpg")
    (folder / "0.jpg").unlink()
    with pytest.raises(UserError, match="x.csv line 2: image .*0.jpg not found"):
        inputs(0, folder / "0.jpg", "x.csv line 2: ")


def test_concurrent_writers_leave_a_valid_cache(tmp_path):
    folder, inputs = cached(tmp_path, n=40)
    inputs.cache.path.unlink()
    code = (
        "from pathlib import Path; from landmarks_fastai.data.image_cache import Inputs, open_cache;"
        f"folder = Path({str(folder)!r}); cache = open_cache(folder, 40, 'crop', 32, dict(labels=1));"
        "inputs = Inputs('crop', 32, cache); [inputs(i, folder / f'{i}.jpg') for i in range(40)]"
    )
    for process in [python(code) for _ in range(4)]:
        finish(process)
    plain, cache = Inputs("crop", 32), cached(tmp_path, n=40)[1].cache
    kept = [record(cache, i, folder / f"{i}.jpg") for i in range(40)]
    assert all(k is None or same(k, plain(i, folder / f"{i}.jpg")) for i, k in enumerate(kept))
    assert sum(k is not None for k in kept) >= 1 and not list(tmp_path.glob("*.tmp"))


def test_full_disk_is_reported_before_training_and_ignored_later(tmp_path, monkeypatch, run_script, drawn):
    folder, inputs = cached(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("builtins.open", full_disk)
        assert inputs(0, folder / "0.jpg")[0].shape == (32, 32, 3)
    assert record(inputs.cache, 0, folder / "0.jpg") is None
    one = inputs.cache.missing_bytes
    monkeypatch.setattr(image_cache.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 2 * one - 1}))
    crops = open_cache(folder, 6, "align1.3", 32, {"labels": 1})
    with pytest.raises(
        UserError, match="--cache: .*-32-pad.cache and .*-32-align1.3.cache may grow by"
    ):  # both have to fit
        open_cache(folder, 6, "pad", 32, {"labels": 1}, crops)
    monkeypatch.setattr(image_cache.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    check_refused(run_script(f"train.py {QUICK} --cache -n r -d", drawn), "--cache", "make room")


def full_disk(path, mode="r", *args, real=open, **kwargs):
    if "+" in mode:
        raise OSError(28, "No space left on device")
    return real(path, mode, *args, **kwargs)


@pytest.mark.train
def test_training_from_the_cache_gives_identical_weights(run_script, data):
    "To the last bit: from files, while the cache is written, and from the cache in a worker."
    for name, flags in [("a", ""), ("b", "--cache"), ("c", "--cache --workers 1")]:
        assert run_script(f"train.py {QUICK} {flags} -n {name} -d", data)[::2] == (0, "")
        assert equal_tensors(RUNS / "a/best.pth", RUNS / name / "best.pth")
    (cache,) = (data / "train").glob("images-*.cache")
    assert cache.stat().st_blocks * 512 >= 40 * 32 * 32 * 3
