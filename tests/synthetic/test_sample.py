"""Drawn faces: files, repeatability, the layout's symmetry, and landmarks that sit where the picture says."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from landmarks_fastai.errors import UserError
from landmarks_fastai.synthetic.sample import flip_indices_of_template, main, make_sample, render_face

ROOT = Path(__file__).parent.parent.parent
SMALL = dict(n_train=12, n_test=4, n_points=68, seed=3, processes=1)
TIP, PUPIL, CORNER, CHIN, OUTER, INNER, BROW, LOW_LID, UP_LID = 0, 1, 3, 5, 6, 8, 10, 14, 16


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_sample(tmp_path_factory.mktemp("one") / "набор лиц", **SMALL)


@cache
def faces(n=120, n_points=18):
    return [render_face(np.random.default_rng([5, i]), n_points) for i in range(n)]


def contents(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def table(path):
    assert b"\r" not in path.read_bytes()
    with open(path, encoding="utf-8", newline="") as f:
        return list(csv.reader(f, delimiter="\t"))


def bright(image, xy):
    """Bilinear brightness of an array (h, w) at (x, y); nan off the picture."""
    j, i = np.floor(xy).astype(int)
    if not (0 <= i < image.shape[0] - 1 and 0 <= j < image.shape[1] - 1):
        return np.nan
    g, f = np.asarray(xy) - [j, i]
    return (1 - f) * ((1 - g) * image[i, j] + g * image[i, j + 1]) + f * (
        (1 - g) * image[i + 1, j] + g * image[i + 1, j + 1]
    )


def steepest(profiles):
    """Where the mean of profiles, sampled at -6, -5.5, ... 6 px, changes fastest, in px."""
    mean = np.nanmean(profiles, axis=0)
    return np.arange(-5.5, 5.6, 0.5)[np.abs(mean[2:] - mean[:-2]).argmax()]


# ---------------------------------------------------------------- the set of files
def test_layout_of_files(made):
    for side, count in (("train", 12), ("test", 4)):
        head, *rows = table(made / side / "landmarks.csv")
        assert head[:3] == ["file_name", "Point_M0_X", "Point_M0_Y"] and head[-1] == "Point_M67_Y" and len(head) == 137
        assert len(rows) == count and all(len(r) == 137 for r in rows)
        names = sorted(r[0] for r in rows)
        assert names == sorted(p.name for p in (made / side / "images").iterdir())
        assert all(re.fullmatch(r"[0-9a-f]{32}\.jpg", name) for name in names)
        for name in names:
            with Image.open(made / side / "images" / name) as image:
                assert image.format == "JPEG" and image.mode == "RGB" and all(110 <= n <= 260 for n in image.size)
    assert sorted(p.name for p in made.iterdir()) == ["sample.json", "test", "train"]
    assert [p.name for p in made.parent.iterdir()] == [made.name]  # no temporary folder is left


def test_test_points_list_thirty_different_indices(made):
    head, *rows = table(made / "test" / "test_points.csv")
    assert head == ["file_name", "point_index_list"]
    assert [r[0] for r in rows] == [r[0] for r in table(made / "test" / "landmarks.csv")[1:]]
    lists = [json.loads(r[1]) for r in rows]
    assert all(len(set(q)) == 30 and 0 <= min(q) and max(q) < 68 for q in lists)
    assert len({tuple(q) for q in lists}) == 4
    assert re.fullmatch(r"\[\d+(, \d+){29}\]", rows[0][1])


def test_files_match_rendered_faces(made):
    for side, name in enumerate(("train", "test")):
        for index, row in enumerate(table(made / name / "landmarks.csv")[1:]):
            image, points = render_face(np.random.default_rng([3, side, index]), 68)
            assert np.array_equal(np.array(row[1:], float).reshape(-1, 2), np.rint(points))
            with Image.open(made / name / "images" / row[0]) as stored:
                assert stored.size == image.size
                assert np.abs(np.asarray(stored, float) - np.asarray(image, float)).mean() < 12


def test_bytes_depend_on_the_seed_and_not_on_processes(made, tmp_path):
    two = make_sample(tmp_path / "two", **{**SMALL, "processes": 2})
    assert contents(two) == contents(made)
    other = make_sample(tmp_path / "other", **{**SMALL, "seed": 4})
    assert not set(contents(made).values()) & set(contents(other).values())


def test_complete_sample_is_not_rewritten(made):
    def stamps():
        return {p: p.stat().st_mtime_ns for p in [made, *made.rglob("*")]}

    before = stamps()
    assert make_sample(made, **{**SMALL, "processes": 2}) == made
    assert stamps() == before


def test_folder_with_other_content_is_refused(made, tmp_path):
    before = contents(made)
    with pytest.raises(UserError, match="another seed"):
        make_sample(made, **{**SMALL, "seed": 9})
    assert contents(made) == before
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("x", encoding="utf-8")
    with pytest.raises(UserError, match="not empty"):
        make_sample(tmp_path / "full", **SMALL)
    with pytest.raises(UserError, match="is a file"):
        make_sample(tmp_path / "full" / "mine.txt", **SMALL)
    assert contents(tmp_path / "full") == {"mine.txt": b"x"}


def test_empty_folder_and_few_points(tmp_path):
    (tmp_path / "empty").mkdir()
    made = make_sample(tmp_path / "empty", n_train=1, n_test=1, n_points=5, processes=1)
    assert sorted(json.loads(table(made / "test" / "test_points.csv")[1][1])) == [0, 1, 2, 3, 4]


def test_interrupted_run_leaves_nothing(tmp_path):
    def stop(rows, total):
        yield next(iter(rows))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_sample(tmp_path / "new", **SMALL, progress=stop)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("wrong", [{"n_train": 0}, {"n_test": -1}, {"n_points": 0}, {"n_asked": 0}, {"seed": -1}])
def test_numbers_that_are_too_small_are_refused(wrong, tmp_path):
    with pytest.raises(UserError, match=next(iter(wrong))):
        make_sample(tmp_path / "new", **{**SMALL, **wrong})
    assert list(tmp_path.iterdir()) == []


def test_command(tmp_path):
    def run(*args):
        return subprocess.run(
            [sys.executable, "-m", "landmarks_fastai.synthetic", *args],
            cwd=ROOT,
            capture_output=True,
            text=True,
            encoding="utf-8",
            env={"PYTHONIOENCODING": "utf-8"},
        )

    folder = str(tmp_path / "мои лица")
    done = run(folder, "--train", "2", "--test", "1", "--points", "7")
    assert done.returncode == 0 and done.stdout.count("\n") == 1 and folder in done.stdout and done.stderr == ""
    assert len(table(Path(folder, "train", "landmarks.csv"))[0]) == 15
    done = run(folder, "--train", "3", "--test", "1", "--points", "7")
    assert done.returncode == 1 and re.fullmatch(r"error: .*another n_train.*\n", done.stderr)


@pytest.mark.parametrize("args", [["--points", "0"], ["--seed", "-1"]])
def test_command_reports_mistakes(args, tmp_path, capsys):
    assert main([str(tmp_path / "new"), *args]) == 1
    assert re.fullmatch(r"error: .+\n", capsys.readouterr().err)
    (tmp_path / "file").write_text("", encoding="utf-8")
    assert main([str(tmp_path / "file" / "under")]) == 1
    assert re.fullmatch(r"error: .+\n", capsys.readouterr().err)
    with pytest.raises(SystemExit) as stop:
        main([str(tmp_path / "new"), "--train", "many"])
    assert stop.value.code == 2


# ---------------------------------------------------------------- the landmarks
@pytest.mark.parametrize("n", [1, 2, 5, 68, 971, 2000])
def test_any_number_of_points(n):
    image, points = render_face(np.random.default_rng(1), n)
    same, five = render_face(np.random.default_rng(1), 5)
    assert points.shape == (n, 2) and points.dtype == np.float64 and np.isfinite(points).all()
    assert image.mode == "RGB" and image.tobytes() == same.tobytes()  # the face does not depend on n
    if n >= 5:
        assert np.allclose(points[:5], five)
    assert len(np.unique(points.round(6), axis=0)) == n


@pytest.mark.parametrize("n", [1, 2, 5, 6, 68, 971])
def test_flip_indices_of_template_are_an_involution(n):
    pairs = flip_indices_of_template(n)
    assert pairs.shape == (n,) and np.issubdtype(pairs.dtype, np.integer)
    assert np.array_equal(pairs[pairs], np.arange(n))
    assert n < 5 or (pairs[TIP] == TIP and pairs[PUPIL] == PUPIL + 1 and pairs[CORNER] == CORNER + 1)
    pairs[:] = 0  # the caller's own copy
    assert n == 1 or flip_indices_of_template(n).any()


def test_zero_points_are_refused():
    for function in (flip_indices_of_template, lambda n: render_face(np.random.default_rng(0), n)):
        with pytest.raises(ValueError):
            function(0)


def test_mean_face_is_symmetric_and_spread():
    shapes = []
    for i in range(150):
        points = render_face(np.random.default_rng([8, i]), 971)[1]
        z = points @ [1, 1j]  # as complex numbers: put the pupils at -0.5 and 0.5
        shapes.append((z - (z[1] + z[2]) / 2) / (z[1] - z[2]))
    mean = np.mean(shapes, axis=0)
    mirrored = -mean.conj()[flip_indices_of_template()]
    gap = np.abs(mirrored - mean)
    assert gap.mean() < 0.05 and gap.max() < 0.15  # in distances between the pupils; pose averages out only so far
    fixed = flip_indices_of_template() == np.arange(971)
    assert np.abs(mean.real[fixed]).max() < 0.15 and np.abs(mean.real[~fixed]).mean() > 0.3
    near = np.abs(mean[:, None] - mean) + np.eye(971)
    assert near.min() > 0.002
    # brows above, chin below, cheek to cheek
    assert mean.imag.min() < -0.5 and mean.imag.max() > 1.4 and np.ptp(mean.real) > 1.7


def test_concurrent_runs_of_one_sample_both_succeed(tmp_path):
    from landmarks_fastai.synthetic import sample

    folder, drawn_first = tmp_path / "set", []

    def other(rows, total):
        rows = list(rows)
        assert len(rows) == total == 16
        drawn_first.append(sample.make_sample(folder, **SMALL))  # ends between our drawing and our renaming
        return rows

    assert sample.make_sample(folder, progress=other, **SMALL) == folder and (folder / "sample.json").is_file()
    assert drawn_first == [folder] and [p.name for p in tmp_path.iterdir()] == ["set"]


def test_faces_vary():
    images, points = zip(*faces(), strict=True)
    assert len({image.size for image in images}) > 100
    roll = [np.degrees(np.arctan2(*(p[PUPIL] - p[PUPIL + 1])[::-1])) for p in points]
    assert min(roll) < -12 and max(roll) > 12
    yaw = [np.linalg.norm(p[TIP] - p[OUTER]) / np.linalg.norm(p[TIP] - p[OUTER + 1]) for p in points]
    assert min(yaw) < 0.7 and max(yaw) > 1.4
    outside = [((p < 0) | (p > np.array(image.size) - 1)).any() for image, p in faces()]
    assert 0.02 < np.mean(outside) < 0.6
    assert np.std([np.asarray(image).mean() for image in images]) > 15


def eyes():
    """(gray picture, landmarks, k) of eyes that are large and open; k is 0 for the eye on the image's right, or 1."""
    for image, p in faces():
        gray = np.asarray(image.convert("L"), float)
        for k in (0, 1):
            wide = np.linalg.norm(p[OUTER + k] - p[INNER + k])
            if wide > 14 and np.linalg.norm(p[UP_LID + k] - p[LOW_LID + k]) > 0.36 * wide:
                yield gray, p, k


