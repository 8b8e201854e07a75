"What a person can switch on, off or over: recipes, averages, looks, rates, time, another size."

import time

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.training import GradientAccumulation
from PIL import Image
from torch import nn

from landmarks_fastai.cli import app, arguments, resolve
from landmarks_fastai.data.block import landmark_dataloaders
from landmarks_fastai.data.flip import predict_with_flip
from landmarks_fastai.data.items import labelled_images
from landmarks_fastai.models.heads import init_head
from landmarks_fastai.models.networks import METADATA, build_model
from landmarks_fastai.runs.checkpoint import FORMAT, read_checkpoint
from landmarks_fastai.settings import RECIPES, Settings
from landmarks_fastai.training.callbacks.evaluation import Average
from landmarks_fastai.training.callbacks.schedules import TimeLimit
from landmarks_fastai.training.learner import landmark_learner
from landmarks_fastai.utils.hardware import Machine
from tests.conftest import ARCH, N_POINTS, N_TRAIN, QUICK, every_learner_has
from tests.training.test_callbacks import learner
from tests.training.test_stage import same, tensors


def best(tmp_path, name):
    return read_checkpoint(tmp_path / "here" / "runs" / f"{name}/best.pth")


def table_head(out):
    "The line above the epochs."
    return next(line for line in out.splitlines() if "train_loss" in line)


def history(tmp_path, name):
    return pd.read_csv(tmp_path / "here" / "runs" / f"{name}/history.csv")


def test_the_baseline_recipe_switches_every_addition_off(run_script, drawn, tmp_path):
    code, out, _ = run_script(f"train.py --recipe baseline {QUICK} -n s -d", drawn)
    settings = best(tmp_path, "s").settings
    assert code == 0 and "mirror" not in out
    for name, value in RECIPES["baseline"].items():
        assert getattr(settings, name) == value, name
    assert not settings.flip_indices and settings.lr == 3e-4 and settings.opt == "adamw" and settings.wd == 0.05
    assert list(history(tmp_path, "s").columns) == [
        "epoch",
        "train_loss",
        "valid_loss",
        "score",
        "nme_box_diag",
        "lr",
        "time",
    ]
    later = resolve.next_settings(arguments.finetune_arguments(["-pm", "s"]), settings)
    assert later.targets == "pixels" and later.aug == 0
    # one part of it, typed, wins over the recipe
    typed = resolve.first_settings(arguments.train_arguments(["--recipe", "baseline", "--loss", "l1"]), drawn=False)
    assert typed.loss == "l1" and typed.targets == "pixels"


def test_a_network_in_pixels_starts_at_the_corner_and_one_in_units_at_the_mean_shape():
    shape = torch.rand(5, 2) - 0.5
    images = torch.rand(2, 3, 32, 32)
    pixels = build_model("resnet18", "linear", 5, 32, "pixels").eval()
    with torch.no_grad():
        assert (pixels(images) + 1).abs().max() < 0.2  # the baseline's initialisation: all points at the top left
        init_head(pixels, shape)
        units = build_model("resnet18", "linear", 5, 32).eval()
        init_head(units, shape)
        for model in (pixels, units):
            assert model(images).reshape(2, 5, 2).numpy() == pytest.approx(shape.expand(2, 5, 2).numpy(), abs=0.1)


def test_the_average_is_that_of_pytorch_with_a_memory_that_grows():
    learn = learner([1] * 4)
    average, seen = Average(0.5), []

    class Watch(Callback):
        order = 46

        def after_step(self):
            seen.append(self.model[1][0].weight.detach().clone())

    learn.fit(4, lr=0.1, cbs=[average, Watch()])
    expected = seen[0]
    for n, weight in enumerate(seen[1:], 1):
        keep = min(0.5, (1 + n) / (10 + n))
        expected = keep * expected + (1 - keep) * weight
    assert torch.allclose(average.network[1][0].weight, expected, atol=1e-6)
    assert not torch.allclose(average.network[1][0].weight, seen[-1])
    assert not torch.equal(average.network[0][1].running_mean, learn.model[0][1].running_mean)  # norms too


