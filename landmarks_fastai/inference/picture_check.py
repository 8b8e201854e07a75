"""Labels that do not fit their pictures: where they disagree with networks that have not seen the row. The doctor's second list.

It finds what has a right shape: another face's labels, points shifted as a whole, on another object, too large or small.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from fastcore.basics import chunked

from landmarks_fastai.data.items import LabelledImages
from landmarks_fastai.data.shape_check import CHUNK
from landmarks_fastai.data.split import digests
from landmarks_fastai.errors import UserError
from landmarks_fastai.inference.predictor import Predictor
from landmarks_fastai.inference.scoring import predict_rows
from landmarks_fastai.inference.torch_network import open_checkpoint
from landmarks_fastai.missing import MIN_POINTS
from landmarks_fastai.runs.checkpoint import Checkpoint
from landmarks_fastai.utils.hardware import Machine

# Of the logarithms: a shift of ten times the median counts as 7.7 standard deviations. Of 5 x 22 damaged photographs 0.3 found
# 93%, 0.4 91%, the spread over the rows, as for shapes, 80%.
WIDTH = 0.3
SCORES = ("shift", "size", "turn", "places")
ALL = 4.0  # calibrated score: a row whose scores are all above has labels of another object
DIRECTIONS = ("right", "lower right", "bottom", "lower left", "left", "upper left", "top", "upper right")


class Misfit(NamedTuple):
    "How labelled points lie against predicted ones: the similarity of least squares between them, and what it leaves."

    shift: np.ndarray  # (2,) pixels
    size: float  # labelled / predicted
    turn: float  # radians, clockwise
    rest: np.ndarray  # (n,) distances that are left, in pixels
    radius: float  # root mean square distance of the predicted points from their middle, pixels


def misfit(points: np.ndarray, predicted: np.ndarray) -> Misfit | None:
    "Compare labelled points (n, 2), NaN: missing, with predicted ones; None for too few."
    labelled = ~np.isnan(points[:, 0])
    if labelled.sum() < MIN_POINTS:
        return None
    z, p = (xy[labelled].astype(np.float64) @ [1, 1j] for xy in (points, predicted))
    shift, radius = z.mean() - p.mean(), float(np.sqrt((abs(p - p.mean()) ** 2).mean()))
    p -= p.mean()
    factor = (p.conj() @ (z - z.mean())) / max(1e-9, float((abs(p) ** 2).sum()))
    rest = np.full(len(points), np.nan)
    rest[labelled] = abs(z - z.mean() - factor * p)
    return Misfit(np.array([shift.real, shift.imag]), float(abs(factor)), float(np.angle(factor)), rest, radius)


def unseen_rows(images: LabelledImages, checkpoints: Sequence[Checkpoint]) -> list[LabelledImages]:
    """Return the images that each checkpoint judges: those that it was not trained on, and no earlier one judges.

    Raises `UserError` for a checkpoint that does not say what it was trained on, or fits other labels.
    """
    of_rows = digests(images.labels.all_names())[images.rows]
    left, parts = np.ones(len(of_rows), bool), []
    for checkpoint in checkpoints:
        if images.fitted(checkpoint.facts, checkpoint.path) is not images:
            raise UserError(f"{checkpoint.path} has its points in another order than the first -pm: name one of them")
        if checkpoint.sides is None:
            raise UserError(f"{checkpoint.path} does not say which rows it was trained on: name a run of train.py")
        seen = checkpoint.sides if checkpoint.settings.all_rows else checkpoint.sides[:1]
        unseen = left & ~np.isin(of_rows, np.concatenate(seen))
        parts.append(images[np.flatnonzero(unseen)])
        left &= ~unseen
    return parts


def check_pictures(images: LabelledImages, checkpoints: Sequence[Checkpoint], machine: Machine) -> np.ndarray:
    "Return `SCORES` of the images (rows, 4); NaN: every checkpoint was trained on the row."
    scores = np.full((len(images), len(SCORES)), np.nan)
    of_row = {int(row): k for k, row in enumerate(images.rows)}
    for part, predictor in judging_predictors(images, checkpoints, machine):
        # in random order: what is usual for a landmark is learned from the first rows
        order = np.random.default_rng(0).permutation(len(part))
        rows, values, usual = [], [], None
        batches: Any = chunked(predict_rows(predictor, [part[int(k)] for k in order]), CHUNK)
        for batch in batches:
            predictions = {item: result.objects[0] for item, result in batch}
            misfits = {item: m for item, p in predictions.items() if (m := misfit(item.points, p.points))}
            if not misfits:
                continue
            rest, radius = (np.stack([getattr(m, name) for m in misfits.values()]) for name in ("rest", "radius"))
            confidences = [predictions[item].confidence for item in misfits]
            if confidences[0] is None:
                usual = np.nan_to_num(np.nanmedian(rest / radius[:, None], 0), nan=1.0) if usual is None else usual
                unit = np.maximum(usual * radius[:, None], 0.1)
            else:
                unit = np.stack(confidences)
            scale = np.sqrt((unit**2).mean(1))
            similarity = [(*m.shift, np.log(max(m.size, 1e-3)) * m.radius, m.turn * m.radius) for m in misfits.values()]
            rows += [item.row for item in misfits]
            values.append(np.column_stack([similarity / scale[:, None], np.sqrt(np.nanmean((rest / unit) ** 2, 1))]))
        if rows:
            x, y, size, turn, places = np.concatenate(values).T
            # a network's own shift, of all its predictions, is not the labels'
            x, y, size, turn = (value - np.median(value) for value in (x, y, size, turn))
            sizes = np.column_stack([np.hypot(x, y), abs(size), abs(turn), places])
            scores[[of_row[row] for row in rows]] = np.log(np.maximum(sizes / np.median(sizes, 0), 1e-9)) / WIDTH
    return scores


def judging_predictors(
    images: LabelledImages, checkpoints: Sequence[Checkpoint], machine: Machine
) -> Iterator[tuple[LabelledImages, Predictor]]:
    "Yield the images that each checkpoint judges, with its predictor."
    for part, checkpoint in zip(unseen_rows(images, checkpoints), checkpoints, strict=True):
        if len(part):
            network = open_checkpoint(checkpoint, machine)
            yield part, Predictor(network, machine=machine, batch_size=checkpoint.settings.batch_size)


def predictions(images: LabelledImages, checkpoints: Sequence[Checkpoint], machine: Machine) -> dict[int, np.ndarray]:
    "Predict images, each by the checkpoint that judges it: points (n, 2) by row."
    return {
        item.row: result.objects[0].points
        for part, predictor in judging_predictors(images, checkpoints, machine)
        for item, result in predict_rows(predictor, [part[k] for k in range(len(part))])
    }


def explain(points: np.ndarray, predicted: np.ndarray, scores: np.ndarray) -> str:
    "Say how labelled points (n, 2) lie against predicted ones; `scores` are the row's `SCORES`."
    m = misfit(points, predicted)
    assert m
    rest = float(np.sqrt(np.nanmean(m.rest**2)))
    worst = SCORES[int(np.nanargmax(scores))]
    if worst == "places" or (scores > ALL).all():
        return f"the network sees other points: {rest:.3g} px off in the mean"
    if worst == "shift":
        side = DIRECTIONS[round(float(np.arctan2(*m.shift[::-1])) / (np.pi / 4)) % 8]
        length = float(np.linalg.norm(m.shift))
        return f"the points are shifted by {length:.3g} px to the {side}, {length / (2 * m.radius):.0%} of the object"
    if worst == "size":
        return f"the points are {m.size:.2f} times as large as the object"
    return f"the points are turned by {abs(np.degrees(m.turn)):.0f} degrees {'clockwise' if m.turn > 0 else 'anticlockwise'}"
