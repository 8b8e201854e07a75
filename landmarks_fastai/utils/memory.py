"Recognise errors of too little memory, and find a batch size that fits."

import os
import shutil
import traceback
from collections.abc import Callable

from landmarks_fastai.errors import UserError
from landmarks_fastai.utils.distributed import this_process
from landmarks_fastai.utils.hardware import Machine, find_gpu

# In the text of a RuntimeError: torch's CPU allocator, oneDNN (2), the CUDA driver, cuDNN, cuBLAS, MPS
NO_MEMORY = (
    "can't allocate memory", "could not create a primitive", "could not create a memory object",
    "CUDA error: out of memory", "CUDNN_STATUS_ALLOC_FAILED", "CUBLAS_STATUS_ALLOC_FAILED",
    "MPS backend out of memory",
)  # fmt: skip
MORE_SHM = "use --workers 0, or a larger /dev/shm (docker run --shm-size 8g)"


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


def batch_that_fits(error: Exception, step: Callable[[int], object], n: int) -> int:
    "Return the first of the batch sizes n/2, n/4, … for which `step` fits in memory, 0 if none does, after `error`."
    import torch

    while n := n // 2:
        traceback.clear_frames(error.__traceback__)  # they hold tensors of the failed step
        if gpu := find_gpu():
            getattr(torch, gpu).empty_cache()
        try:
            step(n)
            return n
        except ValueError:  # a batch norm needs more than one image
            return 0
        except Exception as e:
            if not out_of_memory(e):
                raise
            error = e
    return 0
