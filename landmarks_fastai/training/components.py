"The parts of a Learner that the settings and the machine choose: optimiser, parameter groups, callbacks."

from functools import partial

import torch
from fastai.callback.channelslast import ChannelsLast
from fastai.callback.core import Callback
from fastai.learner import Learner
from fastai.optimizer import OptimWrapper
from fastai.torch_core import params

from landmarks_fastai.settings import Settings
from landmarks_fastai.training import callbacks
from landmarks_fastai.utils.distributed import this_process
from landmarks_fastai.utils.hardware import Machine


def optimiser(settings: Settings) -> partial:
    """Return the `opt_func` of a Learner: a PyTorch optimiser in fastai's `OptimWrapper`.

    fastai's Adam has no amsgrad. With the wrapper weight decay applies to all parameters, biases and norms too, as in the
    published entry's PyTorch loop; fastai's `wd_bn_bias` has no effect.
    """
    # fused: a step of resnext50's weights takes 20 ms instead of 54 on two cores
    kwargs = {"weight_decay": settings.wd, "fused": True}
    return {
        "adamw": partial(OptimWrapper, opt=partial(torch.optim.AdamW, amsgrad=True, **kwargs)),
        "adam": partial(OptimWrapper, opt=partial(torch.optim.Adam, amsgrad=True, **kwargs)),
        "sgd": partial(OptimWrapper, opt=partial(torch.optim.SGD, momentum=0.9, **kwargs)),
    }[settings.opt]


def scheduler(settings: Settings) -> list[Callback]:
    "Return the callbacks that change the learning rate between epochs; none for `onecycle`, which is `fit_one_cycle`."
    if settings.sched == "plateau":
        return [callbacks.PlateauLR(("best", "score") if settings.align else ("score",))]  # best: of the second pass
    return [callbacks.StepLR(settings.step_size, settings.gamma)] if settings.sched == "step" else []


def body_and_head(model: torch.nn.Sequential) -> list:
    "The splitter: two parameter groups, so that the body can be frozen and the head has another learning rate."
    return [params(model[0]), params(model[1])]


def body_lr(learn: Learner) -> float | None:
    "Return the current learning rate of the body; None in an exported Learner, which has no optimiser."
    return learn.opt.hypers[0]["lr"] if learn.opt else None


def on_machine(machine: Machine) -> list[Callback]:
    "Return the callbacks for memory, its format, mixed precision, compilation and several processes."
    cbs: list[Callback] = [callbacks.ReleaseMemory()]
    if machine.channels_last:
        cbs.append(ChannelsLast())
    if machine.precision != "off":
        cbs.append(callbacks.Amp(machine.precision, machine.device))
    if machine.compile:
        cbs.append(callbacks.Compile())
    return [*cbs, callbacks.DistributedTraining()] if this_process().store else cbs
