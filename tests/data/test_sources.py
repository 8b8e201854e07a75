"Which reader a path is for, where its images are, and what makes labels suspicious."

import os
import pickle
import re
import unicodedata

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from landmarks_fastai.data.block import landmark_dataloaders
from landmarks_fastai.data.image_search import resolve
from landmarks_fastai.data.items import labelled_images
from landmarks_fastai.data.sources import read_frame, read_source
from landmarks_fastai.data.split import divided_rows
from landmarks_fastai.data.suspicions import suspicions
from landmarks_fastai.errors import BadData, UserError
from landmarks_fastai.settings import DataFacts, Settings
from tests.data.test_formats import A, B, annotation, coco, cvat, cvat_points, labelme, shapes, write_files
from tests.helpers import QUICK, check_refused

E_ACUTE = "é"  # one letter
NAMES = {  # in the labels -> files of the folder, the one that is meant; empty: none
    "as it is": ("x/a.png", ["x/a.png", "a.png"], "x/a.png"),
    "a folder more in the folder": ("x/a.png", ["images/x/a.png", "images/y/a.png"], "images/x/a.png"),
    "a folder more in the name": ("images/x/a.png", ["x/a.png"], "x/a.png"),
    "letters composed otherwise": (unicodedata.normalize("NFD", E_ACUTE) + ".png", [f"{E_ACUTE}.png"], f"{E_ACUTE}.png"),
    "upper case": ("A.JPG", ["images/a.jpg"], "images/a.jpg"),
    "backslashes": ("x\\a.png", ["x/a.png"], "x/a.png"),
    "no suffix": ("a", ["images/a.png"], "images/a.png"),
    "no suffix, and two that fit": ("a", ["a.png", "a.jpg"], ""),
    "quotes": ("'a.png' ", ["a.png"], "a.png"),
    "another machine": ("/home/me/dogs/a.png", ["images/a.png"], "images/a.png"),
    "another system": ("C:\\dogs\\a.png", ["images/a.png"], "images/a.png"),
    "Label Studio's prefix": ("/data/upload/1/1a2b3c4d-a.png", ["a.png"], "a.png"),
    "up and down again": ("../images/a.png", ["images/a.png"], "images/a.png"),
    "two that fit": ("a.png", ["x/a.png", "y/a.png"], ""),
    "another folder": ("v3/a.png", ["v1/a.png"], ""),
    "nothing": ("b.png", ["a.png"], ""),
    "out of the folder": ("../../etc/a.png", ["b.png"], ""),
    "NUL": ("\0", ["a.png"], ""),
    "an empty name": ("", ["a.png"], ""),
}  # fmt: skip


@pytest.mark.parametrize("kind", NAMES)
def test_image_that_a_name_means(tmp_path, kind):
    name, files, expected = NAMES[kind]
    write_files(tmp_path, {}, files)
    assert resolve([name], tmp_path) == {name: expected}


def test_two_names_do_not_mean_one_file(tmp_path):
    "Of another machine's folders each has one folder here; a file that another row names is not found a second time."
    write_files(tmp_path, {}, ["v1/a.png", "v1/b.png", "v2/b.png"])
    for names in (["v1/a.png", "v2/a.png"], ["/x/v1/a.png", "/y/v3/a.png"]):
        found = resolve(names, tmp_path)
        assert found[names[0]] == "v1/a.png" and not found[names[1]]
    assert set(resolve(["/x/a.png", "/y/a.png"], tmp_path).values()) == {""}
    absolute = str(tmp_path / "v2" / "b.png")
    assert resolve([absolute], tmp_path) == {absolute: "v2/b.png"}


