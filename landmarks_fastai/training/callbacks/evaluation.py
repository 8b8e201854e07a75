"What an epoch is scored by, and what is kept of it."

import math
from itertools import chain

import torch
from fastai.callback.core import Callback
from fastai.learner import ValueMetric
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from landmarks_fastai.data.flip import predict_with_flip
from landmarks_fastai.metrics import stage_metrics
from landmarks_fastai.runs.checkpoint import write_checkpoint
from landmarks_fastai.runs.run import Run
from landmarks_fastai.settings import Settings


class Average(Callback):
    """An exponential average of the weights, and of the norms' running means, taken after every step.

    What counts or indexes is copied: PyTorch's `AveragedModel(use_buffers=True)` averages it too, and truncates. After 40
    steps a position index of swin_t was one off in each of its 12 blocks.

    Its memory grows with the stage, (1 + n) / (10 + n) after n steps, up to `decay`: a stage of fifty steps has a use
    for it too.
    """

    order = 45

    def __init__(self, decay: float):
        self.decay = decay

    def before_fit(self):
        self.twin = AveragedModel(self.model)

    @torch.no_grad()
    def after_step(self):
        n = int(self.twin.n_averaged)  # it lies on the CPU whatever the network's device: nothing waits for a GPU
        floats, others = [], []
        for pair in zip(_tensors(self.network), _tensors(self.model), strict=True):
            (floats if n and pair[0].is_floating_point() else others).append(pair)
        if floats:
            get_ema_multi_avg_fn(min(self.decay, (1 + n) / (10 + n)))(*zip(*floats, strict=True), n)
        if others:
            torch._foreach_copy_(*zip(*others, strict=True))
        self.twin.n_averaged += 1

    @property
    def network(self):
        return self.twin.module


def _tensors(network):
    return chain(network.parameters(), network.buffers())


class EvaluateModel(Callback):
    "Score another network, or the Learner's own with the flip test, on the validation batches that the Learner goes through."

    order = 46  # before the Recorder reads what was found

    def __init__(
        self,
        name: str,  # of its column
        size: int,  # of the network's input
        network,  # called without arguments: the network to score
        flip_indices=(),  # of the flip map, for the flip test
    ):
        self.figures, self.network, self.flip_indices = stage_metrics(size), network, flip_indices
        self.column = ValueMetric(lambda: self.score, name)

    def before_validate(self):
        for figure in self.figures:
            figure.reset()
        self.network().eval()

    def after_batch(self):
        if not self.training:
            unit = predict_with_flip(self.network(), *self.xb, self.flip_indices)
            for figure in self.figures:
                figure.add(unit, self.yb[0], self.learn.maps)

    @property
    def score(self):
        return self.figures[0].value

    @property
    def nme(self):
        return self.figures[1].value


class SaveBest(Callback):
    """Write the run's checkpoint when a score is better than the best so far: the network's or its average's.

    fastai's `SaveModelCallback` reads its file back as a pickle; here the stage itself loads the best, tensors only.
    """

    order = 47  # behind the `EvaluateModel`, before the Recorder asks for the column

    def __init__(
        self,
        run: Run,
        settings: Settings,
        best: float | None = None,  # score to beat: the loaded model's
        evaluations: list | None = None,  # `EvaluateModel` that compete; none: the Learner's own score does
    ):
        self.save_to, self.settings, self.evaluations = run, settings, evaluations or []
        self.best, self.saved = math.inf if best is None else best, False
        self.column = ValueMetric(lambda: self.found[0], "best")  # the better of the epoch's scores

    def after_validate(self):
        found = [(evaluation.score, evaluation.nme, evaluation.network()) for evaluation in self.evaluations]
        if not self.settings.tta:
            own = {m.name: m.value for m in self.learn.metrics if m.name in ("score", "nme_box_diag")}
            found.insert(0, (own["score"], own["nme_box_diag"], self.model))
        self.found = min(found, key=lambda f: math.inf if math.isnan(f[0]) else f[0])

    def after_epoch(self):
        score, nme, network = self.found
        if score < self.best:
            self.best, self.saved = score, True
            write_checkpoint(self.save_to, network, self.settings, score, nme, self.epoch)
