"""What several test modules use: files that are changed, runs and their comparison, signals, processes.

Fixtures stand in conftest.py.
"""

import os
import shlex
import signal
import socket
import struct
import subprocess
import sys
import time
import zlib
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders
from fastai.learner import Learner, ValueMetric
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from landmarks_fastai import landmark_dataloaders, landmark_learner
from landmarks_fastai.data.align import MIN_GAIN
from landmarks_fastai.inference.scoring import Scores
from landmarks_fastai.models.networks import METADATA
from landmarks_fastai.runs.checkpoint import read_checkpoint, write_checkpoint
from landmarks_fastai.runs.run import Run
from landmarks_fastai.settings import DataFacts, Settings
from landmarks_fastai.training.components import body_and_head, optimiser
from landmarks_fastai.utils.hardware import Machine

ROOT = Path(__file__).parent.parent
N_POINTS, N_TRAIN, N_TEST = 68, 40, 6  # of the drawn set
ALIGNED = DataFacts(align_gain=MIN_GAIN)  # of data with a second pass
ARCH = "timm:test_resnet"  # 0.5 million weights: most of a test's time would go into writing resnet18's 11
# One pass: the second has tests of its own (training/test_align.py), and most others hold for either
QUICK = f"--arch {ARCH} --weights none --size 32 -b 8 -e 1 --workers 0 --align off"
SHORT = f"{QUICK} -e 3 -b 4"  # an epoch: 8 batches of training, 2 of validation
RUNS = Path("runs")  # of `run_script`, in the current folder
LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="as Linux does it")


# --- files


def labels_of(data):
    return data / "train" / "landmarks.csv"


def csv_lines(path):
    return Path(path).read_text(encoding="utf-8").splitlines()


def edit_line(path, number, change):
    "Rewrite line `number` (the header is 1) of a text file."
    lines = csv_lines(path)
    lines[number - 1] = change(lines[number - 1])
    Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8")


def row_names(data):
    "The file names of the training rows."
    return [line.split("\t")[0] for line in csv_lines(labels_of(data))[1:]]


def row_image(data, row):
    "The path of a training row's image."
    return data / "train" / "images" / row_names(data)[row]


def snapshot(folder):
    "The bytes of every file, but of the caches, which are complete or absent; None for a folder."
    paths = [path for path in Path(folder).rglob("*") if path.suffix != ".cache"]
    return {path: path.read_bytes() if path.is_file() else None for path in paths}


def frame_with_gaps(data, share=0.3, seed=0):
    "The rows of a drawn set, with that share of the points missing; of point 5 all but one."
    table = pd.read_csv(labels_of(data), sep="\t")
    missing = np.random.default_rng(seed).random((len(table), N_POINTS)) < share
    missing[1:, 5] = True
    values = table.iloc[:, 1:].astype(float).mask(missing.repeat(2, 1))
    return pd.concat([table.iloc[:, :1], values], axis=1)


def write_labelled_images(folder, images, points):
    "Write PIL images as PNGs, and a landmarks.csv with a point (x, y) for each, in the competition's layout."
    (folder / "train" / "images").mkdir(parents=True)
    rows = ["file_name\tx\ty"]
    for k, (image, (x, y)) in enumerate(zip(images, points, strict=True)):
        image.save(folder / "train" / "images" / f"{k}.png")
        rows.append(f"{k}.png\t{x:.4f}\t{y:.4f}")
    labels_of(folder).write_text("\n".join(rows) + "\n", encoding="utf-8")


def dot(width, height, x, y, sigma):
    "An image as floats 0 to 1 (height, width), black but for a Gaussian dot centred on pixel coordinates (x, y)."
    v, u = np.mgrid[:height, :width]
    return np.exp(-((u - x) ** 2 + (v - y) ** 2) / (2 * sigma**2)).astype(np.float32)


def png(width, height, depth, colour, raw, *chunks):
    "A PNG as its bytes: kinds that Pillow does not write."

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    more = b"".join(chunk(*c) for c in chunks)
    return b"\x89PNG\r\n\x1a\n" + head + more + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")


class Payload:
    "Its pickle makes a folder `owned` in the current folder when it is read."

    def __reduce__(self):
        return os.mkdir, ("owned",)


# --- runs


def check_refused(result, *parts, code=1):
    "The result of `run_script` is one line on stderr that says all of `parts`, nothing else."
    exit_code, _, err = result
    assert exit_code == code and err.count("\n") == 1 and err.startswith("error: "), err
    for part in parts:
        assert part in err, err


def tensors(path):
    "The tensors of a checkpoint, without its metadata."
    return {k: t for k, t in torch.load(path, weights_only=True).items() if k != METADATA}


def equal_tensors(a, b):
    "Whether two checkpoints have the same tensors to the last bit."
    a, b = tensors(a), tensors(b)
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def best(name, runs=RUNS):
    return read_checkpoint(runs / f"{name}/best.pth")


def history(name, runs=RUNS, **kwargs):
    return pd.read_csv(runs / f"{name}/history.csv", **kwargs).drop(columns="time")


def check_equal(a, b, runs=RUNS):
    "Weights of the best, every figure of every epoch to its last digit, and the metadata of the checkpoint."
    assert history(a, runs, dtype=str).equals(history(b, runs, dtype=str))
    one, other = (torch.load(runs / f"{name}/best.pth", weights_only=True) for name in (a, b))
    assert one.pop(METADATA) == other.pop(METADATA)
    assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def small_learner(data, path=".", machine=Machine(workers=0), **changes):  # noqa: B008
    "A Learner of a small network on a folder of data, which prints nothing; `changes` are settings."
    settings = {"arch": ARCH, "size": 32, "batch_size": 8, "align": 0.0, "sched": "none"} | changes
    dls = landmark_dataloaders(data, machine=machine, **settings)
    return silent(landmark_learner(dls, weights="none", machine=machine, path=path))


