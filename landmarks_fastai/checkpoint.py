"""A run's files, and what a checkpoint is: tensors in `NAME_best.pth`, all that they mean in `NAME_best.json`.

The `.pth` is the plain state dict that `learn.load` reads. Predicting and the next stage need these two files,
the images, and nothing else.
"""

import itertools
import json
import os
import re
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from landmarks_fastai.errors import UserError
from landmarks_fastai.files import whole_file
from landmarks_fastai.models import build_model, read_tensors
from landmarks_fastai.settings import Settings

FORMAT = 3  # of the .json; 1 had no augmentation, mirror map, loss or average, 2 kept black borders
MAX_NAME = 200  # bytes: with `_best.json.12345.tmp` behind it a name must stay below a file system's 255


class Run:
    "The files of one stage: `out`/NAME_something."

    PICTURED = ("results.png", "batch.png", "mirror.json", "mirror.png", "lr.png")
    STAGE = ("best.pth", "best.json", "history.csv", *PICTURED)
    PREDICTED = ("submit.csv", "points.npy", "points.json")
    LISTING = "bad.csv"  # rows that were left out, or that stopped it: is kept then, and takes no name
    CLAIM = "history.csv"  # made by `claim_run`, so that of two processes that want a name one gets it

    def __init__(self, out, name: str):
        self.out, self.name = Path(out), name

    def file(self, suffix: str) -> Path:
        return self.out / f"{self.name}_{suffix}"

    @property
    def taken(self) -> bool:
        return any(self.file(s).exists() for s in self.STAGE + self.PREDICTED)

    def discard(self):
        "Remove the run's files, where it ended without a checkpoint."
        for suffix in self.STAGE + self.PREDICTED:
            self.file(suffix).unlink(missing_ok=True)


@contextmanager
def claimed_run(*args, **kwargs):
    """`claim_run` for the time of a stage: where that ends without a checkpoint of its own, the name is free again.

    A run that is overwritten keeps its checkpoint until the new one has one; then its old predictions and pictures go.
    """
    run = claim_run(*args, **kwargs)
    best = run.file("best.pth")
    before, old = _stamp(best), {suffix: _stamp(run.file(suffix)) for suffix in Run.PICTURED}
    try:
        yield run
    except KeyboardInterrupt:
        kept = f"the best epoch so far is kept in {best}" if _stamp(best) != before else "nothing was saved yet"
        raise KeyboardInterrupt(kept) from None
    finally:
        if _stamp(best) == before is None:
            run.discard()
        elif _stamp(best) != before:
            stale = [suffix for suffix, stamp in old.items() if _stamp(run.file(suffix)) == stamp]
            for suffix in (*Run.PREDICTED, *stale):
                run.file(suffix).unlink(missing_ok=True)


def _stamp(path: Path):
    return (path.stat().st_ino, path.stat().st_mtime_ns) if path.exists() else None


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
        base = re.sub(r"[^\w.+-]", "_", wanted)[:MAX_NAME]
        for k in itertools.count(1):
            if _claim(run := Run(out, base if k == 1 else f"{base}_{k}")):
                return run
    plain = name and name not in (".", "..") and not re.search(r'[/\\:*?"<>|\x00-\x1f]', name)
    if not plain or len(os.fsencode(name)) > MAX_NAME:
        raise UserError(
            f'-n {name!r} is no plain file name: runs are written into {out}, choose a short name without / \\ : * ? " < > |'
        )
    run = Run(out, name)
    if given and run.file("best.pth").resolve() == given.path.resolve():
        raise UserError(f"-n {name} is the run that -pm loads: a stage keeps what it was given, choose another name")
    if not overwrite and not _claim(run):
        raise UserError(f"-n {name}: {out} already has a run of that name: choose another, or --overwrite to mean it")
    return run


def _claim(run: Run) -> bool:
    "Make the run's history file, if no file of the run is there yet; False where one is, or another process was first."
    if run.taken:
        return False
    try:
        run.file(Run.CLAIM).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def claim_output(out, name: str) -> Run:
    "A run whose predictions may be written: those of the same checkpoint are replaced."
    run = Run(_writable(out), name)
    for suffix in Run.PREDICTED:
        if run.file(suffix).is_dir():
            raise UserError(f"{run.file(suffix)} is a folder, the prediction cannot be written: move it away")
    return run


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
        model = build_model(s.arch, s.head, s.n_points, s.size, s.targets)
        model.load_state_dict(self.tensors(model))
        return model.eval()

    def tensors(self, model) -> dict:
        "The file's tensors. Raises `UserError` where they are not this model's: another network, head or point count."
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
    facts = {"format": FORMAT, "settings": settings.to_dict(), "score": score, "nme": nme, "epoch": epoch}
    tensors = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    try:
        # both are written before either takes its name: what can fail has failed by then
        with whole_file(run.file("best.json")) as j, whole_file(run.file("best.pth"), "wb") as p:
            torch.save(tensors, p)
            json.dump(facts, j, indent=1)
    except (OSError, RuntimeError) as e:  # torch's zip writer raises RuntimeError where the disk is full
        raise UserError(
            f"{run.file('best.pth')} cannot be written ({_reason(e)}): make room, or choose another --out"
        ) from None


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
        raise UserError(f"{beside} cannot be read: {_reason(e)}") from None
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


def _reason(error) -> str:
    return getattr(error, "strerror", None) or (str(error).splitlines() or [type(error).__name__])[0][:200]
