"""A checkpoint is one file: the network's state dict, in which `_extra_state` says what the tensors mean.

`learn.load` reads it, and `learn.save` writes one. Predicting and the next stage need this file, the images, and
nothing else. Checkpoints of earlier versions, tensors with a .json beside them, are still read.
"""

import io
import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from landmarks_fastai.errors import UserError
from landmarks_fastai.models.networks import METADATA, build_model
from landmarks_fastai.models.weights import read_state_dict
from landmarks_fastai.runs.run import Run, find_checkpoint_file, run_name
from landmarks_fastai.settings import Settings
from landmarks_fastai.utils.files import atomic_write, reason

FORMAT = 4  # of the metadata; 3 stood in a .json beside the .pth; 1 and 2 lacked settings and are refused


@dataclass(frozen=True)
class Checkpoint:
    "What a .pth says of itself."

    path: Path
    settings: Settings
    score: float | None  # on the validation rows, as the stage reported it; None where `learn.save` wrote the file
    nme: float | None  # by the diagonal of the box of the true points
    epoch: int | None  # that it was reached in; -1 is the loaded model, before the stage's first

    @property
    def name(self) -> str:
        "The run's name."
        return run_name(self.path)

    def model(self):
        "The network with its weights, in evaluation mode."
        s = self.settings
        model = build_model(s.arch, s.head, s.n_points, s.size, s.targets)
        model.load_state_dict(self.tensors(model))
        model.metadata = checkpoint_metadata(s, self.score, self.nme, self.epoch)
        return model.eval()

    def tensors(self, model) -> dict[str, torch.Tensor]:
        "The file's tensors. Raises `UserError` where they are not this model's: another network, head or point count."
        tensors = {k: t for k, t in read_checkpoint_file(self.path).items() if k != METADATA}
        own = {k: t for k, t in model.state_dict().items() if k != METADATA}
        wrong = sorted(own.keys() ^ tensors.keys()) or [k for k in own if own[k].shape != tensors[k].shape]
        if wrong:
            raise UserError(
                f"{self.path} is not the network that its settings name ({self.settings.arch}, head {self.settings.head}, "
                f"{self.settings.n_points} points): {len(wrong)} tensors differ, the first {wrong[0]}"
            )
        if ruined := [k for k, t in tensors.items() if not torch.isfinite(t).all()]:
            raise UserError(f"{self.path} holds NaN or infinite weights ({ruined[0]}): take an earlier checkpoint")
        return tensors


def checkpoint_metadata(
    settings: Settings,
    score: float | None = None,
    nme: float | None = None,
    epoch: int | None = None,
) -> dict:
    "What a checkpoint says of itself, of JSON kinds: assign it to a network's `metadata`, and `learn.save` writes it."
    return {"format": FORMAT, "settings": settings.to_dict(), "score": score, "nme_box_diag": nme, "epoch": epoch}


def write_checkpoint(run: Run, model, settings: Settings, score: float, nme: float, epoch: int):
    "Write best.pth: to a temporary file that is synced and renamed. Raises `UserError` where the disk is full."
    state = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items() if k != METADATA}
    state[METADATA] = checkpoint_metadata(settings, score, nme, epoch)
    with atomic_write(run.file("best.pth"), "wb") as f:
        torch.save(state, zipped := io.BytesIO())  # into a file, torch would hide that the disk is full
        f.write(zipped.getbuffer())
    run.publish()


def read_checkpoint_file(path) -> dict:
    "The state dict of a .pth, alone or as `learn.save` writes it. Raises `UserError` for a file with anything else."
    return read_state_dict(path, wrapper="model", mmap=True)


def read_checkpoint(path) -> Checkpoint:
    "Read what a .pth says of itself. Raises `UserError` where it says nothing, or not what it must."
    path = Path(path)
    metadata, source = read_checkpoint_file(path).get(METADATA), path
    if metadata in (None, {}) and path.with_suffix(".json").is_file():
        source = path.with_suffix(".json")
        metadata = _read_json(source)
    if not isinstance(metadata, dict) or "settings" not in metadata:
        raise UserError(
            f"{path} is no checkpoint of this program (it has no settings): its weights alone are for --weights"
        )
    if metadata.get("format") != (FORMAT if source == path else 3):
        raise UserError(
            f"{source} was written by another version of this program (format {metadata.get('format')}): train again"
        )
    nme = metadata.get("nme_box_diag", metadata.get("nme"))  # its name in earlier versions
    numbers = [metadata.get("score"), nme, metadata.get("epoch")]
    if not all(n is None or (isinstance(n, (int, float)) and abs(n) < 1e18) for n in numbers):  # False for NaN too
        raise UserError(f"{source}: score, nme_box_diag and epoch must be finite numbers")
    try:
        return Checkpoint(path, Settings.from_dict(metadata["settings"]), *numbers)
    except UserError as e:
        raise UserError(f"{source}: {e}") from None


def _read_json(path: Path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise UserError(f"{path} cannot be read: {reason(e)}") from None


def find_checkpoint(
    name: str,  # as -pm gave it: a path, or the name of a run in the output folder
    out: str | os.PathLike,  # the output folder
) -> Checkpoint:
    "The checkpoint that is meant. Raises `UserError` with the names that do exist."
    return read_checkpoint(find_checkpoint_file(name, out))
