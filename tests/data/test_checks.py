"The check of all rows and images before training, and images that disappear during training."

import csv as csv_room
import io
import os
import shutil
import struct
import zlib

import numpy as np
import pandas as pd
import pytest
from fastai.callback.core import Callback
from PIL import Image

from landmarks_fastai import competition
from landmarks_fastai.data import checks
from landmarks_fastai.data.block import landmark_dataloaders
from landmarks_fastai.data.items import labelled_images
from landmarks_fastai.data.labels import open_labels, read_labels
from landmarks_fastai.data.pictures import Picture
from landmarks_fastai.data.split import split_rows
from landmarks_fastai.errors import SHOWN, BadData, UserError
from landmarks_fastai.runs.checkpoint import read_checkpoint
from landmarks_fastai.settings import Settings
from landmarks_fastai.utils import hardware
from tests.conftest import N_TRAIN, QUICK, csv_lines, edit_line, every_learner_has


def png(width, height, depth, colour, raw, *chunks):
    "A PNG as its bytes: kinds that Pillow does not write."

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    more = b"".join(chunk(*c) for c in chunks)
    return b"\x89PNG\r\n\x1a\n" + head + more + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")


def rgb(path):
    return np.asarray(Picture(path, exif=False).image()).tolist()


def save(path, image, **kwargs):
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(path, **kwargs)
    return path


def test_16_bit_images_are_scaled_not_clipped(tmp_path):
    grey = np.array([[0, 255, 256, 32768, 65535]], np.uint16)
    expected = [[[v >> 8] * 3 for v in grey[0].tolist()]]
    assert rgb(save(tmp_path / "a.png", grey)) == expected
    assert rgb(save(tmp_path / "a.tif", grey)) == expected
    big = Image.frombytes("I;16B", (5, 1), grey.astype(">u2").tobytes())
    assert rgb(save(tmp_path / "b.tif", big)) == expected
    (tmp_path / "a.pgm").write_bytes(b"P5 5 1 65535\n" + grey.astype(">u2").tobytes())
    assert rgb(tmp_path / "a.pgm") == expected
    (tmp_path / "c.png").write_bytes(png(1, 1, 16, 2, b"\0" + bytes([1, 200, 3, 200, 5, 200])))
    assert rgb(tmp_path / "c.png") == [[[1, 3, 5]]]
    (tmp_path / "d.png").write_bytes(
        png(2, 1, 16, 0, b"\0" + bytes([9, 9, 200, 0]), (b"tRNS", bytes([9, 9])))
    )  # its one transparent grey
    assert rgb(tmp_path / "d.png") == [[[0] * 3, [200] * 3]]


def test_transparent_pixels_become_black(tmp_path):
    pixels = np.array([[[200, 100, 50, 255], [255, 0, 255, 0], [200, 100, 50, 128]]], np.uint8)
    seen = [[[200, 100, 50], [0, 0, 0], [100, 50, 25]]]
    assert rgb(save(tmp_path / "a.png", pixels)) == seen
    assert rgb(save(tmp_path / "a.webp", pixels, lossless=True, exact=True)) == seen
    assert Picture(tmp_path / "a.png").inputs([None], "squish", 8)[0][0][0, 3].max() < 60
    grey = np.array([[[90, 255], [250, 0]]], np.uint8)
    assert rgb(save(tmp_path / "b.png", Image.fromarray(grey, "LA"))) == [[[90] * 3, [0] * 3]]
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 240, 250, 200])
    palette.putpixel((1, 0), 1)
    assert rgb(save(tmp_path / "c.png", palette)) == [[[10, 20, 30], [240, 250, 200]]]
    for transparency in (1, b"\xff\x00"):  # one index, and an alpha for each
        assert rgb(save(tmp_path / "d.png", palette, transparency=transparency)) == [[[10, 20, 30], [0, 0, 0]]]
    plain = np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8)
    assert rgb(save(tmp_path / "e.png", plain, transparency=(4, 5, 6))) == [[[1, 2, 3], [0, 0, 0]]]
    assert rgb(save(tmp_path / "f.png", np.array([[7, 8]], np.uint8), transparency=8)) == [[[7] * 3, [0] * 3]]


