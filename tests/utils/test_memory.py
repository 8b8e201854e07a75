"Too little memory, shared memory or disk space."

import os
import shutil
import subprocess
import sys

import pytest
import torch
from fastai.callback.core import Callback

from landmarks_fastai.utils.memory import out_of_memory
from tests.helpers import LINUX, QUICK, ROOT, RUNS, SHORT, check_equal, check_refused, every_learner_has

pytestmark = LINUX


@pytest.fixture
def small_memory(monkeypatch):
    "Every network runs out of memory where a batch has more than five images, with the error that a GPU gives."
    from landmarks_fastai.inference import torch_network
    from landmarks_fastai.models import networks
    from landmarks_fastai.runs import checkpoint
    from landmarks_fastai.training import learner

    build = networks.build_model

    def refuse(module, inputs):
        if len(inputs[0]) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    def built(*args):
        model = build(*args)
        model.register_forward_pre_hook(refuse)
        return model

    monkeypatch.setattr(torch_network, "fuse_norms", lambda model, size: model)  # which leaves hooks behind
    for module in (checkpoint, learner):
        monkeypatch.setattr(module, "build_model", built)


@pytest.mark.train
def test_a_batch_that_does_not_fit_is_one_line(run_script, drawn, runs, small_memory):
    line = "not enough memory for such a batch: try a smaller -b"
    result = run_script(f"train.py {QUICK} -b 16 --accumulate 2 -n r --out {runs} -d", drawn)
    check_refused(result, f"-b 16: {line}, and --accumulate for the same steps")
    check_refused(run_script(f"predict.py --workers 0 -b 6 --out {runs} -pm m"), f"-b 6: {line}\n")
    check_refused(run_script(f"finetune.py --workers 0 -b 8 --accumulate 1 -n s --out {runs} -pm m"), f"-b 8: {line}")
    assert [p.name for p in runs.iterdir()] == ["m"]


def test_a_first_batch_that_does_not_fit_is_one_line(run_script, drawn, monkeypatch):
    def refuse(*args):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    monkeypatch.setattr("landmarks_fastai.data.augment.warp_images", refuse)
    check_refused(run_script(f"train.py {QUICK} -n r -d", drawn), "-b 8: not enough memory for such a batch")


@pytest.mark.parametrize(
    "text",
    [
        "CUDA error: out of memory",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes",
        "could not create a primitive",
        "MPS backend out of memory (MPS allocated: 7.64 GiB, other allocations: 1.2 GiB, max allowed: 9.07 GiB)",
    ],
)
def test_out_of_memory_errors_are_recognised(text):
    assert out_of_memory(RuntimeError(text))
    for other in (
        "CUDA error: an illegal memory access was encountered",
        "GET was unable to find an engine to execute this computation",  # a GPU that this torch was not built for, too
    ):
        assert not out_of_memory(RuntimeError(other))


SMALL_SHM = """
set -e
mount -t tmpfs -o size=64k none /dev/shm
set +e
"{python}" "{root}/train.py" {flags} --workers 1 -n r -d "{data}" 2> err.txt
echo $? > code.txt
"""


@pytest.mark.slow
def test_too_small_shared_memory_is_reported(drawn, tmp_path):
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    script = SMALL_SHM.format(python=sys.executable, root=ROOT, flags=f"{QUICK} --size 64 -b 8", data=drawn)
    subprocess.run(["unshare", "-rm", "sh", "-c", script], cwd=tmp_path, capture_output=True, check=True, timeout=90)
    err, codes = (tmp_path / "err.txt").read_text().splitlines(), (tmp_path / "code.txt").read_text().split()
    assert codes == ["1"] and len(err) == 1, err
    assert "error: 1 workers may need" in err[0] and "use --workers 0, or a larger /dev/shm" in err[0]


@pytest.mark.train
def test_worker_killed_by_a_bus_error_is_reported(run_script, drawn):
    "As torch raises it: the signal's own text is the cause of `exited unexpectedly`."

    def killed(*args):
        try:
            raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that …")
        except RuntimeError as e:
            raise RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly") from e

    class Killed(Callback):
        before_fit = killed

    with every_learner_has(Killed):
        check_refused(run_script(f"train.py {QUICK} -n s -d", drawn), "a bus error", "--workers 0", "/dev/shm")


FILLS = "mobilenetv3_small_050"  # one state of it and not two
FULL = """
set -e
mkdir -p runs && mount -t tmpfs -o size={size}m none runs
set +e
"{python}" "{root}/train.py" {flags} -n parts -d "{data}" 2> err.txt
echo $? > code.txt
ls -l runs/parts > left.txt
mount -o remount,size=500m runs
"{python}" "{root}/train.py" --resume -n parts > resumed.txt 2>&1
echo $? >> code.txt
mkdir out && cp -r runs/* out/
"""


@pytest.mark.slow
def test_full_disk_keeps_the_previous_state(drawn, tmp_path, run_script):
    "A file system that holds one state and not two: the first stays intact, and the run continues from it."
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    flags = f"{SHORT} --arch {FILLS} --save-every 0"
    script = FULL.format(size=24, python=sys.executable, root=ROOT, flags=flags, data=drawn)
    subprocess.run(["unshare", "-rm", "sh", "-c", script], cwd=tmp_path, capture_output=True, check=True)
    err, codes = (tmp_path / "err.txt").read_text(), (tmp_path / "code.txt").read_text().split()
    check_refused(
        (int(codes[0]), "", err), "parts/state.safetensors cannot be written", "No space left on device", "make room"
    )
    assert "then resume with: python train.py --resume -n parts" in err
    left = (tmp_path / "left.txt").read_text()
    assert "state.safetensors\n" in left and ".tmp" not in left
    assert codes[1] == "0" and "resuming at epoch 0, batch 1" in (tmp_path / "resumed.txt").read_text()
    assert run_script(f"train.py {SHORT} --arch {FILLS} -n uninterrupted -d", drawn)[0] == 0
    shutil.copytree(tmp_path / "out" / "parts", RUNS / "parts")
    check_equal("uninterrupted", "parts")


@pytest.mark.parametrize("bytes_left", [1 << 10, 1 << 14, 1 << 17, 1 << 20])
def test_file_size_limit_is_reported_in_one_line(run_script, drawn, finished_run, bytes_left):
    "As a quota does; whichever file is the first that does not fit."
    import resource

    finished_run("other")  # the labels are parsed, the fonts are drawn
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_left, limit[1]))
    try:
        result = run_script(f"train.py {QUICK} -n r -d", drawn)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    check_refused(result, "cannot be written", "File too large")
    assert os.listdir(RUNS) == ["other"]
