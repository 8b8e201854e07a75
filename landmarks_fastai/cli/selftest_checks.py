"The checks of the self-test: each returns its figures, or raises an error whose text is the reason."

import gc
import io
import math
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from fastai.callback.core import Callback

from landmarks_fastai.data.block import landmark_dataloaders
from landmarks_fastai.errors import UserError
from landmarks_fastai.runs.claim import claimed_run
from landmarks_fastai.runs.run import Record
from landmarks_fastai.settings import Settings
from landmarks_fastai.training.builders import first_stage, resumed_stage
from landmarks_fastai.training.callbacks import no_bars
from landmarks_fastai.training.learner import LandmarkLearner, landmark_learner
from landmarks_fastai.training.memory import within_memory
from landmarks_fastai.training.stage import fit_stage
from landmarks_fastai.training.state import read_state
from landmarks_fastai.utils.hardware import NAN_IN_FP16, Machine
from landmarks_fastai.utils.signals import Stopped

LIMIT = 1e-3  # of a relative difference in float32
# Of gradients: rounding grows on its way back through many norms. On a CPU two memory formats of resnext50_32x4d at 128 px
# differ by 0.02.
GRADIENT_LIMIT = 0.1
SMALL = "timm:test_resnet"  # for the checks that do not depend on the network
RATE = 1e-4  # small: Adam's first steps move each weight by it, also where the sign of a gradient is rounding
STEPS = 20  # that are timed, after half as many

Batch = tuple[
    torch.Tensor, torch.Tensor
]  # images (batch, 3, size, size) and points (batch, n_points, 2), on the device


class SkipCheck(Exception):
    "A check that this machine cannot make; the text is the reason."


@dataclass
class Setup:
    "What all checks train: a device, drawn faces, a network."

    device: str
    data: Path
    arch: str
    size: int  # of the network's input
    batch_size: int

    def machine(self, **changes: Any) -> Machine:
        "The device, prepared; without mixed precision and TF32 unless `changes` have them."
        found = Machine(**{"device": self.device, "workers": 0, "amp": "off", "tf32": False} | changes)
        found.prepare()
        return found

    def learner(self, arch: str = "", **changes: Any) -> tuple[LandmarkLearner, Batch]:
        "A Learner on `machine(**changes)` and its first batch: the same random weights and images in each call."
        machine = self.machine(**changes)
        data = {"size": self.size, "batch_size": self.batch_size, "mirror": "none", "align": 0.0}
        dls = landmark_dataloaders(self.data, machine=machine, **data)
        learn = landmark_learner(dls, arch or self.arch, "none", lr=RATE, machine=machine, path=self.data)
        learn.model.to(machine.device, memory_format=machine.memory_format)  # pyright: ignore[reportCallIssue]
        images, points, _ = (t.as_subclass(torch.Tensor) for t in dls.train.one_batch())
        return learn, (images, points)


def run_check(check: Callable[[Setup], str], setup: Setup) -> tuple[str, str]:
    "The result of a check (passed, skipped or FAILED), and its figures or the reason."
    try:
        with redirect_stdout(io.StringIO()):
            found = "passed", check(setup)
    except SkipCheck as e:
        found = "skipped", str(e)
    except Exception as e:  # whatever a driver, a compiler or a kernel raises: the other checks go on
        found = "FAILED", f"{type(e).__name__}: {str(e).strip().partition(chr(10))[0]}"
    gc.collect()  # Learners have cycles: their networks would stay in the GPU's memory
    return found