def test_cmyk_one_bit_and_grey_convert_to_rgb(tmp_path):
    red = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    assert np.abs(np.array(rgb(save(tmp_path / "a.jpg", red, quality=95))) - [255, 0, 0]).max() < 12
    assert rgb(save(tmp_path / "b.png", Image.fromarray(np.array([[True, False]])))) == [[[255] * 3, [0] * 3]]
    assert rgb(save(tmp_path / "c.png", np.array([[77]], np.uint8))) == [[[77] * 3]]


def test_first_frame_of_an_animation_is_used(tmp_path):
    first, second = Image.new("RGB", (4, 4), (255, 0, 0)), Image.new("RGB", (4, 4), (0, 0, 255))
    for name in ("a.gif", "a.tif", "a.png", "a.webp"):
        save(
            tmp_path / name,
            first,
            save_all=True,
            append_images=[second],
            **{"lossless": True} if "webp" in name else {},
        )
        assert rgb(tmp_path / name)[0][0] == [255, 0, 0]


@pytest.mark.parametrize("kind", ["jpg", "png", "webp", "tif"])
def test_exif_rotation_is_reported_and_not_applied(tmp_path, kind):
    pixels = np.zeros((16, 32, 3), np.uint8)
    pixels[:8, :8] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    save(tmp_path / f"a.{kind}", pixels, exif=exif)
    found = np.asarray(Picture(tmp_path / f"a.{kind}", exif=False).image())
    assert found.shape == (16, 32, 3) and found[:6, :6].min() > 200 and found[10:].max() < 50
    assert checks.inspect_image(tmp_path / f"a.{kind}") == ((32, 16), ["with EXIF rotation"])


def in_row(data, row, image, name=None, **kwargs):
    "Put an image in the place of a row's."
    path = data / "train" / "images" / names(data)[row]
    if name:
        edit_line(data / "train" / "landmarks.csv", row + 2, lambda line: name + "\t" + line.split("\t", 1)[1])
        path = path.with_name(name)
    if isinstance(image, bytes):
        path.write_bytes(image)
    else:
        image.save(path, **kwargs)
    return path


def names(data):
    return [line.split("\t")[0] for line in csv_lines(data / "train" / "landmarks.csv")[1:]]


def test_each_kind_of_unusual_image_is_noted_once(data, capsys):
    image = Image.open(data / "train" / "images" / names(data)[0])
    image.load()
    exif = Image.Exif()
    exif[0x0112] = 3
    in_row(data, 1, image.convert("L"))
    in_row(data, 2, image.convert("L"))
    in_row(data, 3, image.convert("CMYK"))
    in_row(data, 4, image, exif=exif)
    in_row(data, 5, image.convert("P"), "a.png")
    in_row(data, 6, image.convert("RGBA"), "b.png")
    in_row(data, 7, Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257), "c.png")
    in_row(data, 8, image, "d.gif", save_all=True, append_images=[image.rotate(90)])
    in_row(data, 9, image, names(data)[1])  # a second row of this image
    labelled_images(data)
    lines = capsys.readouterr().out.splitlines()
    csv = data / "train" / "landmarks.csv"
    for said in (
        f"note: images named in more than one row: 1; the first: {csv} line 11, {names(data)[1]}",
        f"note: 1 image is animated or of several pages, the first frame is used; the first: {csv} line 10, d.gif",
        f"note: 1 image is CMYK, converted to RGB; the first: {csv} line 5, {names(data)[3]}",
        f"note: 1 image is 16-bit, converted to 8-bit RGB; the first: {csv} line 9, c.png",
        "note: 1 image is with transparency, converted to RGB, transparent pixels black",
        f"note: 1 image is with EXIF rotation, which is not applied: landmarks are pixels of the image as stored; "
        f"the first: {csv} line 6, {names(data)[4]}",
    ):
        assert any(line.startswith(said) for line in lines), said
    assert len(lines) == 8
    labelled_images(data)
    assert capsys.readouterr().out == ""  # told at the first check


