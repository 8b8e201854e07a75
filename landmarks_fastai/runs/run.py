"""A run: its folder, its name, the flags it was started with, and the one process that writes it.

Nothing heavy is imported here: a name is claimed before torch is imported, so that a run that is killed in its first
second can be resumed.
"""

import json
import os
import re
import shlex
import shutil
import sys
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from landmarks_fastai.errors import UserError
from landmarks_fastai.settings import OUT, Settings
from landmarks_fastai.utils.files import atomic_write, reason, rename

FORMAT = 2  # of run.json; 1 stored the words of the command line
MAX_NAME = 200  # bytes: with a suffix a name must stay below a file system's 255
SAVED = ("best.pth", "state.safetensors")  # a run that has neither has nothing worth keeping
LISTING = "bad.csv"
MARKS = {*SAVED, LISTING, "run.json", "submit.csv"}  # one of them is in the folder of every run


@dataclass(frozen=True)
class Record:
    "What `run.json` says of how a run was started."

    script: str  # train.py or finetune.py
    args: dict = field(default_factory=dict)  # its flags as they were parsed, paths made absolute
    digest: str = ""  # of the checkpoint that a later stage starts from
    settings: dict | None = None  # `Settings.to_dict()`, once the stage is built
    ended: bool = False

    @property
    def given(self) -> str:
        "Path of the checkpoint that a later stage starts from, empty for a first stage."
        return self.args.get("pretrained_model") or ""


def typed_as(script: str) -> str:
    "The command of a script: `python train.py`, or `landmarks-train` in a process that was started as an installed command."
    installed = Path(sys.argv[0]).stem.startswith("landmarks-")
    return f"landmarks-{Path(script).stem}" if installed else f"python {script}"


class Run:
    """The folder `out`/NAME and the files of one stage in it.

    A run that overwrites another is written into `out`/.NAME.new, which takes its name in `publish`.
    """

    def __init__(self, out, name: str, record: Record | None = None):
        self.out, self.name, self.record = Path(out), name, record
        self.folder = self.out / name
        self.new, self.old = self.out / f".{name}.new", self.out / f".{name}.old"
        self.written_to = self.folder

    def file(self, suffix: str) -> Path:
        "Where a file of the run is written now. For a message: `run.folder / suffix`, where it will be."
        return self.written_to / suffix

    @property
    def listing(self) -> Path:
        "Rows that were left out, or that stopped the run. Never in `.NAME.new`: it outlives a run that fails."
        return self.folder / LISTING

    @property
    def saved(self) -> bool:
        return any(self.file(s).exists() for s in SAVED)

    @property
    def settings(self) -> Settings:
        "Of the stage that is resumed. Raises `UserError` where run.json has none, or wrong ones."
        try:
            return Settings.from_dict(self.record.settings if self.record else None)  # pyright: ignore[reportArgumentType]
        except UserError as e:
            raise UserError(f"{self.file('run.json')}: {e}; start over with --overwrite") from None

    @property
    def resume_command(self) -> str:
        "What goes on with the run, as typed in this folder."
        script = self.record.script if self.record else "train.py"
        return f"{typed_as(script)} --resume -n {shlex.quote(self.name)}{self.out_flag}"

    @property
    def out_flag(self) -> str:
        return "" if self.out == Path(OUT) else f" --out {shlex.quote(str(self.out))}"

    def publish(self):
        "Give the run its name, once it has something to show; a run that it overwrites goes."
        if self.written_to == self.folder:
            return
        if self.listing.exists():
            rename(self.listing, self.new / LISTING)
        rename(self.folder, self.old)
        rename(self.new, self.folder)
        self.written_to = self.folder
        shutil.rmtree(self.old, ignore_errors=True)

    def repair(self):
        "Finish what a process that was killed in `publish` began; remove what others left. Call it with the lock held."
        if self.old.exists() and not self.folder.exists():
            rename(self.new if self.new.exists() else self.old, self.folder)
        for left in (self.old, self.new):
            shutil.rmtree(left, ignore_errors=True)
        for path in self.folder.glob("*.tmp"):
            if re.fullmatch(r"\w+\.\w+\.\d+\.tmp", path.name):
                path.unlink(missing_ok=True)

    def discard(self, *kept: str):
        "Remove the run's files but those, and the folder when it is empty."
        for path in sorted(self.written_to.glob("*"), key=lambda p: p.name == "run.json"):  # killed here, it has a mark
            if path.name not in kept:
                with suppress(OSError):  # a folder that a user put there
                    path.unlink(missing_ok=True)
        with suppress(OSError):
            self.written_to.rmdir()


def read_record(run: Run) -> Record | None:
    "How the run was started; None where nothing says so. Raises `UserError` for a file that is no record."
    path = run.file("run.json")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as e:
        raise UserError(f"{path} cannot be read ({reason(e)}): start over with --overwrite") from None
    if not isinstance(found, dict) or found.pop("format", None) != FORMAT:
        raise UserError(f"{path} is not of this version (format {FORMAT} expected): start over with --overwrite")
    kinds = {"script": str, "args": dict, "digest": str, "settings": (dict, type(None)), "ended": bool}
    if found.keys() != kinds.keys() or not all(isinstance(found[k], kinds[k]) for k in kinds):
        raise UserError(f"{path} is no record of a run: start over with --overwrite")
    return Record(**found)


def write_record(run: Run, record: Record):
    "Write run.json, and let the run have that record."
    with atomic_write(run.file("run.json")) as f:
        json.dump({"format": FORMAT} | asdict(record), f, indent=1)
    run.record = record


def stopped_runs(out) -> str:
    "The names of the runs in a folder that can be resumed: the first 20."
    names = []
    for path in sorted(Path(out).glob("[!.]*/run.json")):
        if len(names) == 20:
            return ", ".join([*names, "…"])
        run = Run(out, path.parent.name)
        with suppress(UserError):
            if (record := read_record(run)) and not record.ended:
                names.append(run.name)
    return ", ".join(names)


def run_name(checkpoint) -> str:
    "The name of the run that a checkpoint file is of."
    path = Path(os.path.abspath(checkpoint))
    return path.parent.name or "best" if path.name == "best.pth" else path.stem.removesuffix("_best")


def checkpoint_places(name: str, out) -> list[str]:
    "The paths that `-pm NAME` may mean, the likeliest first."
    stem = name.removesuffix(".pth")
    run = stem.removesuffix("_best")  # as in the published entry's command lines, and the files of earlier versions
    places = [name] if name.endswith(".pth") else []
    for folder in ("", str(out)):
        ends = (os.path.join(stem, "best.pth"), os.path.join(run, "best.pth"), f"{stem}.pth", f"{stem}_best.pth")
        places += [os.path.join(folder, end) for end in ends]
    return places


def find_checkpoint_file(name: str, out) -> Path:
    "The file that `-pm` means: a path, or a run's name. Raises `UserError` with the names that do exist."
    for place in checkpoint_places(name, out):
        if os.path.isfile(place):
            return Path(place)
    found = [*Path(out).glob("[!.]*/best.pth"), *Path(out).glob("*_best.pth")]
    found.sort(key=os.path.getmtime, reverse=True)
    names = ", ".join(p.parent.name if p.name == "best.pth" else p.name for p in found[:20]) or "none"
    more = f" and {len(found) - 20} older ones" if len(found) > 20 else ""
    raise UserError(f"-pm {name} not found, neither as a path nor in {out}; there are: {names}{more}")
