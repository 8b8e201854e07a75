"""A run: its files in the output folder, its name, the flags it was started with, and the one process that writes them.

Nothing heavy is imported here: a name is claimed before torch is, so that a run that is killed in its first second can
be resumed.
"""

import hashlib
import itertools
import json
import os
import re
import secrets
import shlex
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from landmarks_fastai.errors import UserError
from landmarks_fastai.files import reason, take_lock, whole_file
from landmarks_fastai.interrupts import Stopped
from landmarks_fastai.settings import OUT

FORMAT = 1  # of NAME_run.json
MAX_NAME = 200  # bytes: with `_state.safetensors.12345.tmp` behind it a name must stay below a file system's 255


@dataclass(frozen=True)
class Record:
    "What `NAME_run.json` says of how a run was started."

    door: str  # train.py or finetune.py
    words: tuple = ()  # what was typed behind it
    folder: str = ""  # in which
    given: str = ""  # path of the checkpoint that a later stage starts from
    digest: str = ""  # of that file
    id: str = ""  # that the run's state repeats: a state of an earlier start is not this one's
    ended: bool = False


class Run:
    "The files of one stage: `out`/NAME_something."

    PICTURED = ("results.png", "batch.png", "mirror.json", "mirror.png", "lr.png")
    STAGE = ("best.pth", "best.json", "history.csv", "state.safetensors", *PICTURED)
    PREDICTED = ("submit.csv", "points.npy", "points.json")
    LISTING = "bad.csv"  # rows that were left out, or that stopped it: is kept then, and takes no name

    def __init__(self, out, name: str, record: Record | None = None):
        self.out, self.name, self.record = Path(out), name, record

    @property
    def folder(self) -> Path:
        return self.out

    def file(self, suffix: str) -> Path:
        return self.out / f"{self.name}_{suffix}"

    @property
    def taken(self) -> bool:
        return any(self.file(s).exists() for s in self.STAGE + self.PREDICTED)

    @property
    def resume_command(self) -> str:
        "What goes on with the run, as typed in this folder."
        return f"python {self.record.door} --resume -n {shlex.quote(self.name)}{self.out_flag}"

    @property
    def out_flag(self) -> str:
        return "" if self.out == Path(OUT) else f" --out {shlex.quote(str(self.out))}"

    def discard(self):
        "Remove the run's files, where it ended without a checkpoint."
        for suffix in self.STAGE + self.PREDICTED:
            self.file(suffix).unlink(missing_ok=True)

    def sweep(self):
        "Remove what a killed process left half-written."
        for path in self.out.glob("*.tmp"):
            if re.fullmatch(re.escape(self.name) + r"_\w+\.\w+\.\d+\.tmp", path.name):
                path.unlink(missing_ok=True)


def read_record(run: Run) -> Record | None:
    "How the run was started; None where nothing says so. Raises `UserError` for a file that is no record."
    path = run.file("run.json")
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as e:
        raise UserError(f"{path} cannot be read ({reason(e)}): remove it to start the run over") from None
    if not isinstance(facts, dict) or facts.pop("format", None) != FORMAT:
        raise UserError(f"{path} is no record of a run (format {FORMAT}): remove it to start the run over")
    kinds = {k: type(v) for k, v in asdict(Record("")).items()} | {"words": list}
    words = facts.get("words")
    if {k: type(v) for k, v in facts.items()} != kinds or not all(isinstance(word, str) for word in words):
        raise UserError(f"{path} is no record of a run: remove it to start the run over")
    return Record(**facts | {"words": tuple(words)})


def write_record(run: Run, record: Record):
    run.record = record
    with whole_file(run.file("run.json")) as f:
        json.dump({"format": FORMAT} | asdict(record), f, indent=1)


def stopped_runs(out) -> str:
    "The names of the runs in a folder that can be resumed."
    names = []
    for path in sorted(Path(out).glob("*_run.json")):
        run = Run(out, path.name.removesuffix("_run.json"))
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
):
    """A run whose files this process alone may write, for the time of a stage. Then it has ended, its state goes.

    Where a stage ends badly with nothing saved, the name is free again; a run that is overwritten keeps its checkpoint
    until the new one has one, then its old predictions and pictures go. Raises `UserError` for a name that is taken, or
    leaves `out`, or is running.
    """
    out = _writable(out)
    if name is not None:
        check_name(name, out)
    with _held(out, name, wanted) as run:
        before = read_record(run)
        if before and not before.ended and resume:
            _check_given(run, before, record)
            record = replace(record, id=before.id, words=before.words, folder=before.folder)
        elif run.taken and not overwrite and not (before and not before.ended and not _saved(run)):
            raise UserError(_taken(run, before))
        else:
            record = replace(record, id=secrets.token_hex(8))
        if record.given and run.file("best.pth").resolve() == Path(record.given).resolve():
            raise UserError(
                f"-n {run.name} is the run that -pm loads: a stage keeps what it was given, choose another name"
            )
        if not overwrite and not _saved(run):
            run.discard()
        _check_files(run)
        run.sweep()
        write_record(run, replace(record, digest=_digest(record.given)))
        with _cleared_up(run, before, overwrite):
            yield run
        write_record(run, replace(run.record, ended=True))
        run.file("state.safetensors").unlink(missing_ok=True)