def test_all_bad_rows_are_reported_in_file_order(run_script, data, tmp_path):
    images, csv = data / "train" / "images", data / "train" / "landmarks.csv"
    (images / names(data)[1]).unlink()
    (images / names(data)[9]).write_bytes(b"")
    edit_line(csv, 5, lambda line: line + "\t1")
    edit_line(csv, 9, lambda line: line.split("\t")[0] + "\t5" * (line.count("\t")))
    code, _, err = run_script(f"train.py {QUICK} -n r -d", data)
    lines = err.splitlines()
    for line, part in zip(
        lines,
        ["line 3: image", "line 5: 138 fields", "line 9: all 68 points are (5, 5)", "line 11: image"],
        strict=False,
    ):
        assert line.startswith("error: ") and part in line
    assert lines[4:] == ["error: 4 rows are bad: fix them, or leave them out with --on-bad skip"] and code == 1
    assert not list((tmp_path / "here" / "runs").iterdir())


def test_first_twenty_bad_rows_are_printed_and_all_listed(run_script, data, tmp_path):
    gone = names(data)[3:30]
    for name in gone:
        (data / "train" / "images" / name).unlink()
    listing = tmp_path / "here" / "runs" / "r/bad.csv"
    code, _, err = run_script(f"train.py {QUICK} -n r -d", data)
    lines = err.splitlines()
    assert code == 1 and len(lines) == SHOWN + 2
    assert lines[-2] == "error: … and 7 more; all are listed in runs/r/bad.csv"
    with open(listing, newline="", encoding="utf-8") as f:
        rows = list(csv_room.reader(f))
    assert rows[0] == ["line", "file_name", "problem"] and [r[:2] for r in rows[1:]] == [
        [str(5 + k), name] for k, name in enumerate(gone)
    ]
    with pytest.raises(BadData) as e:
        labelled_images(data)
    assert "…" in e.value.problems[SHOWN] and "listed" not in e.value.problems[SHOWN]
    for name in gone:
        shutil.copy(data / "train" / "images" / names(data)[0], data / "train" / "images" / name)
    assert run_script(f"train.py {QUICK} -n r -d", data)[0] == 0  # the list has not cost the name
    assert not listing.exists()


def test_skip_removes_bad_rows_and_moves_no_other_row(run_script, data, tmp_path):
    images, csv = data / "train" / "images", data / "train" / "landmarks.csv"
    (images / names(data)[0]).unlink()
    (images / names(data)[35]).write_bytes(b"no image")
    edit_line(csv, 12, lambda line: 'a, "b".jpg\t1')
    code, out, err = run_script(f"train.py {QUICK} --on-bad skip -n r -d", data)
    assert (code, err) == (0, "") and "3 of 40 rows are bad and left out: runs/r/bad.csv" in out
    listed = pd.read_csv(tmp_path / "here" / "runs" / "r/bad.csv")
    assert listed.line.tolist() == [2, 12, 37] and listed.file_name[1] == 'a, "b".jpg'
    assert "not found" in listed.problem[0] and "2 fields found" in listed.problem[1]
    items = labelled_images(data, on_bad="skip")
    assert items.left_out.tolist() == [0, 10, 35]
    for settings in (Settings(), Settings(valid_random=True, split_seed=3), Settings(all_rows=True)):
        for side, complete in zip(split_rows(40, settings, items.left_out), split_rows(40, settings), strict=True):
            assert side.tolist() == [r for r in complete.tolist() if r not in (0, 10, 35)]
    (images / names(data)[1]).write_bytes(b"damaged after the start of a run that is resumed")
    dls = landmark_dataloaders(data, on_bad="skip", left_out=items.left_out, size=32, batch_size=8)
    assert len(dls.train.items) + len(dls.valid.items) == 37
    (images / names(data)[1]).write_bytes((images / names(data)[2]).read_bytes())
    settings = read_checkpoint(tmp_path / "here" / "runs" / "r/best.pth").settings
    assert settings.on_bad == "skip"
    assert run_script("finetune.py --workers 0 -e 1 -n s -pm r")[0] == 0  # a later stage takes it over
    assert (tmp_path / "here" / "runs" / "s/bad.csv").exists()
    code, _, err = run_script("finetune.py --workers 0 -e 1 -n t --on-bad stop -pm r")
    assert code == 1 and err.count("\n") == 4


