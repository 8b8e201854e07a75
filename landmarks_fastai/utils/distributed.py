"""The processes that torchrun starts for one training: how they agree, and which of them prints and writes.

Without torchrun there is one process, the first, and every function returns at once. Nothing heavy is imported here.
"""

import os
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar, cast

from landmarks_fastai.errors import UserError
from landmarks_fastai.utils.files import reason

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

# A process that ends closes its connections, which the others notice at once. The timeout is for a machine that loses
# its network or its power; the first process may check images for as long while the others wait.
TIMEOUT = timedelta(minutes=30)
# In the text of a RuntimeError where another process has ended: gloo (2), NCCL, torch's TCPStore
ENDED = ("gloo/transport", "Connection closed by peer", "ncclRemoteError", "TCPStore")
FIRST_PRINTS = 2  # seconds that the others give the first process to say why the run ends


@dataclass(frozen=True)
class Process:
    "This process among those of the run."

    rank: int = 0  # among all
    count: int = 1
    local_rank: int = 0  # among those on this machine
    local_count: int = 1
    machine: int = 0
    machines: int = 1
    store: Any = None  # the torch.distributed.Store of all processes; None without torchrun


_this = Process()


def this_process() -> Process:
    return _this


def is_first() -> bool:
    "Whether this process prints, writes and draws."
    return _this.rank == 0


def start() -> None:
    "Connect to the other processes if torchrun started this one: gloo for tensors on the CPU, NCCL for those on GPUs."
    global _this
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    # or its warnings: DistributedDataParallel's remark that `find_unused_parameters` found none
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    import torch
    import torch.distributed as dist
    from torch.distributed import PrefixStore, rendezvous  # pyright: ignore[reportPrivateImportUsage] (documented there)

    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    try:
        store, rank, count = next(rendezvous("env://", timeout=TIMEOUT))
        # torchrun's agent keeps its store when it restarts the processes: those of before have left their addresses in it
        store = PrefixStore(f"attempt {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
        group_store = PrefixStore("group", store)
        dist.init_process_group(backend, store=group_store, rank=rank, world_size=count, timeout=TIMEOUT)
    except RuntimeError as e:
        hint = "GLOO_SOCKET_IFNAME names the network interface to use"
        raise UserError(f"the processes of torchrun cannot connect ({reason(e)}); {hint}") from None
    names = ("LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE")
    local_rank, local_count, machine, machines = (int(os.environ[name]) for name in names)
    _this = Process(rank, count, local_rank, local_count, machine, machines, PrefixStore("run", store))
    # fastai gathers the loss of every batch where these are set: it would wait for a process that has fewer batches
    for name in ("RANK", "WORLD_SIZE"):
        os.environ.pop(name)


def all_reduce(values: "Sequence[float] | torch.Tensor", op: str = "SUM") -> "torch.Tensor":
    "The sum (or MAX, MIN) over the processes of each value: a tensor in place, numbers as float64 on the CPU."
    import torch
    import torch.distributed as dist

    tensor = values if isinstance(values, torch.Tensor) else torch.tensor(values, dtype=torch.float64)
    if _this.store:
        dist.all_reduce(tensor, getattr(dist.ReduceOp, op))
    return tensor


def barrier() -> None:
    "Wait until all processes are here."
    if _this.store:
        all_reduce([0.0])  # not torch's `barrier`, which takes a GPU where there is one


def broadcast(value: T | None = None) -> T:
    "Return the first process's value in all of them. It is pickled."
    if not _this.store:
        return cast(T, value)
    import torch
    import torch.distributed as dist

    values: list[Any] = [value]
    dist.broadcast_object_list(values, src=0, device=torch.device("cpu"))
    return values[0]


def rank0_first(func: Callable[[], T]) -> T:
    """Call `func` in the first process, then in all others, which find the caches that it has written.

    As fastai's function of this name, which reads the variables that `start` removes, and waits with a barrier on a GPU.
    """
    result: Any = func() if is_first() else None
    barrier()
    return result if is_first() else func()


def announce(event: str) -> None:
    "Let the other processes know that something is done."
    if _this.store:
        _this.store.set(event, "1")


def announced(event: str) -> bool:
    "Whether another process has announced it: 0.2 ms."
    return _this.store is not None and _this.store.check([event])


def wait_for(event: str, seconds: float) -> None:
    "Wait until another process announces it, or for so long."
    with suppress(RuntimeError):
        if _this.store:
            _this.store.wait([event], timedelta(seconds=seconds))


def prints_line(first_prints: bool = False) -> bool:
    """Whether this process prints the line that says why the run ends: the first on its machine that asks.

    If all know the reason, `first_prints`: the others wait, and ask in case the first process was killed.
    """
    if not _this.store:  # torchrun's environment: interrupted before `start` is done
        return os.environ.get("LOCAL_RANK", "0") == "0" or "TORCHELASTIC_RUN_ID" not in os.environ
    # torchrun ends the other processes by a signal when one has ended; these are about to
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    if first_prints and not is_first():
        time.sleep(FIRST_PRINTS)
    try:
        return _this.store.add(f"line{_this.machine}", 1) == 1
    except RuntimeError:  # torchrun itself was killed
        return True


def process_ended(error: BaseException) -> bool:
    "Whether an error says that another process has ended."
    return _this.store is not None and isinstance(error, RuntimeError) and any(text in str(error) for text in ENDED)
