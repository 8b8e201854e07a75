"""A run: its folder, its name, the flags it was started with, and the one process that writes it.

Nothing heavy is imported here: a name is claimed before torch is imported, so that a run that is killed in its first
second can be resumed.
"""

import hashlib
import itertools
import json
import os
import re
import shlex
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from landmarks_fastai.errors import UserError
from landmarks_fastai.files import reason, rename, take_lock, whole_file
from landmarks_fastai.interrupts import UNREAD, Stopped
from landmarks_fastai.settings import OUT, Settings

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
            return Settings.from_dict(self.record.settings)
        except UserError as e:
            raise UserError(f"{self.file('run.json')}: {e}; start over with --overwrite") from None

    @property
    def resume_command(self) -> str:
        "What goes on with the run, as typed in this folder."
        return f"python {self.record.script} --resume -n {shlex.quote(self.name)}{self.out_flag}"

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
    with whole_file(run.file("run.json")) as f:
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
            if not read_record(run).ended:
                names.append(run.name)
    return ", ".join(names)


@contextmanager
def claimed_run(
    out,  # output folder, made where it is absent
    name: str | None,  # as the user gave it
    wanted: str,  # taken where `name` is None, with _2, _3, … behind it until it is free
    record: Record,  # of this start; a run that goes on keeps its own
    overwrite: bool = False,
    resume: bool = False,  # go on with the run of this name; start it where nothing of it is there
) -> Iterator[Run]:
    """A run whose files this process alone may write, for the time of a stage. Then it has ended, its state goes.

    Where a stage ends badly with nothing saved, the name is free again; a run that was to be overwritten stands as it
    stood. Raises `UserError` for a name that is taken, or is no plain file name, or is running.
    """
    out = _writable(out)
    if name is not None:
        check_name(name, out)
    with _held(out, name, wanted) as run:
        before = None if overwrite else read_record(run)
        unfinished = before is not None and not before.ended
        if unfinished and resume:
            _check_unchanged(run, before, record)
            record = before if run.saved else replace(before, settings=None)
        elif not (overwrite or _is_free(run) or (unfinished and not run.saved)):
            raise UserError(_taken(run, before))
        if record.given and run.folder.resolve() in Path(record.given).resolve().parents:
            raise UserError(f"-n {run.name} is the run that -pm loads, which must stay: choose another name")
        record = replace(record, digest=_digest(record.given))
        if overwrite and run.folder.exists():
            run.written_to = run.new
        elif not run.saved:
            run.discard("run.json")
        with _cleaned_up(run):
            write_record(run, record)
            yield run
        run.publish()
        write_record(run, replace(run.record, ended=True))
        run.file("state.safetensors").unlink(missing_ok=True)


def _is_free(run) -> bool:
    return not os.path.lexists(run.folder) or {p.name for p in run.folder.glob("*")} <= {LISTING}


def _taken(run, before):
    way = "choose another, or --overwrite to replace it"
    if before and not before.ended:
        way = f"{Run(run.out, run.name, before).resume_command} goes on with it; or {way}"
    return f"-n {run.name}: {run.out} already has a run of that name: {way}"


def check_name(name: str, out):
    "Raise `UserError` for a name that is no plain file name, and so may leave the output folder, or is hidden."
    plain = name and not name.startswith(".") and not re.search(r'[/\\:*?"<>|\x00-\x1f]', name)
    if not plain or len(os.fsencode(name)) > MAX_NAME:
        raise UserError(
            f"-n {name!r} is no plain file name: runs are written into {out}, choose a short name without / \\ : * ? "
            '" < > | and without a dot at its start'
        )


def _check_folder(run):
    "Raise `UserError` where something else has the run's name: --overwrite would delete it."
    names = {p.name for p in run.folder.glob("*")}
    if os.path.lexists(run.folder) and not (run.folder.is_dir() and (not names or names & MARKS)):
        raise UserError(f"{run.folder} is there and is not the folder of a run: choose another name, or another --out")


def _check_unchanged(run, before, record):
    "A stage that goes on ends with the best of its epochs and of what it was given: that must still be the same."
    if before.script != record.script:
        command = Run(run.out, run.name, before).resume_command
        raise UserError(f"-n {run.name} was started by {before.script}: {command}")
    if run.saved and before.digest != _digest(before.given):
        raise UserError(
            f"{before.given} has changed since {run.name} was started from it: put it back, or start over with --overwrite"
        )


def _digest(path: str) -> str:
    if not path:
        return ""
    try:
        with open(path, "rb") as f:
            return hashlib.file_digest(f, "sha256").hexdigest()
    except OSError as e:
        raise UserError(f"{path} cannot be read: {reason(e)}") from None


@contextmanager
def _held(out, name, wanted):
    "A run with the lock of its name. Without a name: the first that is free."
    base = re.sub(r"[^\w.+-]", "_", wanted).lstrip(".")[:MAX_NAME] or "run"
    names = [name] if name is not None else (base if k == 1 else f"{base}_{k}" for k in itertools.count(1))
    for each in names:
        run = Run(out, each)
        with lock(run) as taken:
            if name is not None and not taken:
                raise UserError(f"-n {name}: another process is running it: let it end, or choose another name")
            if taken:
                run.repair()
                if name is not None:
                    _check_folder(run)
                if name is not None or _is_free(run):
                    yield run
                    return


def lock(run: Run):
    "The lock of the run's name, as `take_lock`; beside the folder, which may be renamed."
    return take_lock(run.out / f".{run.name}.lock")


@contextmanager
def _cleaned_up(run):
    "Say what goes on with a run that ends badly; remove it where it has saved nothing."
    kept = [LISTING]
    try:
        yield
    except (KeyboardInterrupt, BrokenPipeError) as e:
        kept.append("run.json")
        text = f"{'the state is saved' if run.saved else 'nothing was saved yet'}; go on with: {run.resume_command}"
        if run.written_to == run.new and not run.saved:
            text = "nothing was saved yet; the run that was to be overwritten stands as it stood"
        raise Stopped(text, getattr(e, "code", UNREAD if isinstance(e, BrokenPipeError) else 130)) from None
    except UserError as e:
        if run.saved and "--overwrite" not in str(e):
            e.way_on = f"then go on with: {run.resume_command}"
        raise
    finally:
        if run.saved:
            run.publish()
        elif run.written_to == run.new:
            shutil.rmtree(run.new, ignore_errors=True)
        else:
            run.discard(*kept)


def claim_output(out, name: str) -> Run:
    "A run whose predictions may be written: those of the same checkpoint are replaced."
    run = Run(_writable(out), name)
    _check_folder(run)
    return run


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
