"The parts of a Learner that the settings and the machine choose: optimiser, parameter groups, callbacks."

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from fastai.callback.channelslast import ChannelsLast
from fastai.callback.core import Callback
from fastai.learner import Learner
from fastai.optimizer import OptimWrapper
from fastai.torch_core import params
from fastcore.foundation import L
from torch.optim import SGD, Adam, AdamW

from landmarks_fastai.settings import Settings
from landmarks_fastai.training import callbacks
from landmarks_fastai.utils.distributed import this_process
from landmarks_fastai.utils.hardware import Machine


class BodyAndHead(OptimWrapper):
    """A PyTorch optimiser of two parameter groups, whose learning rate is the body's; the head's is a multiple of it.

    Every `fit*` of fastai and every schedule sets the rate by `set_hyper`. A rate for each group is set as it is, and of a
    slice the end: its start is meant for layers that should learn slower than the head.

    With the wrapper weight decay applies to all parameters, biases and norms too, as in the published entry's PyTorch loop;
    fastai's `wd_bn_bias` has no effect.
    """

    def __init__(self, params: Any, opt: Callable, head_lr_mult: float, lr: float, **kwargs: Any):
        super().__init__(params, opt, lr=lr, **kwargs)
        self.head_lr_mult = head_lr_mult
        self.set_hyper("lr", lr)

    def set_hyper(self, k: str, v: Any) -> None:
        v = v.stop if isinstance(v, slice) else v
        if not isinstance(v, (list, tuple, L, np.ndarray)):
            v = [v, v * self.head_lr_mult if k == "lr" else v]
        super().set_hyper(k, [float(x) for x in v])  # numpy's numbers would be saved as a pickle that may run code


def optimiser(settings: Settings) -> partial:
    "Return the `opt_func` of a Learner: a PyTorch optimiser in fastai's `OptimWrapper`. fastai's Adam has no amsgrad."
    opt = {
        "adamw": partial(AdamW, amsgrad=True),
        "adam": partial(Adam, amsgrad=True),
        "sgd": partial(SGD, momentum=0.9),
    }
    # fused: a step of resnext50's weights takes 20 ms instead of 54 on two cores
    opt_of_settings = partial(opt[settings.opt], weight_decay=settings.wd, fused=True)
    return partial(BodyAndHead, opt=opt_of_settings, head_lr_mult=settings.head_lr_mult)


def scheduler(settings: Settings) -> list[Callback]:
    "Return the callbacks that change the learning rate between epochs; none for `onecycle`, which is `fit_one_cycle`."
    if settings.sched == "plateau":
        return [callbacks.PlateauLR()]
    return [callbacks.StepLR(settings.step_size, settings.gamma)] if settings.sched == "step" else []


def body_and_head(model: torch.nn.Sequential) -> list:
    "The splitter: two parameter groups, so that the body can be frozen and the head has another learning rate."
    return [params(model[0]), params(model[1])]


def body_lr(learn: Learner) -> float | None:
    "Return the current learning rate of the body; None in an exported Learner, which has no optimiser."
    return learn.opt.hypers[0]["lr"] if learn.opt else None


def fixed_threads(learn: Learner) -> int:
    "Return the number of PyTorch's threads; 0 if it follows the load."
    return 0 if hasattr(learn, "follow_load") else torch.get_num_threads()


def on_machine(machine: Machine) -> list[Callback]:
    "Return the callbacks for memory, its format, mixed precision, compilation and several processes."
    cbs: list[Callback] = [callbacks.ReleaseMemory()]
    if machine.device == "cpu" and not machine.threads and callbacks.follows_load():
        cbs.append(callbacks.FollowLoad())
    if machine.channels_last:
        cbs.append(ChannelsLast())
    if machine.precision != "off":
        cbs.append(callbacks.Amp(machine.precision, machine.device))
    if machine.compile:
        cbs.append(callbacks.Compile())
    return [*cbs, callbacks.DistributedTraining()] if this_process().store else cbs
