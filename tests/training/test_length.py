"The length of a first stage by the number of its images, and the smallest sets."

import json
import re

import numpy as np
import pytest

from landmarks_fastai.data.block import landmark_dataloaders
from landmarks_fastai.data.split import split_rows
from landmarks_fastai.settings import Settings
from landmarks_fastai.training.length import STEPS, VALIDATED, choose_length, describe_length
from tests.helpers import ARCH, RUNS, csv_lines, labels_of

COMPETITION = 315_144  # its training rows
TINY = f"--arch {ARCH} --weights none --size 32 --workers 0 --align off"


def first_rows(data, folder, rows):
    "A folder with the first rows of another."
    (folder / "train").mkdir(parents=True)
    (folder / "train" / "images").symlink_to(data / "train" / "images")
    (folder / "train" / "landmarks.csv").write_text("\n".join(csv_lines(labels_of(data))[: rows + 1]) + "\n")
    return folder


@pytest.mark.parametrize("images", [4_800, COMPETITION])
def test_large_sets_keep_the_published_length(images):
    assert choose_length(Settings(), images) == Settings()


@pytest.mark.parametrize("images", [1, 3, 12, 40, 120, 400, 1740, 4_799])
def test_small_sets_train_for_enough_steps(images):
    settings = choose_length(Settings(), images)
    steps = images * settings.repeats // settings.batch_size
    assert settings.sched == "onecycle" and steps >= 0.6 * VALIDATED
    assert STEPS <= settings.epochs * steps < 1.2 * STEPS
    line = describe_length(settings, images)
    assert line.startswith(f"{images} images: {settings.epochs} epochs of {steps} steps") and "-e changes it" in line


def test_typed_settings_are_kept():
    settings = choose_length(Settings(batch_size=8, whole_pct=0.7), 120, {"batch_size", "whole_pct"})
    assert (settings.batch_size, settings.whole_pct) == (
        8,
        0.7,
    ) and settings.epochs * 120 * settings.repeats >= 8 * STEPS


@pytest.mark.parametrize(("rows", "valid"), [(5, 1), (15, 3), (16, 8), (39, 8), (40, 8), (200, 40)])
def test_a_few_rows_validate(rows, valid):
    train, held = split_rows(rows, Settings())
    assert (len(held), len(train) + len(held)) == (valid, rows)
    assert len(split_rows(rows, Settings(valid_pct=0.5))[1]) == rows - rows // 2  # a typed share is kept


def test_an_epoch_passes_several_times_over_the_images(drawn):
    dls = landmark_dataloaders(drawn, size=32, batch_size=5, repeats=3, valid_pct=0.5, align=0.0)
    n = len(dls.train.items)
    rows = dls.train.get_idxs()
    assert len(dls.train) == 3 * n // 5 == len(list(dls.train)) and len(dls.valid) == -(-len(dls.valid.items) // 5)
    passes = np.reshape(rows, (3, n))
    assert (np.sort(passes, 1) == np.arange(n)).all() and len({tuple(p) for p in passes}) == 3


@pytest.mark.train
@pytest.mark.parametrize("rows", [2, 9])
def test_a_tiny_set_trains(drawn, tmp_path, monkeypatch, run_script, rows):
    monkeypatch.setattr("landmarks_fastai.training.length.STEPS", 8)
    monkeypatch.setattr("landmarks_fastai.training.length.VALIDATED", 4)
    folder = first_rows(drawn, tmp_path / "few", rows)
    code, out, err = run_script(f"train.py {TINY} -d", folder)
    assert (code, err) == (0, "") and re.search(rf"^{rows * 4 // 5} images: . epochs of . steps", out, re.M)
    (run,) = RUNS.iterdir()
    record = json.loads((run / "run.json").read_text())
    assert record["settings"]["sched"] == "onecycle" and record["threads"] == 1


def test_a_single_row_is_too_little(drawn, tmp_path, run_script):
    code, _, err = run_script(f"train.py {TINY} -d", first_rows(drawn, tmp_path / "few", 1))
    assert code == 1 and len(err.splitlines()) == 1 and "leave none to train on" in err


@pytest.mark.train
def test_a_typed_length_is_kept(drawn, run_script):
    code, out, err = run_script(f"train.py {TINY} -b 8 -e 1 -n kept -d", drawn)
    settings = json.loads((RUNS / "kept" / "run.json").read_text())["settings"]
    assert (code, err) == (0, "") and "-e changes it" not in out
    assert [settings[k] for k in ("epochs", "repeats", "sched", "batch_size")] == [1, 1, "plateau", 8]
