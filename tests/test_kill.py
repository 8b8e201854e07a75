"""Real runs, killed with SIGKILL at random moments and resumed, 5 and 5 of them: `KILLS=20` makes 20 and 20.

Moments within the writing of a state or a checkpoint are among them: every fourth kill waits for the temporary file.
"""

import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from PIL import Image

from tests.helpers import QUICK, ROOT, check_equal, finish, labels_of, start, wait_for_states

pytestmark = pytest.mark.slow

KILLS = int(os.environ.get("KILLS", 5))  # and as many signals
STATES = "--save-every 0"  # a state at every batch
FIRST = f"train.py {QUICK} --arch mobilenetv3_small_050 --head 16,drop0.5 -b 4 -e 3 {STATES} -n one -d"
STAGES = {  # the second one's worker outlives the process for a while
    "one": FIRST,
    "two": f"finetune.py -e 3 --workers 1 {STATES} -n two -pm one",
    "three": f"finetune.py -e 3 --workers 0 {STATES} -n three -pm two",
}


def stage(folder, line, *more, **kwargs):
    "Start a stage in a folder; the output has its errors, too."
    script, *words = line.split()
    return start([ROOT / script, *words, *more], folder, stderr=subprocess.STDOUT, **kwargs)


def kill_in_writing(process, runs, name):
    "Kill the process as soon as it writes a state or a checkpoint."
    while process.poll() is None and not any(p.name.startswith(("state", "best")) for p in (runs / name).glob("*.tmp")):
        pass
    process.kill()
    process.wait()
    assert any((runs / name).glob("*.tmp"))  # it was left half-done


@pytest.fixture(scope="module")
def uninterrupted(drawn, tmp_path_factory):
    "The output folder of the stages, never stopped."
    folder = tmp_path_factory.mktemp("uninterrupted")
    for name, line in STAGES.items():
        finish(stage(folder, line, *([drawn] if name == "one" else [])))
    return folder / "runs"


@pytest.mark.parametrize("kill", range(KILLS))
def test_killed_run_resumes_to_the_same_weights(uninterrupted, drawn, tmp_path, kill):
    """Every fifth kill falls into the start-up, every fourth of the others into the writing of a file, the others anywhere;
    some runs are killed twice.
    """
    rng, name = random.Random(kill), list(STAGES)[kill % len(STAGES)]
    here = tmp_path / "runs"
    here.mkdir()
    for path in uninterrupted.iterdir():  # the stages before, and this one under another name to compare with
        shutil.copytree(path, here / ("uninterrupted" if path.name == name else path.name))
    line, more = STAGES[name], [drawn] if name == "one" else []
    script = line.split()[0]
    for again in range(1 + (kill % 7 == 2)):
        process = stage(tmp_path, f"{script} --resume -n {name}") if again else stage(tmp_path, line, *more)
        if kill % 5 == 4:
            time.sleep(rng.uniform(0.3, 4))
        else:
            wait_for_states(process, here / name, rng.randrange(1, 24 // (1 + again)))
        if kill % 4 == 3 and kill % 5 != 4:
            kill_in_writing(process, here, name)
        else:
            time.sleep(rng.uniform(0, 0.2))
            process.send_signal(signal.SIGKILL)
            process.wait()
    out = finish(stage(tmp_path, f"{script} --resume -n {name}"))
    print(f"kill {kill}: {name}: {[x for x in out.splitlines() if 'resuming' in x or 'finished' in x]}")
    check_equal("uninterrupted", name, here)
    assert not list(here.rglob("*.tmp")) and not list(here.rglob("*.lock"))


# Two workers, so slow that the loop waits for them; a validation as long as the training.
GROUP = f"train.py {QUICK} --arch mobilenetv3_small_050 -b 4 -e 3 --workers 2 --valid-pct 0.5 --save-every 0 -n {{}} -d"


@pytest.fixture(scope="module")
def slow_images(drawn, tmp_path_factory):
    "PNGs of 1,200 px: 40 ms to decode each."
    folder = Path(shutil.copytree(drawn, tmp_path_factory.mktemp("slow") / "faces"))
    table = labels_of(folder)
    head, *rows = table.read_text().splitlines()
    for k, row in enumerate(rows):
        name, *numbers = row.split("\t")
        with Image.open(folder / "train" / "images" / name) as image:
            scale = 1200 / image.width
            large = image.resize((1200, round(image.height * scale)))
            large.save(folder / "train" / "images" / f"{k}.png", compress_level=1)
        rows[k] = "\t".join([f"{k}.png", *(f"{float(v) * scale:.2f}" for v in numbers)])
    table.write_text("\n".join([head, *rows]) + "\n")
    return folder


@pytest.fixture(scope="module")
def uninterrupted_group(slow_images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted_group")
    finish(stage(folder, GROUP.format("uninterrupted"), slow_images))
    return folder / "runs"


@pytest.mark.parametrize("moment", range(KILLS))
def test_a_signal_to_the_process_group_loses_nothing(uninterrupted_group, slow_images, tmp_path, moment):
    "What systemd, Slurm, docker and a terminal send: workers get it too, at start-up, waiting, validation, writing."
    shutil.copytree(uninterrupted_group, tmp_path / "runs")
    rng = random.Random(moment)
    number, code = ((signal.SIGTERM, 143), (signal.SIGINT, 130))[moment % 2]
    process = stage(tmp_path, GROUP.format("r"), slow_images, start_new_session=True)
    record = tmp_path / "runs" / "r" / "run.json"
    while not record.exists() and process.poll() is None:
        time.sleep(0.01)
    if moment % 4 < 2:  # importing, checking images, starting workers
        time.sleep(rng.uniform(0, 6))
    else:  # counted in states: how fast the machine is now does not matter
        wait_for_states(process, record.parent, rng.randrange(1, 14))
        time.sleep(rng.uniform(0, 0.5))
    if moment % 5 == 4:
        while process.poll() is None and not list((tmp_path / "runs" / "r").glob("*.tmp")):
            pass
    os.killpg(process.pid, number)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == code and "Traceback" not in out and record.exists(), out
    assert "resume with: python train.py --resume -n r" in out
    finish(stage(tmp_path, "train.py --resume -n r"))
    check_equal("uninterrupted", "r", tmp_path / "runs")
