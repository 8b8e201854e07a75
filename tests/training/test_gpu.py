"""The GPU path on a CPU; docs/gpu.md says which of its points a test here covers, and what was never run.

The meta device stands in for a GPU: it has no data, so that each copy to the CPU and each mixture of devices is an error.
"""

import multiprocessing
import sys
from pathlib import Path

import pytest
import torch
from fastai.callback.core import Callback
from fasttransform import Transform
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from landmarks_fastai.cli.options import prepared_machine
from landmarks_fastai.cli.train import train_parser
from landmarks_fastai.data.block import landmark_dataloaders
from landmarks_fastai.errors import UserError
from landmarks_fastai.metrics import points_in_image
from landmarks_fastai.models.networks import in_float32
from landmarks_fastai.training.callbacks import Average, StopOnNaN
from landmarks_fastai.training.learner import landmark_learner
from landmarks_fastai.training.state import read_state
from landmarks_fastai.utils import hardware, memory
from landmarks_fastai.utils.distributed import Process
from landmarks_fastai.utils.hardware import Machine
from tests.conftest import ARCH, every_learner_has
from tests.training.test_resume import SHORT, check_equal, stopping_at

RUNS = Path("runs")  # of `run_script`, in the current folder


def learner(drawn, batch_tfms=None, **machine):
    on = Machine(**{"workers": 0} | machine)
    dls = landmark_dataloaders(drawn, size=32, batch_size=8, align=0.0, batch_tfms=batch_tfms, machine=on)
    learn = landmark_learner(dls, ARCH, "none", machine=on, path=drawn)
    learn.logger = lambda values: None
    learn.remove_cb(learn.progress)
    if on.device == "meta":  # where `to` makes new parameters; on a GPU those of the optimiser get other data
        learn.model.to("meta")
        learn.create_opt()
    return learn


@pytest.fixture
def fused_on_meta(monkeypatch):
    "PyTorch's list of devices with fused optimisers leaves meta out, although they compute on it."
    optimizer = sys.modules["torch.optim.optimizer"]
    monkeypatch.setattr(optimizer, "_get_fused_kernels_supported_devices", lambda: ["cpu", "meta"])


class Waits(TorchFunctionMode):
    "List the calls for which a GPU is waited for; a tensor without data gives zeros."

    values = {
        torch.Tensor.cpu: lambda t: torch.zeros_like(t, device="cpu"),
        torch.Tensor.__bool__: lambda t: False,
        torch.Tensor.__float__: lambda t: 0.0,
        torch.Tensor.item: lambda t: 0.0,
    }

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in self.values and args[0].is_meta:
            self.calls.append(func.__name__)
            return self.values[func](args[0])
        return func(*args, **kwargs or {})


class Operations(TorchDispatchMode):
    "List the operations, and the types of the tensors that they make on the meta device."

    def __init__(self):
        super().__init__()
        self.names, self.dtypes = [], set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **kwargs or {})
        self.names.append(func.name())
        self.dtypes |= {
            t.dtype for t in torch.utils._pytree.tree_leaves(made) if isinstance(t, torch.Tensor) and t.is_meta
        }
        return made


class EndOf(Callback):
    "What was listed in each training batch and each validation batch."

    order = 99

    def __init__(self, listed):
        self.listed, self.training_batches, self.validation_batches = listed, [], []

    def before_batch(self):
        self.listed.clear()

    def after_batch(self):
        (self.training_batches if self.training else self.validation_batches).append([*self.listed])


class DeviceSeen(Transform):
    "A batch transform before the augmentation: where the batch is."

    order, seen = 40, None

    def encodes(self, x: torch.Tensor):
        type(self).seen = x.device.type
        return x


def test_a_step_runs_on_the_device_and_waits_for_it_once(drawn, fused_on_meta):
    "The loss is copied for the Recorder, and StopOnNaN reads it twice. Images are warped after the copy to the device."
    learn, waits, operations = learner(drawn, [DeviceSeen()], device="meta"), Waits(), Operations()
    listed = EndOf(waits.calls)
    with waits, operations:
        learn.fit(1, cbs=[StopOnNaN(), Average(0.98), listed])
    assert DeviceSeen.seen == "meta" and "aten::grid_sampler_2d" in operations.names
    assert any(name.startswith("aten::_fused_adamw_") for name in operations.names)
    assert all(p.is_meta for p in learn.model.parameters())
    assert all(p.is_meta for group in learn.opt.opt.param_groups for p in group["params"])
    assert listed.training_batches == [["__bool__", "__bool__", "cpu"]] * len(learn.dls.train)
    assert listed.validation_batches == [["cpu"]] * len(learn.dls.valid)


