"The number of PyTorch's threads, by the cores that other programs leave free."
# fastai sets attributes when it runs, `training` among them
# pyright: reportAttributeAccessIssue=false

import os
import time
from contextlib import suppress

import psutil
import torch
from fastai.callback.core import Callback

from landmarks_fastai.utils.hardware import available_cores


class FollowLoad(Callback):
    """Set the number of threads to that of the free cores, measured every few seconds, and print when it first changes.

    PyTorch's OpenMP threads spin at the end of a parallel loop until the last of them arrives. If another program has
    the last one's core, the others burn theirs meanwhile (`benchmarks/contention.py`). A lower number is taken at once, a
    higher one when two measurements in a row ask for it.
    """

    def __init__(self, seconds: float = 2.0):
        self.seconds, self.most, self.told = seconds, torch.get_num_threads(), False

    def before_fit(self):
        self.number = self.wanted = self.most
        self.time, self.others = time.monotonic(), seconds_of_others()

    def before_batch(self):
        passed = time.monotonic() - self.time
        if passed < self.seconds:
            return
        others = seconds_of_others()
        busy = max(0.0, (others - self.others) / passed)
        self.time, self.others = time.monotonic(), others
        last, self.wanted = self.wanted, max(1, min(self.most, round(available_cores() - busy)))
        number = min(self.wanted, max(last, self.number))
        if number != self.number:
            self.number = number
            torch.set_num_threads(number)
            if not self.told:
                cores = f"other programs use {busy:.1f} of {available_cores()} cores"
                print(f"note: {cores}: from now on as many threads as are free, {number} at first", flush=True)
                self.told = True

    def after_fit(self):
        torch.set_num_threads(self.most)


def follows_load() -> bool:
    "Return whether the number of threads is free to follow the load: neither OMP_NUM_THREADS nor one core fixes it."
    return not os.environ.get("OMP_NUM_THREADS") and torch.get_num_threads() > 1


def seconds_of_others() -> float:
    "CPU seconds that other programs have used on the cores of this process since the machine was started."
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(available_cores())
    times = psutil.cpu_times(percpu=True)
    # guest is a part of user; a hypervisor's steal counts as another program's
    ignored = ("idle", "iowait", "guest", "guest_nice")
    busy = sum(sum(times[core]) - sum(getattr(times[core], k, 0.0) for k in ignored) for core in cores)
    ours = time.process_time()
    for child in psutil.Process().children(recursive=True):  # the processes that decode images
        with suppress(psutil.Error):
            spent = child.cpu_times()
            ours += spent.user + spent.system
    return busy - ours
