"Training in several processes that torchrun starts: equal to one process, resumed after a kill, errors in one line."

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
import torch

from landmarks_fastai.data.augment import Augment
from landmarks_fastai.data.block import landmark_dataloaders
from landmarks_fastai.data.degrade import Degrade

# No batch norm: its means are of each process's part of a batch. A low rate: all epochs go on getting better.
PLAIN = f"{QUICK} --arch timm:test_convnext -e 4 -lr 1e-4 --align 1.05 --tta"
SHORT = f"{QUICK} --head 16,drop0.5 -e 3 --align 1.05 --save-every 0"  # batch norm, dropout, a state at every step

# train.py with its losses and the files that it wrote; behind epoch 0 the process SPOIL[0] damages the image SPOIL[1], or
# runs out of memory
SPY = f"""
import json, os, sys
sys.path.insert(0, {str(ROOT)!r})
rank, spoil, renamed, losses = os.environ["RANK"], os.environ.get("SPOIL", ",").split(","), [], []
sys.addaudithook(lambda event, args: renamed.append(str(args[1])) if event == "os.rename" else None)
from landmarks_fastai.cli import app, train
from tests.helpers import LIMIT, QUICK, ROOT, check_equal, check_stopped, finish, pids_of, torchrun, two_machines
def main():
    import fastai.callback.progress
    from fastai.callback.core import Callback
    from fastai.torch_core import defaults
    class Spy(Callback):
        def after_pred(self):
            if self.training and self.epoch and spoil == [rank, "memory"]:
                raise MemoryError("of a test")
        def after_batch(self):
            if self.training:
                losses.append(float(self.loss))
        def after_epoch(self):
            if rank == spoil[0] and spoil[1] != "memory":
                open(spoil[1], "wb").write(b"no image")
    defaults.callbacks = [*defaults.callbacks, Spy()]
    train.main()
    with open(f"spy{{rank}}.json", "w") as f:
        json.dump({{"losses": losses, "renamed": renamed}}, f)
app.run_main(main)
"""


def spied(folder, line, processes=2, **env):
    "`torchrun` with the script `SPY`."
    (folder / "spy.py").write_text(SPY)
    return torchrun(folder, f"spy.py {line}", processes, **env)


def one_process(folder, line):
    "The same without torchrun."
    (folder / "spy.py").write_text(SPY)
    env = os.environ | {"OMP_NUM_THREADS": "1", "RANK": "0"}
    subprocess.run([sys.executable, folder / "spy.py", *line.split()], cwd=folder, check=True, env=env)


def wait_for_states(process, path, count):
    "Until the state has been written so many times."
    last = None
    while count and process.poll() is None:
        now = path.stat().st_ino if path.exists() else None
        count, last = count - (now not in (None, last)), now
        time.sleep(0.002)
    assert process.poll() is None, process.communicate()


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
@pytest.mark.parametrize("processes,batch,flags", [(2, 4, ""), (3, 3, "--accumulate 2")])
def test_processes_equal_one_with_a_batch_as_large(drawn, tmp_path, processes, batch, flags):
    "Losses of ten steps to 1e-5, scores of both passes, the average and the flip test to 1e-4; each file written by one."
    one_process(tmp_path, f"{PLAIN} {flags} -b {batch * processes} -n one -d {drawn} --on-bad skip")
    one = json.loads((tmp_path / "spy0.json").read_text())
    data = shutil.copytree(drawn, tmp_path / "data", ignore=shutil.ignore_patterns("*.cache"))
    out = finish(spied(tmp_path, f"{PLAIN} {flags} -b {batch} --cache -n several -d data", processes))
    assert out.count("run several") == 2 and f"torchrun --nproc-per-node {processes} finetune.py" in out
    spies = [json.loads((tmp_path / f"spy{rank}.json").read_text()) for rank in range(processes)]
    assert len(one["losses"]) >= 10 and all(spy["losses"] == spies[0]["losses"] for spy in spies)
    np.testing.assert_allclose(spies[0]["losses"], one["losses"], rtol=1e-5)
    ends = [pd.read_csv(tmp_path / f"runs/{n}/history.csv").drop(columns="time") for n in ("one", "several")]
    np.testing.assert_allclose(ends[1], ends[0], rtol=1e-4)
    assert not any(spy["renamed"] for spy in spies[1:])
    caches = [path for path in spies[0]["renamed"] if path.endswith(".cache")]
    assert len(caches) == len(set(caches)) == 4  # labels, the images' stamps, whole images, aligned crops
    (crops,) = (data / "train").glob("images-32-align*.cache")
    assert (np.load(crops)["checksum"] > 0).any()
    out = finish(torchrun(tmp_path, "finetune.py -e 1 --ema 0 -n later -pm several", processes))
    loaded, reported = re.search(r"loaded: score (\S+) on .*; its stage reported (\S+)", out).groups()
    assert float(loaded) == pytest.approx(float(reported), rel=1e-5) and "run later: score" in out
    assert {p.name for p in (tmp_path / "runs/several").iterdir()} == {
        p.name for p in (tmp_path / "runs/one").iterdir()
    }


