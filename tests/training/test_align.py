"The second pass through the scripts: one network makes both, in training, validation, prediction and Python alike."

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib import pyplot as plt
from PIL import Image

from landmarks_fastai import landmark_dataloaders, landmark_learner
from landmarks_fastai.data.align import Alignment, alignment_of
from landmarks_fastai.data.flip import average_flipped
from landmarks_fastai.geometry import cut_image, unit_to_input
from landmarks_fastai.inference.predictor import Predictor
from landmarks_fastai.inference.scoring import score_rows
from landmarks_fastai.inference.torch_network import TorchNetwork, open_checkpoint
from landmarks_fastai.runs.checkpoint import read_checkpoint
from landmarks_fastai.training.learner import load_best
from landmarks_fastai.utils.hardware import Machine
from tests.helpers import N_POINTS, N_TEST, QUICK, best

ALIGN = f"{QUICK} --align 1.05"


@pytest.fixture(scope="module")
def aligned_run(train_run, drawn, tmp_path_factory):
    "The best.pth of a stage with aligned crops, and its history."
    return train_run(f"{ALIGN} -e 3", drawn, tmp_path_factory.mktemp("aligned"))


def learner(run, drawn, **machine):
    checkpoint = read_checkpoint(run / "best.pth")
    dls = landmark_dataloaders(drawn, checkpoint.settings, checkpoint.facts, machine=Machine(workers=0, **machine))
    return load_best(landmark_learner(dls, weights=None, path=run), checkpoint.path), checkpoint


def test_the_reported_score_is_that_of_both_passes(aligned_run, drawn):
    learn, checkpoint = learner(aligned_run, drawn)
    history = pd.read_csv(aligned_run / "history.csv")
    row = history.loc[history.score.idxmin()]
    assert (checkpoint.score, checkpoint.nme) == pytest.approx((row.score, row.nme_box_diag))
    assert min(row.first_pass, row.ema) != pytest.approx(checkpoint.score, rel=1e-2)  # of one pass
    scores = score_rows(learn.predictor(flip_test=False), list(learn.dls.valid.items))
    assert scores[:2] == pytest.approx((checkpoint.score, checkpoint.nme), rel=1e-5)
    assert list(learn.validate()[1:3]) == pytest.approx([checkpoint.score, checkpoint.nme], rel=1e-5)
    images = [item.path for item in learn.dls.valid.items]
    truth = np.stack([item.points for item in learn.dls.valid.items])
    points = learn.predict_points(images, flip_test=False)
    assert ((points - truth) ** 2).mean() == pytest.approx(checkpoint.score, rel=1e-4)


@pytest.mark.parametrize("flip_test", [False, True])
def test_a_pass_sees_the_crops_of_the_points_of_the_pass_before(aligned_run, drawn, flip_test):
    "All passes worked out by hand, with one image at a time; the flip test makes a third one, over two crops."
    learn, checkpoint = learner(aligned_run, drawn)
    path = learn.dls.valid.items[0].path
    settings, facts = checkpoint.settings, checkpoint.facts
    alignment = alignment_of(settings, facts)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (facts.mean, facts.std))

    def one_pass(points, move, flip):
        (crop,) = alignment.maps(points[None])
        crop = crop._replace(c=crop.c + move * settings.size, f=crop.f + move * settings.size)
        pixels = np.array(cut_image(Image.open(path).convert("RGB"), crop, 32))
        inputs = (torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255 - mean) / std
        with torch.no_grad():
            unit = learn.model.eval()(inputs)
            if flip:
                unit = average_flipped(unit, learn.model(inputs.flip(-1)), facts.flip_indices)
        return crop.to_image(unit_to_input(unit[0].double().numpy(), 32))

    whole = Predictor(TorchNetwork(learn.model, settings.replace(align=0.0), facts), flip_test=flip_test)
    expected = one_pass(whole(path).points, 0, False)
    if flip_test:
        expected = (one_pass(expected, 0.02, True) + one_pass(expected, -0.02, True)) / 2
    assert learn.predict_points(path, flip_test=flip_test)[0] == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_predict_py_makes_both_passes(aligned_run, run_script, drawn, tmp_path, workers):
    code, _, err = run_script(f"predict.py --no-tta --workers {workers} -b 4 -pm", aligned_run / "best.pth")
    assert (code, err) == (0, "")
    points = np.load(tmp_path / "here/runs/m/points.npy")
    names = pd.read_json(tmp_path / "here/runs/m/points.json")[0].tolist()
    learn, _ = learner(aligned_run, drawn)
    expected = learn.predict_points([drawn / "test/images" / name for name in names], flip_test=False)
    assert points.shape == (N_TEST, N_POINTS, 2) and points == pytest.approx(expected, abs=0.01)


def test_a_first_pass_without_a_plausible_shape_stands(aligned_run, drawn, monkeypatch):
    _, checkpoint = learner(aligned_run, drawn)
    files = sorted((drawn / "test/images").iterdir())
    monkeypatch.setattr(Alignment, "maps", lambda self, points: [None] * len(points))
    network = open_checkpoint(checkpoint)
    results = list(Predictor(network, flip_test=False).stream(files))
    assert [result.unaligned for result in results] == [1] * N_TEST
    once = TorchNetwork(network.model, network.settings.replace(align=0.0), network.facts)
    expected = np.stack([prediction.points for prediction in Predictor(once, flip_test=False)(files)])
    assert np.stack([result.objects[0].points for result in results]) == pytest.approx(expected, abs=1e-4)
    twice = Predictor([network, network], flip_test=False).stream(files)
    assert [result.unaligned for result in twice] == [1] * N_TEST  # an object counts once


def test_a_later_stage_begins_the_second_pass_and_another_ends_it(run_script, finished_run):
    finished_run("c")
    before = best("c")
    assert before.settings.align == 0
    code, out, err = run_script("finetune.py -e 1 --workers 0 --align 1.05 -n c2 -pm c")
    assert (code, err) == (0, "") and f"loaded: score {before.score:.6g}" in out
    after = best("c2")
    assert after.score <= before.score
    code, out, err = run_script("finetune.py -e 1 --workers 0 --align off -n c3 -pm c2")
    assert (code, err) == (0, "") and f"loaded: score {after.score:.6g}" in out
    assert best("c3").score <= after.score


def test_a_picture_shows_the_second_pass(aligned_run, drawn):
    learn, _ = learner(aligned_run, drawn)
    learn.show_results(max_n=2)
    titles = [ax.get_title() for ax in plt.gcf().axes]
    plt.close("all")
    items = list(learn.dls.valid.items)
    points = learn.predict_points([item.path for item in items], flip_test=False)
    scores = [((p - item.points) ** 2).mean() for p, item in zip(points, items, strict=True)]
    shown = [t for t in titles if t.startswith("score")]
    assert len(shown) == 2 and all(any(f"{s:.4g}" in t for s in scores) for t in shown), (titles, scores)
