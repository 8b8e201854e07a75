"Predictions in several processes that torchrun starts: the files of one process, and after a kill only what is missing."

import os
import shutil
import subprocess
import sys

import pytest

from landmarks_fastai.inference import shards
from landmarks_fastai.utils import distributed
from tests.conftest import QUICK, ROOT, csv_lines, train_run
from tests.processes import LIMIT, check_stopped, finish, torchrun, two_machines

# predict.py with parts of 8 pictures. It writes the number of parts that it predicted. The process DIES is killed in its
# first part, when each of the others has one; they wait in their second one.
SPY = f"""
import os, signal, sys, time
sys.path.insert(0, {str(ROOT)!r})
env, renamed = dict(os.environ), []
dies = env.get("DIES") if env["TORCHELASTIC_RESTART_COUNT"] == "0" else None
def spy(event, args):
    if event == "os.rename" and "predicted_parts" in str(args[1]):
        renamed.append(args[1])
        while env["RANK"] == dies:
            finished = [name for name in os.listdir(os.path.dirname(args[1])) if len(name) == 64]
            if len(finished) == int(env["WORLD_SIZE"]) - 1:
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(0.01)
        if dies and len(renamed) == 2:
            time.sleep(int(env.get("WAIT", 1000)))
sys.addaudithook(spy)
from landmarks_fastai.cli import app, predict
from landmarks_fastai.inference import shards
shards.SIZE = 8
try:
    app.run_main(predict.main)
finally:
    with open(f"spy{{env['RANK']}}.txt", "w") as f:
        f.write(str(len(renamed)))
"""
SAVED = "finished parts are saved; the same command predicts the others"
FILES = ("submit.csv", "points.npy", "points.json")


@pytest.fixture(scope="module")
def two_passes(drawn, tmp_path_factory):
    "A run with aligned crops and a spread."
    flags = f"{QUICK.replace('--align off', '--align 1.05')} --confidence"
    return train_run(flags, drawn, tmp_path_factory.mktemp("two_passes"))


@pytest.fixture
def folder(two_passes, tmp_path):
    "A folder with the run, and `spy.py`."
    shutil.copytree(two_passes, tmp_path / "runs/m")
    (tmp_path / "spy.py").write_text(SPY)
    return tmp_path


def one_process(folder, *words):
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, ROOT / "predict.py", *words], cwd=folder, check=True, env=env)


def check_equal(folder, expected, *names):
    "The files are equal, and nothing is left of parts."
    for name in names:
        assert (folder / name).read_bytes() == (expected / name).read_bytes()
    assert not any("predicted_parts" in str(path) or path.suffix == ".tmp" for path in folder.rglob("*"))


def predicted(folder):
    "The number of parts that the last command predicted."
    files = list(folder.glob("spy?.txt"))
    n = sum(int(file.read_text()) for file in files)
    for file in files:  # the next command may have fewer processes
        file.unlink()
    return n


def test_parts_have_the_batches_of_one_process(monkeypatch):
    "A video is a part, and pictures behind it start a new batch, as in one process."
    paths = ["a.jpg"] * 70 + ["v.mp4", "w.mp4"] + ["b.jpg"] * 9
    monkeypatch.setattr(distributed, "_this", distributed.Process(count=3))
    parts = shards.cut_parts(paths, 8)
    assert [len(part) for part in parts] == [32, 32, 6, 1, 1, 9]
    assert [row for part in parts for row in part] == list(range(81))
    assert shards.cut_parts(["a.jpg"] * 2, 8) == [range(2)] and not shards.cut_parts([], 8)
    assert max(map(len, shards.cut_parts(["a.jpg"] * 9000, 32))) == shards.SIZE


@pytest.mark.slow
def test_submission_of_processes_is_that_of_one(folder, drawn):
    one_process(folder, "-pm", "m", "-b", "1")
    one = shutil.move(folder / "runs/m", folder / "one")
    shutil.copytree(one, folder / "runs/m", ignore=shutil.ignore_patterns(*FILES))
    out = finish(torchrun(folder, "predict.py -pm m -b 1", 4))
    assert out.startswith("6 images: runs/m/submit.csv") and out.count("6 images") == 1
    check_equal(folder / "runs/m", one, *FILES)