def test_listing_has_skipped_rows_or_more_than_the_printed_ones(data, tmp_path):
    "All that is left out; of what stops a run only what is more than the terminal shows."
    listing = tmp_path / "bad.csv"
    (data / "train" / "images" / names(data)[0]).unlink()
    labelled_images(data, on_bad="skip", listing=listing)
    assert pd.read_csv(listing).line.tolist() == [2]
    for name in names(data)[1:SHOWN]:
        (data / "train" / "images" / name).unlink()
    with pytest.raises(BadData):
        labelled_images(data, listing=listing)
    assert not listing.exists()  # nor is that of a start before


def test_skipping_all_validation_rows_is_an_error(run_script, data):
    for k, name in enumerate(names(data)):
        if k >= 32:
            (data / "train" / "images" / name).unlink()
    code, _, err = run_script(f"train.py {QUICK} --on-bad skip -n r -d", data)
    assert code == 1 and "40 rows, 8 of them bad, leave none to validate on" in err and err.count("\n") == 1
    for name in names(data)[:32]:
        (data / "train" / "images" / name).unlink()
    code, _, err = run_script(f"train.py {QUICK} --on-bad skip -n r -d", data)
    assert code == 1 and err.splitlines()[-1] == "error: 40 rows are bad: fix them"


def test_settings_without_on_bad_load():
    record = Settings().to_dict()
    record.pop("on_bad")
    assert Settings.from_dict(record) == Settings()


def swap(path, content):
    "Other bytes, as many and as old."
    before = path.stat()
    path.write_bytes(content.ljust(before.st_size, b"\0")[: before.st_size])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_accepted_image_is_not_opened_again_until_it_changes(data):
    images = data / "train" / "images"
    labelled_images(data)
    swap(images / names(data)[4], b"no image")
    labelled_images(data)  # its size and time are as they were
    os.utime(images / names(data)[4])
    with pytest.raises(BadData, match="line 6: image .* cannot be read"):
        labelled_images(data)
    swap(images / names(data)[4], (images / names(data)[5]).read_bytes())
    (images / names(data)[4]).write_bytes((images / names(data)[5]).read_bytes())
    labelled_images(data)


def test_too_large_image_is_reported_before_it_is_decoded(run_script, data, monkeypatch):
    monkeypatch.setattr(hardware, "_max_pixels", 0)  # the scripts set it: monkeypatch restores it after the test
    lines = [zlib.compress(bytes(13301) * 13300, 9)]  # 13,300 squared, grey: a file of 170 kB
    bomb = png(13300, 13300, 8, 0, b"").replace(zlib.compress(b""), b"")
    at = bomb.index(b"IDAT") - 4
    chunk = b"IDAT" + lines[0]
    bomb = bomb[:at] + struct.pack(">I", len(lines[0])) + chunk + struct.pack(">I", zlib.crc32(chunk))
    bomb += struct.pack(">I", 0) + b"IEND" + struct.pack(">I", zlib.crc32(b"IEND"))
    path = in_row(data, 4, bomb, "bomb.png")
    code, _, err = run_script(f"train.py {QUICK} -n r -d", data)
    assert code == 1 and err.count("\n") == 1 and f"line 6: image {path} has 176.9 million pixels" in err
    assert "--max-pixels allows 64 million" in err and len(bomb) < 200_000


def test_max_pixels_limits_training_and_prediction(run_script, data, monkeypatch):
    monkeypatch.setattr(hardware, "_max_pixels", 0)
    width, height = Image.open(data / "train" / "images" / names(data)[4]).size
    most = max(w * h for w, h in (Image.open(p).size for p in (data / "train" / "images").iterdir())) / 1e6
    assert run_script(f"train.py {QUICK} --max-pixels {most} -n r -d", data)[::2] == (0, "")
    code, _, err = run_script(
        f"train.py {QUICK} --max-pixels {most - 2e-6} -n s -d", data
    )  # what was found good is checked anew
    assert code == 1 and "raise --max-pixels" in err
    code, _, err = run_script("predict.py --workers 0 --max-pixels 0.001 -pm r")
    assert code == 1 and "test_points.csv line 2: image" in err and "--max-pixels allows 0.001 million" in err
    code, _, err = run_script(f"train.py {QUICK} --max-pixels 0 -n t -d", data)
    assert code == 2 and "no number of millions" in err


