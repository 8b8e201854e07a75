"Mixed precision and compilation."
# fastai sets attributes when it runs, `learn` among them
# pyright: reportAttributeAccessIssue=false, reportAssignmentType=false

import torch
from fastai.callback.core import Callback
from fastai.callback.fp16 import MixedPrecision


class Amp(MixedPrecision):
    """fastai's `MixedPrecision` of the training steps, on a CPU too.

    Validation computes in float32, as `predict.py` does: the scores of the network, of its running average and of the flip
    test compete, and half precision moves a score by 0.2%.
    """

    name = "mixed_precision"  # fastai's own parts look for it by this name

    def __init__(
        self,
        precision: str,  # bf16 or fp16
        device: str,  # cpu or cuda
    ):
        super().__init__(precision)
        self.where, self.dtype = device, {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]

    def before_fit(self):
        if self.where == "cuda":
            super().before_fit()
        else:  # fastai's own asks for CUDA, and warns
            self.learn.scaler, self.scales = torch.amp.GradScaler("cpu", enabled=False), []
            self.autocast = torch.autocast("cpu", self.dtype)

    def before_batch(self):
        if self.training:
            super().before_batch()

    def after_loss(self):
        if self.training:
            super().after_loss()


class Compile(Callback):
    "`torch.compile` the network, in place: names of weights, checkpoints and copies are as without it."

    order = 1  # behind ChannelsLast

    def before_fit(self):
        self.learn.model.compile()
