"A stage that is stopped and goes on: equal to one that was never stopped, to the last bit."

import json
import os
import signal
import subprocess
import sys
import time

import pandas as pd
import pytest
import torch
from fastai.callback.core import Callback

from landmarks_fastai.models.networks import METADATA
from landmarks_fastai.runs.run import Run
from landmarks_fastai.utils.files import process_lock
from tests.cli.test_scripts import check_refused, first_image
from tests.conftest import ARCH, QUICK, ROOT, every_learner_has

SHORT = f"{QUICK} -e 3 -b 4"  # an epoch: 8 batches of training, 2 of validation
STOPPED = "resume with: python {} --resume -n {}\n"


class SignalAt(Callback):
    "Send this process a signal when a fit has gone through so many batches; None: never."

    def __init__(self, step, number):
        self.step, self.number, self.count, self.fits = step, number, 0, False

    def before_fit(self):
        self.fits = True

    def after_fit(self):
        self.fits = False

    def after_batch(self):
        self.count += self.fits
        if self.fits and self.count == self.step:
            os.kill(os.getpid(), self.number)


def stopping_at(step, number=signal.SIGINT):
    "Meanwhile a stage gets a signal after so many batches; None: never."
    return every_learner_has(SignalAt(step, number))


class CtrlC(Callback):
    "Ctrl-C as a fit begins, before anything is saved."

    def before_fit(self):
        raise KeyboardInterrupt


def history(runs, name):
    return pd.read_csv(runs / f"{name}/history.csv", dtype=str).drop(columns="time")


def check_equal(runs, a, b):
    "Weights of the best, every figure of every epoch to its last digit, and what the checkpoint says of itself."
    assert history(runs, a).equals(history(runs, b))
    one, other = (torch.load(runs / f"{n}/best.pth", weights_only=True) for n in (a, b))
    assert one.pop(METADATA) == other.pop(METADATA)
    assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


KINDS = {
    "plateau, dropout, average": ("--head 16,drop0.5 -lr 0.02", [3, 7, 12]),
    "one cycle, momentum": ("--opt sgd -lr 1e-4 --sched onecycle", [5]),
    "gradients over batches, patience": ("--accumulate 3 --patience 2 --sched step --step-size 1", [4, 11]),
    "wing loss, half precision, flip test": ("--loss wing --amp bf16 --tta", [6]),
    "head alone, no average": ("--freeze --ema 0 --aug 0", [9]),
    "a worker": ("--workers 1", [17]),
}


@pytest.mark.parametrize(
    "flags,steps", [pytest.param(*v, id=k, marks=[pytest.mark.slow] * (k == "a worker")) for k, v in KINDS.items()]
)
def test_a_stage_that_went_on_is_one_that_was_never_stopped(run_script, drawn, tmp_path, flags, steps):
    runs = tmp_path / "here" / "runs"
    assert run_script(f"train.py {SHORT} {flags} -n whole -d", drawn)[0] == 0
    with stopping_at(steps[0]):
        code, _, err = run_script(f"train.py {SHORT} {flags} -n parts -d", drawn)
    for step in [*steps[1:], None]:
        assert code == 130 and err.count("\n") == 1 and err.endswith(STOPPED.format("train.py", "parts"))
        with stopping_at(step):
            code, out, err = run_script("train.py --resume -n parts")
        assert "resuming at epoch" in out
    assert (code, err) == (0, "")
    check_equal(runs, "whole", "parts")
    files = {p.name for p in (runs / "parts").iterdir()}
    assert files == {p.name for p in (runs / "whole").iterdir()} and "batch.png" in files
    assert {p.name for p in runs.iterdir()} == {"parts", "whole"}
    code, out, err = run_script("train.py --resume -n parts")
    assert (code, err) == (0, "") and "is finished, nothing is left to resume" in out


