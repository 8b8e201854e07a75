"The name of a run: who may use it, and what --overwrite and a process that is killed leave in its folder."

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys

import pytest
from fastai.callback.core import Callback

from landmarks_fastai.errors import UserError
from landmarks_fastai.runs.claim import claimed_run, process_lock
from landmarks_fastai.runs.run import Record, Run
from tests.helpers import (
    ARCH,
    ROOT,
    RUNS,
    SHORT,
    CtrlC,
    best,
    check_refused,
    every_learner_has,
    snapshot,
    stopping_at,
)


@pytest.mark.train
def test_name_of_a_stopped_run_is_refused_without_resume_or_overwrite(run_script, drawn):
    with stopping_at(5):
        assert run_script(f"train.py {SHORT} -n r -d", drawn)[0] == 130
    state = (RUNS / "r/state.safetensors").read_bytes()
    check_refused(
        run_script(f"train.py {SHORT} -n r -d", drawn),
        "already has a run",
        "resume it with python train.py --resume -n r;",
        "--overwrite",
    )
    # a mistake in what overwrites it costs nothing
    check_refused(run_script(f"train.py {SHORT} -n r --overwrite --weights gone.pth -d", drawn), "gone.pth not found")
    assert (RUNS / "r/state.safetensors").read_bytes() == state
    check_refused(run_script("train.py --resume"), "--resume needs -n NAME", "stopped runs in runs: r")
    check_refused(run_script("train.py --resume -n typo"), "-n typo: no such run in runs", "stopped runs there: r")
    check_refused(
        run_script("train.py --resume -n r --out other"), "-n r: no such run in other", "to start it, give -d too"
    )
    check_refused(run_script("train.py --resume -n ../runs/r"), "is not a plain file name")
    check_refused(run_script("train.py --resume -n r -e 5"), "-e 5", "was started with (-e was 3)", "run without -e")
    check_refused(run_script("train.py --resume -n r --arch resnext50_32x4d"), f"--arch was {ARCH}")  # the default
    code, out, err = run_script(f"train.py {SHORT} --resume -n r -d", drawn)  # the same flags may stand there
    assert (code, err) == (0, "") and "resuming at epoch" in out


@pytest.mark.train
def test_failed_overwrite_leaves_the_old_run_unchanged(run_script, drawn):
    "A loss that is no number, an error and Ctrl-C, over a stopped run and over a finished one."
    ruin = f"{SHORT} --opt sgd -lr 999 --head-lr-mult 1 --ema 0 --seed 5 -n r --overwrite -d"
    with stopping_at(13):
        assert run_script(f"train.py {SHORT} -n r -d", drawn)[0] == 130
    assert run_script("predict.py --workers 0 -pm r")[0] == 0  # what others wrote into its folder stays too
    for _ in ("stopped", "finished"):
        before = snapshot(RUNS)
        check_refused(run_script(f"train.py {ruin}", drawn), "NaN or infinite", "nothing was saved")
        assert snapshot(RUNS) == before
        check_refused(run_script(f"train.py {ruin} {drawn} --weights gone.pth"), "gone.pth not found")
        assert snapshot(RUNS) == before
        with every_learner_has(CtrlC):
            code, _, err = run_script(f"train.py {SHORT} -n r --overwrite -d", drawn)
        assert code == 130 and "the run that was to be overwritten is unchanged" in err
        assert snapshot(RUNS) == before
        assert run_script("train.py --resume -n r")[0] == 0


@pytest.mark.parametrize("moment", ["old moved away", "before it saved", "saved", "old half removed"])
def test_repair_after_a_kill_during_overwrite_leaves_one_complete_run(tmp_path, moment):
    "Each state of the folders that SIGKILL can leave, and what the next claim makes of it."
    run = Run(tmp_path, "r")
    old, new = {"best.pth": b"old", "run.json": b"{}"}, {"best.pth": b"new", "run.json": b"{}"}
    folders = {
        "old moved away": {run.old: old},
        "before it saved": {
            run.old: old,
            run.folder: {"run.json": b"{}", "bad.csv": b"1", "batch.png.99999999.tmp": b""},
        },
        "saved": {run.old: old, run.folder: new | {"state.safetensors.99999999.tmp": b""}},
        "old half removed": {run.old: {"run.json": b"{}"}, run.folder: new},
    }[moment]
    for folder, files in folders.items():
        folder.mkdir()
        for name, content in files.items():
            (folder / name).write_bytes(content)
    run.repair()
    assert [p.name for p in tmp_path.iterdir()] == ["r"]
    expected = {"old moved away": old, "before it saved": old | {"bad.csv": b"1"}}.get(moment, new)  # bad.csv stays
    assert {p.name: p.read_bytes() for p in run.folder.iterdir()} == expected


