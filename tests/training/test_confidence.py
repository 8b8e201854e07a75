"A spread for each point: honest on other faces, and the points are those of a stage without it."

import numpy as np
import pandas as pd
import pytest
import torch
from torch.fx import symbolic_trace

from landmarks_fastai.data.flip import average_flipped
from landmarks_fastai.data.items import labelled_images
from landmarks_fastai.errors import UserError
from landmarks_fastai.geometry import unit_to_input
from landmarks_fastai.inference.predictor import Predictor
from landmarks_fastai.inference.torch_network import TorchNetwork
from landmarks_fastai.models.networks import PointsAndSpread, build_model
from landmarks_fastai.runs.checkpoint import read_checkpoint
from landmarks_fastai.settings import Settings
from landmarks_fastai.synthetic.sample import make_sample
from landmarks_fastai.training import stage
from landmarks_fastai.training.confidence import calibration, predict_held_out
from tests.helpers import ARCH, N_POINTS, QUICK, RUNS, best, check_equal, tensors

STAGE = f"{QUICK} --align 1.05 --valid-pct 0.5 -e 6"
IMAGES = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def confident_run(train_run, drawn, tmp_path_factory):
    return train_run(f"{STAGE} --confidence", drawn, tmp_path_factory.mktemp("confident"))


@pytest.fixture(scope="module")
def network(confident_run):
    return read_checkpoint(confident_run / "best.pth").model()


def test_points_and_score_are_those_of_a_stage_without_it(train_run, confident_run, drawn, tmp_path):
    plain = train_run(STAGE, drawn, tmp_path)
    with_spread, without = tensors(confident_run / "best.pth"), tensors(plain / "best.pth")
    assert with_spread.keys() - without.keys() == {"spread.image.weight", "spread.landmarks"}
    assert all(torch.equal(with_spread[k], t) for k, t in without.items())
    after, before = read_checkpoint(confident_run / "best.pth"), read_checkpoint(plain / "best.pth")
    assert (after.score, after.nme, after.epoch) == (before.score, before.nme, before.epoch)
    assert after.settings == before.settings.replace(confidence=True)
    assert torch.equal(after.model()(IMAGES), before.model()(IMAGES))


def test_two_thirds_of_the_points_of_other_faces_lie_within_the_spread(confident_run, network, tmp_path):
    other = make_sample(tmp_path / "other", 40, 1, N_POINTS, seed=8, n_asked=7, processes=1)
    held_out = predict_held_out(Predictor(confident_run / "best.pth"), labelled_images(other)[8:])
    assert held_out.errors.shape == held_out.spreads.shape == (32, N_POINTS)
    within = [(held_out.errors <= n * held_out.spreads).mean() for n in (1, 2)]
    assert 0.55 < within[0] < 0.8 and 0.9 < within[1], within
    ranks = pd.Series(held_out.errors.ravel()).rank().corr(pd.Series(held_out.spreads.ravel()).rank())
    assert ranks > 0.2, ranks


def test_the_table_is_in_pixels_of_the_stored_image(confident_run, network, drawn):
    "A single pass worked out by hand, with one image at a time."
    table = pd.read_csv(confident_run / "confidence.csv")
    assert list(table.columns) == ["landmark", "mean_error", "median_spread", "within_1", "within_2"]
    assert table.landmark.tolist() == list(range(N_POINTS))
    assert (table.within_1 <= table.within_2).all() and table.within_1.mean() == pytest.approx(0.68, abs=0.08)
    checkpoint = read_checkpoint(confident_run / "best.pth")
    settings, facts, both = checkpoint.settings.replace(align=0.0), checkpoint.facts, PointsAndSpread(network)
    item = labelled_images(drawn)[1]
    held_out = predict_held_out(Predictor(TorchNetwork(both, settings, facts)), [item])
    ((fitted, to_input),) = item.picture.inputs([None], settings.fit, settings.size)
    pixels = torch.from_numpy(np.array(fitted)).permute(2, 0, 1)[None] / 255
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (facts.mean, facts.std))
    with torch.no_grad():
        inputs = (pixels - mean) / std
        both_ways = zip(both(inputs), both(inputs.flip(-1)), strict=True)
        unit, spread = (average_flipped(*pair, facts.flip_indices) for pair in both_ways)
    points = to_input.to_image(unit_to_input(unit[0].double().numpy(), settings.size))
    assert held_out.errors[0] == pytest.approx(np.linalg.norm(points - item.points, axis=1), rel=1e-3)
    assert held_out.spreads[0] == pytest.approx(spread[0].numpy() * settings.size / 2 / to_input.scale, rel=1e-3)


