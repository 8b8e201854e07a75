"Precision, memory format, compilation, threads and workers of `Machine`."

import shutil
import sys
import threading
import time

import numpy as np
import pytest
import torch

from landmarks_fastai.cli.options import prepared_machine
from landmarks_fastai.cli.train import train_parser
from landmarks_fastai.data.block import landmark_dataloaders
from landmarks_fastai.data.loader import BatchMaker
from landmarks_fastai.errors import UserError
from landmarks_fastai.inference.torch_network import open_checkpoint
from landmarks_fastai.models.networks import METADATA
from landmarks_fastai.runs.checkpoint import read_checkpoint
from landmarks_fastai.training.callbacks.precision import Amp
from landmarks_fastai.training.components import on_machine
from landmarks_fastai.utils import hardware
from landmarks_fastai.utils.distributed import Process
from landmarks_fastai.utils.hardware import Machine, keep_freed_memory
from landmarks_fastai.utils.parallel import threaded_map
from tests.helpers import LINUX, QUICK, RUNS, check_refused, small_learner, tensors

COMPILER = shutil.which("g++") or shutil.which("clang++")


def learner(drawn, **changes):
    return small_learner(drawn, aug=0.0, init_head="random", machine=Machine(workers=0, **changes))


@pytest.mark.train
def test_bf16_trains_in_bf16_but_for_the_head_and_validates_in_float32(drawn):
    plain, mixed = learner(drawn), learner(drawn, amp="bf16")
    types, of_head, losses = [], [], []
    first = next(layer for layer in mixed.model.modules() if isinstance(layer, torch.nn.Conv2d))
    first.register_forward_hook(lambda layer, inputs, out: types.append(out.dtype))
    mixed.model[1][0].register_forward_hook(lambda layer, inputs, out: of_head.append((inputs[0].dtype, out.dtype)))
    for learn in (plain, mixed):
        learn.fit(2, lr=1e-5)  # small: at a rate that jumps, two runs of one precision differ as much
        losses.append(float(learn.recorder.losses[-1]))
    steps = len(mixed.dls.train)  # validation computes in float32, as predictions do: scores compete
    assert types == ([torch.bfloat16] * steps + [torch.float32] * len(mixed.dls.valid)) * 2
    assert set(of_head) == {(torch.float32, torch.float32)}
    assert all(p.dtype == torch.float32 for p in mixed.model.parameters())
    assert np.isfinite(mixed.validate()[0])  # fastai's own callback fails here: its context is gone after fit
    assert losses[0] != losses[1] and losses[1] == pytest.approx(losses[0], rel=0.02)


def test_auto_precision_on_a_cpu_is_off():
    assert Machine().precision == "off" and Machine(amp="bf16").precision == "bf16"
    assert not learner_callbacks(Machine()) and learner_callbacks(Machine(amp="bf16")) == [Amp]


@pytest.mark.parametrize(
    "name,bf16,precision",
    [
        ("NVIDIA GeForce GTX 1650", False, "off"),
        ("NVIDIA GeForce GTX 1650 with Max-Q Design", False, "off"),
        ("NVIDIA GeForce GTX 1660 SUPER", False, "off"),
        ("Quadro T1000", False, "off"),
        ("Tesla T4", False, "fp16"),
        ("NVIDIA GeForce RTX 2060", False, "fp16"),
        ("NVIDIA GeForce GTX 1080 Ti", False, "fp16"),
        ("NVIDIA H100 80GB HBM3", True, "bf16"),
    ],
)
def test_auto_precision_by_gpu(monkeypatch, name, bf16, precision):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bf16)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *device: name)
    assert Machine("cuda").precision == precision
    assert Machine("cuda", amp="fp16").precision == "fp16"  # who asks for it by name gets it


def test_cudnn_benchmark_is_set_on_a_gpu_only(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda precision: None)
    Machine().prepare()
    assert not torch.backends.cudnn.benchmark
    Machine("cuda").prepare()
    assert torch.backends.cudnn.benchmark


def learner_callbacks(machine):
    return [type(cb) for cb in on_machine(machine) if isinstance(cb, Amp)]


@pytest.mark.train
def test_channels_last_sets_the_memory_format(drawn):
    for on in (True, False):
        learn = learner(drawn, channels_last=on)
        learn.fit(1, lr=1e-4)
        weights = [layer.weight for layer in learn.model.modules() if isinstance(layer, torch.nn.Conv2d)]
        weight = next(weight for weight in weights if min(weight.shape[1:]) > 1)
        assert weight.is_contiguous(memory_format=torch.channels_last) == on


def test_fp16_on_a_cpu_is_refused(run_script, drawn):
    check_refused(run_script(f"train.py {QUICK} --amp fp16 -n r -d", drawn), "--amp fp16", "--amp bf16")


def test_missing_compiler_is_reported_in_one_line(run_script, drawn, monkeypatch):
    def no_compiler(*args, **kwargs):
        raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found\nin many lines")

    monkeypatch.setattr(torch, "compile", no_compiler)
    result = run_script(f"train.py {QUICK} --compile -n r -d", drawn)
    check_refused(result, "--compile", "No working C++ compiler")


@pytest.mark.train
def test_machine_flags_do_not_change_predictions(run_script, drawn):
    assert run_script(f"train.py {QUICK} --amp bf16 --no-tf32 -n n -d", drawn)[::2] == (0, "")
    points = {}
    for flags in ("", "--no-channels-last", "--amp bf16"):
        assert run_script(f"predict.py --workers 0 {flags} -pm n")[::2] == (0, "")
        points[flags] = np.load(RUNS / "n/points.npy")
    assert points["--no-channels-last"] == pytest.approx(points[""], abs=0.01)
    assert not np.array_equal(points["--amp bf16"], points[""])
    assert points["--amp bf16"] == pytest.approx(points[""], abs=5)
    assert "amp" not in torch.load(RUNS / "n/best.pth", weights_only=True)[METADATA]["settings"]


