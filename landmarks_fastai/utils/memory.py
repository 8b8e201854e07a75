"Too little memory: what it looks like, and which batch fits."

import os
import shutil
import traceback

from landmarks_fastai.errors import UserError
from landmarks_fastai.utils.hardware import Machine

# How torch says in a RuntimeError's text that memory is short: its CPU allocator, oneDNN (2), CUDA's driver, cuDNN, cuBLAS
NO_MEMORY = (
    "can't allocate memory", "could not create a primitive", "could not create a memory object",
    "CUDA error: out of memory", "CUDNN_STATUS_ALLOC_FAILED", "CUBLAS_STATUS_ALLOC_FAILED",
)  # fmt: skip


def out_of_memory(error: Exception) -> bool:
    "Whether the main process, or the GPU, had too little memory for what it computed."
    import torch

    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(text in str(error) for text in NO_MEMORY)


def check_shared_memory(machine: Machine, batch_bytes: int):
    """Raise `UserError` where /dev/shm, which workers pass their batches through, may not hold them: a container has 64 MB.

    Told before, because a worker that finds it full prints a traceback and the main process waits for its batch forever.
    """
    shm = "/dev/shm"
    if not machine.decoders or not os.path.isdir(shm):
        return
    needed = (2 * machine.decoders + 2) * batch_bytes  # each prefetches 2; 2 are in use
    free = shutil.disk_usage(shm).free
    if needed > free:
        raise UserError(
            f"{machine.decoders} workers may need {needed / 1e6:.0f} MB of shared memory, {free / 1e6:.0f} MB are free in {shm}: "
            "use --workers 0, or a larger /dev/shm (docker run --shm-size 8g)"
        )


def check_worker_died(error: BaseException | None):
    "Raise `UserError` where a worker died: torch says of what in the error itself or in its cause."
    died = "DataLoader worker (pid" in str(error)  # not an error that a worker met: "in DataLoader worker process 0"
    while error:
        if "Bus error" in str(error):
            raise UserError(
                "a worker was killed by a bus error, for want of shared memory: use --workers 0, or a larger /dev/shm "
                "(docker run --shm-size 8g)"
            ) from None
        error = error.__cause__ or error.__context__
    if died:
        raise UserError(
            "a worker was killed from outside, as the system does where memory is short: use fewer --workers, or --workers 0"
        ) from None


def batch_that_fits(error: Exception, step, n: int) -> int:
    "What of n/2, n/4, … `step` is computed with, by trying, after `error`, which `out_of_memory` knows; 0: none of them."
    import torch

    while n := n // 2:
        traceback.clear_frames(error.__traceback__)  # they hold what was computed so far
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        try:
            step(n)
            return n
        except ValueError:  # a norm, which wants more than one image
            return 0
        except Exception as e:
            if not out_of_memory(e):
                raise
            error = e
    return 0
