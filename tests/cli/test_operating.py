"Runs with signals, closed outputs, no home folder, a locale without UTF-8, little memory."

import os
import signal
import subprocess
import sys
import time

import pytest
from fastai.vision.core import PILImage
from fasttransform import Transform

from landmarks_fastai.data.block import landmark_dataloaders
from landmarks_fastai.errors import UserError
from landmarks_fastai.runs.run import Record, Run, stopped_runs
from landmarks_fastai.training.callbacks.resume_state import SaveResumeState
from landmarks_fastai.utils.files import cache_places
from landmarks_fastai.utils.hardware import Machine
from tests.helpers import LINUX, ROOT, python

STOPPED = "stopped: nothing was saved yet; resume with: python train.py --resume -n r\n"


class Signalled(Transform):
    "Every signal that stops a process, to the process that opens an image."

    def encodes(self, image: PILImage):
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            os.kill(os.getpid(), number)
        return image


@LINUX
def test_a_worker_leaves_signals_to_its_parent(drawn):
    dls = landmark_dataloaders(drawn, size=32, batch_size=8, machine=Machine(workers=1))
    dls.valid.after_item.add(Signalled())
    assert len(list(dls.valid)) == 1
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, [])  # this process has its old mask again


READING = """
import os, time
from fastai.vision.core import PILImage
from fasttransform import Transform
from landmarks_fastai import landmark_dataloaders
from landmarks_fastai.cli import app
from landmarks_fastai.utils.hardware import Machine
from landmarks_fastai.utils.memory import check_worker_died

class Slow(Transform):
    def encodes(self, image: PILImage):
        {action}

def main():
    dls = landmark_dataloaders({data!r}, size=32, batch_size=8, machine=Machine(workers=1))
    dls.valid.after_item.add(Slow())
    try:
        list(dls.valid)
    except Exception as e:
        check_worker_died(e)
        raise

app.run_main(main)
"""
SLOW, KILLED = "print(os.getpid(), flush=True); time.sleep(60)", "os.kill(os.getpid(), 9)"


@pytest.mark.slow
@LINUX
def test_a_worker_in_a_slow_read_ends_with_a_killed_main_process(drawn):
    process = python(READING.format(action=SLOW, data=str(drawn)))
    worker = int(next(line for line in process.stdout if line.strip().isdigit()))
    try:
        process.kill()
        process.wait()
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline and is_running(worker):
            time.sleep(0.1)
        assert not is_running(worker)
    finally:
        if is_running(worker):
            os.kill(worker, signal.SIGKILL)