def test_rejected_image_is_opened_at_each_start(data):
    "A cause may go that leaves size and time as they were: permissions, a disk."
    path = data / "train" / "images" / names(data)[4]
    content = path.read_bytes()
    swap(path, b"no image")
    with pytest.raises(BadData):
        labelled_images(data)
    swap(path, content)
    labelled_images(data)


@pytest.mark.parametrize(
    "damage", [lambda b: b[:-3], lambda b: b"", lambda b: b"\0" * 500, lambda b: b[:-8] + b"8 bytes!"]
)
def test_damaged_stamp_file_is_ignored(data, damage):
    labelled_images(data)
    kept = data / "train" / "landmarks.csv-images.cache"
    kept.write_bytes(damage(kept.read_bytes()))
    swap(data / "train" / "images" / names(data)[4], b"no image")
    with pytest.raises(BadData):
        labelled_images(data)


def test_flipped_bits_of_a_stamp_file_are_noticed(data):
    labelled_images(data)
    labels, kept = open_labels(data / "train" / "landmarks.csv"), data / "train" / "landmarks.csv-images.cache"
    content, right = kept.read_bytes(), checks._read_stamps(labels)
    assert len(right) == N_TRAIN
    for k in range(0, len(content), 7):
        kept.write_bytes(content[:k] + bytes([content[k] ^ 1 << k % 8]) + content[k + 1 :])
        stamps = checks._read_stamps(labels)
        assert stamps is None or np.array_equal(stamps, right)


def test_truncated_jpeg_is_reported_and_trailing_bytes_are_accepted(data):
    path = data / "train" / "images" / names(data)[4]
    content = path.read_bytes()
    path.write_bytes(content + b"x" * 300)
    labelled_images(data)
    path.write_bytes(content[:-100])
    with pytest.raises(BadData, match="line 6: image .* is cut short"):
        labelled_images(data)


def test_links_to_the_folder_and_inside_it_are_followed(data, tmp_path):
    images = data / "train" / "images"
    (images / names(data)[1]).unlink()
    (images / names(data)[1]).symlink_to(names(data)[2])
    (images / "deeper").mkdir()
    os.rename(images / names(data)[3], images / "deeper" / "x.jpg")
    edit_line(data / "train" / "landmarks.csv", 5, lambda line: "deeper/x.jpg\t" + line.split("\t", 1)[1])
    os.rename(images, tmp_path / "real")
    images.symlink_to(tmp_path / "real")
    items = labelled_images(data)
    assert not len(items.left_out) and items.folder == images and items.labels.name(3) == "deeper/x.jpg"


@pytest.mark.parametrize(
    "name", ["../out.jpg", "/etc/passwd", "C:\\x.jpg", "a/../../out.jpg", "..\\out.jpg", "link.jpg", "circle"]
)
def test_name_outside_the_folder_is_not_opened(tmp_path, name):
    images = tmp_path / "images"
    images.mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "out.jpg")
    (images / "link.jpg").symlink_to(tmp_path / "out.jpg")
    (images / "circle").symlink_to(images / "circle")
    (tmp_path / "test_points.csv").write_text(f"file_name\tpoint_index_list\n{name}\t[0]\n")
    test_points = competition.read_test_points(tmp_path / "test_points.csv")
    faults = checks.check_images(test_points, images)
    assert list(faults) == [0] and "leaves the image folder" in faults[0]


def delete_in_epoch(epoch, paths):
    "Real files, deleted while a stage runs."

    class Delete(Callback):
        def before_train(self):
            if self.epoch == epoch:
                for path in paths:
                    path.unlink(missing_ok=True)

    return every_learner_has(Delete)


