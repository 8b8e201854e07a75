"The error of every image and of every landmark, of one pass over labelled images."

import numpy as np
import pandas as pd
import torch

from landmarks_fastai.data.items import LabelledImage, LabelledImages
from landmarks_fastai.geometry import BOXED, box_map
from landmarks_fastai.inference.predictor import PictureResult
from landmarks_fastai.metrics import image_score, nme
from landmarks_fastai.settings import DataFacts
from landmarks_fastai.utils.distributed import all_reduce

COLUMNS = ["score", "nme", "points", "spread"]


class RowErrors:
    """Errors that `score_rows` collects by `add`, in pixels of the images as stored.

    Five numbers an image are kept, not its points: those of the competition's validation images would take 600 MB.
    """

    def __init__(self, items: LabelledImages, facts: DataFacts):
        self.items, self.facts = items, facts
        self.places = {row: place for place, row in enumerate(items.rows.tolist())}
        self.values = np.zeros((len(items), 1 + len(COLUMNS)))  # 1 where the image was predicted, then `COLUMNS`
        self.landmarks = np.zeros((2, facts.n_points))  # sum of the distances, number of labelled points

    def add(self, item: LabelledImage, result: PictureResult) -> None:
        "Add an image and its prediction."
        truth, (prediction,) = item.points, result.objects
        distance = np.linalg.norm(prediction.points - truth, axis=1)
        labelled = ~np.isnan(truth[:, 0])
        score = image_score(prediction.points, truth)
        box_nme = nme(prediction.points[None], truth[None], shape=self.facts.shape).item()
        spread = np.nan if prediction.confidence is None else prediction.confidence.mean()
        self.values[self.places[item.row]] = 1, score, box_nme, labelled.sum(), spread
        self.landmarks += np.where(labelled, distance, 0), labelled

    def gather(self) -> None:
        "Add what other processes have collected."
        self.values, self.landmarks = (
            all_reduce(torch.from_numpy(array)).numpy() for array in (self.values, self.landmarks)
        )

    @property
    def table(self) -> pd.DataFrame:
        "A line an image that was predicted: score, NME, number of labelled points, mean spread (NaN: no confidence)."
        rows = np.flatnonzero(self.values[:, 0] > 0)
        return pd.DataFrame(self.values[rows, 1:], rows, COLUMNS)

    @property
    def landmark_errors(self) -> np.ndarray:
        "Mean distance of each landmark, (n_points,); NaN: labelled in no image."
        with np.errstate(invalid="ignore"):
            return self.landmarks[0] / self.landmarks[1]

    def chosen(self, worst: int, middle: int, best: int) -> list[list[int]]:
        "Return the places in `items` of the images with the highest score, those around the median, and the lowest."
        order = self.table.score.sort_values(ascending=False, kind="stable").index.tolist()
        bad, rest = order[:worst], order[worst:]
        good, rest = rest[max(0, len(rest) - best) :][::-1], rest[: max(0, len(rest) - best)]
        start = min(max(0, len(order) // 2 - worst - middle // 2), max(0, len(rest) - middle))
        return [bad, rest[start : start + middle], good]


def circumstances(item: LabelledImage, facts: DataFacts, size: int, fit: str) -> dict[str, float]:
    """Return what may make an image difficult; NaN where it is not known.

    - size: square root of the area of the object's box, pixels of the image as stored
    - tilt: angle of the labelled points against the mean shape, degrees, clockwise
    - brightness: mean of the grey values of the object's box, 0 to 255, at the network's resolution
    - sharpness: mean gradient there, in percent of the standard deviation of the grey values
    """
    left, top, right, bottom = item.box
    tilt, labelled = np.nan, ~np.isnan(item.points[:, 0])
    if facts.shape and labelled.sum() > 1:
        points, shape = (xy[labelled] @ [1, 1j] for xy in (item.points, np.array(facts.shape).reshape(-1, 2)))
        tilt = float(np.angle(((points - points.mean()) * (shape - shape.mean()).conj()).sum(), deg=True))
    ((pixels, _),) = item.picture.inputs([box_map(item.box, BOXED, size)], fit, size)
    edge = size // 10  # the box without the margin around it
    grey = pixels[edge : size - edge, edge : size - edge].mean(2)
    gradient = np.hypot(*np.gradient(grey)).mean()
    sharpness = float(100 * gradient / max(1.0, grey.std()))
    return {
        "size": ((right - left) * (bottom - top)) ** 0.5,
        "tilt": tilt,
        "brightness": float(grey.mean()),
        "sharpness": sharpness,
    }