def test_images_are_found_beside_the_labels_or_above(tmp_path):
    "As in COCO's own layout: annotations/x.json, and the images in a folder beside it."
    write_files(tmp_path, {"annotations/x.json": coco(annotation(A))}, ["train2017/a.png"])
    for source in (tmp_path / "annotations" / "x.json", tmp_path):
        labels, folder = read_source(source)
        assert (folder / labels.name(0)).samefile(tmp_path / "train2017" / "a.png")
    write_files(tmp_path / "other", {}, ["a.png"])
    labels, folder = read_source(tmp_path / "annotations" / "x.json", image_folder=tmp_path / "other")
    assert folder / labels.name(0) == tmp_path / "other" / "a.png"
    write_files(tmp_path / "empty" / "a" / "b", {"c.json": coco(annotation(A))}, [])
    with pytest.raises(UserError, match="none of 1 images is found, as 'a.png'; looked in"):
        read_source(tmp_path / "empty" / "a" / "b" / "c.json")


def test_names_that_leave_the_folder_are_refused(tmp_path):
    write_files(tmp_path, {"d/e/f/c.json": coco(annotation(A), file="../../../../a.png")})
    with pytest.raises(UserError, match="'../../../../a.png' leaves the folder of the labels"):
        read_source(tmp_path / "d" / "e" / "f" / "c.json")


def test_validation_rows_of_another_source(tmp_path, capsys):
    "Files of a folder each, points in another order; images that both have validate with the first one's rows."
    first = coco(annotation(A), annotation(B, image_id=2), keypoints=("nose", "tail"))
    first["images"] = [{"id": k, "file_name": f"{'ab'[k - 1]}.png"} for k in (1, 2)]
    other = coco(annotation(A, ("tail", "nose"), bbox=[1, 2, 3, 4]), keypoints=("tail", "nose"), file="c.png")
    write_files(tmp_path, {"my train/t.json": first}, ["my train/a.png", "my train/b.png"])
    write_files(tmp_path, {"val/v.json": other}, ["val/c.png"])
    train, valid = tmp_path / "my train/t.json", tmp_path / "val/v.json"
    images = labelled_images(train, valid=str(valid))
    assert [item.path.relative_to(tmp_path).as_posix() for item in images] == [
        "my train/a.png", "my train/b.png", "val/c.png",
    ]  # fmt: skip
    assert [side.tolist() for side in divided_rows(images, Settings(valid=str(valid)))] == [[0, 1], [2]]
    assert (images[2].points == images[0].points).all() and images[2].box == (1, 2, 4, 6)
    assert f"{train} with --valid {valid}, annotation 7" in images[2].where
    assert "names 1 validation rows" in capsys.readouterr().out
    write_files(tmp_path, {"my train/v.csv": "file_name,nose_x,nose_y,tail_x,tail_y,group\nb.png,1,2,3,4,g\n"}, [])
    images = labelled_images(train, valid=str(tmp_path / "my train/v.csv"))
    assert images.labels.valid.tolist() == [False, True] and (images[1].points[1] == B["tail"]).all()
    assert images.labels.groups == ["", ""]  # none of the rows is of the source with groups
    write_files(
        tmp_path, {"val/w.json": coco(annotation({"eye": (1, 2)}, ("eye",)), keypoints=("eye",))}, ["val/a.png"]
    )
    with pytest.raises(UserError, match="w.json has other points .eye. than .*t.json .nose, tail."):
        labelled_images(train, valid=str(tmp_path / "val/w.json"))