def test_both_outputs_in_one_pass_traceable_and_exportable(network):
    both = PointsAndSpread(network).eval()
    points, spread = both(IMAGES)
    assert torch.equal(points, network(IMAGES)) and spread.shape == (3, N_POINTS) and (spread > 0).all()
    for traced in (symbolic_trace(both), torch.export.export(both, (IMAGES,)).module()):
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(traced(IMAGES), (points, spread), strict=True))
    with pytest.raises(ValueError, match="without --confidence"):
        PointsAndSpread(build_model(ARCH, "linear", 5, 32))


def test_the_flip_test_averages_the_spreads_under_the_flip_indices(network, confident_run):
    both, flip_indices = PointsAndSpread(network), read_checkpoint(confident_run / "best.pth").facts.flip_indices
    with torch.no_grad():
        spread, mirrored = both(IMAGES)[1], both(IMAGES.flip(-1))[1]
    expected = (spread + torch.stack([mirrored[:, k] for k in flip_indices], 1)) / 2
    assert torch.allclose(average_flipped(spread, mirrored, flip_indices), expected)
    assert np.allclose(average_flipped(spread.numpy(), mirrored.numpy(), flip_indices), expected)


def test_later_stages_fit_it_again_or_end_it(confident_run, run_script, drawn, tmp_path):
    path = confident_run / "best.pth"
    code, out, err = run_script("finetune.py -e 1 --workers 0 -n again -pm", path)
    first, again = read_checkpoint(path), best("again")
    assert (code, err) == (0, "") and again.settings.confidence and "confidence: median spread" in out
    assert f"loaded: score {first.score:.6g} on the validation rows; its stage reported {first.score:.6g}" in out
    assert again.epoch == 0 and not torch.equal(
        tensors(path)["spread.image.weight"], tensors(again.path)["spread.image.weight"]
    )
    # no epoch beats the loaded model
    line = "finetune.py -e 1 --opt sgd -lr 10 --no-confidence --workers 0 -n none -pm again"
    code, out, err = run_script(line)
    assert code == 0 and "which no epoch beat" in out and "confidence" not in out
    none = best("none")
    assert not none.settings.confidence and not any(k.startswith("spread") for k in tensors(none.path))
    code, _, err = run_script(f"train.py {QUICK} -n body --weights", path, "-d", drawn)
    assert (code, err) == (0, "")
    assert run_script("predict.py --workers 0 -pm", path)[::2] == (0, "")


@pytest.mark.train
def test_a_stage_that_is_stopped_before_the_spread_has_a_checkpoint_and_resumes(run_script, drawn, monkeypatch):
    line = f"train.py {QUICK} --align 1.05 --confidence -e 2 -d {drawn} -n"
    assert run_script(f"{line} whole")[0] == 0

    def ctrl_c(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(stage, "add_confidence", ctrl_c)
        assert run_script(f"{line} parts")[0] == 130
    stopped = best("parts")
    assert not stopped.settings.confidence and stopped.model().spread is None
    code, out, err = run_script("train.py --resume -n parts")
    assert (code, err) == (0, "") and "confidence: median spread" in out
    check_equal("whole", "parts")
    assert (RUNS / "whole/confidence.csv").read_text() == (RUNS / "parts/confidence.csv").read_text()


def test_a_checkpoint_that_lacks_its_spread_is_refused(confident_run, tmp_path):
    state = torch.load(confident_run / "best.pth", weights_only=True)
    torch.save({k: t for k, t in state.items() if not k.startswith("spread")}, tmp_path / "lacks.pth")
    with pytest.raises(UserError, match="2 tensors differ, the first spread.image.weight"):
        read_checkpoint(tmp_path / "lacks.pth").model()
    assert Settings().confidence is False


def test_a_landmark_without_validation_labels_has_the_factor_of_all():
    ratios = np.random.default_rng(0).gamma(2, 1, (400, 3)) * [1, 4, 1]
    ratios[:, 2] = np.nan
    ratios[::2, 1] = np.nan
    factors = calibration(ratios)
    assert factors[2] == pytest.approx(np.nanquantile(ratios, 0.68))
    alone = calibration(ratios[1::2, :2])
    assert factors[0] < factors[2] < factors[1] and factors[1] == pytest.approx(alone[1], rel=0.15)
