"""The settings of a run that depend on the machine; a checkpoint does not store them.

Mixed precision, channels_last, pinned memory, TF32 and `torch.compile` were not measured on a GPU: see
docs/machines.md. `benchmarks/README.md` has the measurements on a CPU.
"""

import ctypes
import multiprocessing
import os
import re
import sys
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from landmarks_fastai.errors import UserError
from landmarks_fastai.utils.distributed import this_process
from landmarks_fastai.utils.files import reason

if TYPE_CHECKING:
    import torch

AMP = ("auto", "off", "bf16", "fp16")
LOGS = ("tensorboard",)
# Turing without tensor cores: fp16 convolutions give NaN (pytorch issues 69449, 77955); Ultralytics' check_amp refuses
# the same cards by name.
NAN_IN_FP16 = re.compile(r"\bGTX 16[356]0\b|\bT(400|500|550|600|1000|1200|2000)\b", re.IGNORECASE)
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # from glibc's malloc.h


@dataclass(frozen=True)
class Machine:
    "Device, precision, worker processes and limits; the defaults are for a CPU."

    device: str = "cpu"  # or cuda, mps (Apple)
    workers: int | None = None  # processes that decode images; None: by the number of cores
    cache: bool = False  # store fitted images on disk
    amp: str = "auto"  # one of `AMP`; auto is bf16 or fp16 with CUDA, off elsewhere and on `NAN_IN_FP16`
    channels_last: bool = True
    tf32: bool = True  # on a GPU that has it
    compile: bool = False
    # Largest image, in millions of pixels. Decoding takes 10 bytes a pixel (measured: 1.7 GB for a PNG of 13,300 x 13,300
    # px, 543 kB on disk), so 0.6 GB a worker with 64, which accepts images of 61-megapixel cameras.
    max_pixels: float = 64.0
    threads: int = 0  # of PyTorch on the CPU; 0: as many as other programs leave free
    log: str = ""  # one of `LOGS`; empty: none
    save_every: float = 5.0  # minutes between two saves of a stage's state; it is also saved after each epoch

    @property
    def decoders(self) -> int:
        """The number of processes that decode images: one a core on a GPU, half the cores on a CPU; eight at most.

        0 on two cores, which training keeps busy: a worker costs more than it gains (`benchmarks/throughput.py`). 0 on a
        CPU with cached images: reading them takes less time than passing them between processes.
        """
        if self.workers is not None:
            return self.workers
        cores = available_cores() // this_process().local_count
        # A spawned worker (Windows) imports everything again, 0.4 GB; training and validation each have their own workers.
        if multiprocessing.get_context().get_start_method() != "fork":
            cores = min(cores, total_memory() // (2 << 30))
        if self.device != "cpu":
            return min(8, cores)
        return 0 if self.cache or cores < 3 else min(8, cores // 2)

    @property
    def pins(self) -> bool:
        "Whether batches are copied to pinned memory."
        return self.device == "cuda"

    @property
    def precision(self) -> str:
        """The precision that `amp` selects: off, bf16 or fp16. bf16 needs no loss scaling; GPUs before Ampere lack it.

        On MPS auto is off: PyTorch has both, but nobody has compared them with float32 there.
        """
        if self.amp != "auto":
            return self.amp
        if self.device != "cuda":
            return "off"
        import torch

        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bf16"
        return "off" if NAN_IN_FP16.search(torch.cuda.get_device_name()) else "fp16"

    def autocast(self) -> AbstractContextManager:
        "Return the context for a network's forward pass."
        import torch

        dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16}
        return torch.autocast(self.device, dtypes.get(self.precision), enabled=self.precision in dtypes)

    @property
    def memory_format(self) -> "torch.memory_format":
        import torch

        return torch.channels_last if self.channels_last else torch.contiguous_format

    def prepare(self) -> None:
        "Apply the settings to this process, before a network is created. Raises `UserError` for what the machine cannot do."
        if self.amp == "fp16" and self.device == "cpu":
            raise UserError("--amp fp16 is for a GPU: use --amp bf16 on a CPU, or run without --amp")
        if self.log and not find_spec(self.log):
            raise UserError(
                f"--log {self.log}: the package is not installed: pip install {self.log}, or run without --log"
            )
        keep_freed_memory()
        set_max_pixels(round(1e6 * self.max_pixels))
        process = this_process()
        if self.device == "mps" and process.store:
            raise UserError("--gpu: several processes need CUDA, and an Apple GPU is one: run without torchrun")
        if self.device != "cuda" and not self.threads and not self.compile:
            return
        import torch

        if self.threads:
            torch.set_num_threads(self.threads)
        if self.device == "cuda" and process.store:
            gpus = torch.cuda.device_count()
            if process.local_count > gpus:
                raise UserError(f"--nproc-per-node {process.local_count}: this machine has {gpus} GPUs")
            torch.cuda.set_device(process.local_rank)  # "cuda" is this one from now on
        if self.compile:
            try:
                torch.compile(lambda x: x.sin() + 1)(torch.zeros(8, device=self.device))
            except Exception as e:  # the errors of torch._inductor, the compiler and the linker share no narrower base
                raise UserError(f"--compile: it fails here ({reason(e)}): run without --compile") from None
        if self.device == "cuda":
            torch.set_float32_matmul_precision("high" if self.tf32 else "highest")
            torch.backends.cudnn.allow_tf32 = self.tf32
            # All batches but the last have one shape: one search serves a stage. Another run may choose another algorithm,
            # but on a GPU runs with one seed differ by rounding anyway.
            torch.backends.cudnn.benchmark = True


_max_pixels = round(1e6 * Machine.max_pixels)


def max_pixels() -> int:
    "The largest number of pixels that an image may have in this process."
    return _max_pixels


def set_max_pixels(pixels: int) -> None:
    "Set `max_pixels` of this process. A worker sets that of the process that started it."
    global _max_pixels
    _max_pixels = pixels


def find_gpu() -> str | None:
    "Return the device that --gpu uses: cuda, or mps (Apple) where CUDA is absent; None without a GPU."
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else None


def gpu_count() -> int:
    "Return the number of CUDA devices that this process may use: one if torchrun started it."
    import torch

    return 1 if this_process().store else torch.cuda.device_count()


def why_no_gpu() -> str:
    "Return why `find_gpu` found none."
    import torch

    return "no GPU was found" if torch.backends.cuda.is_built() else "this torch was built without CUDA"


def available_cores() -> int:
    "Return the number of cores that this process may use."
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def total_memory() -> int:
    "Return the machine's memory in bytes."
    import psutil  # not installed where exported networks predict

    return psutil.virtual_memory().total


def keep_freed_memory() -> bool:
    """Let glibc's malloc keep freed memory for the next step; return False on systems without glibc.

    By default it returns the memory of each large tensor to the kernel, which clears it page by page for the next one. On
    two cores keeping it made training 9% faster (resnet18, 128 px), predicting a third (resnext50), with 5% more memory.
    """
    mallopt = _from_glibc("mallopt")
    # one arena for all threads: the arenas of other threads have 64 MB, and what is larger is returned to the kernel
    options = [(M_MMAP_THRESHOLD, 1 << 30), (M_TRIM_THRESHOLD, (1 << 31) - 1), (M_ARENA_MAX, 1)]
    return mallopt is not None and all(mallopt(option, value) for option, value in options)


def release_freed_memory() -> bool:
    """Return the memory that malloc keeps to the system; return False on systems without glibc.

    Freed blocks of many sizes do not fit the next tensors: a stage of 20 epochs (tf_efficientnet_lite0, 128 px) grew from 2.3
    to 4.7 GB. After one of its epochs this takes 0.16 s, and 1.0 of 2.2 GB are left.
    """
    malloc_trim = _from_glibc("malloc_trim")
    return malloc_trim is not None and malloc_trim(0) == 1


def _from_glibc(name: str) -> Any:
    return getattr(ctypes.CDLL(None), name, None) if sys.platform.startswith("linux") else None