FOLDERS = {
    "labelme": {"a.json": labelme(*shapes(A))},
    "CVAT for images": {"annotations.xml": cvat(cvat_points(A))},
    "COCO keypoints": {"c.json": coco(annotation(A))},
    "CSV": {"p.csv": "file_name,nose_x,nose_y\na.png,1,2\n"},
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_folder_with_one_file_of_labels_is_a_source(tmp_path, capsys, kind):
    labels, _ = read_source(write_files(tmp_path, FOLDERS[kind]))
    assert labels.csv == (tmp_path if kind == "labelme" else tmp_path / next(iter(FOLDERS[kind])))
    assert capsys.readouterr().out.startswith(f"{kind}: 1 rows, 1 images, ")


TABLE = "file_name,nosé_x,nosé_y\na.png,1,2\n"
ALONE = {
    "UTF-16": ("p.csv", TABLE.encode("utf-16"), "line 1: not UTF-8"),
    "Latin-1": ("p.tsv", TABLE.encode("latin-1"), "line 1: not UTF-8"),
    "empty": ("p.csv", b"", "is empty"),
    "no names": ("p.csv", b"a.png,1,2\n", "line 1 names no points"),
    "JSON": ("p.json", b"{", "is damaged, or not JSON"),
    "workbook": ("p.xlsx", b"PK", "is a workbook: export the sheet as CSV"),
}


@pytest.mark.parametrize("kind", ALONE)
def test_damaged_table_alone_in_a_folder_is_named(tmp_path, kind):
    name, content, message = ALONE[kind]
    with pytest.raises(UserError, match=f"{name} {message}"):
        read_source(write_files(tmp_path, {name: content}))


@pytest.mark.parametrize("name", ["a.png", "pictures/a.png", "deep/pictures/a.png"])
def test_linked_folder_of_images_is_searched(tmp_path, name):
    "It becomes the folder of the images; links in a circle end."
    write_files(tmp_path, {"u/v/d/deep/x": "", "u/v/d/p.csv": f"file_name,x,y\n{name},1,2\n"}, ["far/a.png"])
    folder = tmp_path / "u" / "v" / "d"
    os.symlink(tmp_path / "far", folder / "deep" / "pictures")
    os.symlink(tmp_path / "u", folder / "circle")
    images = labelled_images(folder / "p.csv")
    assert images.folder == folder / "deep" / "pictures" and images.labels.all_names() == ["a.png"]


def test_folder_without_labels_or_with_several_is_refused(tmp_path):
    write_files(tmp_path, {})
    with pytest.raises(UserError, match="train.landmarks.csv not found; -d must be .*, nor labels of another tool"):
        read_source(tmp_path)
    write_files(tmp_path, {"a.json": coco(annotation(A)), "b.csv": "file,x0,y0\n"})
    with pytest.raises(UserError, match="a.json, b.csv: name one of them"):
        read_source(tmp_path)
    with pytest.raises(UserError, match="no such folder or file"):
        read_source(tmp_path / "gone.json")


# --- landmarks.csv and DataFrames


def shape_rows(n=12, n_points=6):
    "Turned and scaled copies of a shape, pixels of an image of 96 x 96."
    rng = np.random.default_rng(0)
    shape = np.array([(-0.5, -0.4), (0.5, -0.4), (0, 0), (-0.35, 0.45), (0.35, 0.45), (0, 0.7)])[:n_points]
    angle, scale, centre = rng.uniform(-0.4, 0.4, n), rng.uniform(20, 30, n), rng.uniform(40, 56, (n, 1, 2))
    turn = np.stack([np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)], 1).reshape(n, 2, 2)
    return shape @ turn * scale[:, None, None] + centre


def competition(folder, header, rows, **kwargs):
    names = [f"{k}.png" for k in range(len(rows))]
    write_files(folder / "train" / "images", {}, names, **{"size": (96, 96), **kwargs})
    lines = ["\t".join(["file_name", *header])] + [
        "\t".join([n, *map(str, row)]) for n, row in zip(names, rows, strict=True)
    ]
    (folder / "train" / "landmarks.csv").write_text("\n".join(lines) + "\n")
    return folder


def flat(points, *more):
    return [np.concatenate([np.round(row, 1), *([m] * len(row) for m in more)], 1).ravel().tolist() for row in points]


def columns(*axes):
    return [f"p{k}_{axis}" for k in range(6) for axis in axes]


