"Learning rates, their schedules, the time limit, early stopping and accumulated gradients, in real runs."

import time

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.training import GradientAccumulation
from PIL import Image
from torch import nn

from landmarks_fastai.cli import app
from landmarks_fastai.cli.train import first_settings
from landmarks_fastai.data.block import landmark_dataloaders
from landmarks_fastai.settings import Settings
from landmarks_fastai.training.callbacks.schedules import TimeLimit
from landmarks_fastai.training.learner import landmark_learner
from landmarks_fastai.utils.hardware import Machine
from tests.helpers import ARCH, QUICK, RUNS, best, every_learner_has, history, learner


def test_lr_find_is_printed_drawn_and_used(run_script, drawn):
    code, out, err = run_script(f"train.py {QUICK} --lr find -n f -d", drawn)
    assert (code, err) == (0, "")
    rate = best("f").settings.lr
    assert f"rate found: {rate:g}" in out and 1e-6 < rate < 1 and rate != Settings.lr
    assert history("f").lr[0] == pytest.approx(rate)
    assert Image.open(RUNS / "f/lr.png").width > 400
    assert [p.name for p in RUNS.iterdir() if p.is_dir()] == ["f"]  # fastai's temporary folder is gone
    code, _, err = run_script(f"train.py {QUICK} --lr fast -d", drawn)
    assert code == 2 and "fast" in err


@pytest.mark.slow
def test_lr_find_of_a_later_stage(run_script, finished_run):
    finished_run("f")
    assert run_script("finetune.py --lr find -e 1 --workers 0 -n f2 -pm f")[0] == 0


def test_body_and_head_have_their_own_rates(drawn, tmp_path):
    dls = landmark_dataloaders(drawn, size=32, batch_size=8, machine=Machine(workers=0))
    learn = landmark_learner(dls, ARCH, "none", lr=1e-3, head_lr_mult=0.25, path=tmp_path)
    for lr, expected in ((None, 1e-3), (2e-3, 2e-3)):
        with learn.no_bar(), learn.no_logging():
            learn.fit(1, lr)
        assert [g["lr"] for g in learn.opt.opt.param_groups] == [expected, expected / 4]


def test_onecycle_is_that_of_fastai(run_script, drawn):
    assert run_script(f"train.py {QUICK} -e 4 --sched onecycle -lr 1e-2 -n o -d", drawn)[0] == 0
    lr = history("o").lr
    # 16 steps: up to 1e-2 by the fourth, then down along a cosine
    expected = [1e-2 * (1 + np.cos(np.pi * (k / 16 - 0.25) / 0.75)) / 2 for k in (3, 7, 11, 15)]
    assert lr.tolist()[1:] == pytest.approx(expected[1:], rel=0.05, abs=1e-6)


class Clock:
    "In place of `time.monotonic`: it moves by what a batch of training or validation takes, and by nothing else."

    def __init__(self, monkeypatch, train, valid):
        self.now, self.train, self.valid = time.monotonic(), train, valid
        monkeypatch.setattr(time, "monotonic", lambda: self.now)

    def callback(self):
        clock = self

        class Tick(Callback):
            order = -99

            def after_batch(self):
                clock.now += clock.train if self.training else clock.valid

        return Tick


@pytest.mark.parametrize("sched", ["plateau", "onecycle"])
def test_time_limit_ends_the_run_in_time(run_script, drawn, sched, monkeypatch):
    clock = Clock(monkeypatch, 0.4, 0.2)
    monkeypatch.setattr(app, "STARTED", start := clock.now)
    with every_learner_has(clock.callback()):
        assert run_script(f"train.py {QUICK} --minutes 0.4 --sched {sched} -n q -d", drawn)[0] == 0
    assert 0.2 * 60 < clock.now - start < 0.4 * 60
    table = history("q")
    assert len(table) >= 2 and table.notna().all().all()
    assert best("q").score == pytest.approx(table.score.min(), rel=1e-5)
    if sched == "onecycle":
        assert table.lr.iloc[-1] < 0.1 * table.lr.max()  # the cycle came to its end


