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


def gappy():
    "Predictions, complete truth and truth with missing points, (3, 4, 2)."
    generator = torch.Generator().manual_seed(0)
    pred, truth = torch.randn(2, 3, 4, 2, generator=generator)
    missing = torch.tensor([[0, 1, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0]], dtype=torch.bool)
    return pred.requires_grad_(), truth, truth.masked_fill(missing[..., None], torch.nan)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_missing_points_count_neither_in_the_loss_nor_in_the_gradient(loss, precision):
    func, (pred, truth, gaps) = loss_function(Settings(loss=loss, size=SIZE)), gappy()
    labelled = ~gaps.isnan()
    value = func(pred.to(precision), gaps)
    value.backward()
    assert value.item() == pytest.approx(
        func(pred.to(precision)[labelled][None], truth[labelled][None]).item(), rel=1e-6
    )
    assert pred.grad.isfinite().all() and torch.equal(pred.grad != 0, labelled)
    func.reduction = "none"  # as `Interpretation`, which takes each image's mean
    of_image = func(pred, gaps).flatten(1).mean(1)
    func.reduction = "mean"
    expected = [func(p[mask][None], t[mask][None]) for p, t, mask in zip(pred, truth, labelled, strict=True)]
    assert torch.allclose(of_image, torch.stack(expected))


@pytest.mark.parametrize("loss", LOSSES)
def test_loss_and_gradient_of_complete_labels_are_those_of_the_plain_mean(loss):
    func, (pred, truth, _) = loss_function(Settings(loss=loss, size=SIZE)), gappy()
    value = func(pred, truth)
    plain = func.func.of_error((pred - truth).reshape(-1) * (SIZE / 2)).mean()
    assert torch.equal(value.as_subclass(torch.Tensor), plain)
    assert torch.equal(*(torch.autograd.grad(v, pred)[0].as_subclass(torch.Tensor) for v in (value, plain)))