def test_predicted_points_are_copied_from_the_device(drawn):
    "What the pictures at the end of a stage with aligned crops are made of."
    with Waits() as waits:
        points = learner(drawn, device="meta").predict_points(sorted((drawn / "train/images").iterdir())[:2])
    assert points.shape == (2, 68, 2) and "cpu" in waits.calls


def test_a_training_step_makes_no_float64_on_the_device(drawn, fused_on_meta):
    "MPS has none."
    learn, operations = learner(drawn, device="meta"), Operations()
    listed = EndOf(operations.names)
    with Waits(), operations:
        learn.fit(1, cbs=[StopOnNaN(), Average(0.98), listed, SkipValidation()])
    assert listed.training_batches and torch.float32 in operations.dtypes and torch.float64 not in operations.dtypes


class SkipValidation(Callback):
    def before_validate(self):
        from fastai.callback.core import CancelValidException

        raise CancelValidException


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_metrics_are_float64_on_the_device_and_on_the_cpu_for_mps(device):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        unit, maps = torch.empty(2, 5, 2, device=device), torch.empty(2, 6, device=device)
        points = points_in_image(unit.bfloat16(), maps, 32)
    assert points.dtype == torch.float64 and points.device.type == ("cpu" if device == "mps" else device)


@pytest.mark.skipif(multiprocessing.get_start_method() != "fork", reason="the poisoned torch is inherited by a fork")
def test_workers_open_no_cuda_context(drawn, monkeypatch):
    def poisoned(*args):
        raise AssertionError("a worker opens a CUDA context")

    monkeypatch.setattr(torch.cuda, "_lazy_init", poisoned)
    batches = list(learner(drawn, device="meta", workers=1).dls.train)
    assert len(batches) == 4 and all(t.is_meta for batch in batches for t in batch) and not torch.cuda.is_initialized()


class Overflow(Callback):
    "Gradients that are infinite in some steps of every epoch."

    order = 9  # before `Amp` looks at them

    def before_step(self):
        if self.iter in (0, 2):
            next(p for p in self.learn.model.parameters() if p.grad is not None).grad.fill_(float("inf"))


class Steps(Callback):
    "After each batch: weights, their average, and the counts of what changes them."

    order = 99

    def __init__(self):
        self.seen = []

    def after_batch(self):
        if self.training:
            twin, first = self.learn.average.twin, next(iter(self.learn.opt.opt.state.values()), {"step": 0})
            weights = [next(m.parameters()).detach().clone() for m in (self.learn.model, twin.module)]
            counts = int(first["step"]), int(twin.n_averaged), self.learn.scaler.get_scale()
            self.seen.append((weights, counts, self.learn.pct_train))


def test_fp16_skips_a_step_whose_gradients_overflow(drawn):
    "GradScaler on the CPU, with a PyTorch optimiser in fastai's OptimWrapper."
    learn, steps = learner(drawn, amp="fp16"), Steps()
    learn.fit_one_cycle(3, 1e-4, cbs=[Average(0.98), Overflow(), steps])
    made, seen = 0, steps.seen
    assert [pct for *_, pct in seen] == pytest.approx([k / 12 for k in range(1, 13)])  # the schedule is by batches
    for k, (before, after) in enumerate(zip(seen, seen[1:], strict=False), 1):
        (weights, (n, averaged, scale), _), (new, (new_n, new_averaged, new_scale), _) = before, after
        if new_scale < scale:  # by Overflow, or because the first scale of 65536 is too large
            assert new_scale == scale / 2 and (new_n, new_averaged) == (n, averaged)
            assert all(map(torch.equal, weights, new))
        else:
            assert k % 4 in (1, 3) and (new_n, new_averaged) == (n + 1, averaged + 1)
            assert not torch.equal(weights[0], new[0])
            made += 1
    assert made