def test_the_better_of_network_and_average_is_kept(run_script, drawn, tmp_path):
    "What the table calls `ema` is the score of the file, when the file is the average."
    assert run_script(f"train.py {QUICK} -e 3 -lr 3e-3 -n e -d", drawn)[0] == 0
    table, kept = history(tmp_path, "e"), best(tmp_path, "e")
    assert kept.score == pytest.approx(table[["score", "ema"]].min().min(), rel=1e-5)
    code, out, _ = run_script("finetune.py -e 1 --workers 0 -n e2 -pm e")
    assert code == 0 and f"loaded: score {kept.score:.6g}" in out
    # without an average the same seed gives the same network, epoch by epoch
    assert run_script(f"train.py {QUICK} -e 3 -lr 3e-3 --ema 0 -n p -d", drawn)[0] == 0
    assert history(tmp_path, "p").score.tolist() == table.score.tolist() and "ema" not in history(tmp_path, "p")
    assert best(tmp_path, "p").score == table.score.min()


def test_flip_test_in_validation_and_prediction(run_script, drawn, tmp_path):
    from landmarks_fastai.inference.predictor import FittedImages, predict_batches

    code, out, _ = run_script(f"train.py {QUICK} -e 2 --tta -n t -d", drawn)
    kept, table = best(tmp_path, "t"), history(tmp_path, "t")
    assert code == 0 and list(table.columns[6:8]) == ["flip_score", "ema"]
    assert kept.score == pytest.approx(table[["flip_score", "ema"]].min().min(), rel=1e-5)
    runs = tmp_path / "here" / "runs"
    items = labelled_images(drawn)[np.arange(32, N_TRAIN)]
    images = FittedImages(items.folder, [item.path.name for item in items.sample(99)], kept.settings)
    truth = np.stack([item.points for item in items.sample(99)]).astype(float)
    twice = np.concatenate(
        list(predict_batches(kept, images, Machine(workers=0), flip_indices=kept.settings.flip_indices))
    )
    assert ((twice - truth) ** 2).mean() == pytest.approx(kept.score, rel=1e-4)
    # predict.py looks twice where it can, and once when asked to
    assert run_script("predict.py --workers 0 -pm t")[0] == 0
    default = np.load(runs / "t/points.npy")
    assert run_script("predict.py --workers 0 --no-tta -pm t")[0] == 0
    once = np.load(runs / "t/points.npy")
    assert run_script("predict.py --workers 0 --tta -pm t")[0] == 0
    assert np.array_equal(default, np.load(runs / "t/points.npy")) and not np.array_equal(default, once)


def test_flip_test_of_a_mirrored_image_is_the_mirrored_prediction(quick_run):
    "The one property that the flip test has and a single prediction has not."
    kept = read_checkpoint(quick_run / "best.pth")
    model, flip_indices = kept.model(), list(kept.settings.flip_indices)
    images = torch.rand(4, 3, 32, 32)
    with torch.no_grad():
        there, back = (
            predict_with_flip(model, images, flip_indices),
            predict_with_flip(model, images.flip(-1), flip_indices),
        )
    assert torch.allclose(back[:, flip_indices] * torch.tensor([-1.0, 1.0]), there, atol=1e-5)


def test_a_stage_at_another_size_scores_the_loaded_model_at_its_own_first(run_script, drawn, tmp_path):
    assert run_script(f"train.py {QUICK} -e 2 -lr 1e-3 -n small -d", drawn)[0] == 0
    small = best(tmp_path, "small")
    # a body of random numbers on four steps of a huge rate: no epoch of this stage can win
    code, out, err = run_script("finetune.py -e 1 --size 64 --fit pad --workers 0 -lr 10 --ema 0 -n kept -pm small")
    assert (code, err) == (0, "")
    assert f"loaded: score {small.score:.6g} on the validation rows" in out
    assert "that is at 32 px, crop; at 64 px, pad, it scores" in out
    kept = best(tmp_path, "kept")
    assert kept.epoch == -1 and "the loaded model, which no epoch beat" in out
    assert (kept.settings.size, kept.settings.fit) == (32, "crop") and kept.score == pytest.approx(small.score)
    assert same(tmp_path / "here/runs/small/best.pth", tmp_path / "here/runs/kept/best.pth")
    assert run_script("predict.py --workers 0 -pm kept")[0] == 0
    # and where an epoch wins, the checkpoint is of the new size
    code, out, _ = run_script("finetune.py -e 10 --size 48 --workers 0 -lr 2e-3 -n grown -pm small")
    grown = best(tmp_path, "grown")
    assert code == 0 and grown.score < small.score and grown.settings.size == 48 and grown.epoch >= 0


