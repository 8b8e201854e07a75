"Stages, through the scripts that a person uses: what is written, what is equal, what is never worse than it was given."

import json

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from landmarks_fastai.data.items import labelled_images
from landmarks_fastai.data.split import split_rows
from landmarks_fastai.inference.predictor import Predictor
from landmarks_fastai.models.networks import METADATA
from landmarks_fastai.runs.checkpoint import read_checkpoint
from landmarks_fastai.runs.run import Run
from landmarks_fastai.training.learner import load_best
from landmarks_fastai.training.length import note_low_lr
from landmarks_fastai.training.stage import fit_stage
from tests.helpers import N_POINTS, QUICK, RUNS, check_equal, check_refused, equal_tensors, small_learner, tensors


@pytest.mark.train
def test_three_stages_and_a_submission(run_script, drawn, tmp_path):
    "The four commands of the README, with a small network."
    code, out, err = run_script(f"train.py {QUICK} -e 2 -lr 1e-3 -d", drawn, "-n", "r_e_2")
    assert (code, err) == (0, "") and "run r_e_2" in out.splitlines() and "run r_e_2: score" in out
    first = read_checkpoint(RUNS / "r_e_2/best.pth")
    history = pd.read_csv(RUNS / "r_e_2/history.csv")
    assert list(history.columns) == ["epoch", "train_loss", "valid_loss", "score", "nme_box_diag", "lr", "ema", "time"]
    better = history[["score", "ema"]].min(axis=1)
    assert first.score == better.min() and first.epoch == better.idxmin()
    assert Image.open(RUNS / "r_e_2/results.png").width > 500

    code, out, err = run_script("finetune.py -e 1 --workers 0 -n r_e_2+1 -pm r_e_2_best.pth")
    assert (code, err) == (0, "")
    second = read_checkpoint(RUNS / "r_e_2+1/best.pth")
    assert f"loaded: score {first.score:.6g} on the validation rows; its stage reported {first.score:.6g}" in out
    assert second.score <= first.score
    assert second.settings.lr == pytest.approx(1e-4)
    kept = "arch head size fit data valid_pct split_seed opt wd sched batch_size".split()
    assert all(getattr(second.settings, k) == getattr(first.settings, k) for k in kept)
    assert second.facts == first.facts

    code, out, err = run_script("finetune.py -e 1 --workers 0 -pm", RUNS / "r_e_2+1/best.pth")
    assert code == 0 and "run r_e_2+1+1, from " in out and "run r_e_2+1+1:" in out
    third = read_checkpoint(RUNS / "r_e_2+1+1/best.pth")
    assert third.score <= second.score and third.settings.lr == pytest.approx(1e-5)

    code, out, err = run_script("predict.py --workers 0 -pm r_e_2+1+1_best.pth")
    assert (code, err) == (0, "")
    assert len((RUNS / "r_e_2+1+1/submit.csv").read_text().splitlines()) == 1 + 6


@pytest.mark.train
def test_defaults_reach_the_checkpoint(run_script, drawn, tmp_path):
    "`finetune.py -pm X` alone is 6 epochs at a tenth; `--fit`, `--head`, `--opt` and `--sched` come from X."
    line = f"train.py {QUICK} --head 32,bn,relu,drop0.1 --fit pad --opt sgd --sched step --step-size 2 --gamma 0.5 -lr 0.01 -n x -d"
    assert run_script(line, drawn)[0] == 0
    assert run_script("finetune.py --workers 0 -pm x")[0] == 0
    s = read_checkpoint(RUNS / "x+6/best.pth").settings
    assert (s.epochs, s.lr, s.head, s.fit, s.opt, s.wd, s.sched, s.step_size) == (
        6, pytest.approx(1e-3), "32,bn,relu,drop0.1", "pad", "sgd", 0.0, "step", 2,
    )  # fmt: skip
    lr = pd.read_csv(RUNS / "x+6/history.csv").lr
    assert lr.tolist() == pytest.approx([1e-3, 1e-3, 5e-4, 5e-4, 2.5e-4, 2.5e-4])


@pytest.mark.train
def test_a_seed_makes_two_runs_equal_to_the_last_bit(run_script, drawn):
    for name, seed in [("a", 3), ("b", 3), ("c", 4)]:
        assert run_script(f"train.py {QUICK} -n {name} --seed {seed} --head 16,drop0.5 -d", drawn)[0] == 0
    check_equal("a", "b")
    assert not equal_tensors(RUNS / "a/best.pth", RUNS / "c/best.pth")


