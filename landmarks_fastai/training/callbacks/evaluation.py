"Callbacks that score an epoch, and save the best."
# fastai sets attributes when it runs, `learn` among them
# pyright: reportAttributeAccessIssue=false

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import chain

import torch
from fastai.callback.core import Callback
from fastai.learner import ValueMetric
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from landmarks_fastai.data.align import alignment_of
from landmarks_fastai.data.flip import predict_with_flip
from landmarks_fastai.data.loader import LandmarkDL
from landmarks_fastai.metrics import ImageMetric, points_in_image, stage_metrics, sum_over_processes
from landmarks_fastai.runs.checkpoint import write_checkpoint
from landmarks_fastai.runs.run import Run
from landmarks_fastai.settings import Settings


class Average(Callback):
    """An exponential moving average of the weights, and of the norms' running means, updated after every step.

    Integer buffers are copied. PyTorch's `AveragedModel(use_buffers=True)` averages and truncates them: after 40 steps a
    position index of swin_t was one off in each of its 12 blocks.

    After n steps the decay is (1 + n) / (10 + n), up to `decay`, so that short stages of fifty steps gain from it too.
    A step that fp16's gradient scaling skips is no step.
    """

    order = 45  # after `Amp`, which cancels a step in `before_step`

    stepped = False

    def __init__(self, decay: float):
        self.decay = decay

    def before_fit(self):
        self.twin = AveragedModel(self.model)

    def before_step(self):
        self.stepped = True

    @torch.no_grad()
    def after_step(self):  # of a cancelled step too
        if not self.stepped:
            return
        self.stepped = False
        n = int(self.twin.n_averaged)  # on the CPU with any network: this does not wait for a GPU
        floats: list[tuple[torch.Tensor, torch.Tensor]] = []
        others: list[tuple[torch.Tensor, torch.Tensor]] = []
        for pair in zip(_tensors(self.network), _tensors(self.model), strict=True):
            (floats if n and pair[0].is_floating_point() else others).append(pair)
        if floats:
            averages, values = zip(*floats, strict=True)
            get_ema_multi_avg_fn(min(self.decay, (1 + n) / (10 + n)))(averages, values, n)
        if others:
            averages, values = zip(*others, strict=True)
            torch._foreach_copy_(averages, values)  # pyright: ignore[reportPrivateImportUsage] (one kernel for all)
        self.twin.n_averaged += 1

    @property
    def network(self) -> nn.Module:
        return self.twin.module


def _tensors(network: nn.Module) -> Iterator[torch.Tensor]:
    return chain(network.parameters(), network.buffers())


class EvaluateModel(Callback):
    """Score a network on the validation batches of the Learner, with the flip test if there are flip indices.

    With an alignment it also collects the maps of the aligned crops, for `second_pass`.
    """

    order = 46  # before the Recorder reads the column

    def __init__(
        self,
        name: str,  # of its column
        settings: Settings,
        network: Callable[[], nn.Module] | None = None,  # the network to score; None: the Learner's
        flip_indices: Sequence[int] = (),  # for the flip test; empty: none
    ):
        self.settings, self.network, self.flip_indices = settings, network, flip_indices
        self.metrics, self.alignment = stage_metrics(settings.size), alignment_of(settings)
        self.column = ValueMetric(lambda: self.score, name)
        self.after_crops: Callable[[], None] = lambda: None  # called after each batch of `second_pass`

    def before_validate(self):
        self.scored: nn.Module = self.network() if self.network else self.model
        self.scored_dl: LandmarkDL = self.dl
        for metric in self.metrics:
            metric.reset()
        self.scored.eval()
        self.crops = []

    def after_batch(self):
        if self.training:
            return
        (images,) = self.xb
        first = self.pred if self.network is None else None
        unit = predict_with_flip(self.scored, images, self.flip_indices, first)
        for metric in self.metrics:
            metric.add(unit, self.yb[0], self.learn.maps)
        if self.alignment:
            points = points_in_image(unit, self.learn.maps, self.settings.size)
            self.crops += self.alignment.maps(points.cpu().numpy())

    @torch.no_grad()
    def second_pass(self) -> tuple[float, float]:
        "Return score and NME of a second pass, over the aligned crops of the last validation."
        dl, metrics = self.scored_dl, stage_metrics(self.settings.size)
        dl.crops = dict(zip(dl.seen, self.crops, strict=True))
        try:
            for images, points, maps in dl:
                unit = predict_with_flip(self.scored, images.as_subclass(torch.Tensor), self.flip_indices)
                for metric in metrics:
                    metric.add(unit, points, maps)
                self.after_crops()
        finally:
            dl.crops = None
        if dl.share[1] > 1:
            sum_over_processes(metrics)
        return _score_and_nme(metrics)

    @property
    def first_pass(self) -> tuple[float, float]:
        "Score and NME of the last validation."
        return _score_and_nme(self.metrics)

    @property
    def score(self) -> float | None:
        "The score of the last validation; None before the first."
        return self.metrics[0].value


def _score_and_nme(metrics: list[ImageMetric]) -> tuple[float, float]:
    score, nme = (metric.value for metric in metrics)
    assert score is not None and nme is not None  # a pass without images raises in `LandmarkDL`
    return score, nme


class SaveBest(Callback):
    """Write the run's checkpoint when an evaluation has a better score than the best so far.

    fastai's `SaveModelCallback` reads its file back as a pickle; here the stage loads the best, tensors only.
    """

    order = 47  # after `EvaluateModel`, before the Recorder reads the column

    def __init__(
        self,
        run: Run,
        settings: Settings,
        best: float | None = None,  # score to beat: the loaded model's
        evaluations: list[EvaluateModel] | None = None,  # the best of them counts, or the Learner's metrics
    ):
        self.save_to, self.settings, self.evaluations = run, settings, evaluations or []
        self.best, self.saved = math.inf if best is None else best, False
        self.column = ValueMetric(lambda: self.epoch_best[0], "best")  # the best score of the epoch

    def after_validate(self):
        candidates: list[tuple[float, float, nn.Module, EvaluateModel | None]]
        candidates = [(*e.first_pass, e.scored, e) for e in self.evaluations]
        if not any(e.network is None for e in self.evaluations):
            values = {m.name: m.value for m in self.learn.metrics if m.name in ("score", "nme_box_diag")}
            candidates.insert(0, (values["score"], values["nme_box_diag"], self.model, None))
        score, nme, network, evaluation = min(candidates, key=lambda f: math.inf if math.isnan(f[0]) else f[0])
        if evaluation and evaluation.alignment:  # a second pass of the network with the best first pass only
            score, nme = evaluation.second_pass()
        self.epoch_best = score, nme, network

    def after_epoch(self):
        score, nme, network = self.epoch_best
        if score < self.best:
            self.best, self.saved = score, True
            write_checkpoint(self.save_to, network, self.settings, score, nme, self.epoch)
