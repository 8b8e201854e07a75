"The figures, against numbers worked out by hand, in pixels of images of different sizes."

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from landmarks_fastai.geometry import PixelMap, input_to_unit, pixel_map, unit_to_input
from landmarks_fastai.metrics import ImageMetric, mean_squared_error, nme_box_diag, points_in_image, stage_metrics

SIZE = 64


def batch(*images):
    "A learner's state after a batch: (width, height, truth, prediction) in pixels of the images as stored."
    maps = [pixel_map(w, h, "crop", SIZE) for w, h, _, _ in images]
    truth, pred = (
        torch.stack(
            [input_to_unit(m.to_input(torch.tensor(i[k]).double()), SIZE) for m, i in zip(maps, images, strict=True)]
        )
        for k in (2, 3)
    )
    return SimpleNamespace(pred=pred, yb=(truth,), maps=torch.tensor(maps, dtype=torch.float64))


WIDE = (400, 200, [[0, 0], [30, 40]], [[1, 0], [30, 42]])  # errors 1 0 0 2: score 5/4
TALL = (100, 300, [[10, 10], [13, 14]], [[10, 10], [13, 17]])  # errors 0 0 0 3: score 9/4


def test_score_and_nme_are_in_stored_pixels_at_any_image_scale():
    score, nme = stage_metrics(SIZE)
    for metric in (score, nme):
        metric.reset()
        metric.accumulate(batch(WIDE))
        metric.accumulate(batch(TALL))
    assert score.name == "score" and score.value == pytest.approx((5 / 4 + 9 / 4) / 2)
    # the true boxes' diagonals are 50 and 5; mean distances (1 + 2) / 2 and (0 + 3) / 2
    assert nme.name == "nme_box_diag" and nme.value == pytest.approx((1.5 / 50 + 1.5 / 5) / 2)


def test_a_short_batch_weighs_by_its_images():
    metric = ImageMetric(mean_squared_error, "score", SIZE)
    metric.accumulate(batch(WIDE, WIDE))
    metric.accumulate(batch(TALL))
    assert metric.value == pytest.approx((5 / 4 + 5 / 4 + 9 / 4) / 3)
    metric.reset()
    assert metric.value is None


def test_nothing_waits_for_the_device_until_the_value_is_asked_for(monkeypatch):
    metric, asked = ImageMetric(mean_squared_error, "score", SIZE), []
    for name in ("item", "cpu", "tolist", "__float__", "__bool__"):
        real = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor, name, lambda self, *args, name=name, real=real: asked.append(name) or real(self, *args)
        )
    state = batch(WIDE, TALL)
    asked.clear()
    metric.accumulate(state)
    metric.accumulate(state)
    assert not asked and metric.value == pytest.approx((5 / 4 + 9 / 4) / 2) and asked


def test_score_of_a_set_is_the_float64_mean():
    "To 1e-9: float32 is 2e-8 off."
    torch.manual_seed(0)
    metrics, each = stage_metrics(SIZE), []
    for _ in range(5):
        truth = torch.rand(8, 971, 2) * 2 - 1
        pred, maps = truth + 0.02 * torch.randn(8, 971, 2), [pixel_map(300 + i, 400, "crop", SIZE) for i in range(8)]
        for metric in metrics:
            metric.add(pred, truth, torch.tensor(maps))
        for p, t, m in zip(
            pred.double().numpy(), truth.double().numpy(), torch.tensor(maps).double().tolist(), strict=True
        ):
            p, t = (PixelMap(*m).to_image(unit_to_input(x, SIZE)) for x in (p, t))
            nme = np.linalg.norm(p - t, axis=1).mean() / np.linalg.norm(t.max(0) - t.min(0))
            each.append((((p - t) ** 2).mean(), nme))
    assert [m.value for m in metrics] == pytest.approx(np.mean(each, 0), rel=1e-9)


def test_points_in_image_undoes_the_map():
    state = batch(WIDE, TALL)
    found = points_in_image(state.yb[0], state.maps, SIZE)
    assert found == pytest.approx(torch.tensor([WIDE[2], TALL[2]]).double())


def test_nme_of_a_point_alone_is_its_distance():
    assert nme_box_diag(torch.tensor([[[4.0, 6.0]]]), torch.tensor([[[1.0, 2.0]]])).tolist() == [5.0]


def test_nme_measures_each_image_by_its_own_box_however_small():
    truth = torch.tensor([[[0.0, 0.0], [0.3, 0.4]], [[100.0, 100.0], [106.0, 108.0]], [[5.0, 5.0], [5.0, 5.0]]])
    pred = truth + torch.tensor([[[3.0, 4.0]], [[0.0, 2.0]], [[0.0, 7.0]]])
    assert nme_box_diag(pred, truth).tolist() == pytest.approx([5 / 0.5, 2 / 10, 7])
