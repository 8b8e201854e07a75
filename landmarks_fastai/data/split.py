"""Split the rows into training and validation.

All rows of one image are on one side, and so are those of one group: a person, a folder, a clip.
"""

import hashlib
import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from landmarks_fastai.data.items import LabelledImages
from landmarks_fastai.data.labels import Labels, Sides
from landmarks_fastai.data.sources import is_labels
from landmarks_fastai.errors import UserError
from landmarks_fastai.settings import Settings
from landmarks_fastai.utils.files import read_names

FEWEST = 8  # rows to validate on, where the share is the default and there are twice as many
CLIP = 3  # rows of a group on average, where the groups are guessed
FEW_GROUPS = 5  # fewer groups that are guessed do not decide the split: it would be far from the share
FRAME = re.compile(r"(.+?)[-_. ]+(?:frame|img|image)?[-_. ]*\d+", re.IGNORECASE)  # a name without suffix: its clip


def split_rows(
    n: int,
    settings: Settings,
    groups: np.ndarray | None = None,  # (n,) number of each row's group; None: each row is a group
) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows to train on and to validate on: the last `valid_pct` of the file, or as many at random.

    With the default share at least `FEWEST` rows validate, where there are twice as many. A group is not divided: the
    number of validation rows is the nearest that whole groups make.
    """
    n_train = int(n * (1 - settings.valid_pct) + 1e-9)
    if settings.valid_pct == Settings.valid_pct and n >= 2 * FEWEST:
        n_train = min(n_train, n - FEWEST)
    rng, held = np.random.default_rng(settings.split_seed), np.zeros(n, bool)
    if groups is None:
        held[(rng.permutation(n) if settings.valid_random else np.arange(n))[n_train:]] = True
    else:
        last, sizes = np.zeros(groups.max() + 1, int), np.bincount(groups)
        np.maximum.at(last, groups, np.arange(n))
        order = rng.permutation(len(sizes)) if settings.valid_random else np.argsort(last)
        after = np.cumsum(sizes[order[::-1]])  # rows of the last group, of the last two, …
        taken = 1 + int(abs(after[:-1] - (n - n_train)).argmin()) if len(after) > 1 else 1
        held = np.isin(groups, order[::-1][:taken])
    return np.flatnonzero(~held), np.flatnonzero(held)


def split_items(items: LabelledImages, settings: Settings) -> tuple[list[int], list[int]]:
    "The `splitter` of a DataBlock. Raises `UserError` if a part has no rows, or training less than one batch."
    train, valid = divided_rows(items, settings)
    bad = f", {len(items.left_out)} of them left out," if len(items.left_out) else ""
    csv, size = items.labels.csv, settings.batch_size
    n = f"{csv}: {len(items)} rows{bad}"
    if not len(train):
        way = f"--valid {settings.valid} must not name all" if settings.valid else "lower --valid-pct or add rows"
        raise UserError(f"{n} leave none to train on: {way}")
    if not len(valid):
        raise UserError(f"{n} leave none to validate on: fix them or raise --valid-pct")
    if len(train) * settings.repeats < size:  # a short last batch is dropped in training
        raise UserError(f"{csv}: {len(train)} training rows make no batch of {size}: use -b {len(train)}")
    return train.tolist(), valid.tolist()


def divided_rows(items: LabelledImages, settings: Settings) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows to train on and to validate on: those of --valid, or the source's own, or `split_rows`.

    Rows of an earlier stage, `labels.earlier`, keep their side. With `all_rows` training includes the validation rows. Rows
    that are left out are divided too: one that becomes bad between two stages moves no other from one part to the other.
    How rows are grouped, and how many are new, is printed once. Raises `UserError` for a file of --valid that does not fit,
    and rows that it moves to the other side.
    """
    labels, key = items.labels, repr((settings.of("split"), settings.valid, settings.split_seed))
    if key not in labels.held:
        labels.held[key] = _held_rows(labels, settings, items.left_out)
    held, rows = labels.held[key], np.arange(len(labels))
    train = rows if settings.all_rows else rows[~held]
    return np.setdiff1d(train, items.left_out), np.setdiff1d(rows[held], items.left_out)


def _held_rows(labels: Labels, settings: Settings, left_out: np.ndarray) -> np.ndarray:
    "Return which rows validate, bool (rows,)."
    names, named = labels.all_names(), None
    if settings.valid and not is_labels(Path(settings.valid)):
        named = _named_rows(settings.valid, names)
    elif labels.valid is not None and (settings.valid or (labels.valid.any() and not labels.valid.all())):
        named = labels.valid
        who = f"--valid {settings.valid}" if settings.valid else "the source"
        print(f"{who} names {named.sum()} validation rows", flush=True)
    if labels.earlier is not None:
        return _held_rows_of_later_stage(labels, names, settings, named, left_out)
    if named is not None:
        return named
    held = np.zeros(len(names), bool)
    held[split_rows(len(names), settings, group_rows(labels, names, settings))[1]] = True
    return held