@pytest.mark.parametrize("workers", [0, 1])
def test_training_continues_without_a_deleted_image(run_script, data, tmp_path, workers):
    paths = [data / "train" / "images" / names(data)[row] for row in (3, 36)]  # one of each side
    with delete_in_epoch(1, paths):
        code, out, err = run_script(f"train.py {QUICK} -e 3 --workers {workers} -n r -d", data)
    assert code == 0 and err.count("\n") == 2, err
    for path, line in zip(paths, (5, 38), strict=True):
        assert f"line {line}: image {path} not found: the run goes on without it\n" in err
    assert len(pd.read_csv(tmp_path / "here" / "runs" / "r/history.csv")) == 3
    assert pd.read_csv(tmp_path / "here" / "runs" / "r/bad.csv").line.tolist() == [5, 38]


@pytest.mark.parametrize("workers", [0, 1])
def test_deleted_image_folder_stops_the_run(run_script, data, tmp_path, workers):
    with delete_in_epoch(0, [data / "train" / "images" / name for name in names(data)]):
        code, _, err = run_script(f"train.py {QUICK} -e 3 --workers {workers} -n r -d", data)
    assert code == 1 and err.count("\n") == 1 and "is the folder still there?" in err
    assert not [p for p in (tmp_path / "here" / "runs").iterdir()]


def test_batch_with_one_remaining_image_still_trains(data, run_script):
    "Of batches of two, one image vanished from many: a batch norm would refuse what is left."
    with delete_in_epoch(0, [data / "train" / "images" / name for name in names(data)[:6]]):
        code, _, err = run_script(f"train.py {QUICK} -b 2 -n r -d", data)
    assert code == 0 and err.count("\n") == 6


def broken_inside(data, row):
    "A PNG that begins and ends well and has a hole: only decoding it tells."
    image = Image.open(data / "train" / "images" / names(data)[row])
    file = io.BytesIO()
    image.save(file, "PNG")
    content = file.getvalue()
    middle = len(content) // 2
    return in_row(data, row, content[:middle] + bytes(200) + content[middle + 200 :], f"{row}.png")


@pytest.mark.parametrize("workers", [0, 1])
def test_image_that_fails_to_decode_stops_the_run_or_is_skipped(run_script, data, tmp_path, workers):
    path = broken_inside(data, 7)
    code, _, err = run_script(f"train.py {QUICK} --workers {workers} -n r -d", data)
    assert code == 1 and err.count("\n") == 1 and f"line 9: image {path}" in err
    assert not list((tmp_path / "here" / "runs").iterdir())
    code, _, err = run_script(f"train.py {QUICK} --on-bad skip --workers {workers} -n r -d", data)
    assert code == 0 and err.count("\n") == 1 and f"line 9: image {path}" in err and "goes on without it" in err
    assert pd.read_csv(tmp_path / "here" / "runs" / "r/bad.csv").file_name.tolist() == ["7.png"]


def test_csv_with_malformed_rows_alone_is_reported_in_a_few_lines(tmp_path):
    csv = tmp_path / "l.csv"
    csv.write_text("file_name\tx\ty\n" + "".join(f"{i}.jpg\t1\n" for i in range(5000)))
    with pytest.raises(BadData) as e:
        read_labels(csv)
    assert e.value.problems[-1] == "5000 rows are bad: fix them" and len(e.value.problems) == SHOWN + 2
    labels = open_labels(csv)
    assert len(labels.faults) == len(labels) == 5000 and labels.name(77) == "77.jpg"


def test_point_is_bad_beyond_one_image_side_outside(data):
    csv, image = data / "train" / "landmarks.csv", data / "train" / "images" / names(data)[4]
    width, height = Image.open(image).size
    line = csv_lines(csv)[5]
    for x, y, bad in [(-width, 2 * height, False), (-width - 1, 0, True), (0, 2 * height + 1, True)]:
        edit_line(csv, 6, lambda _, x=x, y=y: "\t".join([*line.split("\t")[:-2], str(x), str(y)]))
        if bad:
            with pytest.raises(
                UserError, match=rf"line 6: point 67 \({x}, {y}\) lies more than an image's side outside"
            ):
                labelled_images(data)
        else:
            labelled_images(data)
