"The one process that may write a run: its name, its lock, what is left when it ends."

import hashlib
import itertools
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from landmarks_fastai.errors import UserError
from landmarks_fastai.runs.run import LISTING, MARKS, MAX_NAME, Record, Run, read_record, write_record
from landmarks_fastai.utils.files import process_lock, reason
from landmarks_fastai.utils.signals import UNREAD, Stopped


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
        unfinished = before if before and not before.ended else None
        if unfinished and resume:
            _check_unchanged(run, unfinished, record)
            record = unfinished if run.saved else replace(unfinished, settings=None)
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
        write_record(run, replace(run.record or record, ended=True))
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
    "The lock of the run's name, as `process_lock`; beside the folder, which may be renamed."
    return process_lock(run.out / f".{run.name}.lock")


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
