"The doctor: damaged labels of drawn faces are found, with the right reason; what it writes; --exclude."

import re
import shutil
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from landmarks_fastai.data.file_check import near_duplicates
from landmarks_fastai.data.items import labelled_images, row_keys
from landmarks_fastai.data.labels import Labels
from landmarks_fastai.data.shape_check import ShapeModel
from landmarks_fastai.data.split import divided_rows
from landmarks_fastai.inference import picture_check
from landmarks_fastai.inference.doctor import Diagnosis
from landmarks_fastai.runs.checkpoint import read_checkpoint
from landmarks_fastai.settings import Settings
from landmarks_fastai.synthetic.face_template import flip_indices_of_template
from landmarks_fastai.training import length
from landmarks_fastai.utils.hardware import Machine
from tests.helpers import (
    N_POINTS,
    N_TRAIN,
    QUICK,
    RUNS,
    check_refused,
    csv_lines,
    edit_line,
    labels_of,
    row_image,
    row_names,
)

COMMAND = "landmarks_fastai.cli.doctor"


@pytest.fixture(scope="module")
def shapes(drawn):
    "Points of 300 faces (rows, n, 2): mixtures of the drawn ones, moved, scaled and turned."
    rng, table = np.random.default_rng(3), pd.read_csv(labels_of(drawn), sep="\t")
    faces = table.iloc[:, 1:].to_numpy(float).reshape(N_TRAIN, N_POINTS, 2) @ [1, 1j]
    faces = np.stack([(z - z.mean()) / abs(z - z.mean()).mean() for z in faces])
    faces = np.concatenate([faces, -faces.conj()[:, flip_indices_of_template(N_POINTS)]])
    share = rng.uniform(size=(300, 1))
    mixed = share * faces[rng.integers(80, size=300)] + (1 - share) * faces[rng.integers(80, size=300)]
    mixed = mixed * rng.uniform(40, 60, (300, 1)) * np.exp(1j * rng.normal(0, 0.2, (300, 1))) + rng.uniform(
        80, 120, (300, 1)
    )
    return np.rint(np.stack([mixed.real, mixed.imag], -1)).astype(np.float32)


def exchanged(points):
    points[[20, 60]] = points[[60, 20]]


def mirrored(points):
    points[:, 0] = -points[:, 0]


def moved(points):
    points[30] += (12, -9)


def rotated(points):
    points[:] = np.roll(points, 1, axis=0)


@pytest.mark.parametrize(
    "damage,reason,landmarks",
    [
        (exchanged, r"points (20 and 60|60 and 20) are exchanged", {20, 60}),
        (mirrored, "left and right are exchanged", set()),
        (moved, r"point 30 is 1\d(\.\d+)? px from where the others predict it", {30}),
        (rotated, r"the numbers of the points are shifted by \+1", set()),
    ],
)
@pytest.mark.parametrize("gaps", [False, True])
def test_a_damaged_shape_is_first_with_its_reason(shapes, damage, reason, landmarks, gaps):
    points, names = shapes.copy(), [str(k) for k in range(N_POINTS)]
    damage(points[17])
    if gaps:  # a missing point is missing, not a point at zero
        missing = np.random.default_rng(0).random(points.shape[:2]) < 0.1
        missing[:, [20, 30, 60]] = False
        points[missing] = np.nan
    model = ShapeModel(points)
    scores = np.log(model.scores(points))
    scores = (scores - np.median(scores, 0)) / np.std(scores, 0)
    assert scores.max(1).argmax() == 17
    text, named, expected = model.explain(points[17], names)
    assert re.fullmatch(reason, text) and set(named) == landmarks
    if landmarks == {30}:
        assert np.linalg.norm(expected[30] - shapes[17, 30]) < 3 and np.isfinite(expected).all()


def test_rows_with_too_few_points_have_no_score(shapes):
    points = shapes.copy()
    points[5, 2:] = np.nan
    points[6] = 7
    scores = ShapeModel(points).scores(points)
    assert np.isnan(scores[[5, 6]]).all() and np.isfinite(np.delete(scores, [5, 6], 0)).all()


def test_the_misfit_of_a_similarity():
    predicted = np.random.default_rng(0).normal(size=(N_POINTS, 2)) * 30
    middle = predicted.mean(0)
    turned = (predicted - middle) @ np.array([[0, 1.2], [-1.2, 0]]) + middle + (5, 0)
    turned[3] = np.nan
    found = picture_check.misfit(turned, predicted)
    assert found.size == pytest.approx(1.2) and np.degrees(found.turn) == pytest.approx(90)
    assert np.isnan(found.rest[3]) and np.nanmax(found.rest) < 1e-9
    shifted = picture_check.explain(predicted + (0, 9), predicted, np.array([8.0, 0, 0, 0]))
    assert "shifted by 9 px to the bottom" in shifted
    assert "1.20 times" in picture_check.explain(turned, predicted, np.array([0, 8.0, 0, 0]))
    assert "90 degrees clockwise" in picture_check.explain(turned, predicted, np.array([0, 0, 8.0, 0]))
    assert picture_check.misfit(np.where(np.arange(N_POINTS)[:, None] < 2, turned, np.nan), predicted) is None