def test_a_network_in_pixels_keeps_its_size(run_script, drawn):
    assert run_script(f"train.py --recipe baseline {QUICK} -n s -d", drawn)[0] == 0
    code, _, err = run_script("finetune.py --size 64 --workers 0 -pm s")
    assert code == 1 and "--targets pixels" in err and "run without --size and --fit" in err and err.count("\n") == 1


def test_lr_find_is_printed_drawn_and_used(run_script, drawn, tmp_path):
    code, out, err = run_script(f"train.py {QUICK} --lr find -n f -d", drawn)
    assert (code, err) == (0, "")
    rate = best(tmp_path, "f").settings.lr
    assert f"rate found: {rate:g}" in out and 1e-6 < rate < 1 and rate != Settings.lr
    assert history(tmp_path, "f").lr[0] == pytest.approx(rate)
    runs = tmp_path / "here" / "runs"
    assert Image.open(runs / "f/lr.png").width > 400
    assert [p.name for p in runs.iterdir() if p.is_dir()] == ["f"]  # fastai's temporary folder is gone
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


def test_onecycle_is_that_of_fastai(run_script, drawn, tmp_path):
    assert run_script(f"train.py {QUICK} -e 4 --sched onecycle -lr 1e-2 -n o -d", drawn)[0] == 0
    lr = history(tmp_path, "o").lr
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
def test_minutes_end_in_time(run_script, drawn, tmp_path, sched, monkeypatch):
    clock = Clock(monkeypatch, 0.4, 0.2)
    monkeypatch.setattr(app, "STARTED", start := clock.now)
    with every_learner_has(clock.callback()):
        assert run_script(f"train.py {QUICK} --minutes 0.4 --sched {sched} -n q -d", drawn)[0] == 0
    assert 0.2 * 60 < clock.now - start < 0.4 * 60
    table = history(tmp_path, "q")
    assert len(table) >= 2 and table.notna().all().all()
    kept = table[["score", "ema"]].min(axis=1)
    assert best(tmp_path, "q").score == pytest.approx(kept.min(), rel=1e-5)
    if sched == "onecycle":
        assert table.lr.iloc[-1] < 0.1 * table.lr.max()  # the cycle came to its end


def test_the_clock_leaves_time_for_the_validation(monkeypatch):
    learn, clock = learner([1] * 1000), Clock(monkeypatch, 0.01, 0.1)
    start = clock.now
    learn.fit(1000, cbs=[TimeLimit(start + 1.0), clock.callback()()])
    assert 0.7 < clock.now - start <= 1.0 + 1e-6


def test_patience_stops_early(run_script, drawn, tmp_path):
    assert run_script(f"train.py {QUICK} -e 1 -lr 1e-3 -n p -d", drawn)[0] == 0
    code, out, _ = run_script("finetune.py --freeze -e 9 -lr 1e-12 --patience 2 --workers 0 -n p2 -pm p")
    table = history(tmp_path, "p2")
    assert code == 0 and "early stopping" in out and len(table) < 9
    assert (
        table.best.tolist() == table[["score", "ema"]].min(axis=1).tolist()
    )  # what is kept counts, not the score alone
    assert table.best.iloc[-1] >= table.best.min()


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
    typed = resolve.first_settings(arguments.train_arguments(["--accumulate", "2"]), drawn=False)
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


def test_a_folder_called_find_is_a_folder(run_script, drawn):
    code, _, err = run_script("train.py --weights none -n x -d find")
    assert code == 1 and "find: no such folder" in err


def test_the_baseline_recipe_on_drawn_faces_is_the_baseline():
    settings = resolve.first_settings(arguments.train_arguments(["--recipe", "baseline"]), drawn=True)
    assert (settings.head, settings.lr, settings.sched, settings.init_head) == ("linear", 3e-4, "plateau", "random")
    assert (settings.arch, settings.size) == ("resnet18", 64)
    assert resolve.first_settings(arguments.train_arguments([]), drawn=True).sched == resolve.DRAWN["sched"]