LAYOUTS = {
    "x y": (columns("x", "y"), flat(shape_rows())),
    "no names": ([f"c{k}" for k in range(12)], flat(shape_rows())),
    "likelihood": (columns("x", "y", "likelihood"), flat(shape_rows(), [0.98])),
    "visible": (columns("x", "y", "visible"), flat(shape_rows(), [2])),
    "planar": ([f"{a}_{k}" for a in "xy" for k in range(6)], [p.T.round(1).ravel().tolist() for p in shape_rows()]),
    "box and group": (
        ["group", "left", "top", "right", "bottom", *columns("x", "y")], [["g", 1, 2, 90, 91, *r] for r in flat(shape_rows())],
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", LAYOUTS)
def test_layouts_of_landmarks_csv(tmp_path, kind):
    "A header that names what its columns are is believed; a DataFrame of the same columns too."
    header, rows = LAYOUTS[kind]
    items = labelled_images(competition(tmp_path, header, rows))
    frame = pd.read_csv(tmp_path / "train" / "landmarks.csv", sep="\t")
    again = labelled_images(frame, tmp_path / "train" / "images")
    for images in (items, again):
        got = np.stack([item.points for item in images])
        assert np.allclose(got, shape_rows().round(1), atol=0.01) and not images.labels.faults
    assert again.labels.place(3) == "DataFrame row 3"


def test_names_in_a_header_that_is_read_by_position(tmp_path, capsys):
    "Also of a DataFrame; points in another order are put in the network's, also as a worker gets them."
    names = ["left eye", "right eye", "nose", "a", "b", "c"]
    folder = competition(tmp_path, [f"{name}_{axis}" for name in names for axis in "xy"], flat(shape_rows()))
    frame = pd.read_csv(tmp_path / "train" / "landmarks.csv", sep="\t")
    assert read_frame(frame).point_names == tuple(names)
    images = labelled_images(folder).fitted(DataFacts(6, point_names=tuple(names[::-1])), "best.pth")
    assert "in another order than best.pth" in capsys.readouterr().out
    for again in (images, pickle.loads(pickle.dumps(images))):
        assert np.allclose(again[3].points, shape_rows()[3, ::-1].round(1), atol=0.01)
        assert again.labels.point_names == tuple(names[::-1])
    assert pickle.loads(pickle.dumps(labelled_images(folder))).labels.point_names == tuple(names)
    for numbered in ("Point_M{}_X Point_M{}_Y", "p{}_x p{}_y"):
        header = " ".join(numbered.format(k, k) for k in range(6)).split()
        assert not labelled_images(competition(tmp_path / numbered[:2], header, flat(shape_rows()))).labels.point_names


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.replace("\t", ","),
        lambda t: t.replace("\n", "\r"),
        lambda t: t.replace("\n", "\t\n"),
        lambda t: re.sub("[^\t\n]+", r'"\g<0>"', t),
    ],
)
def test_landmarks_csv_with_other_separators(tmp_path, change):
    csv = competition(tmp_path, *LAYOUTS["x y"]) / "train" / "landmarks.csv"
    csv.write_bytes(change(csv.read_text()).encode())
    assert np.allclose(labelled_images(tmp_path)[0].points, shape_rows()[0].round(1), atol=0.01)


@pytest.mark.parametrize("written", ["/home/me/{}.png", "images/{}.png", "{}.PNG", "{}"])
def test_names_of_landmarks_csv_that_are_not_quite_those_of_the_images(tmp_path, written):
    csv = competition(tmp_path, *LAYOUTS["no names"]) / "train" / "landmarks.csv"
    text = csv.read_text()
    csv.write_text(re.sub(r"^(\d+)\.png", lambda m: written.format(m[1]), text, flags=re.M))
    images = pickle.loads(pickle.dumps(labelled_images(tmp_path)))  # as a worker gets it
    assert [item.path.name for item in images] == [f"{k}.png" for k in range(12)]
    assert np.allclose(images[3].points, shape_rows()[3].round(1), atol=0.01)
    csv.write_text(text.replace(".png", "x.png"))
    with pytest.raises(UserError, match="landmarks.csv: none of 12 images is found, as '0x.png'; looked in .*images:"):
        labelled_images(tmp_path)


