"""Bad input of many kinds, given to the scripts.

A case is how to break a folder of drawn faces (or the output folder), the line that is typed, and what must be in the
one line that is read (or in each of several). No traceback, nothing half-written, and what stood there stays as it was.
"""

import io
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from landmarks_fastai.models.networks import METADATA
from tests.helpers import N_POINTS, QUICK, Payload, check_refused, csv_lines, edit_line, labels_of, png, snapshot

TRAIN = f"train.py {QUICK} -n r --out OUT -d DATA"
FINETUNE = "finetune.py --workers 0 -e 1 -n r --out OUT -d DATA -pm m"
PREDICT = "predict.py --workers 0 --out OUT -d DATA -pm m"
FIELDS = f"{2 * N_POINTS + 1} expected"
OTHER_NETWORK = "m/best.pth is not the network that its settings name"


def asked_of(data):
    return data / "test" / "test_points.csv"


def labels(change, line=9):
    "Change a line of landmarks.csv."
    return lambda data, out: edit_line(labels_of(data), line, change)


def value(text, k=3):
    "Put a text in the place of a coordinate."

    def change(line):
        fields = line.split("\t")
        fields[k] = text
        return "\t".join(fields)

    return labels(change)


def named(name):
    return labels(lambda line: name + "\t" + line.split("\t", 1)[1])


def whole_csv(change, of=labels_of):
    "Change the bytes of a whole file."
    return lambda data, out: of(data).write_bytes(change(of(data).read_bytes()))


def image_path(data, line=9, side="train"):
    table = labels_of(data) if side == "train" else asked_of(data)
    return data / side / "images" / csv_lines(table)[line - 1].split("\t")[0]


def image(change, side="train", line=9):
    "Change the bytes of the image of a line, or put another there."

    def harm(data, out):
        path = image_path(data, line, side)
        content = change(path.read_bytes())
        if isinstance(content, bytes):
            path.write_bytes(content)

    return harm


def encoded(mode, kind, **kwargs):
    file = io.BytesIO()
    Image.new(mode, (40, 40)).save(file, kind, **kwargs)
    return file.getvalue()


def at_place(make, side="train", line=9):
    "Put something that is no file in an image's place."

    def harm(data, out):
        path = image_path(data, line, side)
        path.unlink()
        make(path)

    return harm


def edit_test_points(change, line=4):
    return lambda data, out: edit_line(asked_of(data), line, change)


def list_is(text):
    return edit_test_points(lambda line: line.split("\t")[0] + "\t" + text)


def edit_metadata(change):
    "Change what the checkpoint says of itself."

    def harm(data, out):
        path = out / "m/best.pth"
        state = torch.load(path, weights_only=True)
        torch.save(state | {METADATA: change(state[METADATA])}, path)

    return harm


def stored(part, **changes):
    "Change settings or facts of the checkpoint."
    return edit_metadata(lambda f: f | {part: f[part] | changes})


def tensors(change):
    def harm(data, out):
        path = out / "m/best.pth"
        torch.save(change(torch.load(path, weights_only=True)), path)

    return harm


def bare(data, out):
    pass


def no_more_than(n, data, out):
    edit = csv_lines(labels_of(data))[: 1 + n]
    labels_of(data).write_text("\n".join(edit) + "\n")


def truncate(path, share=0.5):
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


TIFF_OF_FLOATS, TIFF_OF_INTS, LAB = (encoded(mode, "TIFF") for mode in ("F", "I", "LAB"))
HUGE = png(20000, 20000, 8, 2, b"")
GIF_CUT = encoded("P", "GIF")[:-20]
WEBP_CUT = encoded("RGB", "WEBP")[:-10]
BMP_CUT = encoded("RGB", "BMP")[:-1000]