def _saved(run):
    return run.file("best.pth").exists() or run.file("state.safetensors").exists()


def _taken(run, before):
    way = "choose another, or --overwrite to mean it"
    if before and not before.ended:
        way = f"{Run(run.out, run.name, before).resume_command} goes on with it; or {way}"
    return f"-n {run.name}: {run.out} already has a run of that name: {way}"


def _check_files(run):
    for suffix in (*Run.STAGE, "run.json"):
        if run.file(suffix).is_dir():
            raise UserError(f"{run.file(suffix)} is a folder, the run's file cannot be written: move it away")


def check_name(name, out):
    "Raise `UserError` for a name that is no plain file name, and so may leave the output folder."
    plain = name and name not in (".", "..") and not re.search(r'[/\\:*?"<>|\x00-\x1f]', name)
    if not plain or len(os.fsencode(name)) > MAX_NAME:
        raise UserError(
            f'-n {name!r} is no plain file name: runs are written into {out}, choose a short name without / \\ : * ? " < > |'
        )


def _check_given(run, before, record):
    "A stage that goes on ends with the best of its epochs and of what it was given: that must still be the same."
    if before.door != record.door:
        raise UserError(f"-n {run.name} was started by {before.door}: {Run(run.out, run.name, before).resume_command}")
    if _saved(run) and before.digest != _digest(record.given):
        raise UserError(
            f"{record.given} has changed since {run.name} was started from it: put it back, or start over with --overwrite"
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
    base = re.sub(r"[^\w.+-]", "_", wanted)[:MAX_NAME]
    names = [name] if name is not None else (base if k == 1 else f"{base}_{k}" for k in itertools.count(1))
    for each in names:
        run = Run(out, each)
        with take_lock(run.file("run.lock")) as taken:
            if name is not None and not taken:
                raise UserError(f"-n {name}: another process is running it: let it end, or choose another name")
            if taken and (name is not None or not (run.taken or run.file("run.json").exists())):
                yield run
                return


@contextmanager
def _cleared_up(run, before: Record | None, overwrite: bool):
    best, state = run.file("best.pth"), run.file("state.safetensors")
    saved = _stamp(best), _stamp(state)
    small = {s: run.file(s).read_bytes() for s in _SMALL if overwrite and run.file(s).is_file()}
    old = {s: _stamp(run.file(s)) for s in Run.PICTURED if overwrite}  # a run that goes on keeps its pictures
    interrupted = False
    try:
        yield
    except KeyboardInterrupt as e:
        interrupted = True
        kept = f"{'the state is saved' if _stamp(state) else 'nothing was saved yet'}; go on with: {run.resume_command}"
        if overwrite and (_stamp(best), _stamp(state)) == saved:
            kept = "nothing was saved yet; the run that was to be overwritten stands as it stood"
        raise Stopped(kept, getattr(e, "code", 130)) from None
    except UserError as e:
        now = (_stamp(best), _stamp(state))
        goes_on = now != (None, None) and (not overwrite or now != saved)
        if goes_on and "--overwrite" not in str(e):
            e.way_on = f"then go on with: {run.resume_command}"
        raise
    finally:
        now = (_stamp(best), _stamp(state))
        if overwrite and now == saved:  # nothing came of it: what stood there stands
            _restore(run, before, small)
        elif now == (None, None):
            run.discard()
            if not interrupted:
                run.file("run.json").unlink(missing_ok=True)
        elif now[0] != saved[0]:
            stale = [suffix for suffix, stamp in old.items() if _stamp(run.file(suffix)) == stamp]
            for suffix in (*Run.PREDICTED, *stale):
                run.file(suffix).unlink(missing_ok=True)


_SMALL = ("history.csv", *Run.PICTURED)  # what a stage writes before it has anything to save


def _restore(run, before, small):
    for suffix in _SMALL:
        run.file(suffix).unlink(missing_ok=True)
    for suffix, content in small.items():
        with suppress(UserError), whole_file(run.file(suffix), "wb") as f:
            f.write(content)
    if before:
        with suppress(UserError):
            write_record(run, before)
    else:
        run.file("run.json").unlink(missing_ok=True)


def _stamp(path: Path):
    return (path.stat().st_ino, path.stat().st_mtime_ns) if path.exists() else None


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
