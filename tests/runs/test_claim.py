"The name of a run: who may use it, and what --overwrite and a process that is killed leave in its folder."

import os
import signal
import subprocess
import sys

import pytest

from landmarks_fastai.runs.run import Run
from landmarks_fastai.utils.files import process_lock
from tests.cli.test_scripts import check_refused
from tests.conftest import ARCH, ROOT, every_learner_has
from tests.training.test_resume import RUNS, SHORT, CtrlC, check_equal, snapshot, stopping_at


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
    check_refused(run_script("train.py --resume -n ../runs/r"), "is no plain file name")
    check_refused(run_script("train.py --resume -n r -e 5"), "-e 5", "was started with (-e was 3)", "run without -e")
    check_refused(run_script("train.py --resume -n r --arch resnext50_32x4d"), f"--arch was {ARCH}")  # the default
    code, out, err = run_script(f"train.py {SHORT} --resume -n r -d", drawn)  # the same flags may stand there
    assert (code, err) == (0, "") and "resuming at epoch" in out


def test_failed_overwrite_leaves_the_old_run_unchanged(run_script, drawn):
    "A loss that is no number, an error and Ctrl-C, over a stopped run and over a finished one."
    ruin = f"{SHORT} --opt sgd -lr 999 --head-lr-mult 1 --targets pixels --ema 0 --seed 5 -n r --overwrite -d"
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


@pytest.mark.parametrize("moment", ["before it saved", "old moved away", "new in place"])
def test_repair_after_a_kill_during_overwrite_leaves_one_complete_run(tmp_path, moment):
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


def test_overwritten_run_is_replaced_when_the_new_one_has_saved_a_state(run_script, drawn):
    assert run_script(f"train.py {SHORT} -n r -d", drawn)[0] == 0
    before, seen = snapshot(RUNS / "r"), []
    publish = Run.publish

    def watched(run):
        seen.append(snapshot(RUNS / "r") == before)
        publish(run)

    with pytest.MonkeyPatch.context() as patch, stopping_at(5):
        patch.setattr(Run, "publish", watched)
        assert run_script(f"train.py {SHORT} --seed 3 --overwrite -n r -d", drawn)[0] == 130
    assert seen[0] and [p.name for p in RUNS.iterdir()] == ["r"] and not (RUNS / "r" / "best.pth").exists()
    assert run_script("train.py --resume -n r")[0] == 0
    assert run_script(f"train.py {SHORT} --seed 3 -n whole -d", drawn)[0] == 0
    check_equal(RUNS, "whole", "r")


def test_a_run_of_an_earlier_version_is_not_resumed(run_script, drawn):
    RUNS.mkdir()
    (RUNS / "r_run.json").write_text("{}")
    check_refused(run_script("train.py --resume -n r"), "of an earlier version", "start over with --overwrite")
    (RUNS / "s").mkdir()
    (RUNS / "s" / "run.json").write_text('{"format": 1}')
    check_refused(run_script("train.py --resume -n s"), "not of this version", "start over with --overwrite")
    assert run_script(f"train.py {SHORT} --overwrite -n s -d", drawn)[0] == 0


def test_a_second_process_with_the_same_name_is_refused(run_script, drawn):
    "The lock is another process's; what that process forked does not hold it once it is dead."
    RUNS.mkdir()
    code = (
        "import os, sys, time; from pathlib import Path; from landmarks_fastai.utils.files import process_lock\n"
        "with process_lock(Path(sys.argv[1])) as held:\n"
        "    child = os.fork()\n"
        "    if child: print(held, child, flush=True)\n"
        "    time.sleep(60)"
    )
    lock = RUNS.absolute() / ".r.lock"
    holder = subprocess.Popen([sys.executable, "-c", code, lock], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    held, child = holder.stdout.readline().split()
    try:
        assert held == "True"
        check_refused(run_script(f"train.py {SHORT} -n r -d", drawn), "another process is running it")
        check_refused(run_script("train.py --resume -n r -d", drawn), "another process is running it")
        with process_lock(RUNS / "other.lock") as other:
            assert other
    finally:
        holder.kill()
        holder.wait()
    with process_lock(lock) as mine:  # though the child, a copy of the dead process, lives
        assert mine
    os.kill(int(child), signal.SIGKILL)
    assert not lock.exists()
