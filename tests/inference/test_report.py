"The page of a run: its figures, the images that it shows, what it escapes, and how it looks in a browser."

import html
import json
import re
import shutil
import subprocess

import numpy as np
import pandas as pd
import pytest

from landmarks_fastai.data.items import labelled_images
from landmarks_fastai.inference.predictor import Predictor
from landmarks_fastai.inference.report import stages_of
from landmarks_fastai.inference.row_errors import RowErrors, circumstances
from landmarks_fastai.inference.scoring import score_rows
from landmarks_fastai.runs.checkpoint import read_checkpoint
from landmarks_fastai.training import stage
from tests.helpers import N_POINTS, QUICK, RUNS, check_refused, frame_with_gaps, labels_of, row_names

COMMAND = "landmarks_fastai.cli.report"


def figure(page: str, name: str) -> float:
    "The number in the element of this id."
    return float(re.search(rf'id="{name}">([^<]*)<', page)[1])


@pytest.fixture
def later_run(finished_run):
    "Two runs, `first` and `later`; the second says that it started from the first."
    first, later = finished_run("first"), finished_run("later")
    record = json.loads((later / "run.json").read_text())
    record |= {"script": "finetune.py", "flags": {"pretrained_model": str(first / "best.pth"), "confidence": False}}
    (later / "run.json").write_text(json.dumps(record))
    return later


def test_every_stage_leaves_a_page_with_the_figures_of_its_history(quick_run):
    page = (quick_run / "report.html").read_text(encoding="utf-8")
    history, checkpoint = pd.read_csv(quick_run / "history.csv"), read_checkpoint(quick_run / "best.pth")
    assert figure(page, "score") == pytest.approx(history[["score", "ema"]].min().min(), rel=1e-5)
    assert figure(page, "images") == 8 and f"{8 * N_POINTS} points" in page
    assert figure(page, "delivered") == pytest.approx(
        score_rows(Predictor(quick_run / "best.pth"), labelled_images(checkpoint.settings.data)[32:]).score, rel=1e-4
    )
    assert len(page) < 3e6 and page.count("data:image/jpeg;base64,") == 8 and page.count("<svg") == 8 + 7
    assert not re.search(r"<script|<link|url\(http|(src|href)=\"(?!data:|#)", page)
    assert "prefers-color-scheme: dark" in page and "@media print" in page and 'name="viewport"' in page
    assert "python train.py -n m" in page and re.search(r"Python 3\.\d+\.\d+, torch \d", page)
    assert all(name in page for name in row_names(quick_run.parent / checkpoint.settings.data)[32:])


def test_errors_of_images_and_landmarks(runs, data):
    frame = frame_with_gaps(data, 0.3)
    items = labelled_images(frame, data / "train" / "images")
    predictor = Predictor(runs / "m" / "best.pth")
    errors = RowErrors(items, predictor.networks[0].facts)
    scores = score_rows(predictor, items, collect=errors.add)
    table, labelled = errors.table, ~np.isnan(np.stack([item.points for item in items])[..., 0])
    assert table.points.tolist() == labelled.sum(1).tolist()
    assert np.average(table.score, weights=table.points) == pytest.approx(scores.score, rel=1e-5)
    assert table.nme.mean() == pytest.approx(scores.nme, rel=1e-5) and table.spread.isna().all()
    assert errors.landmarks[1].tolist() == labelled.sum(0).tolist()
    points = predictor(items[0].path).points
    distance = np.linalg.norm(points - items[0].points, axis=1)
    only = np.flatnonzero(labelled[0] & (labelled.sum(0) == 1))  # point 5, where the first row has it
    assert errors.landmark_errors[only] == pytest.approx(distance[only], rel=1e-4)


@pytest.mark.parametrize(
    "n, expected",
    [(1, [[0], [], []]), (4, [[0, 1], [], [3, 2]]), (5, [[0, 1], [2], [4, 3]]), (11, [[0, 1], [4, 5], [10, 9]])],
)
def test_worst_middle_and_best(n, expected, drawn, untrained_run):
    errors = RowErrors(labelled_images(drawn)[:n], read_checkpoint(untrained_run / "best.pth").facts)
    errors.values[:, :2] = np.stack([np.ones(n), 100.0 - np.arange(n)], 1)
    assert errors.chosen(2, 2, 2) == expected


def test_what_makes_an_image_difficult(drawn, untrained_run):
    facts, item = read_checkpoint(untrained_run / "best.pth").facts, labelled_images(drawn)[0]
    values = circumstances(item, facts, 64, "crop")
    left, top, right, bottom = item.box
    assert values["size"] == pytest.approx(((right - left) * (bottom - top)) ** 0.5)
    assert abs(values["tilt"]) < 60 and 0 < values["brightness"] < 255 and values["sharpness"] > 0


