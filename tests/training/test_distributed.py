"Training in several processes that torchrun starts: equal to one process, resumed after a kill, errors in one line."

import json
import os
import re
import shutil
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from landmarks_fastai.data.augment import Augment
from landmarks_fastai.data.block import landmark_dataloaders
from landmarks_fastai.data.degrade import Degrade
from landmarks_fastai.settings import Settings
from landmarks_fastai.training.callbacks import distributed
from landmarks_fastai.training.losses import loss_function
from landmarks_fastai.utils.distributed import Process
from tests.helpers import (
    LIMIT,
    LINUX,
    QUICK,
    ROOT,
    best,
    check_equal,
    check_stopped,
    finish,
    history,
    pids_of,
    start,
    torchrun,
    two_machines,
    wait_for_states,
)

# No batch norm: its means are of each process's part of a batch. A low rate: all epochs go on getting better.
PLAIN = f"{QUICK} --arch timm:test_convnext -e 4 -lr 1e-4 --align 1.05 --tta"
STEPS = f"{QUICK} --head 16,drop0.5 -e 3 --align 1.05 --save-every 0"  # batch norm, dropout, a state at every step

# The stages of lines.json in one process, with their losses and the files that it wrote. Behind epoch 0 the process
# SPOIL[0] damages the image SPOIL[1].
SPY = """
import importlib, json, os, shlex, sys
rank, spoil, renamed, losses = os.environ["RANK"], os.environ.get("SPOIL", ",").split(","), [], []
sys.addaudithook(lambda event, args: renamed.append(str(args[1])) if event == "os.rename" else None)
from landmarks_fastai.cli import app
def main():
    import fastai.callback.progress
    from fastai.callback.core import Callback
    from fastai.torch_core import defaults
    class Spy(Callback):
        def after_batch(self):
            if self.training:
                losses.append(float(self.loss))
        def after_epoch(self):
            if rank == spoil[0]:
                open(spoil[1], "wb").write(b"no image")
    defaults.callbacks = [*defaults.callbacks, Spy()]
    for line in json.load(open("lines.json")):
        sys.argv = shlex.split(line)
        importlib.import_module("landmarks_fastai.cli." + sys.argv[0].removesuffix(".py")).main()
    with open(f"spy{rank}.json", "w") as f:
        json.dump({"losses": losses, "renamed": renamed}, f)
app.run_main(main)
"""


def spied(folder, *lines, processes=2, **env):
    "Start the script `SPY` on the command lines of stages, with torchrun if there are several processes."
    (folder / "spy.py").write_text(SPY)
    (folder / "lines.json").write_text(json.dumps(lines))
    if processes == 1:
        return start([folder / "spy.py"], folder, env={"RANK": "0"} | env)
    return torchrun(folder, "spy.py", processes, **env)


def spies(folder, processes):
    return [json.loads((folder / f"spy{rank}.json").read_text()) for rank in range(processes)]


def training_dl(drawn, share=(0, 1), batch_size=4):
    dls = landmark_dataloaders(drawn, size=32, batch_size=batch_size, seed=3)
    for dl in dls.loaders:
        dl.share = share
    dls.train.epoch = 2
    return dls


def test_shares_of_processes_make_up_the_batches_of_one(drawn):
    "Rows and their views, augmented pixels, and points; validation rows are each in one share."
    one = training_dl(drawn, batch_size=12)
    parts = [training_dl(drawn, (rank, 3)) for rank in range(3)]
    rows = [np.array(p.train.get_idxs()).reshape(-1, 4) for p in parts]
    n = len(one.train) * 12
    assert np.concatenate(rows, 1).ravel().tolist() == one.train.get_idxs()[:n] and n == 24
    for whole, *batches in zip(one.train, *(p.train for p in parts), strict=True):
        for k, tensor in enumerate(whole):
            torch.testing.assert_close(torch.cat([b[k] for b in batches]), tensor)
    valid = sorted(row for p in parts for row in p.valid.get_idxs())
    assert valid == sorted(one.valid.get_idxs())
    assert [len(p.valid) for p in parts] == [len(list(p.valid)) for p in parts]


def test_shares_with_unequal_numbers_of_labelled_points_have_the_loss_of_one_batch(monkeypatch):
    func, (pred, truth) = loss_function(Settings()), torch.rand(2, 4, 5, 2)
    truth[:2, :3] = torch.nan
    total = (~truth.isnan()).sum()
    monkeypatch.setattr(distributed, "all_reduce", lambda labelled: total)
    monkeypatch.setattr(distributed, "this_process", lambda: Process(count=2))
    losses = []
    for half in (slice(0, 2), slice(2, 4)):
        loss, callback = func(pred[half], truth[half]), distributed.DistributedTraining()
        callback.learn = SimpleNamespace(training=True, yb=(truth[half],), loss=loss, loss_grad=loss)
        callback.after_loss()
        assert torch.equal(callback.learn.loss, callback.learn.loss_grad)
        losses.append(float(callback.learn.loss))
    assert np.mean(losses) == pytest.approx(float(func(pred, truth)), rel=1e-6)


