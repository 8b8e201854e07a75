"Options of the scripts: recipes, the running average, the flip test, another size."

import re

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.callback.core import Callback

from landmarks_fastai.cli.finetune import next_settings
from landmarks_fastai.cli.options import typed_flags
from landmarks_fastai.cli.train import DRAWN, first_settings, train_parser
from landmarks_fastai.data.align import MIN_GAIN
from landmarks_fastai.data.block import landmark_dataloaders
from landmarks_fastai.data.flip import average_flipped
from landmarks_fastai.data.items import labelled_images
from landmarks_fastai.inference.predictor import Predictor
from landmarks_fastai.inference.scoring import score_rows
from landmarks_fastai.runs.checkpoint import read_checkpoint
from landmarks_fastai.settings import RECIPES, DataFacts, Settings
from landmarks_fastai.training.callbacks.evaluation import Average
from landmarks_fastai.utils.hardware import Machine
from tests.helpers import (
    ALIGNED,
    N_POINTS,
    N_TRAIN,
    QUICK,
    RUNS,
    best,
    check_refused,
    equal_tensors,
    history,
    labels_of,
    tensors,
    tiny_learner,
    untrained,
)

CLI = "landmarks_fastai.cli"


@pytest.mark.train
def test_the_baseline_recipe_switches_every_addition_off(run_script, drawn):
    code, out, _ = run_script(f"train.py --recipe baseline {QUICK} -n s -d", drawn)
    settings = best("s").settings
    assert code == 0 and "mirror" not in out
    for name, value in RECIPES["baseline"].items():
        assert getattr(settings, name) == value, name
    assert not best("s").facts.flip_indices and settings.lr == 3e-4 and settings.opt == "adamw" and settings.wd == 0.05
    assert list(history("s").columns) == "epoch train_loss valid_loss score nme_box_diag lr".split()
    assert next_settings({}, settings, ALIGNED).aug == 0
    # one part of it, typed, wins over the recipe
    words = ["--recipe", "baseline", "--loss", "l1", "-d", "x"]
    typed = first_settings(typed_flags(train_parser().parse_args(words)))
    assert typed.loss == "l1" and typed.init_head == "random"


def test_each_later_stage_augments_half_as_much_where_crops_are_aligned():
    second = next_settings({}, Settings(), ALIGNED)
    assert (Settings().aug, second.aug, next_settings({}, second, ALIGNED).aug) == (1, 0.5, 0.25)
    assert next_settings({"aug": 1.0}, Settings(), ALIGNED).aug == 1
    for flags, settings, facts in (
        ({"align": 0.0}, Settings(), ALIGNED),
        ({}, Settings(align=0.0), DataFacts()),
        ({}, Settings(), DataFacts(align_gain=MIN_GAIN - 0.1)),  # its crops would not narrow the spread
    ):
        later = next_settings(flags, settings, facts)
        assert (later.aug, later.sched, later.freeze_bn, later.lr) == (1, "plateau", False, pytest.approx(2e-4))
    assert next_settings({"align": 1.3}, Settings(align=0.0), DataFacts()).sched == "onecycle"


@pytest.mark.train
def test_the_average_is_that_of_pytorch_with_a_memory_that_grows():
    learn = tiny_learner([1] * 4)
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


@pytest.mark.train
def test_the_better_of_network_and_average_is_saved(run_script, drawn):
    "What the table calls `ema` is the score of the file, when the file is the average."
    assert run_script(f"train.py {QUICK} -e 3 -lr 3e-3 -n e -d", drawn)[0] == 0
    table, kept = history("e"), best("e")
    assert kept.score == pytest.approx(table.score.min(), rel=1e-5) and (table.score <= table.ema).all()
    code, out, _ = run_script("finetune.py -e 1 --workers 0 -n e2 -pm e")
    assert code == 0 and f"loaded: score {kept.score:.6g}" in out
    # without an average the same seed gives the same network, epoch by epoch
    assert run_script(f"train.py {QUICK} -e 3 -lr 3e-3 --ema 0 -n p -d", drawn)[0] == 0
    plain = history("p")
    assert "ema" not in plain and table.score.tolist() == np.minimum(plain.score, table.ema).tolist()
    assert best("p").score == plain.score.min()


