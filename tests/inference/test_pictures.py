"Pictures to points: the Predictor, and `predict.py PATH`: sources, formats, boxes, overlays, broken pictures."

import csv
import io
import json
import os
import shutil
import sys

import numpy as np
import pytest
from PIL import Image

from landmarks_fastai import Predictor, landmark_dataloaders, landmark_learner
from landmarks_fastai.data.images import ORIENTATION, TURNS
from landmarks_fastai.data.pictures import Picture
from landmarks_fastai.errors import UserError
from landmarks_fastai.inference.open_network import open_network
from landmarks_fastai.inference.overlay import draw_points
from landmarks_fastai.inference.predictor import Prediction
from landmarks_fastai.runs.run import PREDICTIONS
from tests.helpers import N_POINTS, csv_lines, labels_of, untrained


@pytest.fixture(scope="module")
def other_size(drawn, tmp_path_factory):
    return untrained(drawn, tmp_path_factory.mktemp("other"), size=48, fit="squish", mirror="none")


def csv_points(path):
    "(file name, object) -> points; None for a row without."
    with open(path, newline="") as f:
        rows = list(csv.reader(f))[1:]
    return {
        (name, k): np.array(cells[: 2 * N_POINTS], float).reshape(-1, 2) if any(cells) else None
        for name, _, k, *cells in rows
    }


def test_every_kind_of_picture_gives_the_points_of_predict_py(runs, pictures, drawn, run_script):
    assert run_script(f"predict.py --workers 0 --out {runs} -pm m")[0] == 0
    names = json.loads((runs / "m/points.json").read_text())
    expected = dict(zip(names, np.load(runs / "m/points.npy"), strict=True))
    predictor = Predictor(runs / "m")
    one = predictor(pictures[0])
    assert one.points.shape == (N_POINTS, 2) and one.points.dtype == np.float32 and one.confidence is None
    assert one.points == pytest.approx(expected[pictures[0].name], abs=1e-4)
    for several in (
        predictor(pictures),
        predictor(pictures[0].parent),
        predictor(str(pictures[0].parent)),
        predictor(iter(pictures)),
        Predictor("m", runs, batch_size=1)(map(str, pictures)),
    ):
        points = np.stack([prediction.points for prediction in several])
        assert points == pytest.approx(np.stack([expected[path.name] for path in pictures]), abs=0.01)


def test_pixels_give_what_their_file_gives(runs, pictures):
    predictor = Predictor(runs / "m", flip_test=False)
    image = Image.open(pictures[0]).convert("RGB").resize((60, 50))  # twice the input: not reduced by decoding
    image.save("small.png")
    expected = predictor("small.png").points
    array = np.asarray(image)
    for same in (image, array, array / 255, np.asarray(image.convert("RGBA")), Picture("small.png")):
        assert predictor(same).points == pytest.approx(expected, abs=1e-4)
    for wrong in (np.full((9, 9, 3), 2.0), np.zeros((9, 9, 5), np.uint8), np.zeros((0, 9, 3), np.uint8), 7.5):
        with pytest.raises(UserError, match="a picture is a path, a PIL image or an array"):
            predictor([wrong])


@pytest.mark.parametrize("kind", ["png", "tiff"])
def test_exif_rotation_is_applied_and_said(runs, pictures, run_script, kind):
    shown = Image.open(pictures[0]).convert("RGB").resize((60, 50))
    expected = Predictor(runs / "m")(shown).points
    for value in TURNS:
        # stored such that the turn of `value` shows the picture
        back = {6: TURNS[8], 8: TURNS[6]}.get(value, TURNS[value])
        exif = Image.Exif()
        exif[ORIENTATION] = value
        shown.transpose(back).save(f"turned{value}.{kind}", exif=exif)
        assert Predictor(runs / "m")(f"turned{value}.{kind}").points == pytest.approx(expected, abs=1e-3), value
    code, out, err = run_script(f"predict.py --out {runs} -pm m --format json turned6.{kind}")
    (entry,) = json.loads((runs / "m/predictions.json").read_text())
    assert (code, err) == (0, "") and "EXIF rotation of 1 pictures was applied" in out
    assert entry["exif_rotation_applied"] and (entry["width"], entry["height"]) == (60, 50)


