"Metrics against values worked out by hand, in pixels of images of different sizes."

import math

import numpy as np
import pytest
import torch

from landmarks_fastai.errors import UserError
from landmarks_fastai.geometry import PixelMap, input_to_unit, pixel_map, unit_to_input
from landmarks_fastai.metrics import (
    AUC,
    FailureRate,
    ImageMetric,
    auc,
    default_metrics,
    failure_rate,
    mean_squared_error,
    nme,
    points_in_image,
    sum_over_processes,
)

SIZE = 64


def batch(*images):
    "Unit points and maps of images: (width, height, truth, prediction) in pixels of the images as stored."
    maps = [pixel_map(w, h, "crop", SIZE) for w, h, _, _ in images]
    truth, pred = (
        torch.stack(
            [input_to_unit(m.to_input(torch.tensor(i[k]).double()), SIZE) for m, i in zip(maps, images, strict=True)]
        )
        for k in (2, 3)
    )
    return pred, truth, torch.tensor(maps, dtype=torch.float64)


def add(metric, *images):
    "Give a metric a batch, as `Evaluation` does."
    pred, truth, maps = batch(*images)
    metric.add(points_in_image(pred, maps, SIZE), points_in_image(truth, maps, SIZE))


WIDE = (400, 200, [[0, 0], [30, 40]], [[1, 0], [30, 42]])  # errors 1 0 0 2: score 5/4
TALL = (100, 300, [[10, 10], [13, 14]], [[10, 10], [13, 17]])  # errors 0 0 0 3: score 9/4


def test_score_and_nme_are_in_stored_pixels_at_any_image_scale():
    score, nme = default_metrics()
    for metric in (score, nme):
        metric.reset()
        add(metric, WIDE)
        add(metric, TALL)
    assert score.name == "score" and score.value == pytest.approx((5 / 4 + 9 / 4) / 2)
    # the true boxes' diagonals are 50 and 5; mean distances (1 + 2) / 2 and (0 + 3) / 2
    assert nme.name == "nme_box_diag" and nme.value == pytest.approx((1.5 / 50 + 1.5 / 5) / 2)


def test_a_short_batch_weighs_by_its_images():
    metric = ImageMetric(mean_squared_error, "score")
    add(metric, WIDE, WIDE)
    add(metric, TALL)
    assert metric.value == pytest.approx((5 / 4 + 5 / 4 + 9 / 4) / 3)
    metric.reset()
    assert metric.value is None


def test_nothing_waits_for_the_device_until_the_value_is_asked_for(monkeypatch):
    metric, moved = ImageMetric(mean_squared_error, "score"), []
    for name in ("item", "cpu", "tolist", "__float__", "__bool__"):
        real = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor, name, lambda self, *args, name=name, real=real: moved.append(name) or real(self, *args)
        )
    pred, truth, maps = batch(WIDE, TALL)
    moved.clear()
    for _ in range(2):
        metric.add(points_in_image(pred, maps, SIZE), points_in_image(truth, maps, SIZE))
    assert not moved and metric.value == pytest.approx((5 / 4 + 9 / 4) / 2) and moved


def test_score_of_a_set_is_the_float64_mean():
    "To 1e-9: float32 is 2e-8 off."
    torch.manual_seed(0)
    metrics, expected = default_metrics(), []
    for _ in range(5):
        truth = torch.rand(8, 971, 2) * 2 - 1
        pred, maps = truth + 0.02 * torch.randn(8, 971, 2), [pixel_map(300 + i, 400, "crop", SIZE) for i in range(8)]
        for metric in metrics:
            metric.add(*(points_in_image(unit, torch.tensor(maps), SIZE) for unit in (pred, truth)))
        for p, t, m in zip(
            pred.double().numpy(), truth.double().numpy(), torch.tensor(maps).double().tolist(), strict=True
        ):
            p, t = (PixelMap(*m).to_image(unit_to_input(x, SIZE)) for x in (p, t))
            nme = np.linalg.norm(p - t, axis=1).mean() / np.linalg.norm(t.max(0) - t.min(0))
            expected.append((((p - t) ** 2).mean(), nme))
    assert [m.value for m in metrics] == pytest.approx(np.mean(expected, 0), rel=1e-9)


def test_points_in_image_undoes_the_map():
    _, truth, maps = batch(WIDE, TALL)
    assert points_in_image(truth, maps, SIZE) == pytest.approx(torch.tensor([WIDE[2], TALL[2]]).double())


def test_nme_of_a_point_alone_is_its_distance():
    assert nme(torch.tensor([[[4.0, 6.0]]]), torch.tensor([[[1.0, 2.0]]])).tolist() == [5.0]


def test_nme_measures_each_image_by_its_own_box_however_small():
    truth = torch.tensor([[[0.0, 0.0], [0.3, 0.4]], [[100.0, 100.0], [106.0, 108.0]], [[5.0, 5.0], [5.0, 5.0]]])
    pred = truth + torch.tensor([[[3.0, 4.0]], [[0.0, 2.0]], [[0.0, 7.0]]])
    assert nme(pred, truth).tolist() == pytest.approx([5 / 0.5, 2 / 10, 7])


