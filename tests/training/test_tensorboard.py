"`--log tensorboard`: what is written, and what is said without the package."

import json
import sys
import types

import pandas as pd
import pytest

from landmarks_fastai.utils import hardware
from tests.helpers import QUICK, RUNS, check_refused


class Writer:
    "In place of torch's `SummaryWriter`: keeps what it is given."

    kept = []

    def __init__(self, folder, purge_step=None):
        self.folder = folder

    def __getattr__(self, name):
        return lambda *args, **kwargs: self.kept.append((name, *args))

    def __enter__(self):
        return self

    def __exit__(self, *args):
        self.close()


@pytest.mark.train
def test_scalars_settings_and_the_results_picture(run_script, drawn, monkeypatch):
    monkeypatch.setattr(Writer, "kept", [])
    monkeypatch.setattr(hardware, "find_spec", lambda name: True)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=Writer))
    code, out, err = run_script(f"train.py {QUICK} -e 2 --log tensorboard -n t -d", drawn)
    assert (code, err) == (0, "")
    history = pd.read_csv(RUNS / "t/history.csv").drop(columns=["epoch", "time"])
    scalars = {(args[0], args[2]): args[1] for kind, *args in Writer.kept if kind == "add_scalar"}
    assert scalars == {(c, k): pytest.approx(history[c][k]) for c in history for k in range(2)}
    (settings,) = (args[1] for kind, *args in Writer.kept if kind == "add_text")
    assert json.loads(settings.strip("`").removeprefix("json"))["epochs"] == 2
    (picture,) = (args[1] for kind, *args in Writer.kept if kind == "add_image")
    assert picture.ndim == 3 and picture.shape[2] == 3


def test_without_the_package_it_says_so_before_training(run_script, drawn, monkeypatch):
    monkeypatch.setattr(hardware, "find_spec", lambda name: None)
    result = run_script(f"train.py {QUICK} --log tensorboard -n t -d", drawn)
    check_refused(result, "--log tensorboard", "pip install tensorboard")
    assert not (RUNS / "t").exists()


@pytest.mark.train
def test_files_of_the_package(run_script, drawn):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    assert run_script(f"train.py {QUICK} --log tensorboard -n t -d", drawn)[0] == 0
    files = events.EventAccumulator(str(RUNS / "t/tensorboard")).Reload()
    assert "score" in files.Tags()["scalars"] and files.Tags()["images"] == ["results"]