def test_formats_have_the_same_points(runs, pictures, run_script):
    points = np.stack([prediction.points for prediction in Predictor(runs / "m")(pictures)])
    line = f"predict.py --out {runs} -pm m {pictures[0].parent} --format"
    for kind in PREDICTIONS:
        code, out, err = run_script(line, kind)
        assert (code, err) == (0, "") and out.startswith(f"6 pictures: {runs / 'm' / 'predictions'}"), kind
    folder = runs / "m"
    assert np.stack(list(csv_points(folder / "predictions.csv").values())) == pytest.approx(points, abs=1e-3)
    entries = json.loads((folder / "predictions.json").read_text())
    assert np.array([e["objects"][0]["points"] for e in entries]) == pytest.approx(points, abs=1e-3)
    assert [e["file_name"] for e in entries] == [str(file) for file in pictures]
    coco = json.loads((folder / "predictions.coco.json").read_text())
    assert coco["categories"][0]["keypoints"] == [str(k) for k in range(N_POINTS)]
    for image, annotation, expected in zip(coco["images"], coco["annotations"], points, strict=True):
        assert annotation["image_id"] == image["id"] and annotation["num_keypoints"] == N_POINTS
        triples = np.array(annotation["keypoints"]).reshape(-1, 3)
        assert triples[:, :2] == pytest.approx(expected, abs=1e-3) and (triples[:, 2] == 2).all()
        assert annotation["bbox"][:2] == pytest.approx(expected.min(0) + 0.5, abs=1e-3)
    for file, expected in zip(pictures, points, strict=True):
        (pts,) = (folder / "predictions").rglob(f"{file.stem}.pts")
        lines = pts.read_text().splitlines()
        assert lines[:3] == ["version: 1", f"n_points: {N_POINTS}", "{"] and lines[-1] == "}"
        assert np.loadtxt(io.StringIO("\n".join(lines[3:-1]))) == pytest.approx(expected + 1, abs=1e-3)
    assert np.load(folder / "predictions.npy") == pytest.approx(points, abs=1e-4)
    names = json.loads((folder / "predictions.names.json").read_text())
    assert names == [[str(file), None, 0] for file in pictures]


def test_a_broken_picture_costs_itself(runs, pictures, run_script, tmp_path):
    folder = tmp_path / "some pictures" / "deeper"
    folder.mkdir(parents=True)
    for file in pictures[:3]:
        shutil.copy(file, folder.parent)
    (folder / "cut.jpg").write_bytes(pictures[0].read_bytes()[:700])
    (folder / "text.png").write_text("no picture")
    Image.new("RGB", (1, 1)).save(folder / "dot.png")
    (folder / "notes.txt").write_text("no picture either, and not named like one")
    (folder / ".hidden.jpg").write_text("")
    for kind in ("csv", "npy", "json", "coco", "pts"):
        code, out, err = run_script(f"predict.py --out {runs} -pm m -b 2 --format {kind}", folder.parent)
        lines = err.splitlines()
        assert code == 1 and "6 pictures" in out and len(lines) == 4, err
        assert "cut.jpg is cut short" in err and "text.png cannot be read as an image" in err
        assert "1 of its 7 files are left out" in err and lines[-1].startswith(
            "error: 2 of the files could not be used"
        )
    rows = csv_points(runs / "m/predictions.csv")
    assert {name.rsplit("/", 1)[-1] for (name, _), points in rows.items() if points is None} == {"cut.jpg", "text.png"}
    assert len(rows) == 6
    assert np.isnan(np.load(runs / "m/predictions.npy")).all((1, 2)).sum() == 2
    with pytest.raises(UserError, match="cut.jpg is cut short"):
        Predictor(runs / "m")(folder / "cut.jpg")


