"The command `python -m landmarks_fastai.labels`: what it prints, draws and writes."

import sys

import numpy as np
import pytest
from PIL import Image

from landmarks_fastai.cli import labels as command
from landmarks_fastai.data.items import labelled_images
from landmarks_fastai.data.sources import read_source
from tests.data.test_formats import A, B, annotation, coco, rows_of, write_files


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["landmarks-labels", *map(str, words)])
        try:
            command.command()
            code = 0
        except SystemExit as e:
            code = e.code
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def source(tmp_path):
    two = coco(annotation(A, bbox=[1, 2, 30, 20]), annotation(B, id=8), annotation(A, id=9, image_id=2))
    two["images"].append({"id": 2, "file_name": "b $x_1$ é.png"})
    return write_files(tmp_path / "d", {"c.json": two}, ["a.png", "b $x_1$ é.png"]) / "c.json"


def test_prints_what_a_source_holds_and_draws_it(run, source, tmp_path):
    code, out, err = run(source)
    assert code == 0 and not err
    for line in ("COCO keypoints: 3 rows, 2 images, 2 points", "objects an image: 1 in 1 images, 2 in 1 images",
                 "points: nose, tail", "missing in 3 rows: nose 1", "boxes: 1"):  # fmt: skip
        assert line in out.splitlines()
    pixels = np.asarray(Image.open(tmp_path / "labels.png").convert("RGB")).astype(int)
    assert ((pixels[..., 1] - pixels[..., 0]) > 150).sum() > 20  # points are green


@pytest.mark.parametrize("name", ["x.csv", "x.json"])
def test_what_it_writes_is_read_again(run, source, name):
    before, _ = read_source(source)
    code, out, _ = run(source, "--out", source.parent / name)
    assert code == 0 and f"3 rows: {source.parent / name}; its file names are relative to {source.parent}" in out
    assert ("note: not in" in out) == (name == "x.csv")  # skeleton and category
    after, _ = read_source(source.parent / name)
    assert rows_of(after) == rows_of(before) and after.boxes[0].tolist() == before.boxes[0].tolist()
    assert len(labelled_images(source.parent / name)) == 3
    code, again, _ = run(source.parent / name, "--out", source.parent / f"again{name}")
    assert code == 0 and (source.parent / f"again{name}").read_bytes() == (source.parent / name).read_bytes()


def test_groups_are_written_and_points_without_names(run, tmp_path):
    csv = "file_name,group,x0,y0,x1,y1\na.png,g,1.5,2,3,4\na.png,h,5,6,7,8\n"
    path = write_files(tmp_path / "d", {"p.csv": csv}) / "p.csv"
    code, out, _ = run(path, "--out", tmp_path / "d" / "x.csv")
    assert code == 0 and "groups: g (1 rows), h (1 rows)" in out and "points: 0, 1" in out
    labels, _ = read_source(tmp_path / "d" / "x.csv")
    assert labels.groups == ["g", "h"] and not labels.point_names and labels.points(0).tolist() == [[1.5, 2], [3, 4]]


@pytest.mark.parametrize(
    "name,lost", [("x.csv", "validation rows, flip indices, category"), ("x.json", "validation rows, flip indices")]
)
def test_what_is_not_written_is_told(run, tmp_path, name, lost):
    yaml = "train: images\nval: valid/images\nkpt_shape: [2, 2]\nflip_idx: [1, 0]\nnames: [dog]"
    line = "0 .5 .5 .25 .5 .1 .1 .2 .2\n"
    files = {"data.yaml": yaml, "labels/a.txt": line, "valid/labels/b.txt": line}
    folder = write_files(tmp_path / "d", files, ["images/a.png", "valid/images/b.png"])
    code, out, _ = run(folder, "--out", folder / name)
    assert code == 0 and out.endswith(f"note: not in {folder / name}: {lost}\n")


def test_many_points_are_counted(run, tmp_path):
    header = ",".join(f"p{k}_{axis}" for k in range(971) for axis in "xy")
    csv = f"file_name,{header}\na.png,1,2,3,4" + "," * 2 * 969 + "\n"
    code, out, _ = run(write_files(tmp_path / "d", {"p.csv": csv}))
    assert code == 0 and "points: p0, p1, p2, p3, p4, p5, p6, p7, … (971 in all)\nmissing in 1 rows: p2 1, " in out
    assert len(out) < 1000


def test_bad_rows_and_suspicions_are_told(run, tmp_path):
    rows = "".join(f"a.png,0.{k},0.2,0.3,0.{k + 1}\n" for k in range(5))
    path = write_files(tmp_path / "d", {"p.csv": f"file_name,a_x,a_y,b_x,b_y\n{rows}lost.png,x,2,3,4\n"}) / "p.csv"
    code, out, _ = run(path)
    assert code == 0 and "suspicion, training stops at it: most rows have no coordinate beyond 2, as fractions" in out
    assert f"bad: {path} line 7: point a's x is 'x', a number expected" in out
    assert run(path, "--out", "x.txt")[0] == 1 and run(tmp_path / "gone.csv")[2].startswith("error: ")