def test_a_shift_is_found_by_a_network_that_has_not_seen_the_row(drawn, monkeypatch):
    "The network knows where the points are, up to noise; one row is shifted, another has the labels of a third."
    images, rng = labelled_images(drawn), np.random.default_rng(0)
    truth = {row: images.labels.points(row) for row in range(N_TRAIN)}
    stored = np.stack(list(truth.values()))
    stored[7] += (20, 0)
    stored[9] = stored[11]
    images.labels = Labels(images.labels.csv, images.labels.names, images.labels.lines, stored)
    noisy = {row: xy + rng.normal(0, 1, 2) + rng.normal(0, 1, xy.shape) for row, xy in truth.items()}

    def results(rows):
        for row in rows:
            prediction = SimpleNamespace(points=noisy[row].astype(np.float32), confidence=None)
            yield images[row], SimpleNamespace(objects=[prediction])

    monkeypatch.setattr(picture_check, "judging_predictors", lambda images, *_: iter([(images, None)]))
    monkeypatch.setattr(picture_check, "predict_rows", lambda _, items: results([i.row for i in items]))
    diagnosis = Diagnosis(images, ["network"], Machine())  # pyright: ignore (it is not opened)
    table, pictures = diagnosis.table(N_TRAIN)
    names = row_names(drawn)
    worst = np.argsort(-picture_check.check_pictures(images, [], Machine()).max(1))
    assert set(worst[:2].tolist()) == {7, 9} and len(pictures) == N_TRAIN
    reasons = dict(zip(table.file_name, table.reason, strict=True))
    assert re.fullmatch(r"the points are shifted by \d.* px to the right, \d+% of the object", reasons[names[7]])


def test_near_duplicates_are_grouped():
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 256, (500, 32), dtype=np.uint8)
    hashes[3] = hashes[400]
    hashes[4] = hashes[401] ^ np.uint8(
        1 << np.arange(32) % 8 * (np.arange(32) < 10)
    )  # ten bits, and what the rest gives
    hashes[5] = hashes[402]
    hashes[5, :20] ^= 255
    groups = near_duplicates(hashes)
    assert groups[3] == groups[400] and groups[5] != groups[402] and len(np.unique(groups)) >= 497


def test_the_command_finds_what_is_damaged_and_writes_its_files(run_script, data):
    def rotate(line):
        name, *numbers = line.split("\t")
        return "\t".join([name, *numbers[-2:], *numbers[:-2]])

    edit_line(labels_of(data), 9, rotate)
    names = row_names(data)
    shutil.copy(row_image(data, 2), row_image(data, 39))
    odd = "<script>&.jpg"
    row_image(data, 7).rename(row_image(data, 7).with_name(odd))
    edit_line(labels_of(data), 9, lambda line: line.replace(names[7], odd))
    code, out, err = run_script(f"{COMMAND} {data}")
    assert (code, err) == (0, "") and f"1. {odd} (line 9): the numbers of the points are shifted by +1" in out
    same = min(names[2], names[39])
    assert "40 rows, 40 images" in out and f"another one is the same file: 2; the first: {same}" in out.replace(
        names[39], same
    ).replace(names[2], same)
    assert "validation images of which a training image is the same file: 1" in out
    folder = RUNS / "doctor"
    table = pd.read_csv(folder / "doctor.csv")
    assert list(table["rank"]) == list(range(1, 41)) and table.file_name[0] == odd and table.landmarks.isna()[0]
    page = (folder / "doctor.html").read_text(encoding="utf-8")
    assert "&lt;script&gt;&amp;.jpg" in page and "<script" not in page and page.count("data:image/jpeg") == 40
    assert csv_lines(folder / "exclude.txt")[0] == odd
    check_refused(run_script(f"{COMMAND} {data}"), "has results", "--overwrite")
    assert run_script(f"{COMMAND} {data} --overwrite")[0] == 0


def test_proof_compares_with_and_without_the_training_rows_of_the_list(run_script, data, monkeypatch):
    names, called = row_names(data), []
    folder = RUNS / "doctor"
    folder.mkdir(parents=True)
    (folder / "exclude.txt").write_text(f"{names[3]}\n{names[35]}\n")  # the second validates

    def compare(name, **flags):
        called.append((name, flags, csv_lines(folder / "exclude_training.txt")))
        (RUNS / name).mkdir()
        (RUNS / name / "leaderboard.md").write_text("the table")

    monkeypatch.setattr("landmarks_fastai.cli.compare.compare", compare)
    code, out, err = run_script(f"{COMMAND} {data} --prove 2 --arch resnet18 --weights none --size 32")
    assert (code, err) == (0, "") and "the table" in out and "1. " not in out  # the list is taken as it is
    ((name, flags, listed),) = called
    assert name == "doctor_prove" and flags["seeds"] == 2 and flags["size"] == 32 and flags["data"] == str(data)
    assert [csv_lines(path) for path in flags["exclude"]] == [[], [names[3]]] and listed == [names[3]]
    (folder / "exclude.txt").write_text(f"{names[35]}\n")
    check_refused(run_script(f"{COMMAND} {data} --prove 2"), "names no training row")