def test_in_a_terminal_with_its_bars(run_script, drawn, tmp_path, monkeypatch):
    for step, code in ((13, 130), (None, 0)):
        with stopping_at(step):
            line = f"train.py {SHORT} -n r -d {drawn}" if step else "train.py --resume -n r"
            monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
            found, out, err = run_script(line)
        assert found == code and "Traceback" not in err and "train_loss" in out


@pytest.mark.parametrize("flags", ["-e 2", pytest.param("-e 2 -lr 0.3", marks=pytest.mark.slow)])
def test_a_later_stage_goes_on_and_ends_with_no_worse_than_it_was_given(run_script, finished_run, tmp_path, flags):
    "At the rate of 0.3 no epoch beats what was loaded."
    runs = tmp_path / "here" / "runs"
    finished_run("one")
    assert run_script(f"finetune.py {flags} --workers 0 --overwrite -n whole -pm one")[0] == 0
    with stopping_at(5, signal.SIGTERM):
        code, _, err = run_script(f"finetune.py {flags} --workers 0 --overwrite -n parts -pm one")
    assert code == 143 and err.count("\n") == 1 and err.endswith(STOPPED.format("finetune.py", "parts"))
    check_refused(
        run_script("train.py --resume -n parts"), "started by finetune.py", "python finetune.py --resume -n parts"
    )
    assert run_script("finetune.py --resume -n parts")[0] == 0
    check_equal(runs, "whole", "parts")


def test_what_a_later_stage_was_given_may_not_change_under_it(run_script, drawn, tmp_path):
    runs = tmp_path / "here" / "runs"
    assert run_script(f"train.py {SHORT} -n one -d", drawn)[0] == 0
    with stopping_at(5):
        assert run_script("finetune.py -e 2 --workers 0 -n two -pm one")[0] == 130
    assert run_script(f"train.py {SHORT} --seed 8 -n one --overwrite -d", drawn)[0] == 0
    before = (runs / "two/state.safetensors").read_bytes()
    check_refused(run_script("finetune.py --resume -n two -pm other"), "-pm other", "run without -pm")
    check_refused(run_script("finetune.py --resume -n two"), "one/best.pth has changed since two was started from it")
    assert (runs / "two/state.safetensors").read_bytes() == before


def test_the_name_of_a_stopped_run_is_taken(run_script, drawn, tmp_path):
    runs = tmp_path / "here" / "runs"
    with stopping_at(5):
        assert run_script(f"train.py {SHORT} -n r -d", drawn)[0] == 130
    state = (runs / "r/state.safetensors").read_bytes()
    check_refused(
        run_script(f"train.py {SHORT} -n r -d", drawn),
        "already has a run",
        "resume it with python train.py --resume -n r;",
        "--overwrite",
    )
    # a mistake in what overwrites it costs nothing
    check_refused(run_script(f"train.py {SHORT} -n r --overwrite --weights gone.pth -d", drawn), "gone.pth not found")
    assert (runs / "r/state.safetensors").read_bytes() == state
    check_refused(run_script("train.py --resume"), "--resume needs -n NAME", "stopped runs in runs: r")
    check_refused(run_script("train.py --resume -n typo"), "-n typo: no such run in runs", "stopped runs there: r")
    check_refused(run_script("train.py --resume -n ../runs/r"), "is no plain file name")
    check_refused(run_script("train.py --resume -n r -e 5"), "-e 5", "was started with (-e was 3)", "run without -e")
    check_refused(run_script("train.py --resume -n r --arch resnext50_32x4d"), f"--arch was {ARCH}")  # the default
    code, out, err = run_script(f"train.py {SHORT} --resume -n r -d", drawn)  # the same flags may stand there
    assert (code, err) == (0, "") and "resuming at epoch" in out