@pytest.mark.slow
def test_pictures_of_processes_are_those_of_one(folder, drawn):
    "A path with a space, copies with points, a broken picture."
    shutil.copytree(drawn / "train/images", folder / "some faces")
    (folder / "some faces/broken.jpg").write_bytes(b"no picture")
    flags = "-pm m -b 4 --format npy --overlay --confidence 'some faces'"
    out, err = torchrun(folder, f"spy.py {flags}", 3).communicate(timeout=LIMIT)
    assert "41 pictures: runs/m/predictions.npy" in out and predicted(folder) == 6, out + err
    assert err.count("error: image some faces/broken.jpg") == err.count("error: 1 of the files could not be used") == 1
    several = shutil.move(folder / "runs", folder / "several")
    shutil.copytree(several, folder / "runs", ignore=shutil.ignore_patterns("predictions*", "overlay"))
    with pytest.raises(subprocess.CalledProcessError):
        one_process(folder, *flags.replace("'some faces'", "").split(), "some faces")
    names = [str(path.relative_to(folder / "runs")) for path in (folder / "runs").rglob("*") if path.is_file()]
    assert sum("overlay" in name for name in names) == 40
    check_equal(several, folder / "runs", *names)


@pytest.mark.slow
@pytest.mark.parametrize("processes,dies", [(2, 0), (2, 1), (3, 2)])
def test_killed_process_ends_all_and_only_its_part_is_predicted_again(folder, drawn, processes, dies):
    "Parts of other flags, or of a picture that has changed since, are not taken. The number of processes may change."
    shutil.copytree(drawn / "train/images", folder / "faces")
    line = "spy.py -pm m -b 4 --format json faces"
    check_stopped(torchrun(folder, line, processes, DIES=str(dies)), SAVED, start="stopped: ")
    assert not (folder / "runs/m/predictions.json").exists()
    out = finish(torchrun(folder, f"{line} --no-tta", processes))
    assert "predicted before" not in out and predicted(folder) == 5
    out = finish(torchrun(folder, line, 5 - processes))
    assert f"{processes - 1} of 5 parts were predicted before" in out and predicted(folder) == 6 - processes
    shutil.move(folder / "runs/m/predictions.json", folder)
    one_process(folder, *line.split()[1:])
    check_equal(folder / "runs/m", folder, "predictions.json")


@pytest.mark.slow
def test_torchrun_restarts_a_killed_process(folder, drawn):
    line = f"spy.py -pm m -b 4 {drawn}/train/images"
    out = finish(torchrun(folder, line, flags="--standalone --max-restarts 1", DIES="1"))
    assert "1 of 5 parts were predicted before" in out and "40 pictures" in out


@pytest.mark.slow
def test_damaged_image_of_a_submission_ends_all_and_is_predicted_again(folder, data):
    "It is damaged behind the check: as large and as old as before."
    finish(torchrun(folder, f"spy.py -pm m -b 1 -d {data}"))
    expected = [(folder / "runs/m" / name).read_bytes() for name in FILES]
    image = data / "test/images" / csv_lines(data / "test/test_points.csv")[-1].split("\t")[0]
    good, found = image.read_bytes(), image.stat()
    for content in (b"?" * len(good), good):
        image.write_bytes(content)
        os.utime(image, ns=(found.st_atime_ns, found.st_mtime_ns))
        process = torchrun(folder, f"spy.py -pm m -b 1 -d {data} --round none", 3)
        if content != good:
            check_stopped(process, f"image {image} cannot be read as an image", "test_points.csv line 7")
            assert not list(folder.rglob("*.tmp"))
    finish(process)
    assert [(folder / "runs/m" / name).read_bytes() for name in FILES[1:]] == expected[1:]


@pytest.mark.slow
def test_two_machines(folder, drawn, tmp_path):
    "A process that is killed on one ends the other; the same command goes on. A machine must see the pictures."
    line = f"spy.py -pm m -b 4 {drawn}/train/images"
    ends = [p.communicate(timeout=LIMIT)[1] for p in two_machines([folder, folder], line, DIES="1", WAIT="1")]
    stopped = [line for err in ends for line in err.splitlines() if line.startswith("stopped: ")]
    # the process notices it, or its torchrun does first, which ends it by SIGTERM
    assert stopped in ([f"stopped: another process of the run has ended; {SAVED}"], [f"stopped: {SAVED}"]), ends
    out = [finish(process) for process in two_machines([folder, folder], line)]
    assert sorted("parts were predicted before" in text for text in out) == [False, True]
    shutil.move(folder / "runs/m/predictions.csv", folder)
    one_process(folder, *line.split()[1:])
    check_equal(folder / "runs/m", folder, "predictions.csv")
    (folder / "other").mkdir()
    os.symlink(folder / "runs", folder / "other/runs")
    shutil.copytree(drawn / "train/images", folder / "faces")
    machines = two_machines([folder, folder / "other"], f"{ROOT}/predict.py -pm m faces")
    ends = "".join(p.communicate(timeout=LIMIT)[1] for p in machines)
    assert ends.count("error: faces/") == 1 and "is not on this machine: pictures must be in a shared folder" in ends