def test_freeze_leaves_the_body_as_it_was_running_means_included(run_script, finished_run, tmp_path):
    finished_run("whole")
    assert run_script("finetune.py --freeze -e 3 -lr 1e-3 --workers 0 -n head -pm whole")[0] == 0
    before, after = tensors(RUNS / "whole/best.pth"), tensors(RUNS / "head/best.pth")
    assert read_checkpoint(RUNS / "head/best.pth").epoch >= 0  # an epoch won: it did learn
    assert all(torch.equal(before[k], after[k]) for k in before if k.startswith("0."))
    assert not torch.equal(before["1.0.weight"], after["1.0.weight"])


def test_score_is_the_competition_score_of_the_validation_rows(quick_run, drawn):
    "What the table says, against the predictions of predict.py's own path on the same images."
    checkpoint, items = read_checkpoint(quick_run / "best.pth"), labelled_images(drawn)
    items = items[split_rows(len(items), checkpoint.settings)[1]]
    predictions = Predictor(checkpoint.path, flip_test=False)([item.path for item in items])
    errors = np.stack([p.points for p in predictions]).astype(float) - np.stack([item.points for item in items])
    assert np.square(errors).mean() == pytest.approx(checkpoint.score, rel=1e-4)


def test_the_checkpoint_is_tensors_and_their_meaning(quick_run):
    state = torch.load(quick_run / "best.pth", weights_only=True)
    metadata = state.pop(METADATA)
    assert metadata == json.loads(json.dumps(metadata)) and all(isinstance(t, torch.Tensor) for t in state.values())
    assert metadata["facts"]["n_points"] == N_POINTS and metadata["settings"]["size"] == 32
    files = "batch.png best.pth history.csv mirror.json mirror.png report.html results.png run.json".split()
    assert sorted(p.name for p in quick_run.iterdir()) == files


@pytest.mark.train
def test_a_rate_that_ruins_everything_says_so_and_saves_nothing(run_script, drawn):
    result = run_script(f"train.py {QUICK} -e 2 -b 4 --opt sgd -lr 999 -n boom -d", drawn)
    check_refused(result, "try a lower -lr", "epoch")
    assert not (RUNS / "boom").exists()


@pytest.fixture
def learn(drawn, tmp_path):
    return small_learner(drawn, tmp_path, epochs=1)


@pytest.mark.train
def test_a_stage_without_the_command_line(learn, tmp_path):
    "A Learner of fastai: a person in a notebook may validate, load, and show results."
    run = Run(tmp_path, "lib")
    best = fit_stage(learn, run)
    assert learn.validate()[1] == pytest.approx(best.score, rel=1e-5)  # the best is loaded, average or not
    load_best(learn, best.path)
    assert learn.validate()[1] == pytest.approx(best.score, rel=1e-5)


@pytest.mark.train
def test_what_learn_save_writes_predicts_and_trains_on(run_script, learn, drawn, tmp_path):
    learn.save(tmp_path / "here" / "saved")
    learn.save(tmp_path / "here" / "weights", with_opt=False)
    for name in ("saved", "weights"):
        assert run_script(f"predict.py --workers 0 -pm {name} -d", drawn)[::2] == (0, "")
    code, out, err = run_script("finetune.py -e 1 --workers 0 -pm saved")
    assert (code, err) == (0, "") and "reported" not in out


@pytest.mark.parametrize(
    "settings,default,noted",
    [
        ({"lr": 3e-4}, 2e-3, True),
        ({"lr": 3e-4}, 3e-4, False),  # the default itself, of --recipe baseline
        ({"lr": 1e-3}, 2e-3, False),
        ({"lr": 3e-4, "epochs": 25_000}, 2e-3, False),
    ],
)
def test_few_steps_at_a_rate_far_below_the_default_are_noted(learn, capsys, settings, default, noted):
    "One epoch of four batches; with the competition's 393,930 images the published entry's 3e-4 has 98,000 steps."
    capsys.readouterr()
    learn.settings = learn.settings.replace(**settings)
    note_low_lr(learn, default)
    out = capsys.readouterr().out
    assert ("4 steps are few for -lr 0.0003" in out and "the default is -lr 0.002" in out) if noted else not out