@pytest.mark.train
def test_flip_test_in_validation_and_prediction(run_script, drawn):
    code, out, _ = run_script(f"train.py {QUICK} -e 2 --tta -n t -d", drawn)
    kept, table = best("t"), history("t")
    assert code == 0 and kept.score == pytest.approx(table.score.min(), rel=1e-5)
    assert score_rows(Predictor(kept.path), labelled_images(drawn)[32:]).score == pytest.approx(kept.score, rel=1e-4)
    # predict.py uses the flip test by default, and a single prediction with --no-tta
    assert run_script("predict.py --workers 0 -pm t")[0] == 0
    default = np.load(RUNS / "t/points.npy")
    assert run_script("predict.py --workers 0 --no-tta -pm t")[0] == 0
    once = np.load(RUNS / "t/points.npy")
    assert run_script("predict.py --workers 0 --tta -pm t")[0] == 0
    assert np.array_equal(default, np.load(RUNS / "t/points.npy")) and not np.array_equal(default, once)
    code, out, _ = run_script("finetune.py -e 1 --workers 0 --no-tta -n t2 -pm t")
    assert code == 0 and "with the flip test" in out


def test_flip_test_of_a_mirrored_image_is_the_mirrored_prediction(untrained_run):
    "The one property that the flip test has and a single prediction has not."
    kept = read_checkpoint(untrained_run / "best.pth")
    model, flip_indices = kept.model(), list(kept.facts.flip_indices)
    images = torch.rand(4, 3, 32, 32)
    with torch.no_grad():
        once, mirrored = model(images), model(images.flip(-1))
    there, back = average_flipped(once, mirrored, flip_indices), average_flipped(mirrored, once, flip_indices)
    assert torch.allclose(back[:, flip_indices] * torch.tensor([-1.0, 1.0]), there, atol=1e-5)


@pytest.mark.train
def test_another_size_scores_the_loaded_model_at_its_old_size_first(run_script, drawn):
    assert run_script(f"train.py {QUICK} -e 2 -lr 1e-3 -n small -d", drawn)[0] == 0
    small = best("small")
    # a body of random numbers on four steps of a huge rate: no epoch of this stage can win
    code, out, err = run_script("finetune.py -e 1 --size 64 --fit pad --workers 0 -lr 10 --ema 0 -n kept -pm small")
    assert (code, err) == (0, "")
    assert f"loaded: score {small.score:.6g} on the validation rows" in out
    assert "that is at 32 px, crop; at 64 px, pad, it scores" in out
    kept = best("kept")
    assert kept.epoch == -1 and "the loaded model, which no epoch beat" in out
    assert (kept.settings.size, kept.settings.fit) == (32, "crop") and kept.score == pytest.approx(small.score)
    assert kept.facts.points_box == small.facts.points_box  # those of a crop
    assert equal_tensors(RUNS / "small/best.pth", RUNS / "kept/best.pth")
    assert run_script("predict.py --workers 0 -pm kept")[0] == 0
    # and where an epoch wins, the checkpoint is of the new size
    code, out, _ = run_script("finetune.py -e 10 --size 48 --workers 0 -lr 2e-3 -n grown -pm small")
    grown = best("grown")
    assert code == 0 and grown.score < small.score and grown.settings.size == 48 and grown.epoch >= 0


def test_a_folder_called_find_is_a_folder(run_script, drawn):
    check_refused(run_script("train.py --weights none -n x -d find"), "find: no such folder")


def test_the_baseline_recipe_on_drawn_faces_is_the_baseline():
    settings = first_settings({"recipe": "baseline"})
    assert (settings.head, settings.lr, settings.sched, settings.init_head) == ("linear", 3e-4, "plateau", "random")
    assert (settings.arch, settings.size) == ("resnet10t", 48)
    assert first_settings({}).sched == DRAWN["sched"]


