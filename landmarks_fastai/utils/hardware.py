"""What a run may use of the machine it is on, and how. None of it travels with a checkpoint.

On a GPU: mixed precision, channels_last, pinned memory, TF32, `torch.compile`. Nobody has measured these here; on the CPU
`benchmarks/README.md` has what the same choices gave.
"""

import ctypes
import multiprocessing
import os
import re
import sys
from dataclasses import dataclass

from landmarks_fastai.errors import UserError

AMP = ("auto", "off", "bf16", "fp16")
# The limit of images.py, in a variable of the environment: a spawned worker inherits nothing else.
MAX_PIXELS = "LANDMARKS_MAX_PIXELS"
# Turing without tensor cores: convolutions in fp16 give NaN there (pytorch issues 69449, 77955), Ultralytics' check_amp
# refuses the same cards by name.
NAN_IN_FP16 = re.compile(r"\bGTX 16[356]0\b|\bT(400|500|550|600|1000|1200|2000)\b", re.IGNORECASE)
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # of glibc's malloc.h


@dataclass(frozen=True)
class Machine:
    "The defaults are the CPU's."

    device: str = "cpu"  # or cuda
    workers: int | None = None  # processes that decode images; None chooses by the cores
    cache: bool = False  # keep fitted images on disk
    amp: str = "auto"  # one of `AMP`; auto is the GPU's better one, and off on a CPU and on `NAN_IN_FP16`
    channels_last: bool = True
    pin_memory: bool = True  # beside a GPU; a CPU has nothing to copy to
    tf32: bool = True  # on a GPU that has it
    compile: bool = False
    # Millions of pixels of an image. Decoding takes 10 bytes a pixel (measured: 1.7 GB for a PNG of 13,300 px squared, which
    # is 543 kB on disk), so 0.6 GB a worker at this; cameras of 61 megapixels pass.
    max_pixels: float = 64.0
    save_every: float = 5.0  # minutes from one writing of a stage's state to the next; each epoch's end has its own

    @property
    def decoders(self) -> int:
        """Processes that decode images: one a core beside a GPU; half the cores where the CPU trains too.

        Eight at the most: past that a laptop's memory pays for nothing. None on two cores, which training keeps busy: a
        worker there costs more than it does, `benchmarks/throughput.py`. None beside a CPU that has its images ready: to
        read them takes less than to pass them on.
        """
        if self.workers is not None:
            return self.workers
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        # A spawned worker (Windows) imports everything again: 0.4 GB, and training and validation keep theirs side by side.
        if multiprocessing.get_context().get_start_method() != "fork":
            cores = min(cores, total_memory() // (2 << 30))
        if self.device == "cuda":
            return min(8, cores)
        return 0 if self.cache or cores < 3 else min(8, cores // 2)

    @property
    def pins(self) -> bool:
        return self.pin_memory and self.device == "cuda"

    @property
    def precision(self) -> str:
        "What `amp` comes to: off, bf16 or fp16. bf16 needs no loss scaling; GPUs before Ampere do not compute in it."
        if self.amp != "auto":
            return self.amp
        if self.device != "cuda":
            return "off"
        import torch

        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bf16"
        return "off" if NAN_IN_FP16.search(torch.cuda.get_device_name()) else "fp16"

    def autocast(self):
        "The context in which a network computes."
        import torch

        dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16}
        return torch.autocast(self.device, dtypes.get(self.precision), enabled=self.precision in dtypes)

    @property
    def memory_format(self):
        import torch

        return torch.channels_last if self.channels_last else torch.contiguous_format

    def prepare(self):
        "Tell the process: once, before the first network is made. Raises `UserError` for what this machine cannot do."
        if self.amp == "fp16" and self.device == "cpu":
            raise UserError("--amp fp16 is for a GPU: use --amp bf16 on a CPU, or run without --amp")
        keep_freed_memory()
        os.environ[MAX_PIXELS] = str(round(1e6 * self.max_pixels))
        if self.compile:
            _try_compiler(self.device)
        if self.device == "cuda":
            import torch

            torch.set_float32_matmul_precision("high" if self.tf32 else "highest")
            torch.backends.cudnn.allow_tf32 = self.tf32
            # All batches but the last are of one shape, so one search pays for a whole stage. It may choose another
            # algorithm in another run: on a GPU runs of one seed differ by rounding anyway, on a CPU, where they are
            # equal to the last bit, this is not reached.
            torch.backends.cudnn.benchmark = True


def total_memory() -> int:
    "Bytes of this machine's memory."
    if hasattr(os, "sysconf"):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    status = (ctypes.c_ulonglong * 8)(64)  # Windows' MEMORYSTATUSEX: its own size, then the physical memory
    ctypes.windll.kernel32.GlobalMemoryStatusEx(status)
    return status[1]


def _try_compiler(device: str):
    "Compile something small: a machine without a compiler is found out now, in one line."
    import torch

    try:
        torch.compile(lambda x: x.sin() + 1)(torch.zeros(8, device=device))
    except Exception as e:  # torch._inductor's, the compiler's and the linker's own errors share no narrower base
        why = (str(e).strip().splitlines() or [type(e).__name__])[0][:150]
        raise UserError(f"--compile: this machine cannot compile ({why}): run without --compile") from None


def keep_freed_memory() -> bool:
    """Let malloc keep the memory that a step frees, for the next step; False where there is no glibc to tell.

    glibc hands every large tensor's memory back to the kernel, which clears it, page by page, for the next one: on two
    cores keeping it made training 9% faster (resnet18, 128 px), predicting a third (resnext50), at 5% more memory.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    # one arena for all threads: the others' are of 64 MB, and what is larger goes the old way
    options = [(M_MMAP_THRESHOLD, 1 << 30), (M_TRIM_THRESHOLD, (1 << 31) - 1), (M_ARENA_MAX, 1)]
    return bool(mallopt) and all(mallopt(option, value) for option, value in options)