def _held_rows_of_later_stage(
    labels: Labels,
    names: Sequence[str],
    settings: Settings,
    named: np.ndarray | None,  # which rows the user or the source says; None: neither does
    left_out: np.ndarray,  # rows that are not counted in the line
) -> np.ndarray:
    "As `_held_rows`: rows of the earlier stage keep their side, new ones are on that of their group, or are divided."
    assert labels.earlier is not None
    of_rows = digests(names)
    trained, validated = (np.isin(of_rows, side) for side in labels.earlier)
    if settings.valid and named is not None and (moved := named & trained).any():
        row = int(moved.argmax())
        raise UserError(
            f"--valid {settings.valid}: {moved.sum()} rows were trained on by an earlier stage, as {labels.place(row)} "
            f"({names[row]}): remove them from the file, or train a first stage"
        )
    held, new = validated.copy(), np.flatnonzero(~trained & ~validated)
    if not len(new):
        return held
    if named is not None:
        held[new] = named[new]
    else:
        groups = group_rows(labels, names, settings)
        within = None if groups is None else np.unique(groups[new], return_inverse=True)[1]
        held[new[split_rows(len(new), settings, within)[1]]] = True
        if groups is not None:
            held[new] &= ~np.isin(groups[new], groups[trained])
            held[new] |= np.isin(groups[new], groups[validated])
    if len(new := np.setdiff1d(new, left_out)):
        print(f"{len(new)} of {len(names)} rows are new: {held[new].sum()} of them validate", flush=True)
    return held


def _named_rows(path: str, names: Sequence[str]) -> np.ndarray:
    "Return which rows a file names, a file name a line."
    named = {line.strip() for line in read_names("--valid", path).splitlines() if line.strip()}
    if unknown := sorted(named - set(names)):
        raise UserError(f"--valid {path}: {len(unknown)} names are not among the rows, as {unknown[0]}")
    return np.array([name in named for name in names], bool)


def group_rows(labels: Labels, names: Sequence[str], settings: Settings) -> np.ndarray | None:
    """Return the number of each row's group, (rows,); None if each row is its own.

    With --group auto the groups are the source's; else the folders or the clips, where they are at least `FEW_GROUPS`.
    """
    image = np.unique(names, return_inverse=True)[1]
    images = image if image.max(initial=-1) + 1 < len(names) else None
    grouping = _keys(labels, names, settings.group)
    if grouping is None:
        return images
    kind, keys = grouping
    group = np.unique(keys, return_inverse=True)[1]
    n = group.max() + 1
    if settings.group == "auto" and labels.groups is None and n < FEW_GROUPS:
        print(f"note: the split may divide {n} {kind}s, as {keys[0]}: with --group {kind} it does not", flush=True)
        return images
    print(f"{n} {kind}s, as {keys[0] or '.'}: the split divides none (--group none: it may)", flush=True)
    # several objects of an image may be of several groups: then these are one
    pairs = coo_matrix((np.ones(len(names)), (image, image.max() + 1 + group)), shape=(image.max() + 1 + n,) * 2)
    return np.unique(connected_components(pairs, directed=False)[1][image], return_inverse=True)[1]


def _keys(labels: Labels, names: Sequence[str], group: str) -> tuple[str, Sequence[str]] | None:
    "Return what the groups are, and that of each row; None without groups. Raises `UserError` for an unknown column."
    if group == "none" or not names:
        return None
    if labels.groups is not None and group not in GUESSED:
        return "group", labels.groups
    if group not in ("auto", *GUESSED):
        raise UserError(f"--group {group}: {labels.csv} has no such column: use auto, folder, clip or none")
    for kind in GUESSED if group == "auto" else [group]:
        keys = [GUESSED[kind](name) for name in names]
        if group != "auto" or 1 < len(set(keys)) <= len(names) / CLIP:
            return kind, keys
    return None


def _clip(name: str) -> str:
    frame = FRAME.fullmatch(os.path.splitext(name)[0])
    return frame[1] if frame else name


GUESSED = {"folder": os.path.dirname, "clip": _clip}


def digests(names: Sequence[str]) -> np.ndarray:
    "Return a digest of each file name, int64."
    data = b"".join(hashlib.blake2b(name.encode("utf-8", "replace"), digest_size=8).digest() for name in names)
    return np.frombuffer(data, "<i8")


def sides_of(items: LabelledImages, settings: Settings) -> Sides:
    "Return the sides of the rows, for a checkpoint."
    of_rows = digests(items.labels.all_names())
    train, valid = divided_rows(items, settings.replace(all_rows=False))
    earlier = items.labels.earlier or Sides(of_rows[:0], of_rows[:0])  # rows that are no longer there count too
    return Sides(*(np.union1d(of_rows[rows], side) for rows, side in zip((train, valid), earlier, strict=True)))