def test_points_in_another_order_are_put_in_that_of_the_network(tmp_path, capsys):
    "Where both name their points; flip indices and skeleton follow."
    csv = write_files(tmp_path, {"p.csv": "f,a_x,a_y,b_x,b_y,c_x,c_y\na.png,1,2,3,4,5,6\n"}) / "p.csv"
    images = labelled_images(csv)
    images.labels.flip_indices, images.labels.skeleton = (1, 0, 2), ((0, 2),)  # a and b change places; a joins c
    facts = DataFacts(n_points=3, point_names=("c", "a", "b"))
    fitted = images.fitted(facts, "best.pth")
    assert fitted[0].points.tolist() == [[5, 6], [1, 2], [3, 4]] and fitted.labels.point_names == ("c", "a", "b")
    assert fitted.labels.flip_indices == (0, 2, 1) and fitted.labels.skeleton == ((1, 0),)
    assert f"{csv} has its points in another order than best.pth" in capsys.readouterr().out
    assert images[0].points.tolist() == [[1, 2], [3, 4], [5, 6]]
    for same in (fitted, images.fitted(DataFacts(n_points=3), "best.pth")):  # without names the order stays
        assert same.fitted(DataFacts(n_points=3), "best.pth").labels is same.labels
    assert not capsys.readouterr().out
    with pytest.raises(UserError, match=r"p.csv has other points \(b\) than best.pth \(d\)"):
        images.fitted(facts.replace(point_names=("d", "a", "c")), "best.pth")
    with pytest.raises(UserError, match="p.csv has 3 points, best.pth predicts 4"):
        images.fitted(DataFacts(n_points=4), "best.pth")


@pytest.mark.parametrize("source", ["train", "train/landmarks.csv"])
def test_train_folder_or_its_table_named_instead_of_the_folder_above(tmp_path, source):
    "A header of 120 points has more fields than WFLW's lines."
    points = np.tile(shape_rows(n=2), (1, 20, 1))
    header = [f"Point_M{k}_{axis}" for k in range(120) for axis in "XY"]
    competition(tmp_path, header, flat(points))
    labels, folder = read_source(tmp_path / source)
    assert len(labels) == 2 and labels.n_points == 120 and (folder / labels.name(0)).is_file()


def test_long_name_of_a_missing_image_is_shortened(tmp_path):
    write_files(tmp_path, {"p.csv": f"file_name,nose_x,nose_y\n{'b' * 900}.png,1,2\n"}, [])
    with pytest.raises(UserError, match="as 'b{200}…'; looked in"):
        read_source(tmp_path / "p.csv")


def test_data_frame_has_the_checks_of_a_csv(tmp_path):
    frame = pd.read_csv(competition(tmp_path, *LAYOUTS["x y"]) / "train" / "landmarks.csv", sep="\t")
    folder = tmp_path / "train" / "images"
    zero, far, nameless = frame.copy(), frame.copy(), frame.copy()
    zero.iloc[3, 1:], far.iloc[2, 1], nameless.iloc[5, 0] = 0.0, 1e6, np.nan
    cases = [
        (zero, "row 3: all 6 points are"),
        (far, "row 2: point 0's x is 1e.06, a number between"),
        (nameless, "row 5: the file name is empty"),
    ]
    for bad, message in cases:
        with pytest.raises(BadData, match=f"DataFrame {message}"):
            labelled_images(bad, folder)
    absolute = frame.assign(file_name=[str((folder / name).resolve()) for name in frame.file_name])
    dls = landmark_dataloaders(absolute, size=32, batch_size=4)
    assert len(dls.items.all_rows) == 12 and dls.one_batch()[0].shape == (4, 3, 32, 32)
    with pytest.raises(BadData, match="row 0: file name '../x.png' leaves the image folder"):
        labelled_images(frame.replace("0.png", "../x.png"), folder)


