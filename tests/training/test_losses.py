"The losses against their formulas, worked out by hand in pixels of the input."

import math

import pytest
import torch
from torch.nn import functional as F

from landmarks_fastai.settings import LOSSES, Settings
from landmarks_fastai.training.losses import loss_function, wing

SIZE = 128
OFF = torch.tensor([0.0, 0.5, -2.0, 7.0])  # pixels


def value(loss, off=OFF):
    truth = torch.linspace(-0.5, 0.5, len(off))[None]
    func = loss_function(Settings(loss=loss, size=SIZE))
    return func(truth + off[None] * 2 / SIZE, truth.reshape(1, -1, 2)).item()


def test_loss_values_match_their_formulas_in_pixels():
    assert value("l1") == pytest.approx(9.5 / 4, rel=1e-5)
    assert value("mse") == pytest.approx((0.25 + 4 + 49) / 4, rel=1e-5)
    assert value("smooth_l1") == pytest.approx(F.smooth_l1_loss(OFF, torch.zeros(4)).item(), rel=1e-5)
    width, curve = 5.0, 1.0  # 10 and 2 of 256, at 128
    near = sum(width * math.log(1 + e / curve) for e in (0.5, 2.0))
    assert value("wing") == pytest.approx((near + 7 - (width - width * math.log(1 + width / curve))) / 4, rel=1e-5)


def test_wing_has_no_step_at_its_width():
    below, above = wing(torch.tensor([9.9999, 10.0001]), 10, 2)
    assert above - below == pytest.approx(2e-4, abs=1e-4)


@pytest.mark.parametrize("loss", LOSSES)
def test_truth_is_the_minimum_and_every_error_pulls_towards_it(loss):
    assert value(loss, torch.zeros(4)) == pytest.approx(0, abs=1e-6)
    off = torch.tensor([0.3, -0.3, 9.0, -9.0], requires_grad=True)
    loss_function(Settings(loss=loss, size=SIZE))(off[None], torch.zeros(1, 4)).backward()
    assert torch.equal(off.grad.sign(), off.detach().sign())