def test_what_came_to_nothing_leaves_the_run_that_it_was_to_overwrite(run_script, drawn, tmp_path):
    "A loss that is no number, an error and Ctrl-C, over a stopped run and over a finished one."
    runs = tmp_path / "here" / "runs"
    ruin = f"{SHORT} --opt sgd -lr 999 --head-lr-mult 1 --targets pixels --ema 0 --seed 5 -n r --overwrite -d"
    with stopping_at(13):
        assert run_script(f"train.py {SHORT} -n r -d", drawn)[0] == 130
    assert run_script("predict.py --workers 0 -pm r")[0] == 0  # what others wrote into its folder stays too
    for _ in ("stopped", "finished"):
        before = snapshot(runs)
        check_refused(run_script(f"train.py {ruin}", drawn), "NaN or infinite", "nothing was saved")
        assert snapshot(runs) == before
        check_refused(run_script(f"train.py {ruin} {drawn} --weights gone.pth"), "gone.pth not found")
        assert snapshot(runs) == before
        with every_learner_has(CtrlC):
            code, _, err = run_script(f"train.py {SHORT} -n r --overwrite -d", drawn)
        assert code == 130 and "the run that was to be overwritten is unchanged" in err
        assert snapshot(runs) == before
        assert run_script("train.py --resume -n r")[0] == 0


@pytest.mark.parametrize("moment", ["before it saved", "old moved away", "new in place"])
def test_a_process_killed_while_it_overwrites_leaves_one_whole_run(tmp_path, moment):
    "Each state of the folders that SIGKILL can leave, and what the next claim makes of it."
    run = Run(tmp_path, "r")
    old, new = {"best.pth": b"old", "run.json": b"{}"}, {"best.pth": b"new", "run.json": b"{}"}
    folders = {
        "before it saved": {run.folder: old, run.new: {"run.json": b"{}", "batch.png.12.tmp": b""}},
        "old moved away": {run.old: old, run.new: new},
        "new in place": {run.folder: new, run.old: {"best.pth": b"old"}},
    }[moment]
    for folder, files in folders.items():
        folder.mkdir()
        for name, content in files.items():
            (folder / name).write_bytes(content)
    run.repair()
    assert [p.name for p in tmp_path.iterdir()] == ["r"]
    assert (run.folder / "best.pth").read_bytes() == (b"old" if moment == "before it saved" else b"new")


def test_the_run_that_is_overwritten_stands_until_the_new_one_has_a_state(run_script, drawn, tmp_path):
    runs = tmp_path / "here" / "runs"
    assert run_script(f"train.py {SHORT} -n r -d", drawn)[0] == 0
    before, seen = snapshot(runs / "r"), []
    publish = Run.publish

    def watched(run):
        seen.append(snapshot(runs / "r") == before)
        publish(run)

    with pytest.MonkeyPatch.context() as patch, stopping_at(5):
        patch.setattr(Run, "publish", watched)
        assert run_script(f"train.py {SHORT} --seed 3 --overwrite -n r -d", drawn)[0] == 130
    assert seen[0] and [p.name for p in runs.iterdir()] == ["r"] and not (runs / "r" / "best.pth").exists()
    assert run_script("train.py --resume -n r")[0] == 0
    assert run_script(f"train.py {SHORT} --seed 3 -n whole -d", drawn)[0] == 0
    check_equal(runs, "whole", "r")


def test_a_run_of_an_earlier_version_is_not_resumed(run_script, drawn, tmp_path):
    runs = tmp_path / "here" / "runs"
    runs.mkdir()
    (runs / "r_run.json").write_text("{}")
    check_refused(run_script("train.py --resume -n r"), "of an earlier version", "start over with --overwrite")
    (runs / "s").mkdir()
    (runs / "s" / "run.json").write_text('{"format": 1}')
    check_refused(run_script("train.py --resume -n s"), "not of this version", "start over with --overwrite")
    assert run_script(f"train.py {SHORT} --overwrite -n s -d", drawn)[0] == 0


def snapshot(runs):
    return {p: p.read_bytes() for p in runs.rglob("*") if p.is_file()}


