"Split the rows into training and validation."

from collections.abc import Sequence

import numpy as np

from landmarks_fastai.data.items import LabelledImages
from landmarks_fastai.errors import UserError
from landmarks_fastai.settings import Settings

FEWEST = 8  # rows to validate on, where the share is the default and there are twice as many


def split_rows(n: int, settings: Settings, left_out: Sequence[int] | np.ndarray = ()) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows to train on and to validate on: the last `valid_pct` of the file, or as many at random.

    With the default share at least `FEWEST` rows validate, where there are twice as many.

    With `all_rows` training includes the validation rows. `left_out` is removed after the split: a row that becomes bad
    between two stages moves no other row from one part to the other.
    """
    n_train = int(n * (1 - settings.valid_pct) + 1e-9)
    if settings.valid_pct == Settings.valid_pct and n >= 2 * FEWEST:
        n_train = min(n_train, n - FEWEST)
    rows = np.random.default_rng(settings.split_seed).permutation(n) if settings.valid_random else np.arange(n)
    train = rows if settings.all_rows else rows[:n_train]
    return np.setdiff1d(train, left_out), np.setdiff1d(rows[n_train:], left_out)


def split_items(items: LabelledImages, settings: Settings) -> tuple[list[int], list[int]]:
    "The `splitter` of a DataBlock. Raises `UserError` if a part has no rows, or training less than one batch."
    train, valid = split_rows(len(items), settings, items.left_out)
    bad = f", {len(items.left_out)} of them bad," if len(items.left_out) else ""
    csv, size = items.labels.csv, settings.batch_size
    n = f"{csv}: {len(items)} rows{bad}"
    if not len(train):
        raise UserError(f"{n} leave none to train on: lower --valid-pct or add rows")
    if not len(valid):
        raise UserError(f"{n} leave none to validate on: fix them or raise --valid-pct")
    if len(train) * settings.repeats < size:  # a short last batch is dropped in training
        raise UserError(f"{csv}: {len(train)} training rows make no batch of {size}: use -b {len(train)}")
    return train.tolist(), valid.tolist()
