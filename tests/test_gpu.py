"""On a GPU: `python -m pytest -m gpu`. Nobody has run it on one yet; please open an issue with its output.

Without CUDA the tests are skipped. GPU_TESTS_ON=cpu makes the same checks on a CPU, which shows that the checks work.
"""

import csv
import math
import os
import signal

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from fasttransform import Transform
from torch.utils.data import get_worker_info

from landmarks_fastai import landmark_dataloaders, landmark_learner
from landmarks_fastai.utils.hardware import NAN_IN_FP16, Machine
from tests.helpers import ARCH, QUICK, every_learner_has

DEVICE = os.environ.get("GPU_TESTS_ON", "cuda")
GPU = "--gpu" if DEVICE == "cuda" else ""
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.xdist_group("gpu"),  # one process, in this order
    pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="no CUDA"),
]
# A few steps of a network with random weights: rounding must not have time to grow, and half a step must show.
TRAIN = f"train.py {QUICK} -e 2 -lr 3e-4 {GPU}"


class SeesDevice(Callback):
    "The devices of weights and inputs, in all batches."

    seen: set[str] = set()

    def before_batch(self):
        self.seen |= {self.x.device.type, next(self.learn.model.parameters()).device.type}


def train(run_script, drawn, name, flags=""):
    "The score of the second epoch of a run of two."
    code, out, err = run_script(f"{TRAIN} {flags} -n {name} -d", drawn)
    if "--compile" in flags and "--compile: it fails here" in err:
        pytest.skip(err)
    assert code == 0 and "--gpu" not in err and "run " + name in out, err
    return last_score(name)


def last_score(name):
    rows = list(csv.DictReader(open(f"runs/{name}/history.csv")))
    assert len(rows) == 2 and all(math.isfinite(float(row["train_loss"])) for row in rows)
    return float(rows[1]["score"])


def predict(run_script, name, flags=""):
    "All points of the test images, in pixels."
    code, _, err = run_script(f"predict.py -pm {name} {flags}")
    assert code == 0, err
    return np.load(f"runs/{name}/points.npy")


def test_a_stage_trains_on_the_gpu_and_its_checkpoint_predicts_as_on_the_cpu(run_script, drawn):
    "Both passes, the running average, the flip test."
    SeesDevice.seen = set()
    with every_learner_has(SeesDevice):
        train(run_script, drawn, "m", "--align 1.05")
    assert SeesDevice.seen == {DEVICE}
    points, expected = predict(run_script, "m", f"{GPU} --no-tf32"), predict(run_script, "m")
    assert np.isfinite(points).all() and np.abs(points - expected).max() < 0.05
    assert run_script(f"finetune.py -e 1 --workers 0 {GPU} -pm m -n m2")[::2] == (0, "")


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_mixed_precision_trains_to_a_similar_score(run_script, drawn, amp):
    if amp == "fp16" and (DEVICE == "cpu" or NAN_IN_FP16.search(torch.cuda.get_device_name())):
        pytest.skip("fp16 is for a GPU, and gives NaN on some")
    score = train(run_script, drawn, "off", "--amp off")
    assert train(run_script, drawn, amp, f"--amp {amp}") == pytest.approx(score, rel=0.05)
    plain, mixed = (predict(run_script, "off", f"{GPU} --amp {kind}") for kind in ("off", amp))
    assert not np.array_equal(plain, mixed) and np.abs(plain - mixed).max() < 5


class StopAt(Callback):
    "Ctrl-C behind a training batch of the second epoch."

    order = 99

    def after_batch(self):
        if self.training and (self.epoch, self.iter) == (1, 1):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_stopped_stage_is_resumed(run_script, drawn):
    "To the last bit on a CPU; a GPU adds in another order each time."
    score = train(run_script, drawn, "whole", "--amp off")
    with every_learner_has(StopAt):
        code, _, err = run_script(f"{TRAIN} --amp off -n parts -d", drawn)
    assert code == 130 and "resume with" in err
    assert run_script("train.py --resume -n parts")[::2] == (0, "")
    assert last_score("parts") == (score if DEVICE == "cpu" else pytest.approx(score, rel=1e-3))


def fitted(drawn, device, **changes):
    "The losses of the steps of an epoch, augmented, in float32, and the points of the validation images after it."
    machine = Machine(**{"device": device, "workers": 0, "amp": "off", "tf32": False} | changes)
    machine.prepare()
    dls = landmark_dataloaders(drawn, size=32, batch_size=8, align=0.0, machine=machine)
    learn = landmark_learner(dls, ARCH, "none", lr=1e-4, machine=machine, path=drawn)
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, 1e-4)
        losses = [float(loss) for loss in learn.recorder.losses]
        return losses, learn.get_preds()[0].cpu()


@pytest.mark.parametrize("channels_last", [True, False])
def test_steps_and_points_are_those_of_the_cpu(drawn, channels_last):
    "Steps are small: Adam's first ones move each weight by the rate, also where the sign of a gradient is rounding."
    losses, points = fitted(drawn, DEVICE, channels_last=channels_last)
    cpu_losses, cpu_points = fitted(drawn, "cpu", channels_last=False)
    assert losses[0] == pytest.approx(cpu_losses[0], rel=1e-4)
    assert losses == pytest.approx(cpu_losses, rel=1e-2)
    assert (points - cpu_points).abs().max() * 32 / 2 < 0.1  # pixels of the input


class NoContext(Transform):
    "An item transform that fails in a worker with a CUDA context."

    def encodes(self, x: torch.Tensor):
        assert get_worker_info() is None or not torch.cuda.is_initialized(), "a worker has opened a CUDA context"
        return x


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_open_no_cuda_context(drawn, method):
    machine = Machine(device=DEVICE, workers=1)
    torch.zeros(1, device=DEVICE)  # the main process has one
    before = torch.multiprocessing.get_start_method()
    torch.multiprocessing.set_start_method(method, force=True)
    try:
        dls = landmark_dataloaders(drawn, size=32, batch_size=8, align=0.0, item_tfms=[NoContext], machine=machine)
        batches = list(dls.train)
    finally:
        torch.multiprocessing.set_start_method(before, force=True)
    assert len(batches) == 4 and {t.device.type for batch in batches for t in batch} == {DEVICE}


class TooLittleMemory(Callback):
    "Leave the process no more of the GPU's memory than it has; on a CPU raise the error of a GPU."

    def before_batch(self):
        if DEVICE == "cpu":
            raise torch.OutOfMemoryError("CUDA out of memory.")
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(torch.cuda.memory_reserved() / torch.cuda.mem_get_info()[1])


def test_out_of_memory_is_one_line(run_script, drawn):
    try:
        with every_learner_has(TooLittleMemory):
            code, _, err = run_script(f"{TRAIN} --size 256 -b 16 -n r -d", drawn)
    finally:
        if DEVICE == "cuda":
            torch.cuda.set_per_process_memory_fraction(1.0)
    assert code == 1 and err.count("\n") == 1, err
    assert "-b 16: not enough memory for such a batch: try a smaller -b, and --accumulate for the same steps" in err


def test_compiled_networks_train_and_predict_the_same(run_script, drawn):
    score = train(run_script, drawn, "plain", "--amp off --no-tf32")
    assert train(run_script, drawn, "compiled", "--amp off --no-tf32 --compile") == pytest.approx(score, rel=0.05)
    plain, compiled = (predict(run_script, "plain", f"{GPU} --no-tf32 {flag}") for flag in ("", "--compile"))
    assert np.abs(plain - compiled).max() < 0.05
