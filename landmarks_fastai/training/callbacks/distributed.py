"Training in several processes, by PyTorch's DistributedDataParallel."
# fastai sets attributes when it runs, `learn` among them
# pyright: reportAttributeAccessIssue=false

from itertools import chain

from fastai.callback.core import Callback
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from landmarks_fastai.metrics import sum_over_processes
from landmarks_fastai.utils.distributed import all_reduce, this_process


class DistributedTraining(Callback):
    """Average the gradients of all processes, the losses of their batches, and their metrics.

    `learn.model` is the wrapper in the forward pass of a training step only: names of weights do not change, and
    evaluations, in which processes may have different numbers of batches, do not wait for each other.
    """

    order = 10  # after ChannelsLast and Compile; before `Evaluation` and the Recorder

    wrapped: DistributedDataParallel | None = None

    def before_train(self):  # not in `before_fit`, which a prediction has too
        # Without find_unused_parameters the first backward pass changes which gradients are summed together, and in
        # which order three processes' are added: a resumed run would differ in the last bits.
        self.wrapped = self.wrapped or DistributedDataParallel(self.model, find_unused_parameters=True)

    def before_batch(self):
        if self.training:
            self.learn.model = self.wrapped

    def after_pred(self):
        if self.wrapped and self.training:
            self.learn.model = self.wrapped.module

    def after_loss(self):
        "Weigh the mean of this process's batch by its labelled coordinates: as if all batches were one."
        if self.training:
            labelled = (~self.yb[0].isnan()).sum()
            weight = labelled * this_process().count / all_reduce(labelled.clone())  # 1 if no point is missing
            self.learn.loss_grad = self.loss_grad * weight
            self.learn.loss = self.loss * weight

    def after_backward(self):
        self.learn.loss = all_reduce(self.loss.detach().clone()) / this_process().count  # of equal batches

    def after_fit(self):
        self.wrapped = None

    def is_shared(self) -> bool:
        "Whether all processes validate together. In a prediction of fastai's `dl` may be a list."
        return getattr(self.dl, "share", (0, 1))[1] > 1

    def before_validate(self):
        "Take the norms' running means of the first process: each has those of its own batches."
        if self.is_shared():
            average = [self.learn.average.network] if hasattr(self.learn, "average") else []
            for buffer in chain(*(network.buffers() for network in [self.model, *average])):
                dist.broadcast(buffer, 0)

    def after_validate(self):
        if self.is_shared():
            metrics = [self.recorder.loss, *self.learn.metrics]
            sum_over_processes(m for m in metrics if hasattr(m, "total") and hasattr(m, "count"))
