"Stages, through the scripts that a person uses: what is written, what is equal, what is never worse than it was given."

import json

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from landmarks_fastai.data.block import landmark_dataloaders
from landmarks_fastai.data.items import labelled_images
from landmarks_fastai.data.split import split_rows
from landmarks_fastai.models.networks import METADATA
from landmarks_fastai.runs.checkpoint import read_checkpoint
from landmarks_fastai.training.learner import landmark_learner
from landmarks_fastai.training.stage import fit_stage, note_low_lr
from landmarks_fastai.utils.hardware import Machine
from tests.helpers import ARCH, N_POINTS, QUICK


def tensors(path):
    return {k: t for k, t in torch.load(path, weights_only=True).items() if k != METADATA}


def same(a, b):
    a, b = tensors(a), tensors(b)
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_three_stages_and_a_submission(run_script, drawn, tmp_path):
    "The four commands of the README, with a small network."
    runs = tmp_path / "here" / "runs"
    code, out, err = run_script(f"train.py {QUICK} -e 2 -lr 1e-3 -d", drawn, "-n", "r_e_2")
    assert (code, err) == (0, "") and "run r_e_2" in out.splitlines() and "run r_e_2: score" in out
    first = read_checkpoint(runs / "r_e_2/best.pth")
    history = pd.read_csv(runs / "r_e_2/history.csv")
    assert list(history.columns) == ["epoch", "train_loss", "valid_loss", "score", "nme_box_diag", "lr", "ema", "time"]
    each = history[["score", "ema"]].min(axis=1)
    assert first.score == each.min() and first.epoch == each.idxmin()
    assert Image.open(runs / "r_e_2/results.png").width > 500

    code, out, err = run_script("finetune.py -e 1 --workers 0 -n r_e_2+1 -pm r_e_2_best.pth")
    assert (code, err) == (0, "")
    second = read_checkpoint(runs / "r_e_2+1/best.pth")
    assert f"loaded: score {first.score:.6g} on the validation rows; its stage reported {first.score:.6g}" in out
    assert second.score <= first.score
    assert second.settings.lr == pytest.approx(1e-4)
    kept = (
        "arch",
        "head",
        "size",
        "fit",
        "data",
        "valid_pct",
        "split_seed",
        "opt",
        "wd",
        "sched",
        "batch_size",
    )
    assert all(getattr(second.settings, k) == getattr(first.settings, k) for k in kept)
    assert second.facts == first.facts

    code, out, err = run_script("finetune.py -e 1 --workers 0 -pm", runs / "r_e_2+1/best.pth")
    assert code == 0 and "run r_e_2+1+1, from " in out and "run r_e_2+1+1:" in out
    third = read_checkpoint(runs / "r_e_2+1+1/best.pth")
    assert third.score <= second.score and third.settings.lr == pytest.approx(1e-5)

    code, out, err = run_script("predict.py --workers 0 -pm r_e_2+1+1_best.pth")
    assert (code, err) == (0, "")
    assert len((runs / "r_e_2+1+1/submit.csv").read_text().splitlines()) == 1 + 6


def test_defaults_reach_the_checkpoint(run_script, drawn, tmp_path):
    "`finetune.py -pm X` alone is 6 epochs at a tenth; `--fit`, `--head`, `--opt` and `--sched` come from X."
    line = f"train.py {QUICK} --head 32,bn,relu,drop0.1 --fit pad --opt sgd --sched step --step-size 2 --gamma 0.5 -lr 0.01 -n x -d"
    assert run_script(line, drawn)[0] == 0
    assert run_script("finetune.py --workers 0 -pm x")[0] == 0
    s = read_checkpoint(tmp_path / "here" / "runs" / "x+6/best.pth").settings
    assert (s.epochs, s.lr, s.head, s.fit, s.opt, s.wd, s.sched, s.step_size) == (
        6, pytest.approx(1e-3), "32,bn,relu,drop0.1", "pad", "sgd", 0.0, "step", 2,
    )  # fmt: skip
    lr = pd.read_csv(tmp_path / "here" / "runs" / "x+6/history.csv").lr
    assert lr.tolist() == pytest.approx([1e-3, 1e-3, 5e-4, 5e-4, 2.5e-4, 2.5e-4])


def test_a_stage_never_ends_with_worse_than_it_was_given(run_script, drawn, tmp_path):
    runs = tmp_path / "here" / "runs"
    assert run_script(f"train.py {QUICK} -e 2 -lr 1e-3 -n good -d", drawn)[0] == 0
    code, out, _ = run_script("finetune.py -e 1 -lr 10 --workers 0 --opt sgd -n ruined -pm good_best.pth")
    assert code == 0 and "the loaded model, which no epoch beat" in out
    good, kept = read_checkpoint(runs / "good/best.pth"), read_checkpoint(runs / "ruined/best.pth")
    assert kept.score == pytest.approx(good.score, abs=1e-3) and kept.epoch == -1
    assert same(runs / "good/best.pth", runs / "ruined/best.pth")