# --- suspicions


def with_missing(points, value):
    points = points.copy()
    points[::3, 1] = value
    return points


def with_box(points, size=False):
    low, high = points.min(1, keepdims=True), points.max(1, keepdims=True)
    return np.concatenate([low - 2, high - low + 4 if size else high + 2, points], 1)


SUSPICIONS = {
    "x y visible": (
        np.concatenate([shape_rows(), np.full((12, 6, 1), 2)], 2).reshape(12, -1, 2),
        "every third number is from 0 to 2",
    ),
    "zeros": (with_missing(shape_rows(), 0), r"4 of 72 points are exactly \(0, 0\)"),
    "minus one": (with_missing(shape_rows(), -1), r"exactly \(-1, -1\)"),
    "one landmark of minus one": (
        np.where(np.arange(360)[:, None] == 7, -1.0, np.tile(shape_rows(), (1, 60, 1))),
        r"12 of 4320 points are exactly \(-1, -1\)",
    ),
    "fractions": (shape_rows() / 96, "fractions of the image's sides"),
    "fractions, points outside of the image": (
        with_missing(shape_rows() / 96, (1.02, -0.01)),
        "fractions of the image's sides",
    ),
    "planar": (shape_rows().swapaxes(1, 2).reshape(12, 6, 2), "only if x of all points stands before y"),
    "a box": (with_box(shape_rows()), "the first four numbers are a box"),
    "a corner and a size": (with_box(shape_rows(), True), "the first four numbers are a box"),
}


@pytest.mark.parametrize("kind", SUSPICIONS)
def test_labels_that_are_probably_not_points_stop_training(run_script, tmp_path, kind):
    points, message = SUSPICIONS[kind]
    header = [f"c{k}" for k in range(2 * points.shape[1])]
    competition(tmp_path, header, points.round(4).reshape(len(points), -1).tolist())
    with pytest.raises(UserError, match=message) as e:
        labelled_images(tmp_path)
    result = run_script(f"train.py -d {tmp_path} {QUICK} --out {tmp_path / 'runs'}")
    check_refused(result, str(e.value))


def test_labels_that_are_points_are_not_suspicious(tmp_path, drawn):
    far, bent = (
        shape_rows() + (900, 300),
        shape_rows() * np.random.default_rng(1).uniform(0.3, 1.7, (12, 6, 1)) + (900, 300),
    )
    corners = np.concatenate([shape_rows().min(1, keepdims=True) - 5 + (300, 300), shape_rows() + (300, 300)], 1)
    for points in (shape_rows(), far, bent, bent + (-600, 0), corners):
        frame = pd.DataFrame(points.reshape(12, -1))
        frame.insert(0, "file_name", "a.png")
        assert not suspicions(read_frame(frame))
    assert not suspicions(labelled_images(drawn).labels)
    planar = pd.DataFrame(far.swapaxes(1, 2).reshape(12, -1))
    planar.insert(0, "file_name", "a.png")
    assert "x of all points stands before" in suspicions(read_frame(planar))[0]


def test_point_of_no_training_row_is_named(tmp_path):
    rows = "".join(f"{k}.png,{10 + k},20,,\n" for k in range(12))
    write_files(tmp_path, {"p.csv": f"file_name,nose_x,nose_y,tail_x,tail_y\n{rows}"}, [f"{k}.png" for k in range(12)])
    with pytest.raises(UserError, match="no training row has point tail: remove it"):
        landmark_dataloaders(tmp_path / "p.csv", size=32, batch_size=4)


