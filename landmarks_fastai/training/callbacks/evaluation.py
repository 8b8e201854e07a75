"Callbacks that score an epoch, and save the best."
# fastai sets attributes when it runs, `learn` among them
# pyright: reportAttributeAccessIssue=false

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from fastai.callback.core import Callback
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from landmarks_fastai.data.align import alignment_of
from landmarks_fastai.data.flip import average_flipped
from landmarks_fastai.data.labels import Sides
from landmarks_fastai.data.loader import LandmarkDL
from landmarks_fastai.geometry import PixelMap
from landmarks_fastai.inference.scoring import Scores, score_rows, scores_of
from landmarks_fastai.metrics import ImageMetric, default_metrics, points_in_image, sum_over_processes
from landmarks_fastai.runs.checkpoint import write_checkpoint
from landmarks_fastai.runs.run import Run
from landmarks_fastai.settings import Settings


class Average(Callback):
    """An exponential moving average of the weights, and of the norms' running means, updated after every step.

    Integer buffers are copied. PyTorch's `AveragedModel(use_buffers=True)` averages and truncates them: after 40 steps a
    position index of swin_t was one off in each of its 12 blocks.

    After n steps the decay is (1 + n) / (10 + n), up to `decay`, so that short stages of fifty steps gain from it too.
    A step that fp16's gradient scaling skips does not count.
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


@dataclass
class Candidate:
    "A network that may be the best of an epoch, and its first pass over the validation images."

    network: nn.Module
    metrics: list[ImageMetric]  # score, NME, and those of the Learner
    crops: list[PixelMap | None]  # of the second pass, one an image

    @property
    def first_pass(self) -> float:
        "The score of the first pass; infinite where it is not a number."
        score = self.metrics[0].value
        return math.inf if score is None or math.isnan(score) else score


class Evaluation(Callback):
    """Score a validation as predict.py would score: all passes, with the flip test and its third pass if `tta` is set.

    The first passes, of the network and of the running average if there is one (`Average`), are made on the batches of the
    Learner. The better one makes the second pass; `scores` are its scores, and `network` is the network.
    """

    order = 46  # before the Recorder reads the columns

    scores: Scores | None = None  # of the last validation
    candidates: Sequence[Candidate] = ()
    between: Callable[[], None] = staticmethod(lambda: None)  # called after every few images of the second pass

    def before_validate(self):
        self.candidates = []
        if hasattr(self.learn, "gather_preds"):  # a prediction; fastai's trackers recognise it likewise
            return
        networks = [self.model, *([self.learn.average.network] if hasattr(self.learn, "average") else [])]
        self.extra = [metric for metric in self.learn.metrics if isinstance(metric, ImageMetric)]
        self.candidates = [
            Candidate(network.eval(), [*default_metrics(), *map(copy.copy, self.extra)], []) for network in networks
        ]
        for metric in chain(*(candidate.metrics for candidate in self.candidates)):
            metric.reset()
            metric.shape = self.learn.facts.shape
        self.alignment = alignment_of(self.learn.settings, self.learn.facts)
        self.flip_indices = self.learn.facts.flip_indices if self.learn.settings.tta else ()

    def after_batch(self):
        if self.training or not self.candidates or not self.yb or self.learn.maps is None:
            return
        maps, size = self.learn.maps, self.learn.settings.size
        truth = points_in_image(self.yb[0], maps, size)
        for k, candidate in enumerate(self.candidates):
            unit = candidate.network(*self.xb) if k else self.pred
            if self.flip_indices:
                unit = average_flipped(unit, candidate.network(self.xb[0].flip(-1)), self.flip_indices)
            points = points_in_image(unit, maps, size)
            for metric in candidate.metrics:
                metric.add(points, truth)
            if self.alignment:
                candidate.crops += self.alignment.maps(points.cpu().numpy())

    def after_validate(self):
        if not self.candidates:
            return
        if getattr(self.dl, "share", (0, 1))[1] > 1:  # before the next line: one of the processes may have no rows
            sum_over_processes(chain(*(candidate.metrics for candidate in self.candidates)))
        if not self.candidates[0].metrics[0].count:  # no labels, or cancelled as by `lr_find`
            return
        best = min(self.candidates, key=lambda candidate: candidate.first_pass)
        self.network, metrics = best.network, best.metrics
        if self.alignment and isinstance(self.dl, LandmarkDL):
            metrics = [*map(copy.copy, metrics)]
            for metric in metrics:
                metric.reset()
            items = [self.dl.items[row] for row in self.dl.seen]
            predictor = self.learn.predictor(best.network, flip_test=bool(self.flip_indices))
            self.scores = score_rows(predictor, items, best.crops, metrics[2:], self.between)
        else:
            self.scores = scores_of(metrics, 0)
        for metric, scored in zip(self.extra, metrics[2:], strict=True):
            vars(metric).update(vars(scored))

    def score(self) -> float | None:
        "The score of the last validation; None before the first."
        return self.scores.score if self.scores else None

    def nme(self) -> float | None:
        "The NME of the last validation, normalised by the diagonal of the points' box; None before the first."
        return self.scores.nme if self.scores else None

    def first_pass(self, k: int = 0) -> float | None:
        "The score of the first pass of the network, or with k=1 of its running average; None before a validation."
        return self.candidates[k].metrics[0].value if k < len(self.candidates) else None


class SaveBest(Callback):
    """Write the run's checkpoint when an epoch has a better score than the best so far.

    fastai's `SaveModelCallback` reads its file back as a pickle; here the stage loads the best, tensors only.
    """

    order = 47  # after `Evaluation`

    def __init__(
        self,
        run: Run,
        settings: Settings,
        best: float | None = None,  # score to beat: the loaded model's
        sides: Sides | None = None,  # of the rows
    ):
        self.save_to, self.settings, self.sides = run, settings, sides
        self.best, self.saved = math.inf if best is None else best, False
        self.scores: Scores | None = None  # of the epoch that was saved

    def after_epoch(self):
        evaluation = self.learn.evaluation
        if evaluation.scores and evaluation.scores.score < self.best:
            self.best, self.saved, self.scores = evaluation.scores.score, True, evaluation.scores
            score, nme, *_ = evaluation.scores
            write_checkpoint(
                self.save_to, evaluation.network, self.settings, self.learn.facts, score, nme, self.epoch, self.sides
            )