def test_overwritten_run_is_kept_beside_the_new_one_until_that_ends(run_script, drawn, finished_run):
    before = {p.name: p.read_bytes() for p in finished_run("r").iterdir()}
    kept = []

    class Watch(Callback):
        def after_batch(self):
            kept.append({p.name: p.read_bytes() for p in (RUNS / ".r.old").iterdir()} == before)

    with every_learner_has(Watch), stopping_at(13):
        assert run_script(f"train.py {SHORT} --seed 3 --overwrite -n r -d", drawn)[0] == 130
    assert kept and all(kept) and [p.name for p in RUNS.iterdir()] == ["r"]
    assert run_script("train.py --resume -n r")[0] == 0 and best("r").settings.seed == 3


@pytest.mark.train
@pytest.mark.parametrize("record", ["", "[]", '{"format": 1}', '{"script": "train.py", "flags": {"no_such_flag": 1}}'])
def test_a_record_of_another_kind_is_refused_and_can_be_overwritten(run_script, drawn, record):
    (RUNS / "s").mkdir(parents=True)
    (RUNS / "s" / "run.json").write_text(record)
    check_refused(run_script("train.py --resume -n s"), "not the record of a run", "start over with --overwrite")
    if record == "[]":
        assert run_script(f"train.py {SHORT} --overwrite -n s -d", drawn)[0] == 0


@pytest.mark.train
def test_flags_of_the_machine_may_change_when_a_run_is_resumed(run_script, drawn):
    with stopping_at(5):
        assert run_script(f"train.py {SHORT} --save-every 7 -n r -d", drawn)[0] == 130
    with stopping_at(5):
        assert run_script("train.py --resume -n r --workers 1 --cache --max-pixels 1")[0] == 130
    flags = json.loads((RUNS / "r/run.json").read_text())["flags"]
    assert (flags["save_every"], flags["workers"], flags["cache"], flags["max_pixels"]) == (7, 1, True, 1)
    assert (flags["epochs"], flags["data"]) == (3, str(drawn))
    assert run_script("train.py --resume -n r --workers 0")[0] == 0


def test_a_second_process_with_the_same_name_is_refused(run_script, drawn):
    "The lock is another process's; its workers do not hold it once it is dead."
    RUNS.mkdir()
    code = (
        "import multiprocessing, os, sys, time; from pathlib import Path\n"
        "from landmarks_fastai.runs.claim import process_lock\n"
        "read, write = os.pipe()\n"
        "def child():\n"
        "    os.write(write, b'.')\n"
        "    time.sleep(60)\n"
        "with process_lock(Path(sys.argv[1])) as held:\n"
        "    worker = multiprocessing.get_context('fork').Process(target=child)\n"
        "    worker.start()\n"
        "    forked = os.fork() or child()\n"
        "    [os.read(read, 1) for _ in range(2)]\n"  # a forked process closes the lock's file as its first step
        "    print(held, forked, worker.pid, flush=True)\n"
        "    time.sleep(60)"
    )
    lock = RUNS.absolute() / ".r.lock"
    holder = subprocess.Popen([sys.executable, "-c", code, lock], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    held, *children = holder.stdout.readline().split()
    try:
        assert held == "True"
        check_refused(run_script(f"train.py {SHORT} -n r -d", drawn), "another process is running it")
        check_refused(run_script("train.py --resume -n r -d", drawn), "another process is running it")
        with process_lock(RUNS / "other.lock") as other:
            assert other
    finally:
        holder.kill()
        holder.wait()
    with process_lock(lock) as mine:  # though both children, copies of the dead process, live
        assert mine and len(children) == 2
    for child in children:
        os.kill(int(child), signal.SIGKILL)
    assert not lock.exists()


def test_a_run_that_saved_nothing_leaves_no_folder_of_tensorboard(tmp_path):
    for _ in range(2):
        with pytest.raises(UserError, match="not enough memory"):
            with claimed_run(tmp_path, "r", "", Record("train.py", {}), False, False) as run:
                (run.folder / "tensorboard").mkdir()
                (run.folder / "tensorboard" / "events").write_text("1")
                raise UserError("not enough memory")
        assert not run.folder.exists()


def test_lock_can_be_taken_again_and_leaves_no_file(tmp_path):
    for _ in range(2):
        with process_lock(tmp_path / "l") as held, process_lock(tmp_path / "l") as second:
            assert (held, second) == (True, False) and (tmp_path / "l").exists()
        assert not os.listdir(tmp_path)


def test_folder_in_place_of_a_lock_is_reported(tmp_path):
    (tmp_path / "l").mkdir()
    with pytest.raises(UserError, match="l cannot be opened .Is a directory"), process_lock(tmp_path / "l"):
        pass


def test_lock_is_granted_on_file_systems_without_locks(tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with process_lock(tmp_path / "l") as held:
        assert held
    assert not os.listdir(tmp_path)
