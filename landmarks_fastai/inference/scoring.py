"Predictions of labelled images: their score, and a picture of them."

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import repeat
from typing import Any, NamedTuple

import numpy as np
import torch
from fastcore.basics import chunked

from landmarks_fastai import plots
from landmarks_fastai.data.align import alignment_of
from landmarks_fastai.data.items import LabelledImage
from landmarks_fastai.data.pictures import Picture
from landmarks_fastai.errors import UserError, one_line
from landmarks_fastai.geometry import PixelMap
from landmarks_fastai.inference.predictor import PictureResult, Predictor
from landmarks_fastai.metrics import ImageMetric, default_metrics, image_score, sum_over_processes
from landmarks_fastai.utils.distributed import all_reduce

ADDED = 64  # images whose points are given to the metrics together
NAME_SHOWN = 40  # characters of a file name above its picture


def predict_rows(
    predictor: Predictor,
    items: Sequence[LabelledImage],
    crops: Iterable[PixelMap | None] | None = None,  # of the last pass, if the first was made; None for whole images
) -> Iterator[tuple[LabelledImage, PictureResult]]:
    "Yield labelled images with their predictions, pixels of the images as stored; an image that cannot be read costs a warning."
    for item, result in zip(items, predictor.stream(_pictures(predictor, items, crops)), strict=True):
        if result.error:
            print(f"warning: {result.error}: it is not scored", file=sys.stderr, flush=True)
        else:
            yield item, result


def _pictures(
    predictor: Predictor,
    items: Sequence[Any],  # labelled images, or what a `Picture` is made of
    crops: Iterable[PixelMap | None] | None = None,
) -> Iterator[Picture]:
    "Yield the pictures of items, as stored, with their boxes if the network was trained on boxes."
    boxed = predictor.networks[0].settings.crop == "box"
    for item, crop in zip(items, repeat(None, len(items)) if crops is None else crops, strict=True):
        labelled = isinstance(item, LabelledImage)
        picture = item.picture if labelled else Picture(item, exif=False)
        picture.boxes = [item.box] if labelled and boxed else None
        picture.crop = crop
        yield picture


class Scores(NamedTuple):
    "What the predictions of labelled images are worth, in pixels of the images as stored."

    score: float  # the competition's: mean squared error over all labelled coordinates, not rounded
    nme: float  # normalised by the diagonal of the points' box; NaN if no image has one
    images: int
    unaligned: int  # images of which a pass made no plausible shape
    error: float = math.inf  # standard error of the score, from its spread over the images


def score_rows(
    predictor: Predictor,
    items: Sequence[LabelledImage],  # of this process; all processes must call this function, and get the same result
    crops: Iterable[PixelMap | None] | None = None,  # as in `predict_rows`
    metrics: Sequence[ImageMetric] = (),  # that the points are added to
    between: Callable[[], None] = lambda: None,  # called after every few images
    collect: Callable[[LabelledImage, PictureResult], None]
    | None = None,  # called with every image, as `RowErrors.add`
) -> Scores:
    "Score predictions of labelled images. Raises `UserError` if no image can be read."
    metrics, unaligned = [*default_metrics(predictor.networks[0].facts.shape), *metrics], 0
    batches: Any = chunked(predict_rows(predictor, items, crops), ADDED)
    for batch in batches:
        if collect:
            for row in batch:
                collect(*row)
        pred = np.stack([result.objects[0].points for _, result in batch])
        truth = np.stack([item.points for item, _ in batch])
        for metric in metrics:
            metric.add(torch.from_numpy(pred).double(), torch.from_numpy(truth).double())
        unaligned += sum(result.unaligned for _, result in batch)
        between()
    sum_over_processes(metrics)
    if not metrics[0].count:
        raise UserError(f"no image of {len(items)} validation rows can be read: is the folder still there?")
    return scores_of(metrics, int(all_reduce([unaligned])))


def scores_of(metrics: Sequence[ImageMetric], unaligned: int) -> Scores:
    "What `default_metrics` say, the first two of `metrics`."
    score, nme = (math.nan if metric.value is None else metric.value for metric in metrics[:2])
    return Scores(score, nme, metrics[0].count, unaligned, metrics[0].error)


def plot_rows(
    predictor: Predictor,
    items: Sequence[Any],  # labelled images, or paths, PIL images and arrays, which have no true points
) -> None:
    """Plot the network's last input of each image with the predicted points.

    Of a labelled image, the true points, its score and the end of its file name too.
    """
    network, panels = predictor.networks[0], []
    alignment, size = alignment_of(network.settings, network.facts), network.settings.size
    for item, result in zip(items, predictor.stream(_pictures(predictor, items)), strict=True):
        if result.error:  # the image has vanished, and the validation has printed a warning
            continue
        points = result.objects[0].points
        crop = alignment.maps(points[None])[0] if alignment else None
        if crop is None and isinstance(item, LabelledImage):
            crop = item.view(network.settings)
        ((pixels, to_input),) = result.picture.inputs([crop], network.settings.fit, size)
        truth, title = None, ""
        if isinstance(item, LabelledImage):
            labelled, score = ~np.isnan(item.points[:, 0]), image_score(points, item.points)
            n = "" if labelled.all() else f" ({labelled.sum()} of {len(labelled)})"
            name = item.images.labels.name(item.row)
            short = name if len(name) <= NAME_SHOWN else f"…{name[1 - NAME_SHOWN :]}"
            truth, title = to_input.to_input(item.points), f"score {score:.4g}{n}\n{one_line(short)}"
        panels.append((pixels, truth, to_input.to_input(points), title))
    if panels:
        plots.plot_predictions(panels)
