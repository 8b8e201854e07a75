"Learning rates in the optimiser, compared with PyTorch's schedulers on the same scores."

from functools import partial

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.tracker import ReduceLROnPlateau
from torch import nn

from landmarks_fastai.settings import OPTIMISERS
from landmarks_fastai.training.callbacks.schedules import PlateauLR, StepLR, StopOnNaN
from tests.helpers import tiny_learner

pytestmark = pytest.mark.train


def rates(scores, callback, opt="adamw"):
    "The rate in the optimiser's own groups after every epoch."
    seen = []
    learn = tiny_learner(scores, opt)

    class Watch(Callback):
        order = 99

        def after_epoch(self):
            seen.append([g["lr"] for g in self.opt.opt.param_groups])

    learn.fit(len(scores), lr=3e-4, cbs=[callback, Watch()])
    assert all(len(set(groups)) == 1 for groups in seen)
    return [groups[0] for groups in seen]


def torch_rates(scores, make):
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=3e-4)
    scheduler, seen = make(optimizer), []
    for score in scores:
        optimizer.step()
        scheduler.step(score) if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau) else scheduler.step()
        seen.append(optimizer.param_groups[0]["lr"])
    return seen


torch_plateau = partial(torch.optim.lr_scheduler.ReduceLROnPlateau, patience=1, factor=0.31622)

SCORES = {
    "falls": [9, 8, 7, 6, 5, 4],
    "one bad epoch is let pass": [9, 8, 8.5, 7, 7.5, 6],
    "two bad epochs reduce": [9, 8, 8.5, 8.6, 8.7, 8.8, 8.9, 9, 9.1],
    "a fall below a ten-thousandth is no fall": [9, 8.9999, 8.9998, 8.99975, 8.99973, 8.9997, 5],
    "equal": [5] * 12,
    "no number": [9, float("nan"), float("nan"), 8, float("nan"), 7, 7.5, 7.6],
    "down to where a change is not made": [1] * 45,
    "random": list(np.random.default_rng(0).normal(10, 1, 40)),
}


@pytest.mark.parametrize("scores", SCORES.values(), ids=SCORES)
@pytest.mark.parametrize("opt", OPTIMISERS)
def test_plateau_matches_pytorch_in_the_real_optimiser(scores, opt):
    assert rates(scores, PlateauLR(), opt) == pytest.approx(torch_rates(scores, torch_plateau), rel=1e-12)


def test_fastai_plateau_callback_has_no_effect_here():
    "Why PlateauLR exists: through OptimWrapper, `opt.hypers` are fresh dicts. If this fails, fastai has mended it."
    assert set(rates([5] * 8, ReduceLROnPlateau("score", comp=np.less, patience=1))) == {3e-4}


def test_step_schedule_matches_pytorch():
    make = partial(torch.optim.lr_scheduler.StepLR, step_size=3, gamma=0.5)
    assert rates([1] * 10, StepLR(3, 0.5)) == pytest.approx(torch_rates([1] * 10, make), rel=1e-12)


@pytest.mark.parametrize("opt,kind", [("adamw", "AdamW"), ("adam", "Adam"), ("sgd", "SGD")])
def test_optimiser_is_pytorch_and_every_parameter_decays(opt, kind):
    learn = tiny_learner([1, 1], opt)
    learn.fit(2, lr=3e-4, wd=0.05)
    real = learn.opt.opt
    assert type(real).__name__ == kind and [g["weight_decay"] for g in real.param_groups] == [0.05, 0.05]
    assert sum(len(g["params"]) for g in real.param_groups) == len(list(learn.model.parameters()))
    assert opt == "sgd" or all(g["amsgrad"] for g in real.param_groups)


def test_step_is_that_of_adamw_with_biases_and_norms_decayed():
    learn = tiny_learner([1])
    torch.manual_seed(0)
    twin = nn.Sequential(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), nn.Sequential(nn.Linear(4, 2)))
    twin.load_state_dict(learn.model.state_dict())
    batches = list(learn.dls.train)
    learn.fit(1, lr=1e-2, wd=0.05)
    optimizer = torch.optim.AdamW(twin.parameters(), lr=1e-2, weight_decay=0.05, amsgrad=True)
    for x, y in batches:
        optimizer.zero_grad()
        nn.MSELoss()(twin(x), y).backward()
        optimizer.step()
    for a, b in zip(learn.model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-7)


def test_nan_loss_ends_the_fit_and_its_step_is_recorded():
    learn, watch = tiny_learner([1, 1, 1]), StopOnNaN()
    with torch.no_grad():
        learn.model[0][0].weight.fill_(float("inf"))
    learn.fit(3, cbs=watch)
    assert watch.step == (0, 0)


def test_nan_loss_in_validation_does_not_end_the_fit():
    "The running average may be finite."
    learn, watch = tiny_learner([1, 1, 1]), StopOnNaN()
    with torch.no_grad():
        learn.model[0][0].weight.fill_(float("inf"))
    learn.validate(cbs=watch)
    assert watch.step is None