def test_a_seed_makes_two_runs_equal_to_the_last_bit(run_script, drawn, tmp_path):
    runs = tmp_path / "here" / "runs"
    for name, seed in [("a", 3), ("b", 3), ("c", 4)]:
        assert run_script(f"train.py {QUICK} -n {name} --seed {seed} --head 16,drop0.5 -d", drawn)[0] == 0
    assert same(runs / "a/best.pth", runs / "b/best.pth")
    assert not same(runs / "a/best.pth", runs / "c/best.pth")
    strip = lambda n: pd.read_csv(runs / f"{n}/history.csv").drop(columns="time")  # noqa: E731
    assert strip("a").equals(strip("b"))


def test_freeze_leaves_the_body_as_it_was_running_means_included(run_script, finished_run, tmp_path):
    runs = tmp_path / "here" / "runs"
    finished_run("whole")
    assert run_script("finetune.py --freeze -e 3 -lr 1e-3 --workers 0 -n head -pm whole")[0] == 0
    before, after = tensors(runs / "whole/best.pth"), tensors(runs / "head/best.pth")
    assert read_checkpoint(runs / "head/best.pth").epoch >= 0  # an epoch won: it did learn
    assert all(torch.equal(before[k], after[k]) for k in before if k.startswith("0."))
    assert not torch.equal(before["1.0.weight"], after["1.0.weight"])


def test_score_is_the_competition_score_of_the_validation_rows(run_script, drawn, tmp_path):
    "What the table says, against the predictions of predict.py's own path on the same images."
    from landmarks_fastai.inference.predictor import Predictor

    assert run_script(f"train.py {QUICK} --fit squish -n s -d", drawn)[0] == 0
    best = read_checkpoint(tmp_path / "here" / "runs" / "s/best.pth")
    items = labelled_images(drawn)
    items = items[split_rows(len(items), best.settings)[1]]
    found = Predictor(best.path, flip_test=False)([item.path for item in items.sample(99)])
    points = np.stack([each.points for each in found])
    truth = np.stack([item.points for item in items.sample(99)])
    assert np.mean((points.astype(np.float64) - truth) ** 2) == pytest.approx(best.score, rel=1e-4)


def test_the_checkpoint_is_tensors_and_their_meaning(quick_run):
    state = torch.load(quick_run / "best.pth", weights_only=True)
    metadata = state.pop(METADATA)
    assert metadata == json.loads(json.dumps(metadata)) and all(isinstance(t, torch.Tensor) for t in state.values())
    assert metadata["facts"]["n_points"] == N_POINTS and metadata["settings"]["size"] == 32
    files = [
        "batch.png",
        "best.pth",
        "history.csv",
        "mirror.json",
        "mirror.png",
        "results.png",
        "run.json",
    ]
    assert sorted(p.name for p in quick_run.iterdir()) == files


def test_a_rate_that_ruins_everything_says_so_and_saves_nothing(run_script, drawn, tmp_path):
    code, out, err = run_script(f"train.py {QUICK} -e 2 -b 4 --opt sgd -lr 999 -n boom -d", drawn)
    assert code == 1 and "try a lower -lr" in err and "epoch" in err and err.count("\n") == 1
    assert not (tmp_path / "here" / "runs" / "boom/best.pth").exists()


@pytest.fixture
def learn(drawn, tmp_path):
    machine = Machine(workers=0)
    dls = landmark_dataloaders(drawn, size=32, batch_size=8, epochs=1, align=0.0, machine=machine)
    return landmark_learner(dls, ARCH, "none", machine=machine, path=tmp_path)


def test_a_stage_without_the_command_line(learn, tmp_path):
    "A Learner of fastai: a person in a notebook may validate, load, and show results."
    from landmarks_fastai.runs.run import Run
    from landmarks_fastai.training.learner import load_best

    run = Run(tmp_path, "lib")
    best = fit_stage(learn, run)
    assert learn.validate()[1] == pytest.approx(best.score, rel=1e-5)  # the best is loaded, average or not
    load_best(learn, best.path)
    assert learn.validate()[1] == pytest.approx(best.score, rel=1e-5)


def test_what_learn_save_writes_predicts_and_trains_on(run_script, learn, drawn, tmp_path):
    learn.save(tmp_path / "here" / "saved")
    learn.save(tmp_path / "here" / "weights", with_opt=False)
    for name in ("saved", "weights"):
        assert run_script(f"predict.py --workers 0 -pm {name} -d", drawn)[::2] == (0, "")
    code, out, err = run_script("finetune.py -e 1 --workers 0 -pm saved")
    assert (code, err) == (0, "") and "reported" not in out


def test_few_steps_at_a_rate_far_below_the_default_are_noted(learn, capsys):
    "One epoch of four batches; with the competition's 393,930 images the published entry's 3e-4 has 98,000 steps."
    noted = lambda: "note:" in capsys.readouterr().out  # noqa: E731
    learn.settings = learn.settings.replace(lr=3e-4)
    note_low_lr(learn, 2e-3)
    out = capsys.readouterr().out
    assert "4 steps are few for -lr 0.0003" in out and "the default is -lr 0.002" in out
    note_low_lr(learn, 3e-4)  # the default itself, of --recipe baseline
    assert not noted()
    learn.settings = learn.settings.replace(lr=1e-3)
    note_low_lr(learn, 2e-3)
    assert not noted()
    learn.settings = learn.settings.replace(lr=3e-4, epochs=25_000)
    note_low_lr(learn, 2e-3)
    assert not noted()
