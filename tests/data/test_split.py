"What is never on both sides of the split: an image, a group, rows of an earlier stage."

import numpy as np
import pandas as pd
import pytest

from landmarks_fastai.data.block import landmark_dataloaders
from landmarks_fastai.data.items import LabelledImages
from landmarks_fastai.data.labels import Labels, frame_labels
from landmarks_fastai.data.split import Sides, divided_rows, sides_of, split_rows
from landmarks_fastai.errors import UserError
from landmarks_fastai.runs.checkpoint import read_checkpoint
from landmarks_fastai.settings import Settings
from tests.helpers import QUICK, RUNS, csv_lines, edit_line, labels_of


def items_of(names, groups=None):
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"file": names} | {k: rng.uniform(0, 90, len(names)) for k in range(8)})
    labels: Labels = frame_labels(frame)
    labels.groups = groups
    return LabelledImages(labels, ".")


def held(items, **settings):
    "The file names that validate, and those that are trained on."
    train, valid = divided_rows(items, Settings(**settings))
    return [{items.labels.name(row) for row in rows} for rows in (valid, train)]


def test_rows_of_different_images_are_split_as_ever():
    train, valid = divided_rows(items_of([f"{k}x.jpg" for k in range(100)]), Settings())
    assert [train.tolist(), valid.tolist()] == [rows.tolist() for rows in split_rows(100, Settings())]


@pytest.mark.parametrize("random", [False, True])
def test_objects_of_an_image_are_on_one_side(random):
    valid, train = held(items_of([f"{k // 3}x.jpg" for k in range(99)]), valid_random=random)
    assert not valid & train and len(valid) in (6, 7)


@pytest.mark.parametrize(
    ("names", "groups", "words"),
    [
        ([f"{'abcdefgh'[k % 8]}x/{k}.jpg" for k in range(80)], None, "8 folders, as ax"),
        ([f"clip{k % 8}_frame{k:04}.png" for k in range(80)], None, "8 clips, as clip0"),
        ([f"{k}x.jpg" for k in range(80)], [f"person {k % 8}" for k in range(80)], "8 groups, as person 0"),
    ],
)
def test_groups_are_not_divided(names, groups, words, capsys):
    items = items_of(names, groups)
    train, valid = divided_rows(items, Settings())
    group = np.arange(80) % 8
    assert not set(group[train]) & set(group[valid]) and len(valid) == 20  # two of eight: 16 is as near as 0.2 allows
    assert words in capsys.readouterr().out
    assert len(divided_rows(items, Settings(group="none"))[1]) == 16


def test_a_person_in_the_image_of_another_joins_their_groups():
    names = [f"{k}x.jpg" for k in range(30)] + ["0x.jpg"]
    items = items_of(
        names, [*(f"{k // 3}" for k in range(30)), "9"]
    )  # image 0 has a person of group 0 and one of group 9
    train, valid = divided_rows(items, Settings())
    assert {0, 1, 2, 27, 28, 29, 30} <= set(valid) or {0, 1, 2, 27, 28, 29, 30} <= set(train)


def test_few_folders_get_a_note(capsys):
    items = items_of([f"{'ab'[k // 50]}/{k}.jpg" for k in range(100)])
    assert len(divided_rows(items, Settings())[1]) == 20
    assert "note: the split may divide 2 folders" in capsys.readouterr().out
    assert len(divided_rows(items, Settings(group="folder"))[1]) == 50


def test_an_unknown_column_is_refused():
    with pytest.raises(UserError, match="--group person: .* no such column"):
        divided_rows(items_of(["a.jpg"]), Settings(group="person"))


def test_named_rows_validate(tmp_path):
    names = [f"{k}x.jpg" for k in range(50)]
    path = tmp_path / "valid rows.txt"
    path.write_text("3x.jpg\n\n7x.jpg\n")
    assert held(items_of(names), valid=str(path))[0] == {"3x.jpg", "7x.jpg"}
    path.write_text("3x.jpg\nother.jpg\n")
    with pytest.raises(UserError, match="1 names are not among the rows, as other.jpg"):
        held(items_of(names), valid=str(path))
    with pytest.raises(UserError, match="cannot be read"):
        held(items_of(names), valid=str(tmp_path / "none.txt"))


