"What depends on the machine: mixed precision, compilation, memory."
# fastai sets attributes when it runs, `learn` among them
# pyright: reportAttributeAccessIssue=false, reportAssignmentType=false

import torch
from fastai.callback.core import Callback
from fastai.callback.fp16 import MixedPrecision

from landmarks_fastai.utils.hardware import release_freed_memory


class Amp(MixedPrecision):
    """fastai's `MixedPrecision` for training steps only, on any device.

    Validation computes in float32, as `predict.py` does: half precision changes a score by 0.2%, and the best of several
    scores is saved.
    """

    name = "mixed_precision"  # fastai looks it up by this name

    def __init__(
        self,
        precision: str,  # bf16 or fp16
        device: str,  # cpu, cuda or mps
    ):
        super().__init__(precision)
        self.device_type, self.dtype = device, {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]

    def before_fit(self):  # fastai's requires CUDA
        self.learn.scaler = torch.amp.GradScaler(self.device_type, enabled=self.dtype == torch.float16)
        self.autocast, self.scales = torch.autocast(self.device_type, self.dtype), []

    def before_batch(self):
        if self.training:
            super().before_batch()

    def after_loss(self):
        if self.training:
            super().after_loss()


class Compile(Callback):
    "`torch.compile` the network in place: the names of weights do not change."

    order = 1  # after ChannelsLast

    def before_fit(self):
        self.learn.model.compile()


class ReleaseMemory(Callback):
    "Return freed memory to the system after each epoch."

    def after_epoch(self):
        release_freed_memory()