CASES = {
    # landmarks.csv, its rows
    "half a point": (value("nan"), TRAIN, ["line 9: point 1's x is missing: fill it in, or leave both coordinates blank"]),
    "no point": (labels(lambda x: x.split("\t")[0] + "\t" * 2 * N_POINTS), TRAIN, ["line 9: no point is labelled"]),
    "infinity": (value("inf"), TRAIN, ["line 9: point 1's x is inf, a number between -32767 and 32767 expected"]),
    "a word": (value("left eye", 4), TRAIN, ["line 9: point 1's y is 'left eye'"]),
    "beyond what is kept": (value("32768"), TRAIN, ["line 9: point 1's x is 32768"]),
    "code": (value("__import__('os').mkdir('owned')"), TRAIN, ["line 9: point 1's x is \"__import__("]),
    "too few fields": (labels(lambda x: x.rsplit("\t", 1)[0]), TRAIN, ["line 9", f"{2 * N_POINTS} fields", FIELDS]),
    "a name that no disk takes": (named("x" * 300), TRAIN, ["line 9: image xxx", "not found"]),
    "all points zero": (
        labels(lambda x: x.split("\t")[0] + "\t0" * (2 * N_POINTS)), TRAIN, [f"line 9: all {N_POINTS} points are (0, 0)"],
    ),
    "a point far outside": (value("9000"), TRAIN, ["line 9: point 1 (9000, ", "lies more than an image's side outside"]),
    "a point far to the left": (value("-9000"), TRAIN, ["line 9: point 1 (-9000, ", "outside the"]),
    "no UTF-8": (whole_csv(lambda b: _line(b, 9, lambda x: b"\xff" + x)), TRAIN, ["line 9: not UTF-8 text"]),
    "a line cut short": (whole_csv(lambda b: b[: len(b) - 30]), TRAIN, ["line 41", FIELDS]),
    # landmarks.csv as a whole
    "an empty file": (whole_csv(lambda b: b""), TRAIN, ["landmarks.csv is empty"]),
    "an empty line first": (whole_csv(lambda b: b"\n" + b), TRAIN, ["landmarks.csv is empty"]),
    "a header alone": (whole_csv(lambda b: b.split(b"\n")[0] + b"\n"), TRAIN, ["has a header but no rows"]),
    "no header": (whole_csv(lambda b: b.split(b"\n", 1)[1]), TRAIN, ["line 1 holds numbers: add a header line"]),
    "commas throughout, and no names of points": (
        whole_csv(lambda b: _unnamed(b).replace(b"\t", b",")), TRAIN, ["line 1: 1 TAB-separated columns"],
    ),
    "an odd column, and no names of points": (
        whole_csv(lambda b: _unnamed(b).replace(b"\n", b"\t1\n").replace(b"\t1\n", b"\tc\n", 1)), TRAIN,
        ["line 1: 138 TAB-separated columns found"],
    ),
    "UTF-16": (whole_csv(lambda b: b.decode().encode("utf-16")), TRAIN, ["line 1: not UTF-8 text"]),
    "UTF-16 without a mark": (whole_csv(lambda b: b.decode().encode("utf-16-le")), TRAIN, ["line 1: not UTF-8 text"]),
    "a picture for a CSV": (whole_csv(lambda b: encoded("RGB", "JPEG")), TRAIN, ["line 1: not UTF-8 text"]),
    "a folder for a CSV": (
        lambda data, out: (labels_of(data).unlink(), labels_of(data).mkdir()), TRAIN, ["landmarks.csv not found"],
    ),
    # images
    "a missing image": (at_place(lambda path: None), TRAIN, ["line 9: image", "not found in", "--on-bad skip"]),
    "a folder in its place": (at_place(Path.mkdir), TRAIN, ["line 9: image", "is a folder or not a plain file"]),
    "a pipe in its place": (at_place(os.mkfifo), TRAIN, ["line 9: image", "is a folder or not a plain file"]),
    "a link to nowhere": (at_place(lambda path: path.symlink_to("gone.jpg")), TRAIN, ["line 9: image", "not found"]),
    "a link out of the folder": (
        at_place(lambda path: path.symlink_to(labels_of(path.parent.parent.parent))), TRAIN, ["line 9", "leaves the image"],
    ),
    "a link in a circle": (at_place(lambda path: path.symlink_to(path)), TRAIN, ["line 9: file name", "leaves the image"]),
    "no bytes": (image(lambda b: b""), TRAIN, ["line 9: image", "cannot be read as an image (it has no bytes)"]),
    "one byte": (image(lambda b: b[:1]), TRAIN, ["line 9: image", "cannot be read as an image (of a format that Pillow"]),
    "a JPEG's start": (image(lambda b: b[:200]), TRAIN, ["line 9: image", ".jpg"]),
    "half a JPEG": (image(lambda b: b[: len(b) // 2]), TRAIN, ["line 9: image", "is cut short"]),
    "a JPEG without its last bytes": (image(lambda b: b[:-64]), TRAIN, ["line 9: image", "is cut short"]),
    "text": (image(lambda b: b"<html>404 Not Found</html>"), TRAIN, ["line 9: image", "of a format that Pillow does not"]),
    "zeros": (image(lambda b: bytes(len(b))), TRAIN, ["line 9: image", "of a format that Pillow does not know"]),
    "half a PNG": (image(lambda b: (lambda p: p[: len(p) // 2])(_as(b, "PNG"))), TRAIN, ["line 9: image", "cut short"]),
    "a PNG of no width": (image(lambda b: png(0, 9, 8, 2, b"")), TRAIN, ["line 9: image", "cannot be read"]),
    "a PNG without pixels": (image(lambda b: png(400, 400, 8, 2, b""), "test", 4), PREDICT, ["line 4: image", ".jpg"]),
    "a decompression bomb": (image(lambda b: HUGE), TRAIN, ["line 9: image", "400 million pixels", "--max-pixels"]),
    "half a GIF": (image(lambda b: GIF_CUT), TRAIN, ["line 9: image", ".jpg"]),
    "half a WebP": (image(lambda b: WEBP_CUT), TRAIN, ["line 9: image", ".jpg"]),
    "half a BMP": (image(lambda b: BMP_CUT), TRAIN, ["line 9: image", "cut short"]),
    "32-bit floats": (image(lambda b: TIFF_OF_FLOATS), TRAIN, ["line 9: image", "mode F", "save it as 8-bit RGB"]),
    "32-bit integers": (image(lambda b: TIFF_OF_INTS), TRAIN, ["line 9: image", "mode I", "save it as 8-bit RGB"]),
    "Lab colours": (image(lambda b: LAB), TRAIN, ["line 9: image", "mode LAB", "save it as 8-bit RGB"]),
    # names
    "a name that climbs": (named("../../x.jpg"), TRAIN, ["line 9: file name '../../x.jpg' leaves the image folder"]),
    "a name from the root": (named("/etc/passwd"), TRAIN, ["line 9: file name '/etc/passwd' leaves the image folder"]),
    "a name of Windows that climbs": (named("..\\x.jpg"), TRAIN, ["line 9", "leaves the image folder"]),
    "a drive": (named("C:x.jpg"), TRAIN, ["line 9: file name 'C:x.jpg' leaves the image folder"]),
    "a share": (named("\\\\host\\x.jpg"), TRAIN, ["line 9", "leaves the image folder"]),
    "the folder itself": (named("."), TRAIN, ["line 9: image", "is a folder"]),
    "a name that is not a number": (named("nan"), TRAIN, ["line 9: image nan not found"]),
    "a name that moves the cursor": (named("\x1b[2Jx.jpg"), TRAIN, ["line 9: image  [2Jx.jpg not found"]),
    # folders and flags
    "no data folder": (lambda data, out: shutil.rmtree(data), TRAIN, ["no such folder", "train/ and test/"]),
    "a file for a data folder": (
        lambda data, out: (shutil.rmtree(data), data.write_text("")), TRAIN, ["data is empty: a header line"],
    ),
    "no train side": (lambda data, out: shutil.rmtree(data / "train"), TRAIN, ["landmarks.csv not found"]),
    "no image folder": (
        lambda data, out: shutil.rmtree(data / "train" / "images"), TRAIN, ["images: no such folder"],
    ),
    "a file for an image folder": (
        lambda data, out: (shutil.rmtree(data / "train" / "images"), (data / "train" / "images").touch()),
        TRAIN,
        ["images: no such folder"],
    ),
    "an output folder that is a file": (
        bare, TRAIN.replace("OUT", "OUT/m/best.pth"), ["best.pth cannot be written to", "--out"],
    ),
    "a name with a folder": (bare, TRAIN.replace("-n r", "-n a/b"), ["-n 'a/b' is not a plain file name"]),
    "a name that is taken": (bare, TRAIN.replace("-n r", "-n m"), ["-n m: ", "already has a run of that name"]),
    "fewer rows than a batch": (lambda d, o: no_more_than(5, d, o), TRAIN, ["4 training rows make no batch of 8: use -b 4"]),
    "one row": (lambda d, o: no_more_than(1, d, o), TRAIN, ["1 rows leave none to train on"]),
    "nothing to train on": (bare, TRAIN + " --valid-pct 0.999", ["40 rows leave none to train on", "--valid-pct"]),
    "a rate of NaN": (bare, TRAIN + " -lr nan", ["lr is nan"]),
    "weights that are no tensors": (
        lambda data, out: (data / "w.pth").write_bytes(b"x"), TRAIN.replace("none", "DATA/w.pth"), ["w.pth"],
    ),
    # test_points.csv
    "no test side": (lambda data, out: shutil.rmtree(data / "test"), PREDICT, ["test_points.csv not found"]),
    "an empty test_points.csv": (whole_csv(lambda b: b"", asked_of), PREDICT, ["has no rows"]),
    "no header of it": (whole_csv(lambda b: b.split(b"\n", 1)[1], asked_of), PREDICT, ["line 1 holds a row"]),
    "code in a list": (list_is("__import__('os').mkdir('owned')"), PREDICT, ["line 4", "is not a list of point indices"]),
    "an index too large": (list_is(f"[0, 1, 2, 3, 4, 5, {N_POINTS}]"), PREDICT, ["line 4: point index 68", "(0 to 67)"]),
    "a negative index": (list_is("[0, 1, 2, 3, 4, 5, -1]"), PREDICT, ["line 4: point index -1"]),
    "fewer indices": (list_is("[0, 1]"), PREDICT, ["line 4: 2 indices found, 7 as in the rows before"]),
    "no list": (edit_test_points(lambda x: x.split("\t")[0]), PREDICT, ["line 4: a file name, a TAB and a list"]),
    "test_points.csv in UTF-16": (
        whole_csv(lambda b: b.decode().encode("utf-16"), asked_of), PREDICT, ["test_points.csv: not UTF-8"],
    ),
    "a test name that climbs": (
        edit_test_points(lambda x: "../x.jpg\t" + x.split("\t")[1]), PREDICT, ["line 4: file name '../x.jpg' leaves"],
    ),
    "a missing test image": (at_place(lambda path: None, "test", 4), PREDICT, ["line 4: image", "not found"]),
    "half a test image": (image(lambda b: b[: len(b) // 2], "test", 4), PREDICT, ["line 4: image", "is cut short"]),
    # checkpoints
    "tensors alone": (tensors(lambda t: {k: v for k, v in t.items() if k != METADATA}), PREDICT, ["it has no settings"]),
    "no metadata": (edit_metadata(lambda f: {}), FINETUNE, ["it has no settings"]),
    "a list for metadata": (edit_metadata(lambda f: [1]), PREDICT, ["it has no settings"]),
    "a tensor for metadata": (edit_metadata(lambda f: torch.zeros(1)), FINETUNE, ["it has no settings"]),
    "another format": (
        edit_metadata(lambda f: f | {"format": 99}), FINETUNE, ["another version of this program (format 99): train again"],
    ),
    "an older format": (edit_metadata(lambda f: f | {"format": 1}), PREDICT, ["another version of this program (format 1)"]),
    "a folder of something else": (lambda data, out: [(out / "r").mkdir(), (out / "r/x").touch()], TRAIN, ["not the folder of a run"]),
    "a score of NaN": (edit_metadata(lambda f: f | {"score": float("nan")}), PREDICT, ["score, nme_box_diag and epoch must be finite"]),
    "no settings": (edit_metadata(lambda f: f | {"settings": None}), PREDICT, ["setting missing or unknown"]),
    "an unknown setting": (stored("settings", surprise=1), PREDICT, ["setting missing or unknown: surprise"]),
    "a setting of the wrong kind": (stored("settings", size="large"), FINETUNE, ["size is 'large': int expected"]),
    "an unknown way with bad rows": (stored("settings", on_bad="ignore"), FINETUNE, ["on_bad is 'ignore': one of stop, skip"]),
    "another network": (stored("settings", arch="resnet18"), PREDICT, [OTHER_NETWORK]),
    "a later stage on another network": (stored("settings", arch="resnet34"), FINETUNE, [OTHER_NETWORK]),
    "no such network": (stored("settings", arch="resnet19"), PREDICT, ["resnet19"]),
    "layers that are missing": (tensors(lambda t: {k: v for k, v in t.items() if "layer4" not in k}), FINETUNE, [OTHER_NETWORK]),
    "another number of points": (stored("facts", n_points=5, flip_indices=[], shape=[]), PREDICT, ["5 points"]),
    "points that contradict the shape": (stored("facts", n_points=N_POINTS - 1), FINETUNE, ["shape is not a list of 67 points"]),
    "a huge number of points": (stored("facts", n_points=10**12), PREDICT, ["n_points is 1000000000000"]),
    "a flip map that is none": (stored("facts", flip_indices=[1] * N_POINTS), PREDICT, ["flip_indices is not a permutation"]),
    "a .pth cut short": (lambda data, out: truncate(out / "m/best.pth"), PREDICT, ["m/best.pth"]),
    "a .pth of nothing": (lambda data, out: (out / "m/best.pth").write_bytes(b""), FINETUNE, ["m/best.pth"]),
    "a .pth that runs": (tensors(lambda t: t | {"p": Payload()}), PREDICT, ["m/best.pth is not a file of tensors (it holds more"]),
    "a later stage on a .pth that runs": (tensors(lambda t: t | {"p": Payload()}), FINETUNE, ["it holds more than tensors"]),
    "weights of NaN": (tensors(lambda t: t | {"1.0.bias": t["1.0.bias"] * np.nan}), PREDICT, ["holds NaN or infinite weights"]),
    "a later stage on weights of NaN": (
        tensors(lambda t: t | {"1.0.bias": t["1.0.bias"] * np.nan}), FINETUNE, ["holds NaN or infinite weights"],
    ),
    "a number for a tensor": (tensors(lambda t: t | {"p": 1}), PREDICT, ["m/best.pth is not a file of tensors"]),
    "a number for a name": (tensors(lambda t: t | {1: torch.zeros(1)}), FINETUNE, ["m/best.pth is not a file of tensors"]),
    "no checkpoint": (bare, PREDICT.replace("-pm m", "-pm gone"), ["-pm gone not found", "there are: m"]),
    "a network that contradicts": (bare, FINETUNE + " --arch resnet34", ["--arch resnet34 contradicts the checkpoint"]),
    "a later stage on bad data": (value("nan"), FINETUNE, ["line 9: point 1's x is missing", "--on-bad skip"]),
}  # fmt: skip


def _unnamed(content):
    "The CSV with a header that does not name x and y."
    head, rest = content.split(b"\n", 1)
    return b"\t".join([b"c"] * (head.count(b"\t") + 1)) + b"\n" + rest


def _line(content, number, change):
    lines = content.split(b"\n")
    lines[number - 1] = change(lines[number - 1])
    return b"\n".join(lines)


def _as(content, kind):
    file = io.BytesIO()
    Image.open(io.BytesIO(content)).save(file, kind)
    return file.getvalue()


@pytest.mark.parametrize("kind", CASES)
def test_bad_input_is_reported_in_one_line(run_script, data, runs, tmp_path, kind):
    harm, line, parts = CASES[kind]
    harm(data, runs)
    before = snapshot(data) | snapshot(runs)
    check_refused(run_script(line.replace("OUT", str(runs)).replace("DATA", str(data))), *parts)
    assert snapshot(data) | snapshot(runs) == before
    assert not list(tmp_path.rglob("*.tmp")) and not list((tmp_path / "here").rglob("*"))


@pytest.mark.parametrize(
    "line",
    [
        "train.py --on-bad ignore", "train.py --workers -1", "train.py --opt lion", "train.py -b many", "train.py --amp fp8",
        "train.py --size", "train.py --no-such-flag", "train.py stray", "train.py --lr fast", "train.py --weights ''",
        "predict.py", "predict.py -pm ''", "finetune.py --round up",
    ],
)  # fmt: skip
def test_invalid_flags_print_the_usage(run_script, tmp_path, line):
    code, _, err = run_script(line)
    assert code == 2 and "usage:" in err and "error:" in err and "Traceback" not in err
    assert not list((tmp_path / "here").rglob("*"))


LEGAL = {
    "a mark before the header": whole_csv(lambda b: b"\xef\xbb\xbf" + b),
    "Windows' line ends": whole_csv(lambda b: b.replace(b"\n", b"\r\n")),
    "both line ends": whole_csv(lambda b: b.replace(b"\n", b"\r\n", 5)),
    "blank lines": whole_csv(lambda b: b.replace(b"\n", b"\n\n")),
    "line ends of old Macs": whole_csv(lambda b: b.replace(b"\n", b"\r")),
    "commas throughout": whole_csv(lambda b: b.replace(b"\t", b",")),
    "an odd column": whole_csv(lambda b: b.replace(b"\n", b"\t1\n").replace(b"\t1\n", b"\tc\n", 1)),
    "no end of the last line": whole_csv(lambda b: b.rstrip(b"\n")),
    "a header with one name for all": whole_csv(
        lambda b: b"\t".join([b"x"] * (2 * N_POINTS + 1)) + b"\n" + b.split(b"\n", 1)[1]
    ),
    "decimals and spaces": value(" 12.5 "),
    "a JPEG with bytes behind its end": image(lambda b: b + b"\0" * 999),
    "a PNG under a JPEG's name": image(lambda b: _as(b, "PNG")),
    "a row twice": lambda data, out: edit_line(labels_of(data), 9, lambda x: csv_lines(labels_of(data))[7]),
}


@pytest.mark.parametrize("kind", LEGAL)
def test_valid_variants_are_accepted(data, kind):
    from landmarks_fastai.data.items import labelled_images

    LEGAL[kind](data, None)
    items = labelled_images(data)
    assert len(items) == 40 and not len(items.left_out)


def test_image_without_permission_is_reported(data, monkeypatch):
    "Root, who runs the tests in many containers, is refused by no mode bits."
    from landmarks_fastai.data import checks
    from landmarks_fastai.data.items import labelled_images
    from landmarks_fastai.errors import BadData

    closed = str(image_path(data))
    real = checks.open_undecoded

    def open_undecoded(path, where=""):
        if str(path) == closed:
            raise checks.UserError(f"image {path} cannot be read as an image (Permission denied): replace it")
        return real(path, where)

    monkeypatch.setattr(checks, "open_undecoded", open_undecoded)
    with pytest.raises(BadData, match="line 9: image .*Permission denied"):
        labelled_images(data)
