"Errors of too little memory, of the main process, of the GPU and of workers, in one line."

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import psutil

from landmarks_fastai.errors import UserError
from landmarks_fastai.utils.distributed import this_process
from landmarks_fastai.utils.hardware import Machine

# In the text of a RuntimeError: torch's CPU allocator, oneDNN (2), the CUDA driver, cuDNN, cuBLAS, MPS
NO_MEMORY = (
    "can't allocate memory", "could not create a primitive", "could not create a memory object",
    "CUDA error: out of memory", "CUDNN_STATUS_ALLOC_FAILED", "CUBLAS_STATUS_ALLOC_FAILED",
    "MPS backend out of memory",
)  # fmt: skip
MORE_SHM = "use --workers 0, or a larger /dev/shm (docker run --shm-size 8g)"


@contextmanager
def within_memory(learn: Any) -> Iterator[None]:  # a `LandmarkLearner`
    "A context that raises `UserError` if the memory is too small for a batch, or /dev/shm for the workers."
    settings = learn.settings
    check_shared_memory(learn.machine, settings.batch_size * (3 * settings.size**2 + 8 * learn.facts.n_points))
    try:
        yield
    except Exception as e:
        check_worker_died(e)
        if not out_of_memory(e):
            raise
        hint = "try a smaller -b, and --accumulate for the same steps"
        raise UserError(f"-b {settings.batch_size}: not enough memory for such a batch: {hint}") from None


def peak_memory(device: str) -> float:
    "Return the most memory that this process has used, in MB: with CUDA that of its tensors on the GPU. Not on Linux: that of now."
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated() / 1e6
    with suppress(OSError, StopIteration), open("/proc/self/status") as status:
        # VmHWM: unlike `getrusage`'s figure it begins anew with the process, not with its parent's
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) * 1024 / 1e6
    return psutil.Process().memory_info().rss / 1e6


def out_of_memory(error: Exception) -> bool:
    "Return whether an error says that the main process or the GPU has too little memory."
    import torch

    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(text in str(error) for text in NO_MEMORY)


def check_shared_memory(machine: Machine, batch_bytes: int) -> None:
    """Raise `UserError` if /dev/shm is too small for the workers' batches: a container has 64 MB.

    Checked beforehand: a worker that finds it full prints a traceback, and the main process waits for its batch forever.
    """
    shm = "/dev/shm"
    if not machine.decoders or not os.path.isdir(shm):
        return
    processes = this_process().local_count
    needed = processes * (2 * machine.decoders + 2) * batch_bytes  # each worker prefetches 2; 2 are in use
    free = shutil.disk_usage(shm).free
    if needed > free:
        sizes = f"{needed / 1e6:.0f} MB of shared memory, {free / 1e6:.0f} MB are free in {shm}"
        raise UserError(f"{processes * machine.decoders} workers may need {sizes}: {MORE_SHM}")


def check_worker_died(error: BaseException | None) -> None:
    "Raise `UserError` if a worker was killed: torch gives the cause in the error, or in the error's cause."
    died = "DataLoader worker (pid" in str(error)  # an error raised in a worker has "in DataLoader worker process 0"
    while error:
        if "Bus error" in str(error):
            raise UserError(f"a worker was killed by a bus error, shared memory is too small: {MORE_SHM}") from None
        error = error.__cause__ or error.__context__
    if died:
        cause = "a worker was killed from outside, as the system does where memory is short"
        raise UserError(f"{cause}: use fewer --workers, or --workers 0") from None