def test_time_limit_leaves_time_for_the_validation(monkeypatch):
    learn, clock = learner([1] * 1000), Clock(monkeypatch, 0.01, 0.1)
    start = clock.now
    learn.fit(1000, cbs=[TimeLimit(start + 1.0), clock.callback()()])
    assert 0.7 < clock.now - start <= 1.0 + 1e-6


def test_patience_stops_early(run_script, drawn):
    assert run_script(f"train.py {QUICK} -e 1 -lr 1e-3 -n p -d", drawn)[0] == 0
    code, out, _ = run_script("finetune.py --freeze -e 9 -lr 1e-12 --patience 2 --workers 0 -n p2 -pm p")
    table = history("p2")
    assert code == 0 and "early stopping" in out and len(table) < 9
    assert len(table) == table.score.idxmin() + 1 + 2


def test_plateau_is_that_of_the_published_entry(drawn, tmp_path, monkeypatch):
    "By the root of 0.1 after two epochs without a better score, whatever the metrics of the Learner are."
    dls = landmark_dataloaders(drawn, size=32, batch_size=8, align=0.0, machine=Machine(workers=0))
    learn = landmark_learner(dls, ARCH, "none", lr=1e-3, path=tmp_path)
    learn.metrics, rates = [], []
    scores = iter([5.0, 4.0, 4.0 * (1 - 1e-5), 4.1, 3.0, 3.1, 3.2])

    class Scored(Callback):
        order = learn.evaluation.order + 1

        def after_validate(self):
            self.learn.evaluation.scores = self.learn.evaluation.scores._replace(score=next(scores))

        def before_train(self):
            rates.append(self.opt.hypers[0]["lr"])

    with learn.no_bar(), learn.no_logging():
        learn.fit(7, cbs=Scored())
    rates.append(learn.opt.hypers[0]["lr"])
    assert rates == pytest.approx([1e-3] * 4 + [1e-3 * 0.31622] * 3 + [1e-3 * 0.31622**2])


def test_accumulated_batches_make_the_step_of_one_large_batch():
    "On a network without norms: fastai's `GradientAccumulation` counts images, and is given batches times their size."
    weights = []
    for batch, callback in ((4, []), (2, [GradientAccumulation(2 * 2)])):
        learn = learner([1])
        learn.model = nn.Sequential(nn.Sequential(nn.Linear(3, 4)), nn.Sequential(nn.Linear(4, 2)))
        torch.manual_seed(1)
        for p in learn.model.parameters():
            nn.init.normal_(p)
        learn.create_opt()
        learn.dls.train.bs = batch
        data = learn.dls.train.dataset
        learn.dls.loaders[0] = torch.utils.data.DataLoader(data, batch)
        learn.fit(1, lr=0.1, cbs=callback)
        weights.append([p.detach() for p in learn.model.parameters()])
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*weights, strict=True))


def test_accumulate_reaches_the_learner(drawn, tmp_path):
    typed = first_settings({"accumulate": 2, "data": ""})
    assert typed.accumulate == 2
    weights = []
    for accumulate in (1, typed.accumulate):
        dls = landmark_dataloaders(drawn, size=32, batch_size=8, aug=0.0, mirror="none", machine=Machine(workers=0))
        learn = landmark_learner(dls, ARCH, "none", accumulate=accumulate, path=tmp_path)
        with learn.no_bar(), learn.no_logging():
            learn.fit(1)
        weights.append(next(learn.model.parameters()).detach())
    assert not torch.equal(*weights) and learn.settings.accumulate == 2
    assert learn.gradient_accumulation.n_acc == 16  # fastai counts images


def test_more_batches_a_step_than_an_epoch_has_are_refused(run_script, drawn):
    code, _, err = run_script(f"train.py {QUICK} --accumulate 5 -n x -d", drawn)
    assert code == 1 and "--accumulate 5" in err and "4 batches" in err and err.count("\n") == 1