@pytest.mark.slow
@pytest.mark.skipif(not COMPILER, reason="torch.compile needs a C++ compiler")
def test_compiled_networks_train_and_predict_the_same(run_script, drawn):
    "Weights keep their names, so a compiled stage's checkpoint is anybody's; points equal to 0.01 px."
    code, _, err = run_script(f"train.py {QUICK} --ema 0 --compile -n c -d", drawn)
    assert code == 0, err
    assert not any("_orig_mod" in name for name in tensors(RUNS / "c/best.pth"))
    points = []
    for flags in ("", "--compile"):
        code, _, err = run_script(f"predict.py --workers 0 {flags} -pm c")
        assert code == 0, err
        points.append(np.load(RUNS / "c/points.npy"))
    assert points[1] == pytest.approx(points[0], abs=0.01)


def test_keep_freed_memory_works_with_glibc():
    import ctypes

    assert keep_freed_memory() == (sys.platform.startswith("linux") and hasattr(ctypes.CDLL(None), "mallopt"))


@pytest.mark.train
@LINUX
def test_freed_memory_is_returned_after_an_epoch(drawn):
    if not keep_freed_memory():
        pytest.skip("no glibc")
    learn = learner(drawn)
    blocks = [np.ones(1 << 20, np.uint8) for _ in range(300)]
    last = blocks.pop()  # malloc's heap cannot end below it
    del blocks
    before = resident_mb()
    learn.fit(1, lr=1e-5)
    assert resident_mb() < before - 150 and last.all()


def resident_mb():
    return next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith("VmRSS"))


def test_threaded_map_keeps_the_order_and_limits_waiting_items():
    begun, started = [], []

    def work(k):
        begun.append(k)
        time.sleep(0.02 if k % 2 else 0.0)
        return k, threading.get_ident()

    results, ahead = [], 0
    for k, thread in threaded_map(work, range(40), 3, lambda: started.append(threading.get_ident())):
        results.append(k)
        ahead = max(ahead, len(begun) - len(results))
        assert thread in started and thread != threading.get_ident()
    assert results == list(range(40)) and ahead <= 2 * 3 + 1 and len(started) == 3


def test_threaded_map_passes_errors_on_and_can_be_closed():
    def work(k):
        if k == 3:
            raise UserError("line 7: gone")
        return k

    results, before = threaded_map(work, range(10**9), 2), threading.active_count()
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(UserError, match="line 7"):
        next(results)
    left = threaded_map(lambda k: k, range(10**9), 2)
    assert next(left) == 0
    left.close()
    assert threading.active_count() == before


def test_predictions_share_the_threads_and_give_them_back(untrained_run):
    before = torch.get_num_threads()
    torch.set_num_threads(6)
    try:
        with open_checkpoint(read_checkpoint(untrained_run / "best.pth")).streams() as (threads, start):
            start()
            assert (threads, torch.get_num_threads()) == (4, 1)
        assert torch.get_num_threads() == 6
    finally:
        torch.set_num_threads(before)


def test_number_of_workers_by_cores(monkeypatch):
    monkeypatch.setattr(hardware, "total_memory", lambda: 128 << 30)  # or it counts where workers are not forked
    for cores, cpu, cuda in [(1, 0, 1), (2, 0, 2), (8, 4, 8), (64, 8, 8)]:
        monkeypatch.setattr(hardware.os, "sched_getaffinity", lambda pid, n=cores: set(range(n)), raising=False)
        assert (Machine().decoders, Machine("cuda").decoders) == (cpu, cuda)
        assert Machine(cache=True).decoders == 0 and Machine(workers=3).decoders == 3


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


def test_gpu_says_that_it_uses_one_of_two(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(hardware.Machine, "prepare", lambda machine: None)
    assert on_gpu().device == "cuda"
    assert capsys.readouterr().err.startswith("note: --gpu uses one of 2 GPUs")
    monkeypatch.setattr(hardware, "this_process", lambda: Process(count=2, local_count=2, store=object()))
    assert on_gpu().device == "cuda" and capsys.readouterr().err == ""


def test_several_processes_are_refused_on_mps(apple, monkeypatch):
    monkeypatch.setattr(hardware, "this_process", lambda: Process(count=2, local_count=2, store=object()))
    with pytest.raises(UserError, match="need CUDA"):
        on_gpu()


@pytest.mark.train
def test_without_gpu_a_mac_trains_on_the_cpu(apple, run_script, drawn):
    "fastai's default device is MPS there; on this torch any tensor on it would be an error."
    from fastai.torch_core import default_device

    assert default_device().type == "mps"
    assert run_script(f"train.py {QUICK} -n r -d", drawn)[::2] == (0, "")
    assert run_script("predict.py -pm r")[::2] == (0, "")


def test_one_thread_predicts_on_mps(untrained_run):
    network = open_checkpoint(read_checkpoint(untrained_run / "best.pth"))
    for device, threads in (("cuda", 3), ("mps", 1)):
        network.machine = Machine(device, workers=3)
        with network.streams() as (n, _):
            assert n == threads


def test_workers_make_batches_without_a_device(drawn):
    "Nothing in them opens a CUDA context."
    dl = landmark_dataloaders(drawn, size=32, batch_size=8, machine=Machine(workers=1)).train
    dl.device = torch.device("cuda")
    twin = BatchMaker(dl).dl
    assert (twin.device, twin.after_batch) == (None, None) and dl.device.type == "cuda"
    batch, rows, _ = BatchMaker(dl)[[0, 1]]
    assert {t.device.type for t in batch} == {"cpu"} and rows == [0, 1]