def test_a_run_that_saved_nothing_yet_starts_over_with_its_flags(run_script, drawn, tmp_path):
    runs = tmp_path / "here" / "runs"
    with every_learner_has(CtrlC):
        code, _, err = run_script(f"train.py {SHORT} --seed 4 -n r -d", drawn)
    assert code == 130 and "nothing was saved yet" in err and err.endswith(STOPPED.format("train.py", "r"))
    assert [p.name for p in runs.rglob("*")] == ["r", "run.json"]
    code, out, _ = run_script("train.py --resume -n r")
    assert code == 0 and "resuming" not in out
    assert run_script(f"train.py {SHORT} --seed 4 -n whole -d", drawn)[0] == 0
    check_equal(runs, "whole", "r")
    assert (
        run_script(f"train.py {SHORT} --seed 4 --resume -n new -d", drawn)[0] == 0
    )  # nothing of it is there: it starts
    check_equal(runs, "whole", "new")


def test_from_another_folder(run_script, drawn, tmp_path, monkeypatch):
    with stopping_at(5):
        code, _, err = run_script(
            f"train.py {SHORT} -n 'a b' --out 'my runs' -d", os.path.relpath(drawn, tmp_path / "here")
        )
    assert code == 130 and err.endswith("python train.py --resume -n 'a b' --out 'my runs'\n")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert run_script("train.py --resume -n 'a b' --out '../here/my runs'")[0] == 0


@pytest.mark.parametrize("row", [0, 3])
def test_an_image_that_is_lost_while_the_run_is_stopped_costs_that_image(run_script, data, tmp_path, row):
    with stopping_at(5):
        assert run_script(f"train.py {SHORT} -n r -d", data)[0] == 130
    image = first_image(data, row)  # fastai looks at the first one to learn what an item is
    image.unlink()
    code, out, err = run_script("train.py --resume -n r")
    assert code == 0 and f"{image.name} not found: the run goes on without it" in err
    assert err.count("\n") == 1 and (tmp_path / "here" / "runs" / "r/bad.csv").read_text().count(image.name) == 2


def test_rows_that_were_left_out_stay_so(run_script, data, tmp_path):
    "The image is mended while the run is stopped: the order of the epochs is still that of the rows it began with."
    runs, image = tmp_path / "here" / "runs", sorted((data / "train" / "images").iterdir())[3]
    whole = image.read_bytes()
    image.write_bytes(b"")
    assert run_script(f"train.py {SHORT} --on-bad skip -n whole -d", data)[0] == 0
    with stopping_at(5):
        assert run_script(f"train.py {SHORT} --on-bad skip -n parts -d", data)[0] == 130
    image.write_bytes(whole)
    assert run_script("train.py --resume -n parts")[0] == 0
    check_equal(runs, "whole", "parts")


def test_labels_may_not_change_under_a_stopped_run(run_script, data, tmp_path):
    from tests.conftest import edit_line

    with stopping_at(5):
        assert run_script(f"train.py {SHORT} -n r -d", data)[0] == 130
    edit_line(data / "train" / "landmarks.csv", 9, lambda x: x.rsplit("\t", 1)[0] + "\t3")
    check_refused(run_script("train.py --resume -n r"), "landmarks.csv has changed since the run r was stopped")


def payload():
    "A pickle that makes a folder when it is read."

    class Payload:
        def __reduce__(self):
            return os.mkdir, ("owned",)

    import pickle

    return pickle.dumps(Payload())


def damage(metadata):
    from safetensors.torch import save

    return save({"model.x": torch.zeros(1)}, {"facts": json.dumps(metadata)})


