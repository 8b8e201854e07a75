"""Checkpoints: one .pth with the network's state dict, whose `_extra_state` holds settings, facts and scores.

`learn.load` reads it, `learn.save` writes one.
"""

import io
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from landmarks_fastai.data.labels import Sides
from landmarks_fastai.errors import UserError
from landmarks_fastai.models.networks import METADATA, SPREAD, LandmarkNetwork, build_model
from landmarks_fastai.models.weights import read_state_dict
from landmarks_fastai.runs.run import Run, find_checkpoint_file, run_name
from landmarks_fastai.settings import DataFacts, Settings
from landmarks_fastai.utils.files import atomic_write

FORMAT = 8  # of the metadata


@dataclass(frozen=True)
class Checkpoint:
    "A checkpoint file and its metadata."

    path: Path
    settings: Settings
    facts: DataFacts
    score: float | None  # on the validation rows; None if `learn.save` wrote the file
    nme: float | None  # normalised by the diagonal of the box of the true points; None if no image has one, too
    epoch: int | None  # of the stage; -1: the loaded model, which no epoch beat
    sides: Sides | None = None  # of the rows that it was trained and validated on

    @property
    def name(self) -> str:
        "The run's name."
        return run_name(self.path)

    def model(self) -> LandmarkNetwork:
        "The network with its weights, in evaluation mode."
        s = self.settings
        model = build_model(s.arch, s.head, self.facts.n_points, s.size, s.confidence)
        model.load_state_dict(self.tensors(model))
        model.metadata = checkpoint_metadata(s, self.facts, self.score, self.nme, self.epoch)
        return model.eval()

    def tensors(self, model: nn.Module) -> dict[str, torch.Tensor]:
        "The tensors of the file. Raises `UserError` if they do not fit the model, or are NaN or infinite."
        expected = {k: t for k, t in model.state_dict().items() if k != METADATA}
        # the network of a Learner has no spread, whatever the file has
        extras = tuple(name for name in (METADATA, SPREAD) if not any(k.startswith(name) for k in expected))
        tensors = {k: t for k, t in read_state_dict(self.path).items() if not k.startswith(extras)}
        wrong = sorted(expected.keys() ^ tensors.keys()) or [
            k for k in tensors if expected[k].shape != tensors[k].shape
        ]
        if wrong:
            raise UserError(
                f"{self.path} is not the network that its settings name ({self.settings.arch}, head {self.settings.head}, "
                f"{self.facts.n_points} points): {len(wrong)} tensors differ, the first {wrong[0]}"
            )
        if bad := [k for k, t in tensors.items() if not torch.isfinite(t).all()]:
            raise UserError(f"{self.path} holds NaN or infinite weights ({bad[0]}): take an earlier checkpoint")
        return tensors


def checkpoint_metadata(
    settings: Settings,
    facts: DataFacts,
    score: float | None = None,
    nme: float | None = None,
    epoch: int | None = None,
) -> dict:
    "The metadata of a checkpoint, of JSON types. `learn.save` writes what is in the network's `metadata`."
    stored = {"format": FORMAT, "settings": settings.to_dict(), "facts": facts.to_dict()}
    nme = None if nme is None or math.isnan(nme) else nme  # no image has one
    return stored | {"score": score, "nme_box_diag": nme, "epoch": epoch}


def write_checkpoint(
    run: Run,
    model: nn.Module,
    settings: Settings,
    facts: DataFacts,
    score: float | None,
    nme: float | None,
    epoch: int | None,
    sides: Sides | None = None,
) -> None:
    "Write best.pth, through a temporary file. Raises `UserError` if the disk is full."
    metadata = checkpoint_metadata(settings, facts, score, nme, epoch)
    if sides:
        metadata["sides"] = [side.tolist() for side in sides]
    run.write("best.pth", lambda path: _write(path, model, metadata))


def _write(path: Path, model: nn.Module, metadata: dict) -> None:
    state = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items() if k != METADATA}
    state[METADATA] = metadata
    with atomic_write(path, "wb") as f:
        torch.save(state, zipped := io.BytesIO())  # in memory: writing to a file, torch hides a full disk
        f.write(zipped.getbuffer())


def read_checkpoint(path: str | os.PathLike) -> Checkpoint:
    "Read the metadata of a .pth. Raises `UserError` if it has none, or wrong ones."
    path = Path(path)
    metadata = read_state_dict(path).get(METADATA)
    if not isinstance(metadata, dict) or "settings" not in metadata:
        raise UserError(
            f"{path} is not a checkpoint of this program (it has no settings): use it with train.py --weights"
        )
    if metadata.get("format") != FORMAT:
        version = f"another version of this program (format {metadata.get('format')})"
        raise UserError(f"{path} was written by {version}: train again")
    score, nme, epoch = numbers = [metadata.get(name) for name in ("score", "nme_box_diag", "epoch")]
    if not all(n is None or (isinstance(n, (int, float)) and abs(n) < 1e18) for n in numbers):  # False for NaN too
        raise UserError(f"{path}: score, nme_box_diag and epoch must be finite numbers")
    try:
        settings, facts = Settings.from_dict(metadata["settings"]), DataFacts.from_dict(metadata.get("facts"))
    except UserError as e:
        raise UserError(f"{path}: {e}") from None
    return Checkpoint(path, settings, facts, score, nme, epoch, _sides(path, metadata.get("sides")))


def _sides(path: Path, stored: Any) -> Sides | None:
    if stored is None:
        return None
    try:
        trained, validated = (np.array(side, np.int64) for side in stored)
        assert trained.ndim == validated.ndim == 1
    except (ValueError, TypeError, OverflowError, AssertionError):
        raise UserError(f"{path}: the digests of its rows are damaged: train again") from None
    return Sides(trained, validated)


def find_checkpoint(name: str, out: str | os.PathLike) -> Checkpoint:
    "The checkpoint that `-pm` means: a path, or the name of a run in the output folder. Raises `UserError`."
    return read_checkpoint(find_checkpoint_file(name, out))