def test_valid_that_names_every_row_or_no_labels_is_told_of(drawn, tmp_path):
    for valid, message in ((drawn, "--valid .* must not name all"), (tmp_path, "^--valid .*; it must be the folder")):
        with pytest.raises(UserError, match=message):
            landmark_dataloaders(drawn, valid=valid)


def test_the_source_may_name_its_validation_rows(capsys):
    items = items_of([f"{k}x.jpg" for k in range(50)])
    items.labels.valid = np.arange(50) < 5
    assert held(items)[0] == {f"{k}x.jpg" for k in range(5)} and "names 5 validation rows" in capsys.readouterr().out


def test_rows_of_an_earlier_stage_keep_their_side(tmp_path, capsys):
    before = items_of([f"{k}x.jpg" for k in range(50)])
    sides = sides_of(before, Settings())
    assert [len(side) for side in sides] == [40, 10]
    names = [f"{k}y.jpg" for k in range(100)] + [f"{k}x.jpg" for k in range(49)]  # others come first, one is gone
    after = items_of(names)
    after.labels.earlier = sides
    valid, train = held(after)
    assert {name for name in valid if name.endswith("x.jpg")} == {f"{k}x.jpg" for k in range(40, 49)}
    assert (
        len(valid) == 29
        and not valid & train
        and "100 of 149 rows are new: 20 of them validate" in capsys.readouterr().out
    )
    assert {len(side) for side in sides_of(after, Settings())} == {120, 30}  # the row that is gone is remembered
    (file := tmp_path / "v.txt").write_text("1x.jpg\n")
    with pytest.raises(UserError, match="1 rows were trained on by an earlier stage, as DataFrame row 101 .1x.jpg."):
        held(after, valid=str(file))


def test_new_rows_are_on_the_side_that_the_source_says(capsys):
    before, after = (items_of([f"{k}x.jpg" for k in range(n)]) for n in (50, 100))
    after.labels.earlier, after.labels.valid = sides_of(before, Settings()), np.arange(100) % 25 == 0
    assert held(after)[0] == {f"{k}x.jpg" for k in (*range(40, 50), 50, 75)}  # row 0 was trained on
    out = capsys.readouterr().out
    assert "50 of 100 rows are new: 2 of them validate" in out and "divide" not in out


def test_new_rows_join_the_side_of_their_group():
    before = items_of([f"{k}x.jpg" for k in range(60)], [f"{k // 6}" for k in range(60)])
    after = items_of([f"{k}x.jpg" for k in range(90)], [f"{k % 60 // 6}" for k in range(90)])
    after.labels.earlier = sides_of(before, Settings())
    train, valid = divided_rows(after, Settings())
    group = np.arange(90) % 60 // 6
    assert not set(group[train]) & set(group[valid]) and len(train) + len(valid) == 90


@pytest.mark.train
def test_a_later_stage_does_not_validate_on_trained_rows(data, run_script):
    lines = csv_lines(labels_of(data))
    assert run_script(f"train.py {QUICK} -n a -d", data)[0] == 0
    trained, validated = read_checkpoint(RUNS / "a/best.pth").sides or Sides(np.zeros(0), np.zeros(0))
    assert (len(trained), len(validated)) == (32, 8)
    labels_of(data).write_text("\n".join([lines[0], *reversed(lines[1:])]) + "\n")  # the last rows come first
    code, out, err = run_script("finetune.py -pm a -e 1 --workers 0 -n b")
    assert (code, err) == (0, "") and "are new" not in out
    sides = read_checkpoint(RUNS / "b/best.pth").sides
    assert sides and (sides[0] == trained).all() and (sides[1] == validated).all()
    edit_line(labels_of(data), 2, lambda line: line.replace(line.split("\t")[0], "copy of it.png"))
    first = data / "train" / "images" / lines[-1].split("\t")[0]
    first.rename(first.with_name("copy of it.png"))
    assert "1 of 40 rows are new" in run_script("finetune.py -pm a -e 1 --workers 0 -n c")[1]
