"The check of all rows and images before training, and images that disappear during training."

import csv
import io
import os
import re
import shutil

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
from landmarks_fastai.data.split import divided_rows, split_rows
from landmarks_fastai.errors import SHOWN, BadData, UserError
from landmarks_fastai.settings import Settings
from landmarks_fastai.utils import hardware
from tests.helpers import (
    N_TRAIN,
    QUICK,
    RUNS,
    best,
    check_refused,
    csv_lines,
    edit_line,
    every_learner_has,
    history,
    labels_of,
    png,
    row_image,
    row_names,
)


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
        save(tmp_path / name, first, save_all=True, append_images=[second], lossless=True)
        assert rgb(tmp_path / name)[0][0] == [255, 0, 0]


@pytest.mark.parametrize("kind", ["jpg", "png", "webp", "tif"])
def test_exif_rotation_is_reported_and_not_applied(tmp_path, kind):
    pixels = np.zeros((16, 32, 3), np.uint8)
    pixels[:8, :8] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    save(tmp_path / f"a.{kind}", pixels, exif=exif)
    opened = np.asarray(Picture(tmp_path / f"a.{kind}", exif=False).image())
    assert opened.shape == (16, 32, 3) and opened[:6, :6].min() > 200 and opened[10:].max() < 50
    assert checks.inspect_image(tmp_path / f"a.{kind}") == ((32, 16), ["with EXIF rotation"])


def in_row(data, row, image, name=None, **kwargs):
    "Put an image in the place of a row's."
    path = row_image(data, row)
    if name:
        edit_line(labels_of(data), row + 2, lambda line: name + "\t" + line.split("\t", 1)[1])
        path = path.with_name(name)
    if isinstance(image, bytes):
        path.write_bytes(image)
    else:
        image.save(path, **kwargs)
    return path


def test_each_kind_of_unusual_image_is_noted_once(data, capsys):
    names = row_names(data)
    image = Image.open(row_image(data, 0))
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
    in_row(data, 9, image, names[1])  # a second row of this image
    labelled_images(data)
    lines = capsys.readouterr().out.splitlines()
    table = labels_of(data)
    for note in (
        f"note: images named in more than one row: 1; the first: {table} line 11, {names[1]}",
        f"note: 1 image is animated or of several pages, the first frame is used; the first: {table} line 10, d.gif",
        f"note: 1 image is CMYK, converted to RGB; the first: {table} line 5, {names[3]}",
        "note: 1 image is 16-bit, converted to 8-bit RGB: grey by the bits that it uses (8 to 16), colours by their upper 8; "
        f"the first: {table} line 9, c.png",
        "note: 1 image is with transparency, converted to RGB, transparent pixels black",
        f"note: 1 image is with EXIF rotation, which is not applied: landmarks are pixels of the image as stored; "
        f"the first: {table} line 6, {names[4]}",
    ):
        assert any(line.startswith(note) for line in lines), note
    assert len(lines) == 8
    labelled_images(data)
    assert capsys.readouterr().out == ""  # told at the first check


def test_all_bad_rows_are_reported_in_file_order(run_script, data):
    row_image(data, 1).unlink()
    row_image(data, 9).write_bytes(b"")
    edit_line(labels_of(data), 5, lambda line: line + "\t1")
    edit_line(labels_of(data), 9, lambda line: line.split("\t")[0] + "\t5" * (line.count("\t")))
    code, _, err = run_script(f"train.py {QUICK} -n r -d", data)
    *lines, last = err.splitlines()
    parts = ["line 3: image", "line 5: 138 fields", "line 9: all 68 points are (5, 5)", "line 11: image"]
    for line, part in zip(lines, parts, strict=True):
        assert line.startswith("error: ") and part in line
    assert code == 1 and last == "error: 4 rows are bad: fix them, or leave them out with --on-bad skip"
    assert not list(RUNS.iterdir())