def test_fp16_resumes_to_the_last_bit_with_its_scale(run_script, drawn, monkeypatch):
    monkeypatch.setattr(Machine, "prepare", lambda self: None)  # which refuses fp16 on a CPU
    fp16 = f"train.py {SHORT} --amp fp16"
    with every_learner_has(Overflow):
        assert run_script(f"{fp16} -n whole -d", drawn)[0] == 0
        with stopping_at(5):
            assert run_script(f"{fp16} -n parts -d", drawn)[0] == 130
        from landmarks_fastai.runs.run import Run

        state = read_state(Run("runs", "parts"))
        assert state and state.metadata["scaler"]["scale"] <= 2.0**14
        code, _, err = run_script("train.py --resume -n parts")
    assert (code, err) == (0, "")
    check_equal(RUNS, "whole", "parts")


class Scalars(Callback):
    "The numbers that are read from tensors in each training step."

    order = 99

    def __init__(self, operations):
        self.operations, self.counts = operations, []

    def before_batch(self):
        self.operations.names.clear()

    def after_batch(self):
        if self.training:
            self.counts.append(self.operations.names.count("aten::_local_scalar_dense"))


@pytest.mark.parametrize("amp,counts", [("off", {3}), ("bf16", {3}), ("fp16", {3, 5})])
def test_numbers_that_a_step_reads(drawn, amp, counts):
    """Two of StopOnNaN, and Average's count, which is on the CPU.

    With fp16 also whether gradients overflow, and, in a step that is made, the scale; Average counts no skipped step.
    """
    learn, operations = learner(drawn, amp=amp), Operations()
    scalars = Scalars(operations)
    with operations:
        learn.fit(2, cbs=[StopOnNaN(), Average(0.98), scalars])
    assert set(scalars.counts) == counts


def on_gpu(*flags):
    return prepared_machine(vars(train_parser().parse_args(["--gpu", *flags])))


@pytest.fixture
def apple(monkeypatch):
    "A torch that says that it has MPS, and no CUDA. Nothing can be made on its device."
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)


def test_gpu_takes_mps_where_cuda_is_absent(apple, monkeypatch, capsys):
    monkeypatch.setattr(hardware, "available_cores", lambda: 4)
    machine = on_gpu()
    assert (machine.device, machine.precision, machine.pins, machine.decoders) == ("mps", "off", False, 4)
    assert on_gpu("--amp", "fp16").precision == "fp16" and not torch.backends.cudnn.benchmark
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert hardware.find_gpu() == "cuda"


def test_several_processes_are_refused_on_mps(apple, monkeypatch):
    monkeypatch.setattr(hardware, "this_process", lambda: Process(count=2, local_count=2, store=object()))
    with pytest.raises(UserError, match="need CUDA"):
        on_gpu()


def test_without_gpu_a_mac_trains_on_the_cpu(apple, run_script, drawn):
    "fastai's default device is MPS there; on this torch any tensor on it would be an error."
    from fastai.torch_core import default_device

    assert default_device().type == "mps"
    assert run_script(f"train.py {SHORT} -e 1 -n r -d", drawn)[::2] == (0, "")
    assert run_script("predict.py -pm r")[::2] == (0, "")


def test_one_thread_predicts_on_mps(quick_run):
    from landmarks_fastai.inference.torch_network import TorchNetwork
    from landmarks_fastai.runs.checkpoint import read_checkpoint

    network = TorchNetwork(read_checkpoint(quick_run / "best.pth"))
    for device, threads in (("cuda", 3), ("mps", 1)):
        network.machine = Machine(device, workers=3)
        with network.streams() as (n, _):
            assert n == threads


@pytest.mark.parametrize("device", ["cpu", "cuda", "mps"])
def test_the_head_leaves_autocast_on_each_device(device):
    torch.set_autocast_enabled(device, True)
    try:
        assert in_float32(torch.nn.Linear(3, 2), torch.rand(4, 3).bfloat16()).dtype == torch.float32
    finally:
        torch.set_autocast_enabled(device, False)


@pytest.mark.parametrize("gpu", ["cuda", "mps"])
def test_memory_of_a_failed_batch_is_released_before_a_smaller_one_is_tried(apple, monkeypatch, gpu):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu == "cuda")
    events = []
    monkeypatch.setattr(getattr(torch, gpu), "empty_cache", lambda: events.append("emptied"))

    def step(n):
        events.append(n)
        if n > 2:
            raise RuntimeError("MPS backend out of memory (MPS allocated: 7.64 GiB, max allowed: 9.07 GiB)")

    assert memory.batch_that_fits(RuntimeError(), step, 16) == 2
    assert events == ["emptied", 8, "emptied", 4, "emptied", 2]