# three points, the first two 10 px apart, their box 30 x 40: its diagonal is 50
TRUTH = np.array([[[0.0, 0.0], [6.0, 8.0], [30.0, 40.0]]] * 4)
# every point is off by 0, 1, 2 and 10 px
PRED = TRUTH + np.array([[0.0, 0.0], [0.6, 0.8], [-2.0, 0.0], [8.0, 6.0]])[:, None]
SIZES = [[300, 400]] * 4  # the diagonal is 500


@pytest.mark.parametrize(
    "normaliser,length", [("box_diag", 50), ("image_diag", 500), ((0, 1), 10), ((1, 0), 10)], ids=str
)
def test_nme_divides_the_mean_distance_by_the_chosen_length(normaliser, length):
    assert nme(PRED, TRUTH, normaliser, SIZES).tolist() == pytest.approx([0, 1 / length, 2 / length, 10 / length])
    assert nme(torch.tensor(PRED), torch.tensor(TRUTH), normaliser, torch.tensor(SIZES)).tolist() == pytest.approx(
        nme(PRED, TRUTH, normaliser, SIZES).tolist()
    )


def test_auc_and_failure_rate_by_hand():
    # box diagonal: errors 0, 0.02, 0.04, 0.2; at 0.08 they add 1, 3/4, 1/2 and 0 to the area
    assert float(auc(PRED, TRUTH)) == pytest.approx((1 + 3 / 4 + 1 / 2 + 0) / 4)
    assert float(failure_rate(PRED, TRUTH)) == 1 / 4
    # the distance of two points: errors 0, 0.1, 0.2, 1; at 0.4 they add 1, 3/4, 1/2 and 0
    assert float(auc(PRED, TRUTH, (0, 1), 0.4)) == pytest.approx((1 + 3 / 4 + 1 / 2 + 0) / 4)
    assert float(failure_rate(PRED, TRUTH, (0, 1), 0.15)) == 2 / 4
    # the image diagonal: errors 0, 0.002, 0.004, 0.02
    assert float(auc(PRED, TRUTH, "image_diag", sizes=SIZES)) == pytest.approx((1 + 39 / 40 + 38 / 40 + 3 / 4) / 4)
    assert float(failure_rate(PRED, TRUTH, "image_diag", sizes=SIZES)) == 0


def test_an_error_equal_to_the_threshold_is_no_failure():
    truth = np.array([[[0.0, 0.0], [4.0, 0.0]]])  # a box of 4 px
    assert float(failure_rate(truth + [[0.0, 1.0]], truth, threshold=0.25)) == 0
    assert float(failure_rate(truth + [[0.0, 1.0]], truth, threshold=0.2499)) == 1


def test_auc_is_the_area_under_the_curve_of_cumulative_errors():
    truth = np.array([[[0.0, 0.0], [3.0, 4.0]]] * 200)
    pred = truth + np.random.default_rng(0).normal(0, 0.3, truth.shape)
    errors = nme(pred, truth).numpy()
    x = np.linspace(0, 0.08, 20_001)
    curve = (errors[:, None] <= x[:-1]).mean(0)
    assert 0.1 < float(auc(pred, truth)) == pytest.approx(curve.mean(), abs=1e-4)


def test_auc_and_failure_rate_are_metrics_of_a_learner():
    metrics = [AUC((0, 1), 0.2), FailureRate((0, 1), 0.2)]
    for metric in metrics:
        add(metric, WIDE, WIDE)  # errors 1.5 / 50 = 0.03 twice
        add(metric, TALL)  # 1.5 / 5 = 0.3
    assert [m.name for m in metrics] == ["auc", "failure_rate"]
    assert [m.value for m in metrics] == pytest.approx([(0.85 + 0.85 + 0) / 3, 1 / 3])


def test_image_diag_needs_sizes():
    with pytest.raises(UserError, match="image_diag needs the images' sizes"):
        auc(PRED, TRUTH, "image_diag")
    for metric in (AUC, FailureRate):
        with pytest.raises(UserError, match="a batch does not hold the images' sizes"):
            metric("image_diag")
    with pytest.raises(UserError, match="normaliser is 'box': box_diag, image_diag or two point indices expected"):
        nme(PRED, TRUTH, "box")


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_metrics_are_float64_on_the_device_and_on_the_cpu_for_mps(device):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        unit, maps = torch.empty(2, 5, 2, device=device), torch.empty(2, 6, device=device)
        try:
            unit.as_subclass(torch.Tensor)
        except RuntimeError as e:
            pytest.skip(f"fake tensors of torch 2.8 and earlier: {e}")
        points = points_in_image(unit.bfloat16(), maps, 32)
    assert points.dtype == torch.float64 and points.device.type == ("cpu" if device == "mps" else device)


GAP = [np.nan, np.nan]