@pytest.mark.train
def test_first_twenty_bad_rows_are_printed_and_all_listed(run_script, data):
    gone = {5 + k: row_image(data, 3 + k) for k in range(27)}  # by line
    for path in gone.values():
        path.unlink()
    listing = RUNS / "r/bad.csv"
    code, _, err = run_script(f"train.py {QUICK} -n r -d", data)
    lines = err.splitlines()
    assert code == 1 and len(lines) == SHOWN + 2
    assert lines[-2] == "error: … and 7 more; all are listed in runs/r/bad.csv"
    with open(listing, newline="", encoding="utf-8") as f:
        head, *rows = csv.reader(f)
    assert head == ["line", "file_name", "problem"]
    assert [row[:2] for row in rows] == [[str(line), path.name] for line, path in gone.items()]
    with pytest.raises(BadData) as e:
        labelled_images(data)
    assert "…" in e.value.problems[SHOWN] and "listed" not in e.value.problems[SHOWN]
    for path in gone.values():
        shutil.copy(row_image(data, 0), path)
    assert run_script(f"train.py {QUICK} -n r -d", data)[0] == 0  # the list has not cost the name
    assert not listing.exists()


@pytest.mark.train
def test_skip_removes_bad_rows_and_moves_no_other_row(run_script, data):
    row_image(data, 0).unlink()
    row_image(data, 35).write_bytes(b"no image")
    first, second, third = (row_image(data, row) for row in (1, 2, 10))
    edit_line(labels_of(data), 12, lambda line: 'a, "b".jpg\t1')
    code, out, err = run_script(f"train.py {QUICK} --on-bad skip -n r -d", data)
    assert (code, err) == (0, "") and "3 of 40 rows are bad and left out: runs/r/bad.csv" in out
    listed = pd.read_csv(RUNS / "r/bad.csv")
    assert listed.line.tolist() == [2, 12, 37] and listed.file_name[1] == 'a, "b".jpg'
    assert "not found" in listed.problem[0] and "2 fields found" in listed.problem[1]
    items = labelled_images(data, on_bad="skip")
    assert items.left_out.tolist() == [0, 10, 35] and third.exists()
    for settings in (Settings(), Settings(valid_random=True, split_seed=3)):
        for side, complete in zip(divided_rows(items, settings), split_rows(40, settings), strict=True):
            assert side.tolist() == [r for r in complete.tolist() if r not in (0, 10, 35)]
    assert divided_rows(items, Settings(all_rows=True))[0].tolist() == [r for r in range(40) if r not in (0, 10, 35)]
    first.write_bytes(b"damaged after the start of a run that is resumed")
    dls = landmark_dataloaders(data, on_bad="skip", left_out=items.left_out, size=32, batch_size=8)
    assert len(dls.train.items) + len(dls.valid.items) == 37
    first.write_bytes(second.read_bytes())
    assert best("r").settings.on_bad == "skip"
    assert run_script("finetune.py --workers 0 -e 1 -n s -pm r")[0] == 0  # a later stage takes it over
    assert (RUNS / "s/bad.csv").exists()
    code, _, err = run_script("finetune.py --workers 0 -e 1 -n t --on-bad stop -pm r")
    assert code == 1 and err.count("\n") == 4


def test_listing_has_skipped_rows_or_more_than_the_printed_ones(data, tmp_path):
    "All that is left out; of what stops a run only what is more than the terminal shows."
    listing = tmp_path / "bad.csv"
    row_image(data, 0).unlink()
    labelled_images(data, on_bad="skip", listing=listing)
    assert pd.read_csv(listing).line.tolist() == [2]
    for row in range(1, SHOWN):
        row_image(data, row).unlink()
    with pytest.raises(BadData):
        labelled_images(data, listing=listing)
    assert not listing.exists()  # nor is that of a start before


def test_skipping_all_validation_rows_is_an_error(run_script, data):
    for row in range(32, 40):
        row_image(data, row).unlink()
    result = run_script(f"train.py {QUICK} --on-bad skip -n r -d", data)
    check_refused(result, "40 rows, 8 of them left out, leave none to validate on")
    for row in range(32):
        row_image(data, row).unlink()
    check_refused(run_script(f"train.py {QUICK} --on-bad skip -n r -d", data), "none of 40 images is found, as ")


def swap(path, content):
    "Other bytes, as many and as old."
    before = path.stat()
    path.write_bytes(content.ljust(before.st_size, b"\0")[: before.st_size])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_accepted_image_is_not_opened_again_until_it_changes(data):
    path, other = row_image(data, 4), row_image(data, 5).read_bytes()
    labelled_images(data)
    swap(path, b"no image")
    labelled_images(data)  # its size and time are as they were
    os.utime(path)
    with pytest.raises(BadData, match="line 6: image .* cannot be read"):
        labelled_images(data)
    path.write_bytes(other)
    labelled_images(data)