def test_an_image_may_be_changed_after_it_was_passed(runs, pictures):
    "As by a camera that writes each frame into the same image."
    predictor, image = Predictor("m", out=runs), Image.open(pictures[0]).convert("RGB")
    expected = predictor(image.copy()).points

    def frames():
        yield image
        image.paste((0, 0, 0), (0, 0, *image.size))
        yield image

    first, second = predictor(frames())
    assert first.points == pytest.approx(expected, abs=0.01) and abs(second.points - expected).max() > 0.1


@pytest.mark.parametrize("kind", PREDICTIONS)
def test_predictions_are_replaced_by_those_of_the_same_command(runs, pictures, run_script, tmp_path, kind):
    "Of a checkpoint outside of runs/, whose folder there has predictions only."
    checkpoint = shutil.copy(runs / "m" / "best.pth", tmp_path / "c.pth")
    for _ in range(2):
        code, out, err = run_script(f"predict.py --format {kind} -pm", checkpoint, pictures[0])
        assert (code, err) == (0, "") and "1 pictures" in out


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere names of pictures are Unicode")
@pytest.mark.parametrize("kind", PREDICTIONS)
def test_a_name_that_is_not_utf_8_has_its_points_too(runs, pictures, run_script, tmp_path, kind):
    folder = tmp_path / "old names"
    folder.mkdir()
    shutil.copy(pictures[0], os.fsdecode(bytes(folder) + b"/caf\xe9.jpg"))
    code, out, err = run_script(f"predict.py --out {runs} -pm m --format {kind} --overlay", folder)
    assert (code, err) == (0, "") and "1 pictures" in out
    expected = Predictor(runs / "m")(pictures[0]).points
    if kind == "csv":
        ((name, _), points), *more = csv_points(runs / "m/predictions.csv").items()
        assert not more and name.endswith(r"caf\udce9.jpg") and points == pytest.approx(expected, abs=1e-3)
    elif kind == "json":
        (entry,) = json.loads((runs / "m/predictions.json").read_text())
        assert os.fsencode(entry["file_name"]).endswith(b"caf\xe9.jpg")
        assert np.array(entry["objects"][0]["points"]) == pytest.approx(expected, abs=1e-3)
    elif kind == "npy":
        assert np.load(runs / "m/predictions.npy")[0] == pytest.approx(expected, abs=1e-3)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere names of pictures are Unicode")
def test_names_that_are_not_utf_8_in_a_list_and_in_a_table_of_boxes(runs, pictures, run_script, tmp_path, monkeypatch):
    name = bytes(tmp_path) + b"/caf\xe9.jpg"
    shutil.copy(pictures[0], os.fsdecode(name))
    (tmp_path / "boxes.csv").write_bytes(b"file_name,left,top,right,bottom\n" + name + b",10,10,60,70\n")
    for flags in ("", f"--boxes {tmp_path / 'boxes.csv'}"):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(name + b"\n"), "utf-8"))
        code, out, err = run_script(f"predict.py --out {runs} -pm m {flags} -")
        assert (code, err) == (0, "") and "1 pictures" in out


def test_sizes_of_a_batch_are_checked(runs, pictures, run_script):
    for size in (-1, 0):
        code, _, err = run_script(f"predict.py --out {runs} -pm m -b {size}", pictures[0])
        assert code == 1 and err.startswith(f"error: batch_size is {size}") and err.count("\n") == 1


