"Settings: a round trip through JSON, and errors for wrong values."

import json
from pathlib import Path

import numpy as np
import pytest

from landmarks_fastai.errors import UserError
from landmarks_fastai.settings import RECIPES, DataFacts, Settings


def test_settings_survive_json():
    settings = Settings(arch="alexnet", lr=1e-3, valid_random=True, data="папка с пробелом")
    facts = DataFacts(
        2,
        (0.0, 0.5, 1.0, -1.0),
        3.1,
        (-1.0, -0.5, 1.0, 0.5),
        (1, 0),
        (0.5, 0.5, 0.5),
        (0.1, 0.2, 0.3),
        ("nose", "я"),
        (0, 1),
    )
    for value in (settings, facts):
        assert type(value).from_dict(json.loads(json.dumps(value.to_dict()))) == value


def test_scalars_of_numpy_and_paths_are_taken():
    values = {"size": np.int64(32), "lr": np.float32(0.5), "freeze": np.bool_(True), "valid": Path("v.csv")}
    assert Settings(**values) == Settings(size=32, lr=0.5, freeze=True, valid="v.csv")
    assert json.dumps(Settings(**values).to_dict())
    for wrong in (np.array([32]), np.float64(32)):
        with pytest.raises(UserError, match="int expected"):
            Settings().replace(size=wrong)


@pytest.mark.parametrize("recipe,lr", [("best", 2e-3), ("baseline", 3e-4)])
def test_recipe_defaults(recipe, lr):
    s = Settings(**RECIPES[recipe])
    assert (s.arch, s.size, s.fit, s.batch_size, s.epochs, s.lr) == ("resnext50_32x4d", 128, "crop", 32, 10, lr)
    head = "linear" if recipe == "baseline" else "map64"
    assert (s.opt, s.wd, s.sched, s.head) == ("adamw", 0.05, "plateau", head)
    assert (s.valid_pct, s.valid_random) == (0.2, False)


@pytest.mark.parametrize(
    "key,value",
    [
        ("size", "128"), ("size", 0), ("size", 10**9), ("size", True), ("size", 64.5), ("lr", float("nan")), ("lr", -1.0),
        ("lr", "fast"), ("fit", "stretch"), ("arch", 5), ("batch_size", 0), ("valid_pct", 0.0), ("valid_pct", 1.0), ("freeze", "yes"),
        ("opt", "lion"), ("surprise", 1), ("seed", -1), ("aug", 2.1),
        ("aug", -0.1), ("loss", "l3"), ("ema", 1.0), ("head_lr_mult", 0.0), ("mirror", "yes"), ("minutes", -1),
        ("accumulate", 0), ("patience", -1),
    ],
)  # fmt: skip
def test_a_wrong_setting_is_refused_by_name(key, value):
    with pytest.raises(UserError, match=key):
        Settings.from_dict(Settings().to_dict() | {key: value})


@pytest.mark.parametrize(
    "key,value",
    [
        ("mean", [0.5, 0.5]), ("std", [0.1, 0.0, 0.1]), ("mean", [0.5, 0.5, "x"]), ("n_points", -1), ("n_points", True),
        ("flip_indices", [1, 0]), ("flip_indices", "mirror"), ("shape", [0.0]), ("align_gain", float("nan")),
        ("align_gain", -1.0), ("points_box", [1.0, 0.0, 0.0, 1.0]), ("points_box", [0.0]), ("surprise", 1),
    ],
)  # fmt: skip
def test_a_wrong_fact_is_refused_by_name(key, value):
    with pytest.raises(UserError, match=key):
        DataFacts.from_dict(DataFacts().to_dict() | {key: value})


def test_from_dict_refuses_other_types():
    for record in (None, [], {}, {"arch": "resnet18"}):
        with pytest.raises(UserError, match="setting"):
            Settings.from_dict(record)