def test_mistakes_are_one_line(run_script, runs, drawn, tmp_path):
    check_refused(run_script(f"{COMMAND} {tmp_path / 'none'}"), "no such folder")
    (tmp_path / "a.csv").write_text("file_name,a_x,a_y\n")
    check_refused(run_script(f"{COMMAND} {tmp_path / 'a.csv'}"), "a.csv")
    check_refused(run_script(f"{COMMAND} {drawn} -pm gone"), "-pm gone not found")
    check_refused(run_script(f"{COMMAND} {drawn} --out {runs} -pm m"), "does not say which rows it was trained on")


@pytest.mark.train
def test_excluded_rows_are_in_no_part_and_move_no_other(run_script, data):
    names = row_names(data)
    (data / "exclude.txt").write_text(f"{names[3]}\n\n{names[35]}\n")
    whole, less = (labelled_images(data, exclude=e) for e in ("", data / "exclude.txt"))
    parts = [divided_rows(images, Settings()) for images in (whole, less)]
    for before, after, row in zip(*parts, (3, 35), strict=True):
        assert after.tolist() == [k for k in before.tolist() if k != row]
    code, out, err = run_script(f"train.py {QUICK} -b 4 -n x -d {data} --exclude {data / 'exclude.txt'}")
    assert (code, err) == (0, "") and f"2 of {N_TRAIN} rows are excluded by" in out
    sides = read_checkpoint(RUNS / "x" / "best.pth").sides
    assert [len(side) for side in sides] == [31, 7]
    code, out, err = run_script("finetune.py -e 1 --workers 0 -pm x -n y")
    assert (code, err) == (0, "") and "rows are excluded by" in out
    sides = read_checkpoint(RUNS / "y" / "best.pth").sides
    assert [len(side) for side in sides] == [31, 7]
    (data / "exclude.txt").write_text(f"{names[3]}\nnobody.jpg\n")
    check_refused(run_script(f"train.py {QUICK} -d {data} --exclude {data / 'exclude.txt'}"), "line 2", "'nobody.jpg'")
    check_refused(run_script(f"train.py {QUICK} -d {data} --exclude {data / 'none.txt'}"), "cannot be read")


def test_one_object_of_an_image_is_excluded(drawn, tmp_path):
    lines = csv_lines(labels_of(drawn))
    folder = tmp_path / "twice"
    shutil.copytree(drawn / "train", folder / "train", ignore=shutil.ignore_patterns("*.cache"))
    labels_of(folder).write_text("\n".join([*lines, lines[1], lines[1]]) + "\n")
    keys, name = row_keys(labelled_images(folder).labels), row_names(drawn)[0]
    assert [keys[0], keys[1], keys[40]] == [f"{name}\t1", row_names(drawn)[1], f"{name}\t2"]
    for text, rows in [(f"{name}\t2\n", [40]), (f"{name}\r\n", [0, 40, 41]), (f"{keys[41]}\n{keys[1]}\n", [1, 41])]:
        (tmp_path / "e.txt").write_text(text, newline="")
        assert labelled_images(folder, exclude=tmp_path / "e.txt").left_out.tolist() == rows


@pytest.mark.train
def test_folds_and_runs_judge_rows_that_they_have_not_seen(run_script, drawn, monkeypatch):
    for name, few in {"STEPS": 8, "VALIDATED": 2}.items():
        monkeypatch.setattr(length, name, few)
    flags = "--arch timm:test_resnet --weights none --size 32 --workers 0"
    code, out, err = run_script(f"{COMMAND} {drawn} --folds 2 {flags}")
    assert (code, err) == (0, "") and "fold 2 of 2" in out
    folds = [read_checkpoint(RUNS / "doctor" / f"fold_{k}" / "best.pth") for k in (1, 2)]
    parts = picture_check.unseen_rows(labelled_images(drawn), folds)
    assert sorted(item.row for part in parts for item in part) == list(range(N_TRAIN))
    page = (RUNS / "doctor" / "doctor.html").read_text(encoding="utf-8")
    assert re.search(rf"judged by a network too</small><b>{N_TRAIN}<", page)
    code, out, err = run_script(f"{COMMAND} {drawn} -n again -pm {RUNS / 'doctor' / 'fold_1'}")
    assert (code, err) == (0, "")
    page = (RUNS / "again" / "doctor.html").read_text(encoding="utf-8")
    assert re.search(rf"judged by a network too</small><b>{len(parts[0])}<", page)