@pytest.mark.parametrize("wrong", [None, 3, b"jpg"])
def test_what_is_no_picture_network_box_or_source_is_refused(runs, pictures, wrong):
    predictor = Predictor(runs / "m")
    with pytest.raises(UserError, match="a picture is a path, .* found"):
        predictor(wrong)
    for boxes in ((1, 2, 50, 60), [(1, 2, 3)]):
        with pytest.raises(UserError, match="boxes is a list of .left, top, right, bottom."):
            predictor(pictures[0], boxes=boxes)
    with pytest.raises(UserError, match="no network: a run's name or folder"):
        Predictor([])
    with pytest.raises(UserError, match="a network is a run's name or folder"):
        Predictor(wrong if wrong != b"jpg" else 4.5)  # pyright: ignore[reportArgumentType]
    with pytest.raises(UserError, match="labels are a path or a DataFrame"):
        landmark_dataloaders([wrong])
    with pytest.raises(UserError, match="DataLoaders expected"):
        landmark_learner(wrong)


def test_no_mean_of_networks_whose_points_have_another_order(untrained_run, tmp_path):
    networks = [open_network(untrained_run) for _ in range(3)]
    for network, order in zip(networks, (1, 1, -1), strict=True):
        network.facts = network.facts.replace(point_names=tuple(f"p{k}" for k in range(N_POINTS))[::order])
    assert len(Predictor(networks[:2]).networks) == 2
    with pytest.raises(UserError, match="another order: no mean can be taken"):
        Predictor(networks)


def test_boxes_of_several_pictures_are_refused_and_videos_of_a_folder_left_out(runs, pictures, tmp_path):
    predictor = Predictor(runs / "m")
    shutil.copy(pictures[0], tmp_path / "a.jpg")
    (tmp_path / "clip.mp4").write_bytes(b"")
    assert len(list(predictor(tmp_path))) == 1
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "clip.mp4").write_bytes(b"")
    with pytest.raises(UserError, match="holds no picture that Pillow reads$"):
        list(predictor(tmp_path / "videos"))
    for several in (pictures, tmp_path, iter(pictures)):
        with pytest.raises(UserError, match="boxes are those of one picture"):
            predictor(several, boxes=[(0, 0, 9, 9)])


