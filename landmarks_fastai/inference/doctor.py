"The doctor: labels that do not fit, in one ranking with a reason for each row; the files that it leaves."

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from landmarks_fastai.data.align import NoShape
from landmarks_fastai.data.describe import names_of_points
from landmarks_fastai.data.file_check import ImageFacts, check_places
from landmarks_fastai.data.items import LabelledImages, row_keys
from landmarks_fastai.data.shape_check import SCORES, calibrated, check_shapes
from landmarks_fastai.errors import UserError
from landmarks_fastai.inference import picture_check
from landmarks_fastai.inference.report import draw_item, write_page
from landmarks_fastai.runs.checkpoint import Checkpoint
from landmarks_fastai.utils.files import atomic_write, write_text
from landmarks_fastai.utils.hardware import Machine

LIMIT = 6.0  # of a row in exclude.txt
COLUMNS = ["rank", "value", "file_name", "object", "where", "reason", "landmarks"]
LISTED, LEAST, SHOWN = 0.02, 50, 48  # rows of doctor.csv: their share, at least; of them on the page


class Diagnosis:
    """How far each row of `images` is from what is usual.

    The values of each list are logarithms in standard deviations, so that they can be compared: a row's is its largest.
    """

    def __init__(
        self,
        images: LabelledImages,
        checkpoints: Sequence[Checkpoint],
        machine: Machine,
        facts: ImageFacts | None = None,
    ):
        """Judge the rows by their points, by their place in the image if its `facts` are there, and by the networks.

        Raises `UserError` where the labels have no shape, and for a checkpoint that does not fit them.
        """
        self.images, self.checkpoints, self.machine = images, checkpoints, machine
        try:
            self.model, shapes = check_shapes(images.labels, images.rows)
        except NoShape as e:
            raise UserError(f"{images.labels.csv}: {e}") from None
        place = calibrated(check_places(images, facts)[:, None]) if facts else np.full((len(images), 1), np.nan)
        networks = picture_check.check_pictures(images, checkpoints, machine)
        self.values = np.concatenate([shapes, place, networks], 1)  # `SCORES`, place, `picture_check.SCORES`
        self.value = np.fmax.reduce(self.values, 1)
        self.order = np.argsort(-np.nan_to_num(self.value, nan=-np.inf), kind="stable")

    def table(self, count: int) -> tuple[pd.DataFrame, list[dict[str, Any]]]:
        "Return the first rows of the ranking, a line each with the reason, and pictures of the first `SHOWN`."
        images, places = self.images, self.order[:count].tolist()
        predicted = picture_check.predictions(images[places], self.checkpoints, self.machine)
        labels, keys, names = images.labels, row_keys(images.labels), names_of_points(images.labels)
        lines, pictures = [], []
        for rank, place in enumerate(places, 1):
            item, value = images[place], self.value[place]
            reason, landmarks, expected = self._explain(place, item.points, names, predicted.get(item.row))
            name, _, number = keys[item.row].partition("\t")
            named = " ".join(names[k] for k in landmarks)
            lines.append((rank, value, name, number, labels.where(item.row), reason, named))
            if rank <= SHOWN:
                with suppress(UserError):  # the image has vanished, or cannot be decoded
                    picture = draw_item(item, expected, landmarks)
                    pictures.append(picture | {"reason": reason, "value": value, "rank": rank})
        return pd.DataFrame(lines, columns=COLUMNS), pictures

    def _explain(
        self, place: int, points: np.ndarray, names: Sequence[str], predicted: np.ndarray | None
    ) -> tuple[str, list[int], np.ndarray]:
        "Return the reason of a row, the landmarks that it is about, and where all should be, (n, 2) pixels."
        values, of_shape, unknown = self.values[place], len(SCORES), np.full_like(points, np.nan)
        if np.isnan(values[:of_shape]).all():
            return "too few points to judge", [], unknown
        worst = int(np.nanargmax(values))
        if worst > of_shape and predicted is not None:
            return picture_check.explain(points, predicted, values[of_shape + 1 :]), [], predicted
        if worst == of_shape:
            reason = "unusual place in the image, or unusual size"
            return reason, [], unknown if predicted is None else predicted
        reason, landmarks, expected = self.model.explain(points, names)
        return reason, landmarks, expected if predicted is None or landmarks else predicted


def write_diagnosis(diagnosis: Diagnosis, folder: Path, source: str, lines: Sequence[str]) -> pd.DataFrame:
    "Write doctor.csv, exclude.txt and doctor.html; returns the table of the first. `lines` are those of the files."
    images, n = diagnosis.images, len(diagnosis.images)
    folder.mkdir(parents=True, exist_ok=True)
    table, pictures = diagnosis.table(min(n, max(LEAST, round(LISTED * n))))
    with atomic_write(folder / "doctor.csv") as f:
        table.to_csv(f, index=False, float_format="%.3g", lineterminator="\n")
    keys, over = row_keys(images.labels), [k for k in diagnosis.order.tolist() if diagnosis.value[k] > LIMIT]
    write_text(folder / "exclude.txt", "".join(f"{keys[int(images.rows[k])]}\n" for k in over))
    by_network = int((~np.isnan(diagnosis.values[:, len(SCORES) + 1 :])).any(1).sum())
    write_page(
        folder / "doctor.html", "doctor.html", name=f"Labels of {source}", kind="doctor", lines=lines, pictures=pictures, rows=n,
        excluded=len(over), limit=LIMIT, by_network=by_network, exclude=str(folder / "exclude.txt"),
    )  # fmt: skip
    return table