def test_flip_test_without_flip_map_is_refused(run_script, drawn):
    code, _, err = run_script(f"train.py {QUICK} --tta --mirror none -n x -d", drawn)
    assert code == 1 and "--tta" in err and "--mirror none" in err and err.count("\n") == 1
    run_script(f"train.py {QUICK} --tta -n t -d", drawn)
    code, out, _ = run_script("finetune.py -e 1 --workers 0 --no-tta -n t2 -pm t")
    assert code == 0 and "flip_score" not in table_head(out) and "with the flip test" in out


def test_an_overwritten_run_leaves_no_picture_of_the_one_before(run_script, drawn, finished_run, tmp_path):
    runs = tmp_path / "here" / "runs"
    (finished_run("o") / "lr.png").write_bytes(b"of --lr find")
    assert (runs / "o/mirror.json").exists()
    assert run_script(f"train.py {QUICK} --mirror none --overwrite -n o -d", drawn)[0] == 0
    assert sorted(p.name for p in (runs / "o").iterdir()) == [
        "batch.png", "best.pth", "history.csv", "results.png", "run.json",
    ]  # fmt: skip


def test_a_network_bound_to_its_size_says_so(run_script, drawn):
    assert run_script(f"train.py {QUICK} --arch timm:vit_tiny_patch16_224 -n v -d", drawn)[0] == 0
    code, _, err = run_script("finetune.py -e 1 --size 64 --workers 0 -pm v")
    assert code == 1 and "--size 64" in err and "run without --size" in err and err.count("\n") == 1


def test_a_checkpoint_of_an_earlier_version_is_named_as_such(run_script, finished_run):
    path = finished_run("c") / "best.pth"
    state = torch.load(path, weights_only=True)
    for version in (1, FORMAT + 1):
        torch.save(state | {METADATA: state[METADATA] | {"format": version}}, path)
        code, _, err = run_script("predict.py --workers 0 -pm c")
        assert code == 1 and "another version" in err and "train again" in err


def test_all_rows_are_trained_on_and_the_score_says_so(run_script, drawn, tmp_path):
    code, out, _ = run_script(f"train.py {QUICK} --all-rows -n a -d", drawn)
    assert code == 0 and "on rows that were trained on" in out
    dls = landmark_dataloaders(drawn, size=32, batch_size=8, all_rows=True, machine=Machine(workers=0))
    assert len(dls.train_ds) == N_TRAIN and len(dls.valid_ds) == 8
    later = arguments.finetune_arguments(["-pm", "a"])
    assert resolve.next_settings(later, best(tmp_path, "a").settings).all_rows


def test_mirror_pairs_in_a_checkpoint_are_checked(run_script, finished_run):
    path = finished_run("c") / "best.pth"
    state = torch.load(path, weights_only=True)
    facts = state[METADATA]
    for wrong in ([0, 1], [1] * N_POINTS, ["a"] * N_POINTS, [N_POINTS] * N_POINTS, [[0]] * N_POINTS):
        torch.save(state | {METADATA: facts | {"settings": facts["settings"] | {"flip_indices": wrong}}}, path)
        code, _, err = run_script("predict.py --workers 0 -pm c")
        assert code == 1 and "permutation" in err and err.count("\n") == 1, wrong


def test_weights_of_a_run_start_another(run_script, drawn, finished_run, tmp_path):
    "A body trained on one set, for a head on another."
    finished_run("first")
    runs = tmp_path / "here" / "runs"
    code, out, err = run_script(f"train.py {QUICK} -lr 1e-12 -n second --weights runs/first/best.pth -d", drawn)
    assert (code, err) == (0, "")
    a, b = tensors(runs / "first/best.pth"), tensors(runs / "second/best.pth")
    body = next(k for k in a if k.startswith("0.") and k.endswith("conv1.weight"))
    assert torch.allclose(a[body], b[body], atol=1e-6)
    assert not torch.allclose(a["1.0.weight"], b["1.0.weight"], atol=1e-4)