def test_rejected_image_is_opened_at_each_start(data):
    "A cause may go that leaves size and time as they were: permissions, a disk."
    path = row_image(data, 4)
    content = path.read_bytes()
    swap(path, b"no image")
    with pytest.raises(BadData):
        labelled_images(data)
    swap(path, content)
    labelled_images(data)


def test_too_large_image_is_reported_before_it_is_decoded(run_script, data, monkeypatch):
    monkeypatch.setattr(hardware, "_max_pixels", 0)  # the scripts set it: monkeypatch restores it after the test
    bomb = png(13300, 13300, 8, 0, bytes(13301) * 13300)  # grey: a file of 170 kB
    path = in_row(data, 4, bomb, "bomb.png")
    result = run_script(f"train.py {QUICK} -n r -d", data)
    check_refused(result, f"line 6: image {path} has 176.9 million pixels", "--max-pixels allows 64 million")
    assert len(bomb) < 200_000


def test_max_pixels_is_a_limit_of_training_and_of_prediction(run_script, data, runs, monkeypatch):
    monkeypatch.setattr(hardware, "_max_pixels", 0)
    predict = f"predict.py --workers 0 --out {runs} -pm m -d {data} --max-pixels"
    most = max(w * h for w, h in (Image.open(p).size for p in (data / "test" / "images").iterdir())) / 1e6
    assert run_script(predict, most)[::2] == (0, "")
    check_refused(run_script(predict, most - 2e-6), "raise --max-pixels")  # what was accepted is checked anew
    for line, table in [
        (f"{predict} 0.001", "test_points.csv"),
        (f"train.py {QUICK} --max-pixels 0.001 -n s -d {data}", "landmarks.csv"),
    ]:
        code, _, err = run_script(line)
        assert code == 1 and f"{table} line 2: image" in err and "--max-pixels allows 0.001 million" in err
    code, _, err = run_script(f"train.py {QUICK} --max-pixels 0 -n t -d", data)
    assert code == 2 and "not a number of millions" in err


@pytest.mark.parametrize(
    "damage", [lambda b: b[:-3], lambda b: b"", lambda b: b"\0" * 500, lambda b: b[:-8] + b"8 bytes!"]
)
def test_damaged_stamp_file_is_ignored(data, damage):
    labelled_images(data)
    stamps = labels_of(data).with_name("landmarks.csv-images.cache")
    stamps.write_bytes(damage(stamps.read_bytes()))
    swap(row_image(data, 4), b"no image")
    with pytest.raises(BadData):
        labelled_images(data)


def test_flipped_bits_of_a_stamp_file_are_noticed(data):
    labelled_images(data)
    labels, path = open_labels(labels_of(data)), labels_of(data).with_name("landmarks.csv-images.cache")
    content, right = path.read_bytes(), checks._read_stamps(labels)
    assert len(right) == N_TRAIN
    for k in range(0, len(content), 7):
        path.write_bytes(content[:k] + bytes([content[k] ^ 1 << k % 8]) + content[k + 1 :])
        stamps = checks._read_stamps(labels)
        assert stamps is None or np.array_equal(stamps, right)


def test_links_to_the_folder_and_inside_it_are_followed(data, tmp_path):
    images, moved = data / "train" / "images", row_image(data, 3)
    row_image(data, 1).unlink()
    row_image(data, 1).symlink_to(row_names(data)[2])
    (images / "deeper").mkdir()
    os.rename(moved, images / "deeper" / "x.jpg")
    edit_line(labels_of(data), 5, lambda line: "deeper/x.jpg\t" + line.split("\t", 1)[1])
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
    wanted = "(leaves the image folder|cannot be accessed)" if name == "circle" else "leaves the image folder"
    assert list(faults) == [0] and re.search(wanted, faults[0])  # Python 3.13 resolves a circle without an error


def delete_in_epoch(epoch, paths):
    "Real files, deleted while a stage runs."

    class Delete(Callback):
        def before_train(self):
            if self.epoch == epoch:
                for path in paths:
                    path.unlink(missing_ok=True)

    return every_learner_has(Delete)