def test_names_are_escaped_and_missing_points_counted(run_script, runs, data):
    name = "<script>alert('&')<b>.png"
    frame = frame_with_gaps(data, 0.3)
    images = data / "train" / "images"
    (images / frame.iloc[-1, 0]).rename(images / name)
    frame.iloc[-1, 0] = name
    frame.to_csv(labels_of(data), sep="\t", index=False)
    code, out, err = run_script(f"{COMMAND} m --out {runs} -d", data)
    assert (code, err) == (0, "") and f"look at {runs / 'm' / 'report.html'}" in out
    page = (runs / "m" / "report.html").read_text(encoding="utf-8")
    assert "<script" not in page and html.escape(name, quote=False) in page.replace("&#39;", "'")
    labelled = frame.iloc[-8:, 1::2].notna().to_numpy()
    assert f"{labelled.sum()} points labelled" in page and f"{labelled[-1].sum()} of {N_POINTS} points" in page
    assert figure(page, "images") == 8


def test_earlier_stages_and_runs_side_by_side(run_script, later_run):
    assert [stage.run.name for stage in stages_of(later_run)] == ["first", "later"]
    assert run_script(f"{COMMAND} later")[0] == 0
    page = (later_run / "report.html").read_text(encoding="utf-8")
    assert page.count('class="best"') == 2 and "2 stages" in page
    first, later = re.search(r"<pre>(.*?)</pre>", page, re.S)[1].splitlines()
    assert first.startswith("python train.py -n first ") and " -b 8 " in first
    assert later == f"python finetune.py -n later -pm {RUNS.resolve() / 'first' / 'best.pth'} --no-confidence"
    code, out, err = run_script(f"{COMMAND} first later")
    assert (code, err) == (0, "") and "look at runs/report.html" in out
    page = (RUNS / "report.html").read_text(encoding="utf-8")
    assert page.count('class="best"') == 2 + 1 + 2 and "first" in page and page.count("<svg") == 1
    check_refused(run_script(f"{COMMAND} first later -d x"), "-d is for the report of one run")


def test_a_checkpoint_outside_of_a_run_is_no_stage(later_run, tmp_path):
    shutil.copytree(later_run, tmp_path / "later")
    run = tmp_path / "later" / "run.json"
    shutil.copy(later_run / "best.pth", tmp_path / "saved.pth")
    run.write_text(run.read_text().replace(str(RUNS.resolve() / "first" / "best.pth"), str(tmp_path / "saved.pth")))
    assert [stage.run.name for stage in stages_of(tmp_path / "later")] == ["later"]
    assert stages_of(tmp_path) == []


def test_a_run_whose_data_has_gone_or_has_other_points(run_script, runs, drawn, tmp_path):
    check_refused(run_script(f"{COMMAND} m --out {runs} -d {tmp_path / 'gone'}"), "no such folder")
    csv = tmp_path / "p.csv"
    csv.write_text("file_name,a_x,a_y,b_x,b_y\na.png,1,2,3,4\n")
    shutil.copy(next((drawn / "train" / "images").iterdir()), tmp_path / "a.png")
    check_refused(run_script(f"{COMMAND} m --out {runs} -d {csv}"), "has 2 points", f"predicts {N_POINTS}")
    check_refused(run_script(f"{COMMAND} none --out {runs}"), "not found")


@pytest.mark.train
def test_a_page_that_fails_costs_no_checkpoint(run_script, drawn, monkeypatch):
    def fail(*args):
        raise ValueError("no\nroom")

    monkeypatch.setattr(stage, "write_report", fail)
    code, out, err = run_script(f"train.py {QUICK} -n x -d", drawn)
    assert code == 0 and err == f"warning: {RUNS / 'x' / 'report.html'} was not written: no\n"
    assert (RUNS / "x/best.pth").exists() and (RUNS / "x/results.png").exists() and "run x: score" in out


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium")
def test_in_a_browser(quick_run, tmp_path):
    page = quick_run / "report.html"
    chromium = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]

    def run(*flags):
        return subprocess.run(
            [*chromium, *flags, page.as_uri()], capture_output=True, text=True, timeout=120, check=True
        )

    dom = run("--dump-dom").stdout
    history = pd.read_csv(quick_run / "history.csv")
    assert figure(dom, "score") == pytest.approx(history[["score", "ema"]].min().min(), rel=1e-5)
    for width in (375, 800, 1400):
        run(f"--screenshot={tmp_path / 'page.png'}", f"--window-size={width},1200")
        assert (tmp_path / "page.png").stat().st_size > 50_000
