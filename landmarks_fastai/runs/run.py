"""The folder of a run, its run.json, and the checkpoint that `-pm NAME` means.

Nothing heavy is imported here: a run has its name before torch is imported, so that a run that is killed in its first
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
from landmarks_fastai.utils.distributed import is_first, this_process
from landmarks_fastai.utils.files import atomic_write, reason, rename

FORMAT = 2  # of run.json; format 1 had the words of the command line
MAX_NAME = 200  # bytes of a run's name: with suffixes it must fit into a file system's 255
SAVED = ("best.pth", "state.safetensors")  # a run without either has saved nothing
LISTING = "bad.csv"
# Format -> the file of a prediction's points; a folder for pts.
PREDICTIONS = {
    "csv": "predictions.csv", "json": "predictions.json", "coco": "predictions.coco.json", "pts": "predictions",
    "npy": "predictions.npy",
}  # fmt: skip
# The folder of a run has one of them at least.
RUN_FILES = {*SAVED, LISTING, *PREDICTIONS.values(), "run.json", "submit.csv"}


@dataclass(frozen=True)
class Record:
    "The contents of run.json: how a run was started."

    script: str  # train.py or finetune.py
    args: dict = field(default_factory=dict)  # parsed flags, paths made absolute
    digest: str = ""  # SHA-256 of the checkpoint that a later stage starts from
    settings: dict | None = None  # `Settings.to_dict()`; None until the Learner is made
    facts: dict | None = None  # `DataFacts.to_dict()`, likewise
    ended: bool = False

    @property
    def checkpoint(self) -> str:
        "Path of the checkpoint that a later stage starts from; empty for a first stage."
        return self.args.get("pretrained_model") or ""


def typed_as(script: str) -> str:
    """The command of a script: `python train.py`, or `landmarks-train` in a process started as an installed command.

    In a process of torchrun, the same with its numbers of machines and processes.
    """
    process = this_process()
    if process.store and script != "predict.py":  # which runs in one process
        machines = f" --nnodes {process.machines} …" if process.machines > 1 else ""
        return f"torchrun{machines} --nproc-per-node {process.local_count} {script}"
    installed = Path(sys.argv[0]).stem.startswith("landmarks-")
    return f"landmarks-{Path(script).stem}" if installed else f"python {script}"


def is_plain_name(name: str) -> bool:
    "Return whether a folder may have this name on every system: it is not hidden, and does not lead elsewhere."
    plain = name and not name.startswith(".") and not re.search(r'[/\\:*?"<>|\x00-\x1f]', name)
    return bool(plain) and len(os.fsencode(name)) <= MAX_NAME


def plain_name(name: str) -> str:
    "Return a plain name like another name."
    return re.sub(r"[^\w.+-]", "_", name).lstrip(".")[:MAX_NAME] or "run"


class Run:
    """The folder `out`/NAME with the files of one stage.

    A run that overwrites another is written to `out`/.NAME.new; `publish` renames that folder.
    """

    def __init__(self, out: str | os.PathLike, name: str, record: Record | None = None):
        self.out, self.name, self.record = Path(out), name, record
        self.folder = self.out / name
        self.new, self.old = self.out / f".{name}.new", self.out / f".{name}.old"
        self.written_to = self.folder

    def file(self, name: str) -> Path:
        "Path to write a file to. In a message use `run.folder / name`, where the file is after `publish`."
        return self.written_to / name

    @property
    def listing(self) -> Path:
        "Path of bad.csv. Never in `.NAME.new`: the file outlives a run that fails."
        return self.folder / LISTING

    @property
    def saved(self) -> bool:
        "Whether a checkpoint or a state was saved."
        return any(self.file(name).exists() for name in SAVED)

    @property
    def settings(self) -> Settings:
        "Settings of the stage to resume. Raises `UserError` if run.json has none, or wrong ones."
        try:
            return Settings.from_dict(self.record.settings if self.record else None)  # pyright: ignore[reportArgumentType]
        except UserError as e:
            raise UserError(f"{self.file('run.json')}: {e}; start over with --overwrite") from None

    @property
    def resume_command(self) -> str:
        "The command that resumes the run, for the current folder."
        script = self.record.script if self.record else "train.py"
        return f"{typed_as(script)} --resume -n {shlex.quote(self.name)}{self.out_flag}"

    @property
    def out_flag(self) -> str:
        "The flag --out with a space before it; empty for the default folder."
        return "" if self.out == Path(OUT) else f" --out {shlex.quote(str(self.out))}"

    def publish(self) -> None:
        "Replace the run that is overwritten, once this one has saved something."
        if self.written_to == self.folder:
            return
        if not is_first():  # which does it
            self.written_to = self.folder
            return
        if self.listing.exists():
            rename(self.listing, self.new / LISTING)
        rename(self.folder, self.old)
        rename(self.new, self.folder)
        self.written_to = self.folder
        shutil.rmtree(self.old, ignore_errors=True)

    def repair(self) -> None:
        "Finish a `publish` that was killed, and remove temporary files. The caller holds the lock."
        if self.old.exists() and not self.folder.exists():
            rename(self.new if self.new.exists() else self.old, self.folder)
        for leftover in (self.old, self.new):
            shutil.rmtree(leftover, ignore_errors=True)
        for path in self.folder.glob("*.tmp"):
            if re.fullmatch(r"\w+\.\w+\.\d+\.tmp", path.name):
                path.unlink(missing_ok=True)

    def discard(self, *kept: str) -> None:
        "Remove the files of the run except `kept`, and the folder if it is empty then."
        # run.json last: if this process is killed here, the folder is still known as a run's
        for path in sorted(self.written_to.glob("*"), key=lambda p: p.name == "run.json"):
            if path.name not in kept:
                with suppress(OSError):  # a folder that a user made
                    path.unlink(missing_ok=True)
        with suppress(OSError):
            self.written_to.rmdir()


def read_record(run: Run) -> Record | None:
    "Read run.json; None if there is none. Raises `UserError` for a file of another kind."
    path = run.file("run.json")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as e:
        raise UserError(f"{path} cannot be read ({reason(e)}): start over with --overwrite") from None
    if not isinstance(found, dict) or found.pop("format", None) != FORMAT:
        raise UserError(f"{path} is not of this version (format {FORMAT} expected): start over with --overwrite")
    kinds = {
        "script": str,
        "args": dict,
        "digest": str,
        "settings": (dict, type(None)),
        "facts": (dict, type(None)),
        "ended": bool,
    }
    if found.keys() != kinds.keys() or not all(isinstance(found[k], kinds[k]) for k in kinds):
        raise UserError(f"{path} is not the record of a run: start over with --overwrite")
    return Record(**found)


def write_record(run: Run, record: Record) -> None:
    "Write run.json, and set `run.record`."
    if is_first():
        with atomic_write(run.file("run.json")) as f:
            json.dump({"format": FORMAT} | asdict(record), f, indent=1)
    run.record = record


def stopped_runs(out: str | os.PathLike) -> str:
    "Names of the runs in a folder that can be resumed: the first 20, joined by commas; `none` if there are none."
    names = []
    for path in sorted(Path(out).glob("[!.]*/run.json")):
        if len(names) == 20:
            return ", ".join([*names, "…"])
        run = Run(out, path.parent.name)
        with suppress(UserError):
            if (record := read_record(run)) and not record.ended:
                names.append(run.name)
    return ", ".join(names) or "none"


def run_name(checkpoint: str | os.PathLike) -> str:
    "The name of the run that a checkpoint file belongs to."
    path = Path(os.path.abspath(checkpoint))
    return path.parent.name or "best" if path.name == "best.pth" else path.stem.removesuffix("_best")


def checkpoint_places(name: str, out: str | os.PathLike) -> list[str]:
    "The paths that `-pm NAME` may mean, in the order in which they are tried."
    stem = name.removesuffix(".pth")
    run = stem.removesuffix("_best")  # as in the published entry's command lines, and the files of earlier versions
    places = [name] if name.endswith(".pth") else []
    for folder in ("", str(out)):
        ends = (os.path.join(stem, "best.pth"), os.path.join(run, "best.pth"), f"{stem}.pth", f"{stem}_best.pth")
        places += [os.path.join(folder, end) for end in ends]
    return places


def find_checkpoint_file(name: str, out: str | os.PathLike) -> Path:
    "The file that `-pm` means, a path or the name of a run. Raises `UserError` that lists the existing names."
    for place in checkpoint_places(name, out):
        if os.path.isfile(place):
            return Path(place)
    if os.path.isfile(name):
        raise UserError(f"-pm {name} is no checkpoint: a checkpoint's file name ends in .pth")
    found = [*Path(out).glob("[!.]*/best.pth"), *Path(out).glob("*_best.pth")]
    found.sort(key=os.path.getmtime, reverse=True)
    names = ", ".join(p.parent.name if p.name == "best.pth" else p.name for p in found[:20]) or "none"
    more = f" and {len(found) - 20} older ones" if len(found) > 20 else ""
    raise UserError(f"-pm {name} not found, neither as a path nor in {out}; there are: {names}{more}")
