"""The spread of each point, learned on the trained network: the radius that 68% of its errors lie within.

The spread is a factor for the landmark times one for the image, a log-linear function of the body's features. It is fitted
to the errors on training batches, then calibrated on the validation rows. The points do not change.

Measured on 544 held-out photographs of faces, as the rank correlation of spread and error over points and over faces:
landmarks alone 0.22 and 0; a ridge regression after one pass over the training rows 0.36 and 0.52; the same weights by
fastai's one cycle 0.30 and 0.40 in one epoch, 0.34 and 0.49 in four; one factor for each image and landmark 0.34 and 0.47
in four epochs. The regression has a unique solution, and no learning rate.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from fastai.torch_core import set_seed

from landmarks_fastai.data.block import landmark_block
from landmarks_fastai.data.items import LabelledImage
from landmarks_fastai.data.loader import LandmarkDL
from landmarks_fastai.inference.predictor import Predictor
from landmarks_fastai.inference.scoring import predict_rows
from landmarks_fastai.inference.torch_network import TorchNetwork
from landmarks_fastai.missing import labelled_mean, nan_mean
from landmarks_fastai.models.heads import SpreadHead
from landmarks_fastai.models.networks import LandmarkNetwork, PointsAndSpread
from landmarks_fastai.runs.checkpoint import Checkpoint, write_checkpoint
from landmarks_fastai.runs.run import Run
from landmarks_fastai.training.learner import LandmarkLearner, normalize
from landmarks_fastai.utils.files import atomic_write
from landmarks_fastai.utils.memory import within_memory

WITHIN = 0.68  # share of the errors within one spread
IMAGES = 4000  # at the most, to fit and to calibrate on; each takes memory for the errors of all its points
REGRESSION = 10  # seconds, of 4,000 images and 2,048 features, on one core
ALPHAS = np.logspace(0, 4, 5)  # penalties that the regression chooses from
# Images that a landmark's factor has to be learned from until it counts as much as the factor of all. On held-out faces
# the share within one spread is 4.1 percentage points off by landmark without factors, 2.7 with 50 to 200, 3.4 with 1000.
SHRINKAGE = 100


class HeldOut(NamedTuple):
    "Validation images, predicted as `predict.py` does it; pixels of the images as stored."

    errors: np.ndarray  # float32 (images, n_points): distances of the predicted points from the true ones; NaN: missing
    spreads: np.ndarray  # the same shape


def add_confidence(learn: LandmarkLearner, run: Run, best: Checkpoint) -> None:
    "Add a spread to best.pth, write confidence.csv, and print how well the spread holds."
    settings, facts, model = best.settings.replace(confidence=True), best.facts, best.model().to(learn.dls.device)
    # with the checkpoint's input, which a stage that no epoch beat has kept; all rows, of several processes too
    dls = landmark_block(settings, facts, machine=learn.machine).dataloaders(learn.dls.items.all_rows)
    normalize(dls, facts.mean, facts.std)
    with within_memory(learn):
        model.spread = fit_spread(model, dls.train)
        network = TorchNetwork(PointsAndSpread(model), settings, facts, replace(learn.machine, amp="off"))
        step = -(-len(dls.valid.items) // IMAGES)
        held_out = predict_held_out(Predictor(network, batch_size=settings.batch_size), dls.valid.items[::step])
    ratios = held_out.errors / held_out.spreads
    factors = calibration(ratios)
    with torch.no_grad():
        model.spread.landmarks.add_(torch.as_tensor(np.log(factors), device=learn.dls.device))
    write_checkpoint(run, model, settings, facts, best.score, best.nme, best.epoch, best.sides)
    report(run, HeldOut(held_out.errors, held_out.spreads * factors), cross_fitted(ratios), best)


def time_needed(learn: LandmarkLearner) -> float:
    "The time of `add_confidence` without the regression, as a multiple of a validation."
    n_train, n_valid = (len(dl.items) for dl in learn.dls.loaders)
    return (min(n_train, IMAGES) + 4 * min(n_valid, IMAGES)) / n_valid


@torch.no_grad()
def fit_spread(model: LandmarkNetwork, dl: LandmarkDL) -> SpreadHead:
    "Fit a spread to the errors of a network in one pass over the training batches, with their augmentation."
    from sklearn.linear_model import RidgeCV

    set_seed(dl.settings.seed)  # of a user's transforms
    parts, n_images = [], 0
    dl.epoch, dl.first = dl.settings.epochs, 0
    for batch in dl:
        images, points = (t.as_subclass(torch.Tensor) for t in batch[:2])
        features = model[0](images).float()
        parts.append((features.cpu(), (model[1](features) - points).norm(dim=-1).cpu()))
        n_images += len(images)
        if n_images >= IMAGES:
            break
    features, errors = map(torch.cat, zip(*parts, strict=True))
    labelled = ~errors.isnan()
    of_landmark = labelled_mean(errors, labelled, 0)
    of_landmark = of_landmark.nan_to_num(float(of_landmark.nanmean())).clamp(min=1e-6)  # labelled in no image: the mean
    of_image = labelled_mean(errors / of_landmark, labelled, 1).clamp(min=1e-6)
    regression = RidgeCV(ALPHAS).fit(features.double().numpy(), of_image.log().double().numpy())
    spread = SpreadHead(features.shape[1], errors.shape[1])
    spread.image.weight.copy_(torch.as_tensor(regression.coef_)[None])
    spread.landmarks.copy_(of_landmark.log() + regression.intercept_)
    return spread.to(dl.device)


def predict_held_out(predictor: Predictor, items: Sequence[LabelledImage]) -> HeldOut:
    "Predict labelled images, with all passes and the flip test where `predict.py` has them."
    errors, spreads = [], []
    for item, result in predict_rows(predictor, items):
        (prediction,) = result.objects
        errors.append(np.linalg.norm(prediction.points - item.points, axis=-1))
        spreads.append(prediction.confidence)
    return HeldOut(np.stack(errors), np.stack(spreads))


def calibration(
    ratios: np.ndarray,  # (images, n_points): errors as multiples of the spread; NaN: missing
) -> np.ndarray:
    """Return the factor of each landmark's spread (n_points,) float32 with which 68% of the errors lie within it.

    A landmark without labels has the factor of all.
    """
    n, of_all = (~np.isnan(ratios)).sum(0), np.nanquantile(ratios, WITHIN)
    of_landmark = np.full(len(n), of_all)
    of_landmark[n > 0] = np.nanquantile(ratios[:, n > 0], WITHIN, axis=0)
    logs = np.log(np.maximum(1e-6, [np.full_like(of_landmark, of_all), of_landmark]))
    return np.exp((SHRINKAGE * logs[0] + n * logs[1]) / (SHRINKAGE + n)).astype(np.float32)


def cross_fitted(ratios: np.ndarray) -> np.ndarray:
    "Calibrate one half of the images with the factors of the other half, and the other way round."
    odd, calibrated = np.arange(len(ratios)) % 2 == 1, np.empty_like(ratios)
    for half in (odd, ~odd):
        calibrated[half] = ratios[half] / calibration(ratios[~half] if not half.all() else ratios)
    return calibrated


def report(run: Run, held_out: HeldOut, ratios: np.ndarray, best: Checkpoint) -> None:
    "Write confidence.csv, a line for each landmark, and print what it amounts to."
    errors, spreads = held_out
    table = {"mean_error": nan_mean(errors, 0), "median_spread": np.median(spreads, axis=0)}
    within = [np.where(np.isnan(ratios), np.nan, ratios <= n) for n in (1, 2)]
    table |= {f"within_{n}": nan_mean(values, 0) for n, values in enumerate(within, 1)}
    with atomic_write(run.folder / "confidence.csv") as f:
        pd.DataFrame(table, best.facts.point_names or None).to_csv(
            f, index_label="landmark", float_format="%.4g", lineterminator="\n"
        )
    rank = pd.Series(errors.ravel()).corr(pd.Series(spreads.ravel()), method="spearman")
    images = "images that were trained on" if best.settings.all_rows else "validation images"
    print(
        f"confidence: median spread {np.median(spreads):.3g} px; in {len(errors)} {images} {nan_mean(within[0]):.1%} of the "
        f"points lie within one spread, {nan_mean(within[1]):.1%} within two; rank correlation with the error {rank:.2f}; "
        f"by landmark in {run.folder / 'confidence.csv'}",
        flush=True,
    )