def test_first_batch_of_a_share_is_that_of_a_resumed_epoch(drawn):
    dl, all_rows = training_dl(drawn, (1, 2)).train, training_dl(drawn, (1, 2)).train.get_idxs()
    dl.first = 2
    assert dl.get_idxs() == all_rows[8:]


def test_lost_images_of_a_share_are_replaced_by_others_of_the_batch(data):
    "All processes count the same number of images, or gradients would be accumulated over different numbers of steps."
    dl = training_dl(data, (0, 2)).train
    row = dl.dataset.items[dl.get_idxs()[0]]
    row.path.unlink()
    assert [len(batch[0]) for batch in dl] == [4] * len(dl)


@pytest.mark.parametrize("augment", [Augment(1.0, None, seed=1), Degrade(0.5, seed=1)])
def test_augmentation_of_one_process_is_that_of_the_whole_batch(augment):
    images, points = torch.rand(6, 3, 16, 16), torch.rand(6, 5, 2)
    augment.begin(3, 5)
    whole, *_ = augment.encodes((images, points))
    augment.begin(3, 5, (1, 2))
    part, *_ = augment.encodes((images[3:], points[3:]))
    assert torch.equal(part.as_subclass(torch.Tensor), whole[3:].as_subclass(torch.Tensor))


@pytest.mark.slow
def test_two_processes_equal_one_with_twice_the_batch(drawn, tmp_path):
    """Losses of 16 steps to 1e-5, scores of both passes, the average and the flip test to 1e-4; each file written by one.

    And a later stage, which accumulates gradients.
    """
    later = "finetune.py -e 2 --accumulate 2 --workers 0"
    finish(
        spied(
            tmp_path,
            f"train.py {PLAIN} -b 8 -n one -d {drawn} --on-bad skip",
            f"{later} -b 8 -n one2 -pm one",
            processes=1,
        )
    )
    (one,) = spies(tmp_path, 1)
    data = shutil.copytree(drawn, tmp_path / "data", ignore=shutil.ignore_patterns("*.cache"))
    lines = f"train.py {PLAIN} -b 4 --cache -n several -d data", f"{later} -b 4 -n several2 -pm several"
    out = finish(spied(tmp_path, *lines))
    assert out.count("run several\n") == 1 and "torchrun --nproc-per-node 2 finetune.py" in out
    loaded, reported = re.search(r"loaded: score (\S+) on .*; its stage reported (\S+)", out).groups()
    assert float(loaded) == pytest.approx(float(reported), rel=1e-5) and "run several2: score" in out
    first, second = spies(tmp_path, 2)
    assert first["losses"] == second["losses"] and len(one["losses"]) == 16 + 8
    np.testing.assert_allclose(first["losses"][:16], one["losses"][:16], rtol=1e-5)
    np.testing.assert_allclose(first["losses"], one["losses"], rtol=1e-4)
    runs = tmp_path / "runs"
    for name, other in (("one", "several"), ("one2", "several2")):
        np.testing.assert_allclose(history(other, runs), history(name, runs), rtol=1e-4)
        assert {p.name for p in (runs / other).iterdir()} == {p.name for p in (runs / name).iterdir()}
    assert not second["renamed"]
    caches = [path for path in first["renamed"] if path.endswith(".cache")]
    assert len(caches) == len(set(caches)) == 4  # labels, the images' stamps, whole images, aligned crops
    (crops,) = (data / "train").glob("images-32-align*.cache")
    assert (np.load(crops)["checksum"] > 0).any()


@pytest.fixture(scope="module")
def whole(drawn, tmp_path_factory):
    "The output folder of a run of two processes that was never stopped; its rate was found."
    folder = tmp_path_factory.mktemp("whole")
    out = finish(torchrun(folder, f"train.py {STEPS} -b 4 --lr find -n whole -d {drawn}"))
    assert out.count("rate found") == 1 and "submission:  python predict.py -pm whole" in out
    assert (folder / "runs/whole/lr.png").exists()
    return folder / "runs"


