"What an epoch is scored by, and what is kept of it."

import math
from collections.abc import Callable
from itertools import chain

import torch
from fastai.callback.core import Callback
from fastai.learner import Learner, ValueMetric
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from landmarks_fastai.data.block import alignment_of
from landmarks_fastai.data.flip import predict_with_flip
from landmarks_fastai.metrics import points_in_image, stage_metrics
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
    """Score a network on the validation batches that the Learner goes through, with the flip test where it is wanted.

    With an alignment it also finds each image's aligned crop, for `second_pass`.
    """

    order = 46  # before the Recorder reads the column

    def __init__(
        self,
        name: str,  # of its column
        settings: Settings,
        network: Callable[[], nn.Module] | None = None,  # the network to score; None: the Learner's own
        flip_indices: tuple = (),  # for the flip test; empty: none
    ):
        self.settings, self.network, self.flip_indices = settings, network, flip_indices
        self.metrics, self.alignment = stage_metrics(settings.size), alignment_of(settings)
        self.column = ValueMetric(lambda: self.score, name)

    @property
    def scored(self) -> nn.Module:
        return self.network() if self.network else self.model

    def before_validate(self):
        for metric in self.metrics:
            metric.reset()
        self.scored.eval()
        self.crops = []

    def after_batch(self):
        if self.training:
            return
        known = self.network is None and not len(self.flip_indices)
        unit = self.pred if known else predict_with_flip(self.scored, *self.xb, self.flip_indices)
        for metric in self.metrics:
            metric.add(unit, self.yb[0], self.learn.maps)
        if self.alignment:
            points = points_in_image(unit, self.learn.maps, self.settings.size)
            self.crops += self.alignment.maps(points.cpu().numpy())

    @torch.no_grad()
    def second_pass(self, learn: Learner) -> tuple[float, float]:
        "Score and NME of a second pass over the aligned crops that the pass before has found."
        network, dl, metrics = (
            self.network() if self.network else learn.model,
            learn.dls.valid,
            stage_metrics(self.settings.size),
        )
        dl.crops = dict(zip(dl.seen, self.crops, strict=True))
        try:
            for images, points, maps in dl:
                unit = predict_with_flip(network, images, self.flip_indices)
                for metric in metrics:
                    metric.add(unit, points, maps)
        finally:
            dl.crops = None
        return tuple(metric.value for metric in metrics)

    @property
    def score(self):
        return self.metrics[0].value

    @property
    def nme(self):
        return self.metrics[1].value


class SaveBest(Callback):
    """Write the run's checkpoint when a score is better than the best so far: the network's or its average's.

    fastai's `SaveModelCallback` reads its file back as a pickle; here the stage itself loads the best, tensors only.
    """

    order = 47  # behind `EvaluateModel`, before the Recorder asks for the column

    def __init__(
        self,
        run: Run,
        settings: Settings,
        best: float | None = None,  # score to beat: the loaded model's
        evaluations: list[EvaluateModel] | None = None,  # that compete; none: the Learner's own score does
    ):
        self.save_to, self.settings, self.evaluations = run, settings, evaluations or []
        self.best, self.saved = math.inf if best is None else best, False
        self.column = ValueMetric(lambda: self.found[0], "best")  # the better of the epoch's scores

    def after_validate(self):
        found = [(e.score, e.nme, e.scored, e) for e in self.evaluations]
        if not any(e.network is None for e in self.evaluations):
            own = {m.name: m.value for m in self.learn.metrics if m.name in ("score", "nme_box_diag")}
            found.insert(0, (own["score"], own["nme_box_diag"], self.model, None))
        *self.found, best = min(found, key=lambda f: math.inf if math.isnan(f[0]) else f[0])
        if best and best.alignment:  # the network with the better first pass makes the second
            self.found[:2] = best.second_pass(self.learn)

    def after_epoch(self):
        score, nme, network = self.found
        if score < self.best:
            self.best, self.saved = score, True
            write_checkpoint(self.save_to, network, self.settings, score, nme, self.epoch)
