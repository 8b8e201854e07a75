"Which rows are trained on, and which are held out for validation."

from dataclasses import dataclass

import numpy as np

from landmarks_fastai.data.items import LabelledImages
from landmarks_fastai.errors import UserError
from landmarks_fastai.settings import Settings


def split_rows(n: int, settings: Settings, left_out=()) -> tuple[np.ndarray, np.ndarray]:
    """Rows to train on and to validate on: the last `valid_pct` of the file, as the published entry's, or as many at random.

    With `all_rows` the same rows are validated on, and trained on as well. Rows that are left out are taken out of the
    split of all: one that becomes bad between two stages moves no other from one side to the other.
    """
    n_train = int(n * (1 - settings.valid_pct) + 1e-9)
    rows = np.arange(n)
    if settings.valid_random:
        rows = np.random.default_rng(settings.split_seed).permutation(n)
    train, valid = rows[:n_train], rows[n_train:]
    train = np.arange(n) if settings.all_rows else train
    return np.setdiff1d(train, left_out), np.setdiff1d(valid, left_out)


@dataclass(frozen=True)
class RowSplitter:
    "The `splitter` of a DataBlock. Raises `UserError` where a side has no rows, or training not one batch."

    settings: Settings

    def __call__(self, items: LabelledImages) -> tuple[list[int], list[int]]:
        train, valid = split_rows(len(items), self.settings, items.left_out)
        bad = f", {len(items.left_out)} of them bad," if len(items.left_out) else ""
        n = f"{items.labels.csv}: {len(items)} rows{bad}"
        if not len(train):
            raise UserError(f"{n} leave none to train on: lower --valid-pct or add rows")
        if not len(valid):
            raise UserError(f"{n} leave none to validate on: fix them or raise --valid-pct")
        if len(train) < self.settings.batch_size:  # a short last batch is dropped in training
            raise UserError(
                f"{items.labels.csv}: {len(train)} training rows make no batch of {self.settings.batch_size}: use -b {len(train)}"
            )
        return train.tolist(), valid.tolist()
