"The scripts in the environments of users: variables of a notebook, empty variables, earlier predictions, other places."

import multiprocessing.spawn
import os
import subprocess
import sys
import types

import numpy as np
import pytest
from PIL import Image

from landmarks_fastai.cli import app
from tests.helpers import LINUX, QUICK, ROOT


@pytest.mark.slow
@pytest.mark.train
def test_the_backend_of_a_notebook_is_not_used(drawn, tmp_path):
    "A Jupyter kernel exports its own to what `!python train.py` starts, in an environment that may lack it."
    env = os.environ | {"MPLBACKEND": "module://no_such_backend", "COLUMNS": "20", "TERM": "dumb", "LC_ALL": "C"}
    command = [sys.executable, ROOT / "train.py", *QUICK.split(), "-d", drawn, "-n", "m"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert (tmp_path / "runs/m/results.png").stat().st_size > 10_000


def test_a_script_in_the_process_of_a_notebook(monkeypatch):
    "`%run` may be the second of its process, shows figures after it, and its `__main__` has no `__spec__`."
    main = types.ModuleType("__main__")
    del main.__spec__
    for name, module in (("__main__", main), ("ipykernel", types.ModuleType("ipykernel"))):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    monkeypatch.setattr(app, "STARTED", before := app.STARTED)
    app.run_main(lambda: None)
    assert os.environ["MPLBACKEND"] == "module://matplotlib_inline.backend_inline"
    assert app.STARTED > before and multiprocessing.spawn.get_preparation_data("x")["name"] == "x"


@pytest.mark.parametrize(
    "line",
    [
        "train.py -n '' -d x", "train.py --weights '' -d x", "train.py --out '' -d x", "finetune.py -pm ''",
        "predict.py -pm '' x.jpg", "predict.py -pm m ''", "predict.py -pm m --boxes '' x.jpg", "train.py --arch '' -d x",
        "train.py --valid '' -d x", "train.py --exclude '' -d x",
    ],
)  # fmt: skip
def test_an_empty_text_is_not_taken_for_a_missing_flag(run_script, line):
    code, _, err = run_script(line)
    assert code == 2 and "is empty: is a variable of the shell not set?" in err


def test_flags_that_onnx_files_cannot_have_are_refused(run_script, tmp_path):
    for flag in ("--amp bf16", "--compile"):
        code, _, err = run_script(f"predict.py -pm {tmp_path}/x.onnx {flag} x.jpg")
        assert code == 1 and "--amp and --compile are for checkpoints" in err and err.count("\n") == 1


@LINUX
def test_a_killed_prediction_does_not_lock_the_next_one_out(run_script, untrained_run, pictures, tmp_path):
    "With a checkpoint outside of --out, the folder holds nothing but copies and temporary files then."
    folder = tmp_path / "here/runs/m"
    (folder / "overlay").mkdir(parents=True)
    killed = subprocess.Popen([sys.executable, "-c", ""])
    killed.wait()
    (folder / f"predictions.csv.{killed.pid}.tmp").write_text("")
    code, _, err = run_script(f"predict.py -pm {untrained_run / 'best.pth'} {pictures[0]} --overlay")
    assert (code, err) == (0, "")
    assert sorted(path.name for path in folder.iterdir()) == ["overlay", "predictions.csv"]


def test_pictures_of_one_name_have_files_of_their_own(run_script, untrained_run, tmp_path, pictures):
    names = ["a.png.jpg", "a.jpg", "a.png", "sub/a.jpg"]
    for name in names:
        (tmp_path / "here/in" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.open(pictures[0]).save(tmp_path / "here/in" / name)
    paths = [f"in/{name}" for name in names] + [str(tmp_path / "here/in/a.png")]
    assert run_script(f"predict.py -pm {untrained_run / 'best.pth'} --format pts --overlay", *paths)[0] == 0
    folder = tmp_path / "here/runs/m"
    for kind in ("predictions", "overlay"):
        assert len([path for path in (folder / kind).rglob("*") if path.is_file()]) == len(paths)


def test_boxes_that_name_no_picture_or_lie_outside_are_told(run_script, untrained_run, pictures, tmp_path):
    rows = f"{pictures[0].name},5,5,60,60\nother.png,0,0,9,9\n{pictures[1].name},5000,5000,5050,5060\n"
    (tmp_path / "b.csv").write_text("file_name,left,top,right,bottom\n" + rows)
    line = f"predict.py -pm {untrained_run / 'best.pth'} --boxes {tmp_path / 'b.csv'} --format json"
    code, _, err = run_script(line, *pictures[:2])
    assert code == 0 and "1 file names are not among the pictures, as other.png" in err
    assert err.count("lies outside of the picture") == 1


@pytest.mark.train
@pytest.mark.parametrize("fit,noted", [("crop", True), ("pad", False)])
def test_points_that_the_centre_crop_loses_are_told(run_script, tmp_path, fit, noted):
    folder, rng = tmp_path / "wide/train/images", np.random.default_rng(0)
    folder.mkdir(parents=True)
    rows = ["file_name\t" + "\t".join(f"{axis}{k}" for k in range(6) for axis in "xy")]
    for k in range(20):
        Image.new("RGB", (160, 40), (k, 90, 60)).save(folder / f"{k}.png")
        points = rng.uniform(0, 40, (6, 2)) + [rng.uniform(0, 120), 0]
        rows.append("\t".join([f"{k}.png", *(f"{v:.1f}" for v in points.ravel())]))
    (folder.parent / "landmarks.csv").write_text("\n".join(rows) + "\n")
    code, out, _ = run_script(f"train.py {QUICK} --fit {fit} -n w -d", tmp_path / "wide")
    assert code == 0 and ("of the points lie outside of what the network sees" in out) == noted
    assert ("--fit pad" in out) == noted