@pytest.mark.train
@pytest.mark.parametrize("workers", [0, 1])
def test_training_continues_without_a_deleted_image(run_script, data, workers):
    paths = {line: row_image(data, line - 2) for line in (5, 38)}  # one of each side
    with delete_in_epoch(1, paths.values()):
        code, _, err = run_script(f"train.py {QUICK} -e 2 --workers {workers} -n r -d", data)
    assert code == 0 and err.count("\n") == 2, err
    for line, path in paths.items():
        assert f"line {line}: image {path} not found: the run goes on without it\n" in err
    assert len(history("r")) == 2
    assert pd.read_csv(RUNS / "r/bad.csv").line.tolist() == [5, 38]


@pytest.mark.train
def test_deleted_image_folder_stops_the_run(run_script, data):
    with delete_in_epoch(0, [row_image(data, row) for row in range(N_TRAIN)]):
        result = run_script(f"train.py {QUICK} -e 3 --workers 1 -n r -d", data)
    check_refused(result, "is the folder still there?")
    assert not list(RUNS.iterdir())


@pytest.mark.train
def test_batch_with_one_remaining_image_still_trains(data, run_script):
    "Of batches of two, one image vanished from many: a batch norm would refuse what is left."
    with delete_in_epoch(0, [row_image(data, row) for row in range(6)]):
        code, _, err = run_script(f"train.py {QUICK} -b 2 -n r -d", data)
    assert code == 0 and err.count("\n") == 6


@pytest.mark.train
@pytest.mark.parametrize("workers", [0, 1])
def test_image_that_fails_to_decode_stops_the_run_or_is_skipped(run_script, data, workers):
    "A PNG that begins and ends well and has a hole: only decoding it tells."
    file = io.BytesIO()
    Image.open(row_image(data, 7)).save(file, "PNG")
    content = file.getvalue()
    middle = len(content) // 2
    path = in_row(data, 7, content[:middle] + bytes(200) + content[middle + 200 :], "7.png")
    check_refused(run_script(f"train.py {QUICK} --workers {workers} -n r -d", data), f"line 9: image {path}")
    assert not list(RUNS.iterdir())
    code, _, err = run_script(f"train.py {QUICK} --on-bad skip --workers {workers} -n r -d", data)
    assert code == 0 and err.count("\n") == 1 and f"line 9: image {path}" in err and "goes on without it" in err
    assert pd.read_csv(RUNS / "r/bad.csv").file_name.tolist() == ["7.png"]


def test_images_that_were_shrunk_without_their_labels_stop_the_run(data):
    "At each start; a few such images are bad rows, or none."
    for row in range(N_TRAIN):
        if row == N_TRAIN // 4:
            labelled_images(data, on_bad="skip")
        image = Image.open(row_image(data, row))
        image.resize((image.width // 3, image.height // 3)).save(row_image(data, row))
    for on_bad in ("stop", "skip"):
        with pytest.raises(UserError, match="most points lie outside of their images: were the images resized, or"):
            labelled_images(data, on_bad=on_bad)


def test_csv_with_malformed_rows_alone_is_reported_in_a_few_lines(tmp_path):
    table = tmp_path / "l.csv"
    table.write_text("file_name\tx\ty\n" + "".join(f"{i}.jpg\t1\n" for i in range(5000)))
    with pytest.raises(BadData) as e:
        read_labels(table)
    assert e.value.problems[-1] == "5000 rows are bad: fix them" and len(e.value.problems) == SHOWN + 2
    labels = open_labels(table)
    assert len(labels.faults) == len(labels) == 5000 and labels.name(77) == "77.jpg"


def test_point_is_bad_beyond_one_image_side_outside(data):
    width, height = Image.open(row_image(data, 4)).size
    line = csv_lines(labels_of(data))[5]
    for x, y, bad in [(-width, 2 * height, False), (-width - 1, 0, True), (0, 2 * height + 1, True)]:
        edit_line(labels_of(data), 6, lambda _, x=x, y=y: "\t".join([*line.split("\t")[:-2], str(x), str(y)]))
        if not bad:
            labelled_images(data)
            continue
        with pytest.raises(UserError, match=rf"line 6: point 67 \({x}, {y}\) lies more than an image's side outside"):
            labelled_images(data)
