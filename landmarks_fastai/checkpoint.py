"""A run's files, and what a checkpoint is: tensors in `NAME_best.pth`, all that they mean in `NAME_best.json`.

The `.pth` is the plain state dict that `learn.load` reads. Predicting and the next stage need these two files,
the images, and nothing else.
"""

import difflib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from landmarks_fastai.errors import UserError
from landmarks_fastai.files import whole_file
from landmarks_fastai.models import build_model, read_tensors
from landmarks_fastai.settings import Settings

FORMAT = 1  # of the .json


class Run:
    "The files of one stage: `out`/NAME_something."

    FILES = ("best.pth", "best.json", "history.csv", "results.png")

    def __init__(self, out, name: str):
        self.out, self.name = Path(out), name

    def file(self, suffix: str) -> Path:
        return self.out / f"{self.name}_{suffix}"

    @property
    def taken(self) -> bool:
        return any(self.file(s).exists() for s in self.FILES)

    def discard(self):
        "Remove what a stage writes: of a run that is overwritten, or that ended before its first epoch."
        for suffix in self.FILES:
            self.file(suffix).unlink(missing_ok=True)


def claim_run(
    out,  # output folder, made where it is absent
    name: str | None,  # as the user gave it
    wanted: str,  # taken where `name` is None, with _2, _3, … behind it until it is free
    overwrite: bool = False,
    given: "Checkpoint | None" = None,  # what the run starts from, which it may not overwrite
) -> Run:
    "A run whose files may be written. Raises `UserError` for a name that is taken or leaves `out`."
    out = _writable(out)
    if name is None:
        base, k = re.sub(r"[^\w.+-]", "_", wanted), 1
        while (run := Run(out, base if k == 1 else f"{base}_{k}")).taken:
            k += 1
        return run
    if not name or name in (".", "..") or re.search(r'[/\\:*?"<>|\0]', name):
        raise UserError(
            f'-n {name!r} is no plain file name: runs are written into {out}, choose a name without / \\ : * ? " < > |'
        )
    run = Run(out, name)
    if given and run.file("best.pth").resolve() == given.path.resolve():
        raise UserError(f"-n {name} is the run that -pm loads: a stage keeps what it was given, choose another name")
    if run.taken and not overwrite:
        raise UserError(f"-n {name}: {out} already has a run of that name: choose another, or --overwrite to mean it")
    return run


def claim_output(out, name: str) -> Run:
    "A run whose predictions may be written: those of the same checkpoint are replaced."
    return Run(_writable(out), name)


def _writable(out) -> Path:
    "The output folder, made where it is absent; a folder that refuses is found out now, not after the first epoch."
    out = Path(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / f".{os.getpid()}.tmp"
        probe.touch()
        probe.unlink()
    except OSError as e:
        raise UserError(f"output folder {out} cannot be written to ({e.strerror}): choose another with --out") from None
    return out


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
        s = self.settings
        model = build_model(s.arch, s.head, s.n_points, s.size)
        model.load_state_dict(self.tensors(model))
        return model.eval()

    def tensors(self, model) -> dict:
        "The file's tensors. Raises `UserError` where they are not this model's: another network, head or point count."
        tensors, own = read_tensors(self.path), model.state_dict()
        wrong = sorted(own.keys() ^ tensors.keys()) or [k for k in own if own[k].shape != tensors[k].shape]
        if wrong:
            raise UserError(
                f"{self.path} is not the network that its .json tells of ({self.settings.arch}, head {self.settings.head}, "
                f"{self.settings.n_points} points): {len(wrong)} tensors differ, the first {wrong[0]}"
            )
        return tensors


def write_checkpoint(run: Run, model, settings: Settings, score: float, nme: float, epoch: int):
    "Write both files whole: each to a temporary one that is synced and renamed."
    facts = {"format": FORMAT, "settings": settings.to_dict(), "score": score, "nme": nme, "epoch": epoch}
    tensors = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    with whole_file(run.file("best.pth"), "wb") as f:
        torch.save(tensors, f)
    with whole_file(run.file("best.json")) as f:
        json.dump(facts, f, indent=1, ensure_ascii=False)


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
    except (OSError, ValueError) as e:
        raise UserError(f"{beside} cannot be read: {e}") from None
    if not isinstance(facts, dict) or facts.get("format") != FORMAT:
        raise UserError(f"{beside} is no checkpoint's .json of this program (format {FORMAT})")
    numbers = [facts.get(k) for k in ("score", "nme", "epoch")]
    if not all(isinstance(n, (int, float)) for n in numbers):
        raise UserError(f"{beside}: score, nme and epoch must be numbers")
    try:
        return Checkpoint(path, Settings.from_dict(facts.get("settings")), *numbers)
    except UserError as e:
        raise UserError(f"{beside}: {e}") from None


def find_checkpoint(
    name: str,  # as -pm gave it: a path, or a name in the output folder
    out,  # the output folder
) -> Checkpoint:
    "The checkpoint that is meant. Raises `UserError` with the names that do exist."
    for place in (Path(name), Path(out) / name):
        for path in (place, place.with_name(place.name + ".pth"), place.with_name(place.name + "_best.pth")):
            if path.is_file() and path.suffix == ".pth":
                return read_checkpoint(path)
    there = sorted(p.name for p in Path(out).glob("*_best.pth"))
    near = difflib.get_close_matches(Path(name).name, there, 5, 0) or ["none"]
    raise UserError(f"-pm {name} not found, neither as a path nor in {out}; there are: {', '.join(near)}")
