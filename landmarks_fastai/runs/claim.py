"Starting and ending a run: its name, the lock that one process holds, and the files that are left when it ends."

import hashlib
import itertools
import os
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path

from landmarks_fastai.errors import UserError
from landmarks_fastai.runs.run import (
    LISTING,
    RUN_FILES,
    Record,
    Run,
    is_plain_name,
    plain_name,
    read_record,
    write_record,
)
from landmarks_fastai.utils.distributed import broadcast, is_first, process_ended
from landmarks_fastai.utils.files import process_lock, reason
from landmarks_fastai.utils.signals import UNREAD, Stopped


@contextmanager
def claimed_run(
    out: str | os.PathLike,  # output folder, made if it does not exist
    name: str | None,  # of -n
    default_name: str,  # used if `name` is None, with _2, _3, … behind it if it is taken
    record: Record,  # of this start; a resumed run has the record of its first start
    overwrite: bool = False,
    resume: bool = False,  # resume the run of this name; start it if it does not exist
) -> Iterator[Run]:
    """Lock a run for the time of a stage, and yield it. At the end it is marked as finished and its state is deleted.

    A stage that fails before anything is saved leaves the name free, and a run that was to be overwritten unchanged.
    Raises `UserError` for a name that is taken, no plain file name, or used by a running process. Of the processes of
    torchrun the first locks the run.
    """
    if not is_first():
        run: Run = broadcast()
        if not run.file("run.json").exists():
            raise UserError(f"{run.folder} of the first process is not on this machine: --out must be a shared folder")
        with _resume_hint(run):
            yield run
        return
    out = _make_folder(out)
    if name is not None:
        check_name(name, out)
    with _locked_run(out, name, default_name) as run:
        before = None if overwrite else read_record(run)
        unfinished = before if before and not before.ended else None
        if unfinished and resume:
            _check_unchanged(run, unfinished)
            record = unfinished if run.saved else replace(unfinished, settings=None)
        elif not (overwrite or _is_free(run) or (unfinished and not run.saved)):
            raise UserError(_name_taken(run, unfinished))
        if record.checkpoint and run.folder.resolve() in Path(record.checkpoint).resolve().parents:
            raise UserError(f"-n {run.name} is the run that -pm loads: choose another name")
        record = replace(record, digest=_digest(record.checkpoint))
        if overwrite and run.folder.exists():
            run.written_to = run.new
        elif not run.saved:
            run.discard("run.json")
        with _cleanup(run):
            write_record(run, record)
            broadcast(run)
            yield run
        run.publish()
        write_record(run, replace(run.record or record, ended=True))
        run.file("state.safetensors").unlink(missing_ok=True)


def _is_free(run) -> bool:
    return not os.path.lexists(run.folder) or {p.name for p in run.folder.glob("*")} <= {LISTING}


def _name_taken(run, unfinished) -> str:
    hint = "choose another, or --overwrite to replace it"
    if unfinished:
        hint = f"resume it with {Run(run.out, run.name, unfinished).resume_command}; or {hint}"
    return f"-n {run.name}: {run.out} already has a run of that name: {hint}"


def check_name(name: str, out: str | os.PathLike) -> None:
    "Raise `UserError` unless the name is a plain file name: others may leave the output folder, or are hidden."
    if not is_plain_name(name):
        raise UserError(
            f"-n {name!r} is no plain file name: runs are written into {out}, choose a short name without / \\ : * ? "
            '" < > | and without a dot at its start'
        )


def _check_folder(run):
    "Raise `UserError` if a folder or file of that name is no run: --overwrite would delete it."
    names = {p.name for p in run.folder.glob("*")}
    if os.path.lexists(run.folder) and not (run.folder.is_dir() and (not names or names & RUN_FILES)):
        raise UserError(f"{run.folder} exists and is not the folder of a run: choose another name, or another --out")


def _check_unchanged(run, before):
    "Raise `UserError` if the checkpoint that a resumed run started from has changed."
    if run.saved and before.digest != _digest(before.checkpoint):
        changed = f"{before.checkpoint} has changed since {run.name} was started from it"
        raise UserError(f"{changed}: restore it, or start over with --overwrite")


def _digest(path: str) -> str:
    if not path:
        return ""
    try:
        with open(path, "rb") as f:
            return hashlib.file_digest(f, "sha256").hexdigest()
    except OSError as e:
        raise UserError(f"{path} cannot be read: {reason(e)}") from None


@contextmanager
def _locked_run(out, name, default_name):
    "Lock the run of that name; if `name` is None, the first free name."
    base = plain_name(default_name)
    names = [name] if name is not None else (base if k == 1 else f"{base}_{k}" for k in itertools.count(1))
    for each in names:
        run = Run(out, each)
        with lock(run) as locked:
            if locked:
                run.repair()
            elif name is not None:
                raise UserError(f"-n {name}: another process is running it: let it end, or choose another name")
            if name is not None:
                _check_folder(run)
            if locked and (name is not None or _is_free(run)):
                yield run
                return


def lock(run: Run) -> AbstractContextManager[bool]:
    "The lock of a run's name, as `process_lock`. It lies beside the folder, because the folder may be renamed."
    return process_lock(run.out / f".{run.name}.lock")


@contextmanager
def _resume_hint(run):
    "Add the resume command to the message of a run that fails or is stopped."
    try:
        yield
    except (KeyboardInterrupt, BrokenPipeError, RuntimeError) as e:
        if isinstance(e, RuntimeError) and not process_ended(e):
            raise
        text = f"{'the state is saved' if run.saved else 'nothing was saved yet'}; resume with: {run.resume_command}"
        if run.written_to == run.new and not run.saved:
            text = "nothing was saved yet; the run that was to be overwritten is unchanged"
        if process_ended(e):
            raise Stopped(f"another process of the run has ended; {text}", 1) from None
        raise Stopped(text, getattr(e, "code", UNREAD if isinstance(e, BrokenPipeError) else 130)) from None
    except UserError as e:
        if run.saved and "--overwrite" not in str(e):
            e.way_on = f"then resume with: {run.resume_command}"
        raise


@contextmanager
def _cleanup(run):
    "`_resume_hint`; then remove the files of a run that saved nothing: all but its record if it was stopped."
    kept = [LISTING]
    try:
        with _resume_hint(run):
            yield
    except Stopped:
        kept.append("run.json")
        raise
    finally:
        if run.saved:
            run.publish()
        elif run.written_to == run.new:
            shutil.rmtree(run.new, ignore_errors=True)
        else:
            run.discard(*kept)


def claim_output(out: str | os.PathLike, name: str) -> Run:
    "A run to write predictions into; earlier predictions of the same checkpoint are replaced."
    run = Run(_make_folder(out), name)
    _check_folder(run)
    return run


def _make_folder(out) -> Path:
    "Make the output folder and test that it is writable now, not after the first epoch."
    out = Path(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / f".{os.getpid()}.tmp"
        probe.touch()
        probe.unlink()
    except OSError as e:
        raise UserError(f"output folder {out} cannot be written to ({e.strerror}): choose another with --out") from None
    return out