def test_score_is_pooled_over_the_labelled_coordinates():
    metric = default_metrics()[0]
    truth = torch.tensor([[[0.0, 0.0], [1.0, 1.0]], [[5.0, 5.0], GAP], [GAP, GAP]], dtype=torch.float64)
    pred = torch.tensor([[[1.0, 0.0], [1.0, 1.0]], [[5.0, 8.0], [99.0, 99.0]], [[7.0, 7.0], [7.0, 7.0]]]).double()
    metric.add(pred[:1], truth[:1])
    metric.add(pred[1:], truth[1:])
    metric.add(pred[2:], truth[2:])  # nothing is labelled
    assert metric.value == pytest.approx((1 + 9) / 6) and metric.count == 4
    assert mean_squared_error(pred, truth)[:2].tolist() == [1 / 4, 9 / 2]
    metric.add(pred[:1] * np.nan, truth[:1])  # what a network predicts is not left out
    assert np.isnan(metric.value)


def test_complete_labels_have_the_plain_means_to_the_bit():
    pred, truth = torch.rand(2, 7, 971, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    score, error = default_metrics(np.random.default_rng(0).random((971, 2)))
    for metric in (score, error):
        metric.add(pred[:4], truth[:4])
        metric.add(pred[4:], truth[4:])
    squared = ((pred - truth) ** 2).mean((1, 2))
    assert score.value == float(squared[:4].mean() * 4 + squared[4:].mean() * 3) / 7
    by_box = (pred - truth).norm(dim=-1).mean(1) / (truth.amax(1) - truth.amin(1)).norm(dim=-1)
    assert torch.equal(nme(pred, truth), by_box)
    assert error.value == float(by_box[:4].mean() * 4 + by_box[4:].mean() * 3) / 7
    assert torch.equal(auc(pred, truth), (1 - by_box / 0.08).clamp(min=0).mean())


def test_nme_takes_the_annotated_box_or_fills_in_missing_points_from_the_mean_shape():
    shape = np.array([[0.0, 0.0], [3.0, 0.0], [0.0, 4.0], [3.0, 4.0]])
    truth = 10 * shape[None] + 5  # its box has a diagonal of 50
    pred, gaps = truth + [3.0, 4.0], truth.copy()
    gaps[0, 3] = np.nan
    assert nme(pred, truth).tolist() == nme(pred, gaps, shape=shape).tolist() == [pytest.approx(5 / 50)]
    turned = (gaps @ np.array([[0, 1], [-1, 0]])) * 2  # the shape is laid by a similarity
    assert nme(turned + [3.0, 4.0], turned, shape=shape).tolist() == [pytest.approx(5 / 100)]
    assert nme(pred, gaps, boxes=[[0, 0, 60, 80]]).tolist() == [pytest.approx(5 / 100)]
    assert nme(pred, gaps, shape=shape, boxes=[[np.nan] * 4]).tolist() == [pytest.approx(5 / 50)]
    assert nme(pred, gaps, (0, 1)).tolist() == [pytest.approx(5 / 30)]


def test_images_without_a_length_leave_nme_auc_and_failure_rate():
    truth = np.concatenate([TRUTH, TRUTH])
    truth[4:, 1:] = np.nan  # one point alone is not laid onto
    pred = np.concatenate([PRED, PRED + 99])
    shape = TRUTH[0]
    assert nme(pred, truth, shape=shape).isnan().tolist() == [False] * 4 + [True] * 4
    assert auc(pred, truth, shape=shape) == auc(PRED, TRUTH)
    assert failure_rate(pred, truth, shape=shape) == failure_rate(PRED, TRUTH)
    for metric in (default_metrics(shape)[1], AUC(), FailureRate()):
        metric.add(torch.tensor(pred[4:]), torch.tensor(truth[4:]))
        assert metric.value is None and metric.count == 4
        metric.add(torch.tensor(pred), torch.tensor(truth))
        both = metric.value
        metric.reset()
        metric.add(torch.tensor(PRED), torch.tensor(TRUTH))
        assert both == metric.value


def test_sums_over_processes_may_hold_a_process_without_labels(monkeypatch):
    metric, other = default_metrics()[0], default_metrics()[0]
    metric.add(torch.tensor(PRED), torch.tensor(TRUTH))
    other.add(torch.tensor(PRED), torch.tensor(TRUTH) * np.nan)
    before = metric.value
    sums = [metric.total, metric.squares, metric.weight, metric.count]
    monkeypatch.setattr("landmarks_fastai.metrics.all_reduce", lambda values: torch.tensor(values) + torch.tensor(sums))
    sum_over_processes([other])
    assert other.value == before and other.count == 8


def test_standard_error_of_a_score():
    truth, metric = torch.zeros(6, 4, 2), default_metrics()[0]
    values = torch.tensor([1.0, 4, 2, 9, 3, 5])
    for part in (slice(0, 2), slice(2, 6)):
        metric.add(values[part, None, None].sqrt().expand(-1, 4, 2), truth[part])
    assert metric.value == pytest.approx(4.0) and metric.error == pytest.approx(float(values.std()) / 6**0.5)
    metric.reset()
    metric.add(torch.ones(1, 4, 2), truth[:1])
    assert metric.error == math.inf  # one image has no spread