def is_running(pid) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as f:
            return f.read().rsplit(")")[-1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
@LINUX
def test_a_killed_worker_is_told_in_one_line(drawn):
    "As the kernel does where memory is short."
    process = python(READING.format(action=KILLED, data=str(drawn)))
    err = process.stderr.read()
    assert process.wait() == 1
    assert err.splitlines()[-1] == (  # torch warns before it
        "error: a worker was killed from outside, as the system does where memory is short: "
        "use fewer --workers, or --workers 0"
    )


def test_error_after_a_signal_is_reported():
    save_state = SaveResumeState(None, None)
    with pytest.raises(UserError, match="cannot be written"), save_state.stopping_on_signals():
        signal.raise_signal(signal.SIGINT)
        raise UserError("state.safetensors cannot be written")


RUN = """
import atexit, signal
from landmarks_fastai.cli import app
from landmarks_fastai.runs.run import Record
from landmarks_fastai.runs.claim import claimed_run
def main():
    from landmarks_fastai.training.callbacks.resume_state import SaveResumeState
    with claimed_run("runs", "r", "", Record("train.py")):
        {code}
app.run_main(main)
"""
PRINTING = RUN.format(code="while True: print('epoch', flush=True)")
TWICE = """try:
            with {context}:
                signal.raise_signal(signal.SIGTERM)
        finally:
            atexit.register(signal.raise_signal, signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)"""


@pytest.mark.slow
@pytest.mark.parametrize("context", ["open('x', 'w')", "SaveResumeState(None, None).stopping_on_signals()"])
def test_the_second_of_two_signals_at_once_does_not_take_away_the_line(tmp_path, context):
    "Of a scheduler that signals all processes of a job, torchrun among them, which passes it on; before a fit, and in it."
    process = python(RUN.format(code=TWICE.format(context=context)), tmp_path)
    assert (process.communicate()[1], process.returncode) == (STOPPED, 143)


@pytest.mark.slow
def test_closed_output_pipe_stops_a_run_with_code_141(tmp_path):
    process = python(PRINTING, tmp_path)
    process.stdout.readline()
    process.stdout.close()
    assert (process.stderr.read(), process.wait()) == (STOPPED, 141)


def test_closed_output_pipe_at_the_end_exits_with_code_141():
    code = "import time; from landmarks_fastai.cli import app\napp.run_main(lambda: [time.sleep(1), print(1)])"
    process = python(code)
    process.stdout.close()
    assert (process.stderr.read(), process.wait()) == ("stopped: the program that reads its output has ended\n", 141)


@LINUX
def test_closed_outputs_do_not_stop_a_run(tmp_path):
    code = "import sys; from landmarks_fastai.cli import app\napp.run_main(lambda: open('f', 'w').write(str(sys.stdout.isatty())))"
    command = f'"{sys.executable}" -c "$CODE" >&- 2>&-'
    env = os.environ | {"PYTHONPATH": str(ROOT), "CODE": code}
    assert subprocess.run(["sh", "-c", command], cwd=tmp_path, env=env).returncode == 0
    assert (tmp_path / "f").read_text() == "False"


@pytest.mark.slow
@LINUX
def test_a_full_disk_behind_the_output_is_told_in_one_line(tmp_path):
    with open("/dev/full", "w") as full:
        process = python(PRINTING, tmp_path, stdout=full)
    line = "error: the output cannot be written (No space left on device): make room where it goes\n"
    assert (process.communicate()[1], process.returncode) == (line, 1)


@LINUX
def test_too_little_memory_to_load_torch_is_told_in_one_line():
    process = python(
        "import resource; resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30)); from landmarks_fastai.cli import app\n"
        "def main(): import torch\napp.run_main(main)"
    )
    err = process.stderr.read()
    assert process.wait() == 1 and err.startswith("error: not enough memory") and err.count("\n") == 1, err


def test_a_user_without_a_home_has_the_cache_beside_the_file(tmp_path, monkeypatch):
    for name in ("HOME", "XDG_CACHE_HOME", "LOCALAPPDATA", "USERPROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as it is where the user is in no list
    assert cache_places(tmp_path / "a.csv") == [tmp_path / "a.csv.cache"]


@LINUX
def test_a_checkpoint_and_a_cache_under_a_cyrillic_name_in_the_c_locale(tmp_path):
    code = (
        "import os, sys, torch; from pathlib import Path; from landmarks_fastai.models.weights import read_state_dict\n"
        "from landmarks_fastai.utils.files import cache_places\n"
        "path = Path(os.fsdecode('лицо.pth'.encode())); torch.save({'a': torch.ones(1)}, path)\n"
        "print(sys.getfilesystemencoding(), len(cache_places(path)), *read_state_dict(path))"
    )
    env = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    (tmp_path / "script.py").write_text(code, encoding="utf-8")
    out, err = python("exec(open('script.py', encoding='utf-8').read())", tmp_path, env=env).communicate()
    assert out.split() == ["ascii", "2", "a"], err


def test_stopped_runs_lists_the_first_20(tmp_path):
    for k in range(30):
        Run(tmp_path, f"r{k:02}").write_record(Record("train.py"))
    assert stopped_runs(tmp_path) == ", ".join([*(f"r{k:02}" for k in range(20)), "…"])