def untrained(data, out, name="m", **changes):
    "The folder of a run in an output folder, with the checkpoint of a network that nobody has trained."
    learn, run = small_learner(data, init_head="random", **changes), Run(out, name)
    run.folder.mkdir(parents=True)
    write_checkpoint(run, learn.model, learn.settings, learn.facts, 99.0, 0.5, 0)
    return run.folder


def silent(learn):
    "A Learner without its progress bar and its table."
    learn.remove_cbs([callback for callback in learn.cbs if callback.name == "progress"])
    learn.logger = lambda values: None
    return learn


class GivenScores(Callback):
    "In place of the one that scores points: `scores` runs through a list, one an epoch."

    order, name = 46, "evaluation"

    def __init__(self, scores):
        self.left = iter(scores)

    def after_validate(self):
        self.scores = Scores(next(self.left), 0.0, 1, 0)


def tiny_learner(scores, opt="adamw", lr=3e-4):
    "A Learner on a tiny network whose score runs through `scores`, one an epoch."
    torch.manual_seed(0)
    data = TensorDataset(torch.rand(4, 3), torch.rand(4, 2))
    dls = DataLoaders(DataLoader(data, 2), DataLoader(data, 2))
    model = nn.Sequential(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), nn.Sequential(nn.Linear(4, 2)))
    opt_func, evaluation = optimiser(Settings(opt=opt, wd=0.05, head_lr_mult=1.0)), GivenScores(scores)
    metrics = ValueMetric(lambda: evaluation.scores.score, "score")
    learn = Learner(dls, model, nn.MSELoss(), opt_func=opt_func, lr=lr, metrics=metrics, splitter=body_and_head)
    learn.add_cb(evaluation)
    return silent(learn)


@contextmanager
def every_learner_has(*callbacks):
    "fastai's own way to a Learner that somebody else makes: `defaults.callbacks`."
    import fastai.callback.progress  # noqa: F401 (it and what it imports add their own to the list: before it is patched)
    from fastai.torch_core import defaults

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(defaults, "callbacks", [*defaults.callbacks, *callbacks])
        yield


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


# --- processes

LIMIT = 240  # seconds, for a machine under load: a deadlock would last for distributed.TIMEOUT


def start(command, folder=None, **kwargs):
    "Start Python with these words, in a folder; its output is read."
    kwargs = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | kwargs
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | kwargs.pop("env", {})
    return subprocess.Popen([sys.executable, *map(str, command)], cwd=folder, text=True, env=env, **kwargs)


def python(code, folder=None, **kwargs):
    "Start Python on a program."
    return start(["-c", code], folder, **kwargs)


def torchrun(folder, line, processes=2, flags="--standalone", **env):
    "Start torchrun in a folder on a script's command line; the script is in this folder, or one of the project."
    script, *words = shlex.split(line)
    script = folder / script if (folder / script).exists() else ROOT / script
    command = ["-m", "torch.distributed.run", *flags.split(), "--nproc-per-node", processes, script, *words]
    return start(command, folder, env=env)


def two_machines(folders, line, **env):
    "A torchrun in each folder, as on two machines: they meet at an address of this one."
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    meet = f"--nnodes 2 --rdzv-backend c10d --rdzv-id test --rdzv-endpoint 127.0.0.1:{port}"
    return [torchrun(f, line, 1, f"{meet} --local-addr 127.0.0.{k}", **env) for k, f in enumerate(folders, 1)]


def finish(process):
    "The output of a process that must end well."
    out, err = process.communicate(timeout=LIMIT)
    assert process.returncode == 0, f"{out}{err}"
    return out


def check_stopped(process, *texts, begins="error: "):
    "The processes of a torchrun ended with one line, before its report; torchrun ends with code 1. Returns the output."
    out, err = process.communicate(timeout=LIMIT)
    lines = [line for line in err.splitlines() if line.startswith(("error: ", "stopped: ", "warning: "))]
    assert process.returncode == 1 and len(lines) == 1 and lines[0].startswith(begins), out + err
    assert err.count("Traceback") == 1, err  # torchrun's own
    assert all(text in lines[0] for text in texts), lines[0]
    return out


def pids_of(process):
    "The processes that a torchrun has started: rank -> pid. (Linux)"
    pids = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
            if parent == process.pid and b".py" in (folder / "cmdline").read_bytes():
                env = dict(x.split("=", 1) for x in (folder / "environ").read_text().split("\0") if "=" in x)
                pids[int(env["LOCAL_RANK"])] = int(folder.name)
        except (OSError, KeyError):  # it has ended, or is a fork that has not started yet
            continue
    return pids


def wait_for_states(process, folder, count):
    "Until a run has written its state so many times, or its process has ended."
    path, last = folder / "state.safetensors", None
    while count and process.poll() is None:
        now = path.stat().st_ino if path.exists() else None
        count, last = count - (now not in (None, last)), now
        time.sleep(0.002)


def peak_memory(code, folder=None):
    "The peak of a fresh process's memory, in bytes. (Linux) Unlike getrusage's, VmHWM begins anew with the process."
    code += "\nprint(*[line.split()[1] for line in open('/proc/self/status') if 'VmHWM' in line])"
    return 1024 * int(finish(python(code, folder)).split()[-1])