def test_flip_test_without_flip_map_is_refused(run_script, drawn):
    check_refused(run_script(f"train.py {QUICK} --tta --mirror none -n x -d", drawn), "--tta", "--mirror none")


def test_overwriting_removes_all_files_of_the_old_run(run_script, drawn, finished_run):
    (finished_run("o") / "lr.png").write_bytes(b"of --lr find")
    assert (RUNS / "o/mirror.json").exists()
    assert run_script(f"train.py {QUICK} --mirror none --overwrite -n o -d", drawn)[0] == 0
    assert sorted(p.name for p in (RUNS / "o").iterdir()) == [
        "batch.png", "best.pth", "history.csv", "report.html", "results.png", "run.json",
    ]  # fmt: skip


def test_fixed_size_network_refuses_another_size(run_script, drawn, tmp_path):
    untrained(drawn, tmp_path, "v", arch="timm:vit_tiny_patch16_224")
    result = run_script(f"finetune.py -e 1 --size 64 --workers 0 --out {tmp_path} -pm v")
    check_refused(result, "--size 64", "run without --size")


@pytest.mark.train
def test_all_rows_trains_on_the_validation_rows_and_says_so(run_script, drawn):
    code, out, _ = run_script(f"train.py {QUICK} --all-rows -n a -d", drawn)
    assert code == 0 and "on rows that were trained on" in out
    dls = landmark_dataloaders(drawn, size=32, batch_size=8, all_rows=True, machine=Machine(workers=0))
    assert len(dls.train_ds) == N_TRAIN and len(dls.valid_ds) == 8
    assert next_settings({}, best("a").settings, best("a").facts).all_rows


def test_weights_flag_takes_the_checkpoint_of_another_run(run_script, drawn, finished_run):
    "A body trained on one set, for a head on another."
    finished_run("first")
    code, out, err = run_script(f"train.py {QUICK} -lr 1e-12 -n second --weights runs/first/best.pth -d", drawn)
    assert (code, err) == (0, "")
    a, b = tensors(RUNS / "first/best.pth"), tensors(RUNS / "second/best.pth")
    body = next(k for k in a if k.startswith("0.") and k.endswith("conv1.weight"))
    assert torch.allclose(a[body], b[body], atol=1e-6)
    assert not torch.allclose(a["1.0.weight"], b["1.0.weight"], atol=1e-4)


@pytest.mark.train
def test_points_named_in_another_order_train_what_they_are_named(run_script, data):
    "In every command that scores labels with a checkpoint."
    frame = pd.read_csv(labels_of(data), sep="\t")
    pairs = [list(frame.columns[k : k + 2]) for k in range(1, 2 * N_POINTS, 2)]
    for name, order in {"a": pairs, "b": pairs[::-1]}.items():
        table = frame[["file_name", *sum(order, [])]]
        table.columns = [re.sub("^Point_M", "p", column) for column in table.columns]
        table.to_csv(data / "train" / f"{name}.csv", index=False)
    code, out, err = run_script(f"train.py {QUICK} -n m -d", data / "train" / "a.csv")
    assert (code, err) == (0, "")
    for line in ("finetune.py -pm m -n n -e 1 -lr 1e-12 --workers 0 -d", f"{CLI}.report m -d", f"{CLI}.doctor -pm m"):
        code, out, err = run_script(line, data / "train" / "b.csv")
        assert (code, err) == (0, "") and out.count("another order than") == 1
    assert best("n").facts.point_names == best("m").facts.point_names == tuple(f"p{k}" for k in range(N_POINTS))
    assert best("n").facts.flip_indices == best("m").facts.flip_indices
    assert best("n").score == pytest.approx(best("m").score, rel=0.01)  # norms adapt
    page = (RUNS / "m" / "report.html").read_text(encoding="utf-8")
    assert f"{best('m').score:.4g}" in page