@pytest.fixture(scope="module")
def whole(drawn, tmp_path_factory):
    "The output folder of runs that were never stopped, by number of processes."
    folder = tmp_path_factory.mktemp("whole")
    for n in (2, 3):
        finish(torchrun(folder, f"train.py {SHORT} -b 4 -n whole{n} -d {drawn}", n))
    return folder / "runs"


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("processes,rank", [(2, 0), (2, 1), (3, 0), (3, 1), (3, 2)])
def test_killed_process_ends_all_and_the_run_resumes_to_the_last_bit(whole, drawn, tmp_path, processes, rank):
    process = torchrun(tmp_path, f"train.py {SHORT} -b 4 -n r -d {drawn}", processes)
    wait_for_states(process, tmp_path / "runs/r/state.safetensors", 2 + rank)
    os.kill(pids_of(process)[rank], signal.SIGKILL)
    command = f"torchrun --nproc-per-node {processes} train.py --resume -n r"
    check_stopped(process, "another process of the run has ended; the state is saved", command, start="stopped: ")
    out = finish(torchrun(tmp_path, "train.py --resume -n r", processes))
    assert "resuming at epoch" in out and "before" not in out
    shutil.copytree(whole / f"whole{processes}", tmp_path / "runs/whole")
    check_equal(tmp_path / "runs", "whole", "r")
    assert not list(tmp_path.rglob("*.tmp")) and not list(tmp_path.rglob("*.lock"))


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("to", ["torchrun", "the second process"])
def test_signal_saves_the_state_of_this_step(whole, drawn, tmp_path, to):
    "And a run continues with another number of processes."
    process = torchrun(tmp_path, f"train.py {SHORT} --save-every 60 -b 4 -n r -d {drawn}")
    wait_for_states(process, tmp_path / "runs/r/state.safetensors", 1)
    os.kill(process.pid if to == "torchrun" else pids_of(process)[1], signal.SIGTERM)
    check_stopped(process, "stopped: the state is saved; resume with: torchrun", start="stopped: ")
    if to == "torchrun":
        finish(torchrun(tmp_path, "train.py --resume -n r"))
        shutil.copytree(whole / "whole2", tmp_path / "runs/whole")
        check_equal(tmp_path / "runs", "whole", "r")
    else:
        out = finish(torchrun(tmp_path, "train.py --resume -n r", 3))
        assert "3 processes, 2 before: a step sees 3 times -b images" in out
        assert len(pd.read_csv(tmp_path / "runs/r/history.csv")) == 3


@pytest.mark.slow
def test_errors_are_told_once(drawn, data, tmp_path):
    process = torchrun(tmp_path, "train.py --no-such-flag")
    out, err = process.communicate(timeout=LIMIT)
    assert process.returncode == 1 and err.count("unrecognized arguments: --no-such-flag") == 1
    check_stopped(torchrun(tmp_path, f"train.py {QUICK} -d nowhere"), "nowhere: no such folder")
    check_stopped(torchrun(tmp_path, "predict.py -pm r"), "predict.py runs in one process: run it without torchrun")
    line = f"train.py {QUICK} -lr 1000 --ema 0 -d {drawn}"
    check_stopped(torchrun(tmp_path, line, 3), "nothing was saved; try a lower -lr")
    image = training_dl(data, (1, 2)).train.dataset.items[0].path
    process = spied(tmp_path, f"{QUICK} -b 4 -e 3 -n r -d {data}", SPOIL=f"1,{image}")
    check_stopped(process, f"image {image} cannot be read as an image", "then resume with: torchrun --nproc-per-node 2")
    process = spied(tmp_path, f"{QUICK} -b 4 -e 3 -n m -d {drawn}", SPOIL="1,memory")
    check_stopped(process, "error: -b 4: not enough memory for such a batch", "then resume with: torchrun")
    assert not list(tmp_path.rglob("*.lock"))


@pytest.mark.slow
def test_all_processes_train_with_the_rate_that_was_found(drawn, tmp_path):
    out = finish(torchrun(tmp_path, f"train.py {QUICK} -b 4 --lr find -n r -d {drawn}"))
    assert out.count("rate found") == 1 and "submission:  python predict.py -pm r" in out
    assert (tmp_path / "runs/r/lr.png").exists() and len(pd.read_csv(tmp_path / "runs/r/history.csv")) == 1


@pytest.mark.slow
def test_two_machines_equal_two_processes(whole, drawn, tmp_path):
    for process in two_machines([tmp_path, tmp_path], f"train.py {SHORT} -b 4 -n r -d {drawn}"):
        finish(process)
    shutil.copytree(whole / "whole2", tmp_path / "runs/whole")
    check_equal(tmp_path / "runs", "whole", "r")


@pytest.mark.slow
@pytest.mark.parametrize("missing", ["images", "runs"])
def test_machine_without_the_shared_folder(data, tmp_path, missing):
    "The second has another current folder, in which `data` or `runs` is not."
    other = tmp_path / "other"
    other.mkdir()
    out, source = (tmp_path / "runs", "data") if missing == "images" else ("runs", data)
    first, second = two_machines([tmp_path, other], f"train.py {QUICK} -n r --out {out} -d {source}")
    text = f"{other}/data: no such folder" if missing == "images" else "--out must be a shared folder"
    results = [process.communicate(timeout=LIMIT) for process in (first, second)]
    assert first.returncode == second.returncode == 1
    told = [[x for x in err.splitlines() if x.startswith(("error: ", "stopped: "))] for _, err in results]
    assert sorted(map(len, told)) == [1, 1] and sum(text in lines[0] for lines in told) == 1, told
    # the other's connection breaks, or its torchrun stops it first
    assert sum(lines[0].startswith("stopped: ") for lines in told) == 1, told