@pytest.fixture
def line(whole, drawn, tmp_path):
    "The command line of the same run with the rate that was found: all processes have trained with it."
    shutil.copytree(whole, tmp_path / "runs")
    return f"train.py {STEPS} -b 4 -lr {best('whole', whole).settings.lr} -n r -d {drawn}"


@pytest.mark.slow
@LINUX
@pytest.mark.parametrize("rank", [0, 1])
def test_killed_process_ends_all_and_the_run_resumes_to_the_last_bit(line, tmp_path, rank):
    process = torchrun(tmp_path, line)
    wait_for_states(process, tmp_path / "runs/r", 2 + rank)
    os.kill(pids_of(process)[rank], signal.SIGKILL)
    command = "torchrun --nproc-per-node 2 train.py --resume -n r"
    check_stopped(process, "another process of the run has ended; the state is saved", command, begins="stopped: ")
    out = finish(torchrun(tmp_path, "train.py --resume -n r"))
    assert "resuming at epoch" in out and "before" not in out
    check_equal("whole", "r", tmp_path / "runs")
    assert not list(tmp_path.rglob("*.tmp")) and not list(tmp_path.rglob("*.lock"))


@pytest.mark.slow
@LINUX
def test_signal_saves_the_state_of_this_step(line, tmp_path):
    "To torchrun, or to the second process. And a run continues with another number of processes."
    stopped = "stopped: the state is saved; resume with: torchrun"
    process = torchrun(tmp_path, f"{line} --save-every 60")
    wait_for_states(process, tmp_path / "runs/r", 1)
    os.kill(process.pid, signal.SIGTERM)
    check_stopped(process, stopped, begins="stopped: ")
    shutil.copytree(tmp_path / "runs/r", tmp_path / "other/runs/r")
    finish(torchrun(tmp_path, "train.py --resume -n r"))
    check_equal("whole", "r", tmp_path / "runs")
    process = torchrun(tmp_path / "other", "train.py --resume -n r --save-every 0", 3)
    wait_for_states(process, tmp_path / "other/runs/r", 2)
    os.kill(pids_of(process)[1], signal.SIGTERM)
    out = check_stopped(process, stopped, begins="stopped: ")
    assert "3 processes, 2 before: a step sees 3 times -b images" in out
    out = finish(start([ROOT / "train.py", "--resume", "-n", "r"], tmp_path / "other"))
    assert "1 processes, 3 before" in out and len(history("r", tmp_path / "other/runs")) == 3


@pytest.mark.slow
def test_errors_are_told_once(drawn, data, tmp_path):
    "Before the processes are connected; of the first process, in which the others wait for it; of all; of the second."
    process = torchrun(tmp_path, "train.py --no-such-flag")
    _, err = process.communicate(timeout=LIMIT)
    assert process.returncode == 1 and err.count("unrecognized arguments: --no-such-flag") == 1
    check_stopped(torchrun(tmp_path, "predict.py -pm r"), "predict.py runs in one process: run it without torchrun")
    check_stopped(torchrun(tmp_path, f"train.py {QUICK} -d nowhere"), "nowhere: no such folder")
    process = torchrun(tmp_path, f"train.py {QUICK} -lr 1000 --ema 0 -d {drawn}")
    check_stopped(process, "nothing was saved; try a lower -lr")
    image = training_dl(data, (1, 2)).train.dataset.items[0].path
    process = spied(tmp_path, f"train.py {QUICK} -b 4 -e 3 -n r -d {data}", SPOIL=f"1,{image}")
    check_stopped(process, f"image {image} cannot be read as an image", "then resume with: torchrun --nproc-per-node 2")
    assert not list(tmp_path.rglob("*.lock"))


@pytest.mark.slow
def test_two_machines_equal_two_processes(line, tmp_path):
    for process in two_machines([tmp_path, tmp_path], line):
        finish(process)
    check_equal("whole", "r", tmp_path / "runs")


@pytest.mark.slow
def test_machine_without_the_shared_folder(data, tmp_path):
    "The second has another current folder, in which `runs` is not."
    other = tmp_path / "other"
    other.mkdir()
    processes = two_machines([tmp_path, other], f"train.py {QUICK} -n r -d {data}")
    errors = [process.communicate(timeout=LIMIT)[1] for process in processes]
    assert [process.returncode for process in processes] == [1, 1]
    lines = [[x for x in err.splitlines() if x.startswith(("error: ", "stopped: "))] for err in errors]
    assert sorted(map(len, lines)) == [1, 1], lines
    assert sum("--out must be a shared folder" in line for (line,) in lines) == 1, lines
    # the other's connection breaks, or its torchrun stops it first
    assert sum(line.startswith("stopped: ") for (line,) in lines) == 1, lines