@pytest.mark.parametrize(
    "kind",
    [
        "payload",
        "cut",
        "empty",
        "facts of another kind",
        "no tensors",
        "torch's own format",
        "its record",
        "its settings",
    ],
)
def test_a_state_that_is_none_is_refused_and_never_run(run_script, drawn, tmp_path, kind):
    runs = tmp_path / "here" / "runs"
    with stopping_at(5):
        assert run_script(f"train.py {SHORT} -n r -d", drawn)[0] == 130
    path, record = runs / "r/state.safetensors", json.loads((runs / "r/run.json").read_text())
    whole = path.read_bytes()
    metadata = json.loads(whole[8 : 8 + int.from_bytes(whole[:8], "little")])["__metadata__"]["facts"]
    bad = {
        "payload": payload,
        "cut": lambda: whole[:-9],
        "empty": lambda: b"",
        "facts of another kind": lambda: damage({"format": 2, "epoch": "x"}),
        "no tensors": lambda: damage(json.loads(metadata)),
        "torch's own format": lambda: torch.save({"a": torch.zeros(1)}, path) or path.read_bytes(),
        "its record": lambda: whole,
        "its settings": lambda: whole,
    }[kind]()
    path.write_bytes(bad)
    if kind == "its record":
        (runs / "r/run.json").write_text(json.dumps(record | {"args": record["args"] | {"no_such_flag": 1}}))
    if kind == "its settings":
        (runs / "r/run.json").write_text(json.dumps(record | {"settings": record["settings"] | {"size": "big"}}))
    check_refused(run_script("train.py --resume -n r"), "start over with --overwrite")
    assert not (tmp_path / "here" / "owned").exists() and path.read_bytes() == bad


def test_a_checkpoint_that_was_put_in_place_of_a_stopped_run_is_not_run(run_script, drawn, tmp_path, monkeypatch):
    from landmarks_fastai.training import stage

    runs, draw = tmp_path / "here" / "runs", stage.load_best

    def stopped(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(stage, "load_best", stopped)  # behind its last epoch, before its pictures
    assert run_script(f"train.py {SHORT} -n r -d", drawn)[0] == 130
    monkeypatch.setattr(stage, "load_best", draw)
    (runs / "r/best.pth").write_bytes(payload())
    check_refused(run_script("train.py --resume -n r"), "r/best.pth is no file of tensors", "may run code")
    assert not (tmp_path / "here" / "owned").exists()


def test_two_processes_of_one_name(run_script, drawn, tmp_path):
    "The lock is another process's; what that process forked does not hold it once it is dead."
    runs = tmp_path / "here" / "runs"
    runs.mkdir()
    code = (
        "import os, sys, time; from pathlib import Path; from landmarks_fastai.utils.files import process_lock\n"
        "with process_lock(Path(sys.argv[1])) as held:\n"
        "    child = os.fork()\n"
        "    if child: print(held, child, flush=True)\n"
        "    time.sleep(60)"
    )
    lock = runs / ".r.lock"
    holder = subprocess.Popen([sys.executable, "-c", code, lock], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    held, child = holder.stdout.readline().split()
    try:
        assert held == "True"
        check_refused(run_script(f"train.py {SHORT} -n r -d", drawn), "another process is running it")
        check_refused(run_script("train.py --resume -n r -d", drawn), "another process is running it")
        with process_lock(runs / "other.lock") as other:
            assert other
    finally:
        holder.kill()
        holder.wait()
    with process_lock(lock) as mine:  # though the child, a copy of the dead process, lives
        assert mine
    os.kill(int(child), signal.SIGKILL)
    assert not lock.exists()


def test_ctrl_c_while_nothing_is_trained_yet_ends_at_once(tmp_path, drawn):
    "A real process, and its exit code."
    command = [sys.executable, ROOT / "train.py", *QUICK.split(), "-n", "r", "-d", drawn]
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert process.stdout.readline() == "run r\n"  # it has its name, torch is not imported yet
        time.sleep(0.1)
        process.send_signal(number)
        _, err = process.communicate()
        assert process.returncode == code, err
        assert "nothing was saved yet" in err and err.endswith(STOPPED.format("train.py", "r"))