def test_paths_patterns_lists_and_what_is_not_there(runs, pictures, run_script, tmp_path, monkeypatch):
    folder = tmp_path / "a b"
    (folder / "c").mkdir(parents=True)
    for k, file in enumerate(pictures):
        shutil.copy(file, folder / "c" / f"{k}.jpg" if k < 3 else folder / f"{k}.JPG")
    predict = f"predict.py --out {runs} -pm m"

    def names(*paths):
        code, _, err = run_script(predict, *paths)
        assert (code, err) == (0, ""), err
        return [name.rsplit("/", 1)[-1] for name, _ in csv_points(runs / "m/predictions.csv")]

    assert names(folder) == ["3.JPG", "4.JPG", "5.JPG", "0.jpg", "1.jpg", "2.jpg"]
    assert names(f"{folder}/*/[01].jpg", folder / "5.JPG") == ["0.jpg", "1.jpg", "5.JPG"]
    (folder / "d").mkdir()
    (folder / "d" / "notes.txt").write_text("a folder without pictures")
    assert names(f"{folder}/**") == ["3.JPG", "4.JPG", "5.JPG", "0.jpg", "1.jpg", "2.jpg"]
    assert names(f"{folder}/*") == ["3.JPG", "4.JPG", "5.JPG", "0.jpg", "1.jpg", "2.jpg"]
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{folder}/c/2.jpg\n\n{folder}/4.JPG\n"))
    assert names("-") == ["2.jpg", "4.JPG"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n"))
    code, _, err = run_script(predict, "-")
    assert code == 1 and err.startswith("error: stdin is empty")
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{folder}/4.JPG\n{folder}/no.jpg\n{folder}/5.JPG\n"))
    code, _, err = run_script(predict, "-")  # those before and behind it are kept
    assert code == 1 and f"{folder}/no.jpg" in err and "not found" in err
    rows = csv_points(runs / "m/predictions.csv")
    predicted = [name.rsplit("/", 1)[-1] for (name, _), points in rows.items() if points is not None]
    assert predicted == ["4.JPG", "5.JPG"]
    before = (runs / "m/predictions.csv").read_bytes()
    (tmp_path / "empty").mkdir()
    for path, message in [
        (tmp_path / "no.jpg", "not found"),
        (f"{folder}/*.gif", "no pattern that matches"),
        (f"{folder}/d/*", "matches no picture"),
        (tmp_path / "empty", "holds no picture"),
    ]:
        code, _, err = run_script(predict, "--overlay", folder / "5.JPG", path)
        assert code == 1 and message in err and err.count("\n") == 1, err
        assert not (runs / "m/overlay").exists()  # before anything is predicted
    assert (runs / "m/predictions.csv").read_bytes() == before
    code, _, err = run_script(f"{predict} --max-pixels 0.001", folder / "5.JPG")
    assert code == 1 and "--max-pixels allows 0.001 million" in err


def test_pictures_of_the_same_name_have_files_of_their_own(runs, pictures, run_script, monkeypatch, tmp_path):
    (tmp_path / "below").mkdir()
    for place in (tmp_path, tmp_path / "below"):
        shutil.copy(pictures[0], place / "a.jpg")
        shutil.copy(pictures[1], place / "b.jpg")
    monkeypatch.chdir(tmp_path / "below")
    for pictures in ("b.jpg", "a.jpg ../a.jpg"):  # those of the first line are replaced
        for flags in ("--overlay", "--format pts"):
            assert run_script(f"predict.py --out {runs} -pm m {flags} {pictures}")[0] == 0
    made = {str(p.relative_to(runs / "m")) for p in (runs / "m").rglob("a.*")}
    assert made == {"overlay/a.jpg.jpg", "overlay/__/a.jpg.jpg", "predictions/a.pts", "predictions/__/a.pts"}
    assert not list((runs / "m").rglob("b.pts"))


def test_flags_that_make_no_sense_together(run_script):
    for line, message in [
        ("--overlay", "--overlay is for pictures"),
        ("--boxes b.csv", "--boxes is for pictures"),
        ("x.jpg --detect --boxes b.csv", "use one"),
        ("x.jpg --format xml", "invalid choice"),
        ("--format json", "--format is for pictures: name them, as in: -pm NAME photo.jpg --format json"),
        ("--smooth", "--smooth is for pictures"),
        ("x.jpg --round floor", "--round is for the submission"),
        ("x.jpg -d faces", "-d is for the submission"),
        ("x.jpg --confidence", "--confidence draws on the copies of --overlay"),
    ]:
        code, _, err = run_script(f"predict.py -pm m {line}")
        assert code == 2 and message in err


def test_several_networks_are_averaged_in_pixels_of_the_picture(runs, other_size, pictures, drawn, run_script):
    one, other = Predictor(runs / "m")(pictures), Predictor(other_size)(pictures)
    mean = np.stack([(a.points + b.points) / 2 for a, b in zip(one, other, strict=True)])
    assert np.abs(mean - np.stack([a.points for a in one])).max() > 0.5  # they do differ
    both = Predictor([runs / "m", other_size])(pictures)
    assert np.stack([prediction.points for prediction in both]) == pytest.approx(mean, abs=0.01)
    shutil.copytree(other_size, runs / "n")
    code, out, _ = run_script(f"predict.py --out {runs} -pm m -pm n")
    assert code == 0 and (runs / "m+n" / "submit.csv").exists()
    names = json.loads((runs / "m+n/points.json").read_text())
    submitted = dict(zip(names, np.load(runs / "m+n/points.npy"), strict=True))
    assert np.stack([submitted[file.name] for file in pictures]) == pytest.approx(mean, abs=0.01)


def test_networks_of_other_points_are_not_averaged(runs, data, tmp_path):
    labels_of(data).write_text("".join("\t".join(line.split("\t")[:41]) + "\n" for line in csv_lines(labels_of(data))))
    with pytest.raises(UserError, match="different numbers of points"):
        Predictor([runs / "m", untrained(data, tmp_path / "fewer")])


def test_boxes_cut_objects_as_training_images_are_cut(runs, pictures, run_script, tmp_path, monkeypatch):
    "A face in a larger scene, with its box, has the points that it has in its own image."
    predictor = Predictor(runs / "m", flip_test=False)
    own = Image.open(pictures[0]).convert("RGB").resize((96, 96))
    alone = predictor(own).points
    scene = Image.new("RGB", (500, 300), (90, 120, 60))
    scene.paste(own, (40, 30))
    scene.paste(own, (300, 150))
    scene.save(tmp_path / "scene.png")
    inside = (np.array(predictor.networks[0].facts.points_box) + 1) * 48  # where a training image has its points' box
    boxes = [tuple(inside + [x, y, x, y]) for x, y in [(40, 30), (300, 150)]]
    faces = predictor(tmp_path / "scene.png", boxes=boxes)
    assert [face.box for face in faces] == [pytest.approx(box) for box in boxes]
    for face, shift in zip(faces, [(40, 30), (300, 150)], strict=True):
        assert face.points == pytest.approx(alone + shift, abs=0.15)  # the two are resampled in different ways
    table = "".join(f"scene.png,{','.join(map(str, box))}\n" for box in boxes)
    (tmp_path / "boxes.csv").write_text("file_name,left,top,right,bottom\n" + table)
    line = f"predict.py --no-tta --out {runs} -pm m --boxes {tmp_path / 'boxes.csv'}"
    code, out, err = run_script(line, tmp_path / "scene.png", pictures[1])
    assert code == 0 and "2 pictures, 2 objects" in out and f"note: {pictures[1]}: no box found" in err
    rows = csv_points(runs / "m/predictions.csv")
    assert rows.pop((str(pictures[1]), "")) is None
    assert np.stack(list(rows.values())) == pytest.approx(np.stack([face.points for face in faces]), abs=1e-3)
    (tmp_path / "boxes.csv").write_text("file_name,left,top,right,bottom\n" + table.replace("scene", "./scene"))
    monkeypatch.chdir(tmp_path)
    code, out, err = run_script(line, "./scene.png")
    assert code == 0 and "1 pictures, 2 objects" in out
    (tmp_path / "boxes.csv").write_text(table)
    code, _, err = run_script(line, tmp_path / "scene.png")
    assert code == 1 and "line 1 is a box: add a header line" in err
    for row, message in [("scene.png,1,2,3", "line 2"), ("scene.png,5,2,3,4", "line 2"), ("", "has no rows")]:
        (tmp_path / "boxes.csv").write_text(f"file_name,left,top,right,bottom\n{row}\n")
        code, _, err = run_script(line, tmp_path / "scene.png")
        assert code == 1 and message in err and err.count("\n") == 1, err


@pytest.mark.parametrize("size", [(100, 80), (4000, 3000)])
def test_an_overlay_shows_every_point(size):
    "On a small picture, enlarged, points a pixel apart are still told apart; on a large one a dot is seen when it is reduced."
    points = np.stack(np.meshgrid(np.linspace(0.3, 0.7, 31), np.linspace(0.3, 0.7, 31)), -1).reshape(-1, 2) * size
    prediction = Prediction(points.astype(np.float32), np.full(len(points), size[0] / 200, np.float32))
    drawn = draw_points(Image.new("RGB", size, (40, 40, 40)), [prediction])
    factor = drawn.width // size[0]
    assert drawn.width >= 1000 and drawn.size == (size[0] * factor, size[1] * factor)
    pixels = np.asarray(drawn)
    at = np.rint((points + 0.5) * factor - 0.5).astype(int)
    assert (pixels[at[:, 1], at[:, 0]] == (0, 255, 0)).all()
    coloured = (pixels != 40).any(-1)
    assert coloured.sum() < 0.1 * 0.4 * 0.4 * coloured.size * 4  # the dots leave most of the face free
    middle = np.rint((points[0] + points[32]) / 2 * factor).astype(int)
    assert not coloured[middle[1], middle[0]]
    rings = np.asarray(draw_points(Image.new("RGB", size, (40, 40, 40)), [prediction], confidence=True))
    assert (rings == (255, 60, 60)).all(-1).any()


def test_overlays_are_written_beside_the_points(runs, pictures, run_script, tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        shutil.copy(pictures[0], tmp_path / folder / "x.jpg")
    code, out, _ = run_script(f"predict.py --out {runs} -pm m --overlay", tmp_path / "a", tmp_path / "b")
    assert code == 0 and f"with the points drawn: {runs / 'm' / 'overlay'}" in out
    assert len(list((runs / "m/overlay").rglob("x.jpg.jpg"))) == 2


@pytest.fixture(scope="module")
def good_run(tmp_path_factory, train_run):
    "A network that was runs well enough for its points to be compared: one minute."
    from landmarks_fastai.synthetic.sample import make_sample

    folder = tmp_path_factory.mktemp("good")
    faces = make_sample(folder / "faces", 240, 24, N_POINTS, seed=11, n_asked=7, processes=1)
    flags = "--arch timm:test_resnet --weights none --size 48 -b 16 -e 30 -lr 1e-2 --sched onecycle --workers 0"
    return train_run(flags, faces, folder), faces


@pytest.mark.slow
def test_faces_in_scenes_score_as_those_cut_exactly(good_run):
    "Several drawn faces in larger scenes, found by the detector, against the same faces with their exact boxes."
    from landmarks_fastai.data.labels import open_labels
    from landmarks_fastai.inference.detector import FaceDetector

    run, drawn = good_run
    labels = open_labels(drawn / "test" / "landmarks.csv")
    rng, exact, detected, alone = np.random.default_rng(0), [], [], []
    predictor, finder = Predictor(run), Predictor(run, detector=FaceDetector())
    for start in range(0, 24, 4):
        scene, truth = Image.new("RGB", (1100, 1100), (110, 90, 70)), []
        for k in range(4):
            image = Image.open(drawn / "test" / "images" / labels.name(start + k))
            alone.append(((predictor(image.convert("RGB")).points - labels.points(start + k)) ** 2).mean())
            corner = [550 * (k % 2), 550 * (k // 2)] + rng.integers(0, 550 - max(image.size), 2)
            scene.paste(image, tuple(corner.tolist()))
            truth.append(labels.points(start + k) + corner)
        boxes = [(*p.min(0), *(p.max(0) + 1)) for p in truth]
        exact += [((f.points - p) ** 2).mean() for f, p in zip(predictor(scene, boxes), truth, strict=True)]
        faces = finder(scene)
        assert len(faces) == 4 and all(face.score > 0.6 for face in faces)
        detected += [min(((face.points - p) ** 2).mean() for face in faces) for p in truth]
    assert np.mean(exact) < 1.2 * np.mean(alone) and np.mean(detected) < 1.2 * np.mean(exact)


def test_a_picture_without_a_face_has_an_empty_row(runs, drawn, pictures, run_script, tmp_path):
    Image.new("RGB", (300, 200), (30, 90, 120)).save(tmp_path / "sky.png")
    code, out, err = run_script(f"predict.py --detect --out {runs} -pm m", tmp_path / "sky.png", pictures[0])
    assert code == 0 and f"note: {tmp_path / 'sky.png'}: no face found" in err and "2 pictures, 1 objects" in out
    rows = csv_points(runs / "m/predictions.csv")
    assert rows[(str(tmp_path / "sky.png"), "")] is None and rows[(str(pictures[0]), "0")] is not None
