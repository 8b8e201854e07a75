"""What a checkpoint is: tensors in `NAME_best.pth`, all that they mean in `NAME_best.json`.

The `.pth` is the plain state dict that `learn.load` reads. Predicting and the next stage need these two files,
the images, and nothing else. torch is imported where it is needed: a later stage claims its name before.
"""

import io
import json
import os
from dataclasses import dataclass
from pathlib import Path

from landmarks_fastai.errors import UserError
from landmarks_fastai.files import reason, whole_file
from landmarks_fastai.runs import Run
from landmarks_fastai.settings import Settings

FORMAT = 3  # of the .json; 1 had no augmentation, mirror map, loss or average, 2 kept black borders


def checkpoint_metadata(settings):
    return {}


@dataclass(frozen=True)
class Checkpoint:
    "What `NAME_best.json` says of `NAME_best.pth`."

    path: Path  # of the .pth
    settings: Settings
    score: float  # the contest's, on the validation rows, as the stage reported it
    nme: float
    epoch: int  # that it was reached in; -1 is the loaded model, before the stage's first

    @property
    def name(self) -> str:
        "The run's name."
        return self.path.name.removesuffix(".pth").removesuffix("_best")

    def model(self):
        "The network with its weights, in evaluation mode."
        from landmarks_fastai.models import build_model

        s = self.settings
        model = build_model(s.arch, s.head, s.n_points, s.size, s.targets)
        model.load_state_dict(self.tensors(model))
        return model.eval()

    def tensors(self, model) -> dict:
        "The file's tensors. Raises `UserError` where they are not this model's: another network, head or point count."
        import torch

        from landmarks_fastai.models import read_tensors

        tensors, own = read_tensors(self.path, wrapped=False), model.state_dict()
        wrong = sorted(own.keys() ^ tensors.keys()) or [k for k in own if own[k].shape != tensors[k].shape]
        if wrong:
            raise UserError(
                f"{self.path} is not the network that its .json tells of ({self.settings.arch}, head {self.settings.head}, "
                f"{self.settings.n_points} points): {len(wrong)} tensors differ, the first {wrong[0]}"
            )
        if ruined := [k for k, t in tensors.items() if not torch.isfinite(t).all()]:
            raise UserError(f"{self.path} holds NaN or infinite weights ({ruined[0]}): take an earlier checkpoint")
        return tensors


def write_checkpoint(run: Run, model, settings: Settings, score: float, nme: float, epoch: int):
    "Write both files whole: each to a temporary one that is synced and renamed."
    import torch

    facts = {"format": FORMAT, "settings": settings.to_dict(), "score": score, "nme": nme, "epoch": epoch}
    tensors = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    # both are written before either takes its name: what can fail has failed by then
    with whole_file(run.file("best.json")) as j, whole_file(run.file("best.pth"), "wb") as p:
        json.dump(facts, j, indent=1)
        torch.save(tensors, zipped := io.BytesIO())  # into a file, torch would hide that the disk is full
        p.write(zipped.getbuffer())
        for f in (j, p):
            f.flush()
            os.fsync(f.fileno())


def read_checkpoint(path) -> Checkpoint:
    "Read the .json beside a .pth. Raises `UserError` where either is missing or does not hold what it must."
    path = Path(path)
    beside = path.with_suffix(".json")
    try:
        facts = json.loads(beside.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{beside} not found: a checkpoint is a .pth and the .json that its stage wrote beside it"
        ) from None
    except (OSError, ValueError, RecursionError) as e:
        raise UserError(f"{beside} cannot be read: {reason(e)}") from None
    if isinstance(facts, dict) and facts.get("format") in range(1, FORMAT):
        raise UserError(
            f"{beside} was written by an earlier version of this program (format {facts['format']}): train anew"
        )
    if not isinstance(facts, dict) or facts.get("format") != FORMAT:
        raise UserError(f"{beside} is no checkpoint's .json of this program (format {FORMAT})")
    numbers = [facts.get(k) for k in ("score", "nme", "epoch")]
    if not all(isinstance(n, (int, float)) and abs(n) < 1e18 for n in numbers):  # False for NaN too
        raise UserError(f"{beside}: score, nme and epoch must be finite numbers")
    try:
        return Checkpoint(path, Settings.from_dict(facts.get("settings")), *numbers)
    except UserError as e:
        raise UserError(f"{beside}: {e}") from None


def find_checkpoint(
    name: str,  # as -pm gave it: a path, or a name in the output folder
    out,  # the output folder
) -> Checkpoint:
    "The checkpoint that is meant. Raises `UserError` with the names that do exist."
    name = name.removesuffix(".json")
    for place in (name, os.path.join(out, name)):
        for path in (place, place + ".pth", place + "_best.pth"):
            if path.endswith(".pth") and os.path.isfile(path):
                return read_checkpoint(path)
    there = sorted(Path(out).glob("*_best.pth"), key=os.path.getmtime, reverse=True)
    names = ", ".join(p.name for p in there[:20]) or "none"
    more = f" and {len(there) - 20} older ones" if len(there) > 20 else ""
    raise UserError(f"-pm {name} not found, neither as a path nor in {out}; there are: {names}{more}")
