"`--log tensorboard`: what is written, and what is said without the package."

import json

import numpy as np
import pandas as pd
import pytest

from landmarks_fastai.utils import hardware
from tests.helpers import QUICK, RUNS, check_refused


@pytest.mark.train
def test_scalars_settings_and_the_results_picture(run_script, drawn):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    code, out, err = run_script(f"train.py {QUICK} -e 2 --log tensorboard -n t -d", drawn)
    assert code == 0, err
    log = events.EventAccumulator(str(RUNS / "t/tensorboard")).Reload()
    history = pd.read_csv(RUNS / "t/history.csv").drop(columns=["epoch", "time"])
    assert set(log.Tags()["scalars"]) == set(history)
    for name in history:
        assert [(e.step, pytest.approx(e.value)) for e in log.Scalars(name)] == list(enumerate(history[name]))
    (settings,) = (e.tensor_proto.string_val[0] for e in log.Tensors("settings/text_summary"))
    assert json.loads(settings.decode().strip("`").removeprefix("json"))["epochs"] == 2
    (picture,) = log.Images("results")
    assert picture.width > 100 and picture.height > 100 and np.isfinite(picture.wall_time)


def test_without_the_package_it_says_so_before_training(run_script, drawn, monkeypatch):
    monkeypatch.setattr(hardware, "find_spec", lambda name: None)
    result = run_script(f"train.py {QUICK} --log tensorboard -n t -d", drawn)
    check_refused(result, "--log tensorboard", "pip install tensorboard")
    assert not (RUNS / "t").exists()