def test_pupil_landmarks_are_the_darkest_point_of_the_eye():
    steps = [(x, y) for x in (-2, 0, 2) for y in (-2, 0, 2)]
    seen = np.array([[bright(gray, p[PUPIL + k] + step) for step in steps] for gray, p, k in eyes()])
    assert len(seen) > 40
    mean = dict(zip(steps, np.nanmean(seen, axis=0), strict=True))
    centre = mean.pop((0, 0))
    assert centre < 0.7 * min(mean.values())
    whites = np.nanmean(
        [bright(gray, p[PUPIL + k] * 0.3 + p[end + k] * 0.7) for gray, p, k in eyes() for end in (OUTER, INNER)]
    )
    assert centre < 0.5 * whites


def test_brow_and_mouth_landmarks_lie_on_image_edges():
    brows, mouths = [], []
    steps = np.arange(-6, 6.1, 0.5)
    for image, p in faces():
        rgb = np.asarray(image, float)
        redness = (rgb[..., 0] - rgb[..., 1]) / (rgb.sum(2) + 20)
        out = (p[CORNER] - p[CORNER + 1]) / np.linalg.norm(p[CORNER] - p[CORNER + 1])
        for k in (0, 1):
            eye = p[OUTER + k] - p[INNER + k]
            up = np.array([eye[1], -eye[0]]) / np.linalg.norm(eye) * (1 - 2 * k)
            brows.append([bright(rgb.mean(2), p[BROW + k] + d * up) for d in steps])
            mouths.append([bright(redness, p[CORNER + k] + d * out * (1 - 2 * k)) for d in steps])
    assert abs(steepest(brows)) <= 1
    assert abs(steepest(mouths)) <= 1.5


@pytest.mark.skipif(not hasattr(signal, "sigtimedwait"), reason="signals are sent as Linux does")
@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_to_the_process_group_stops_the_drawing(tmp_path, number, code):
    "Of a terminal or a scheduler: the workers get it too."
    command = [sys.executable, "-m", "landmarks_fastai.synthetic", "faces", "--train", "100000", "--points", "68"]
    process = subprocess.Popen(
        command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    try:
        while len(list(tmp_path.rglob("*.jpg"))) < 20 and process.poll() is None:
            time.sleep(0.05)
        os.killpg(process.pid, number)
        _, err = process.communicate(timeout=60)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert (process.returncode, err) == (code, "stopped\n") and not list(tmp_path.iterdir())