def step(learn: LandmarkLearner, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    "Make a training step; return its predictions, loss and gradients."
    assert learn.opt is not None
    with learn.machine.autocast():
        pred = learn.model.train()(batch[0])
        loss = learn.loss_func(pred, batch[1])
    loss.backward()
    grads = torch.cat([p.grad.flatten() for p in learn.model.parameters() if p.grad is not None])
    learn.opt.step()
    learn.opt.zero_grad()
    return pred.detach(), loss.detach(), grads


def compared(learn: tuple[LandmarkLearner, Batch], other: tuple[LandmarkLearner, Batch]) -> str:
    "The relative differences of two training steps. Raises `ValueError` if one is too large."
    rows = [[*step(*each), step(*each)[0]] for each in (learn, other)]
    figures = []
    for name, a, b in zip(("points", "loss", "gradients", "points after the step"), *rows, strict=True):
        off = float((a.cpu() - b.cpu()).norm() / b.cpu().norm())
        if not off <= (limit := GRADIENT_LIMIT if name == "gradients" else LIMIT):
            raise ValueError(f"{name} differ by {off:.2g} of their size, at most {limit:g} expected")
        figures.append(f"{name} {off:.1g}")
    return "relative differences: " + ", ".join(figures)


def float32(setup: Setup) -> str:
    "A training step in float32, and on the CPU."
    return compared(setup.learner(), setup.learner(device="cpu", channels_last=False))


def channels_last(setup: Setup) -> str:
    "A training step with and without channels_last."
    return compared(setup.learner(), setup.learner(channels_last=False))


def compiled(setup: Setup) -> str:
    "A training step with and without torch.compile."
    try:
        learn, batch = setup.learner(SMALL, compile=True)
    except UserError as e:
        raise SkipCheck(e.line) from None
    learn.model.compile()
    return f"{SMALL}: {compared((learn, batch), setup.learner(SMALL))}"


def mixed_precision(setup: Setup, amp: str) -> str:
    "An epoch in mixed precision: finite losses, and how far the points are from float32's, in pixels of the input."
    if amp == "fp16" and setup.device == "cpu":
        raise SkipCheck("it is for a GPU")
    learn, (images, _) = setup.learner(amp=amp)
    with torch.no_grad():
        expected = learn.model.eval()(images)
        with learn.machine.autocast():
            off = float((learn.model(images) - expected).abs().max()) * setup.size / 2
    with no_bars(learn), learn.no_logging():
        learn.fit(1)
    losses = [float(loss) for loss in learn.recorder.losses]
    found = f"{learn.machine.precision}: losses {losses[0]:.4g} to {losses[-1]:.4g}, points {off:.2g} px from float32's"
    if all(map(math.isfinite, losses)) and off < setup.size / 8:
        return found
    if setup.device == "cuda" and NAN_IN_FP16.search(torch.cuda.get_device_name()):
        raise SkipCheck(f"{found}; known of such cards, on which --amp auto is off")
    raise ValueError(found)


def resume(setup: Setup) -> str:
    "The score of two epochs, and of two between which the run was stopped."
    expected, resumed = train(setup, "uninterrupted", []), train(setup, "stopped", [StopAfterEpoch()])
    found, limit = f"{SMALL}: scores {expected:.7g} and {resumed:.7g}", 0.0 if setup.device == "cpu" else LIMIT
    if not abs(resumed / expected - 1) <= limit:
        raise ValueError(f"{found}, a relative difference of {limit:g} at most expected")
    return found


class StopAfterEpoch(Callback):
    "Stop a run as Ctrl-C does, after its first epoch."

    order = 99  # the state is saved

    def after_epoch(self):
        raise Stopped


def train(setup: Setup, name: str, cbs: list[Callback]) -> float:
    "The score of a run of two epochs; it is resumed if the callbacks stop it."
    settings = Settings(data=str(setup.data), arch=SMALL, size=setup.size, batch_size=8, epochs=2)
    machine = setup.machine()
    try:
        with claimed_run(setup.data / "runs", name, name, Record("train.py"), resume=True) as run:
            state = read_state(run)
            learn = resumed_stage(state, machine, run) if state else first_stage(settings, "none", machine, run)
            learn.add_cbs(cbs)
            score = fit_stage(learn, run, state=state).score
    except Stopped:
        if not cbs:  # Ctrl-C
            raise
        return train(setup, name, [])
    assert score is not None
    return score


def out_of_memory(setup: Setup) -> str:
    "The advice where a batch does not fit: CUDA's memory is limited, elsewhere the network refuses the batch."
    learn, batch = setup.learner()
    step(learn, batch)
    if setup.device == "cuda":
        weights = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step(learn, batch)
        limit = weights + 0.7 * (torch.cuda.max_memory_allocated() - weights)
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.mem_get_info()[1])
    else:
        learn.model.register_forward_pre_hook(partial(refuse, setup.batch_size // 2))
    try:
        with within_memory(learn):
            step(learn, batch)
    except UserError as e:
        if "fits (tried here)" not in e.line:
            raise
        return e.line
    finally:
        if setup.device == "cuda":
            torch.cuda.set_per_process_memory_fraction(1.0)
    raise ValueError("the batch was trained on, an error was expected")


def refuse(most: int, module: torch.nn.Module, inputs: tuple[torch.Tensor]) -> None:
    "A forward hook: raise the error of a GPU for a batch of more than `most` images."
    if len(inputs[0]) > most:
        raise torch.OutOfMemoryError("out of memory")


def speed(setup: Setup, amp: str, training: bool) -> str:
    "Images a second of the network alone, on one batch; on CUDA the peak of the memory."
    learn, batch = setup.learner(amp=amp, tf32=True)

    def run(steps: int) -> None:
        for _ in range(steps):
            if training:
                step(learn, batch)
            else:
                with torch.inference_mode(), learn.machine.autocast():
                    learn.model.eval()(batch[0])
        if setup.device != "cpu":
            getattr(torch, setup.device).synchronize()

    if setup.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    run(STEPS // 2)
    start = time.perf_counter()
    run(STEPS)
    rate = STEPS * setup.batch_size / (time.perf_counter() - start)
    peak = f", peak memory {torch.cuda.max_memory_allocated() / 1e9:.2f} GB" if setup.device == "cuda" else ""
    return f"{learn.machine.precision}: {rate:.4g} images/s{peak}"


CHECKS: dict[str, Callable[[Setup], str]] = {
    "float32, against the CPU": float32,
    "channels_last": channels_last,
    "torch.compile": compiled,
    "--amp auto": partial(mixed_precision, amp="auto"),
    "--amp bf16": partial(mixed_precision, amp="bf16"),
    "--amp fp16": partial(mixed_precision, amp="fp16"),
    "resume": resume,
    "out of memory": out_of_memory,
    "training, --amp off": partial(speed, amp="off", training=True),
    "training, --amp auto": partial(speed, amp="auto", training=True),
    "prediction, --amp off": partial(speed, amp="off", training=False),
    "prediction, --amp auto": partial(speed, amp="auto", training=False),
}