@pytest.mark.parametrize("exif,refused", [(6, True), (8, True), (3, False), (1, False)])
def test_points_that_fit_a_photograph_as_shown_are_refused(tmp_path, exif, refused):
    points = shape_rows() * (0.8, 1.2)  # 77 x 115: of a picture shown upright
    competition(tmp_path, *(columns("x", "y"), flat(points)), size=(120, 80), exif=exif)
    if refused:
        with pytest.raises(
            UserError, match="fit them as they are shown, not as stored; the first: .*landmarks.csv line"
        ):
            labelled_images(tmp_path)
    else:
        labelled_images(tmp_path)


def test_turned_pictures_have_no_note_that_contradicts(tmp_path, capsys):
    shape = labelme(*shapes(A)) | {"imageWidth": 48, "imageHeight": 64}
    labelled_images(write_files(tmp_path, {"a.json": shape}, exif=6))
    out = capsys.readouterr().out
    assert (
        "1 rows are of pictures with EXIF rotation: their points were turned back" in out and "not applied" not in out
    )
    other = labelme(*shapes(A)) | {"imageWidth": 640, "imageHeight": 480}
    labelled_images(write_files(tmp_path, {"a.json": other}))
    assert "of another size than labelled, as a.png: 64 x 48, 640 x 480 in the labels" in capsys.readouterr().out


def test_missing_images_are_counted_but_those_of_a_csv_stop(tmp_path, capsys):
    other = coco(
        annotation(A),
        annotation(A, image_id=2),
        images=[{"id": 1, "file_name": "a.png"}, {"id": 2, "file_name": "lost.png"}],
    )
    items = labelled_images(write_files(tmp_path, {"c.json": other}) / "c.json")
    assert len(items) == 1 and "1 rows whose image was not found, as lost.png" in capsys.readouterr().out
    write_files(tmp_path, {"p.csv": "file_name,nose_x,nose_y\na.png,1,2\nlost.png,3,4\n"})
    with pytest.raises(BadData, match="p.csv line 3: image lost.png not found in"):
        labelled_images(tmp_path / "p.csv")


# --- training


@pytest.mark.train
def test_run_on_labels_of_another_tool(run_script, tmp_path, monkeypatch):
    "A category among several; a later stage and a resumed run find the same rows."
    names = [f"{k}.png" for k in range(12)]
    images = [{"id": k, "file_name": name, "width": 96, "height": 96} for k, name in enumerate(names)]
    parts = [f"p{k}" for k in range(6)]
    rows = [
        annotation(dict(zip(parts, p.round(1).tolist(), strict=True)), parts, id=k, image_id=k)
        for k, p in enumerate(shape_rows())
    ]
    rows += [row | {"id": 100 + row["id"], "category_id": 2} for row in rows]
    categories = [{"id": k, "name": n, "keypoints": parts} for k, n in ((1, "dog"), (2, "cat"))]
    write_files(tmp_path, {"c.json": coco(*rows, images=images, categories=categories)}, names, size=(96, 96))
    line = f"train.py -d {tmp_path / 'c.json'} {QUICK} --out {tmp_path / 'runs'} -n r"
    check_refused(run_script(line), "several categories")
    code, out, err = run_script(line + " --category dog")
    assert code == 0 and "COCO keypoints: 12 rows, 12 images, 6 points" in out, err
    code, out, err = run_script(f"finetune.py -pm r -e 1 -n s --workers 0 --out {tmp_path / 'runs'}")
    assert code == 0 and "COCO keypoints: 12 rows" in out, err
    code, out, err = run_script(f"train.py --resume -n r --out {tmp_path / 'runs'}")
    assert code == 0 and "is finished" in out


def test_link_out_of_the_folder_is_refused(tmp_path):
    Image.new("RGB", (64, 48)).save(tmp_path / "secret.png")
    write_files(tmp_path / "d", {"c.json": coco(annotation(A))}, ["b.png"])
    os.symlink(tmp_path / "secret.png", tmp_path / "d" / "a.png")
    with pytest.raises(BadData, match="annotation 7: file name 'a.png' leaves the image folder"):
        labelled_images(tmp_path / "d" / "c.json")
