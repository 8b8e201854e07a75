"Starting and ending a run: its name, the lock that one process holds, and the files that are left when it ends."

import errno
import hashlib
import itertools
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from landmarks_fastai.errors import UserError
from landmarks_fastai.runs import run as runs
from landmarks_fastai.runs.run import Record, Run, flags_of, is_plain_name, read_record, stopped_runs
from landmarks_fastai.utils.distributed import broadcast, is_first, process_ended
from landmarks_fastai.utils.files import reason, remove_temporary_files, rename
from landmarks_fastai.utils.signals import UNREAD, Stopped

NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}  # of a file system without locks


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
    Raises `UserError` for a name that is taken, not a plain file name, or used by a running process, and for a flag of a
    resumed run that differs from its start. Exits with 0 if that run is finished. Of the processes of torchrun the first
    locks the run.
    """
    if not is_first():
        run: Run | None = broadcast()
        if run is None:
            sys.exit(0)
        if not (run.folder / "run.json").exists():
            raise UserError(f"{run.folder} of the first process is not on this machine: --out must be a shared folder")
        with _ending(run):
            yield run
        return
    if resume and (overwrite or name is None):
        raise UserError(f"--resume needs -n NAME, and excludes --overwrite; stopped runs in {out}: {stopped_runs(out)}")
    with _locked_run(Path(out), name, runs.plain_name(default_name)) as run:
        record = _checked_record(run, record, overwrite, resume)
        with _ending(run):
            if overwrite and run.folder.exists():
                run.overwrites = True
                rename(run.folder, run.old)
            elif not run.saved:
                run.discard("run.json")
            run.write_record(record)
            broadcast(run)
            yield run
        run.write_record(replace(run.record, ended=True))
        (run.folder / "state.safetensors").unlink(missing_ok=True)


@contextmanager
def _locked_run(out: Path, name: str | None, base: str) -> Iterator[Run]:
    "Lock the run of that name; if `name` is None, the first free name that begins with `base`."
    if name is not None and not is_plain_name(name):  # others may leave the output folder, or are hidden
        raise UserError(
            f"-n {name!r} is not a plain file name: runs are written into {out}, choose a short name without / \\ : * ? "
            '" < > | and without a dot at its start'
        )
    _make_folder(out)
    for k in itertools.count(1):
        run = Run(out, name or (base if k == 1 else f"{base}_{k}"))
        with process_lock(out / f".{run.name}.lock") as locked:  # beside the folder, which --overwrite renames
            if name and not locked:
                raise UserError(f"-n {name}: another process is running it: let it end, or choose another name")
            if name:
                _check_folder(run)
            if locked:
                run.repair()
            if locked and (name or _is_free(run)):
                yield run
                return


@contextmanager
def process_lock(path: Path) -> Iterator[bool]:
    """Hold the lock file `path` for the time of the block; yield whether this process got it.

    filelock closes the file in forked processes, so the workers of a killed run do not hold it. A file system without
    locks grants every lock. Raises `UserError` if the file cannot be opened.
    """
    from filelock import FileLock, Timeout  # not at the top: predictions do without it

    lock, held = FileLock(path, blocking=False, fallback_to_soft=False), True
    try:
        lock.acquire()
    except Timeout:
        held = False
    except OSError as e:
        if e.errno not in NO_LOCKS:
            hint = "move it away, or choose another --out"
            raise UserError(f"{path} cannot be opened ({reason(e)}): {hint}") from None
    try:
        yield held
    finally:
        if held:
            with suppress(OSError):  # Windows cannot remove an open file: there `release` removes it
                path.unlink(missing_ok=True)
        lock.release()


def _checked_record(run: Run, record: Record, overwrite: bool, resume: bool) -> Record:
    "The record to start a run with, or to resume it. Raises `UserError` for a name that is taken, and like `_resumed`."
    run.record = previous = None if overwrite else read_record(run)
    unfinished = previous is not None and not previous.ended
    if resume and previous:
        record = _resumed(run, previous, record)
    elif resume and not record.flags.keys() & {"data", "pretrained_model"}:
        stopped = f"no such run in {run.out}, stopped runs there: {stopped_runs(run.out)}"
        raise UserError(f"-n {run.name}: {stopped}; to start it, give -d too")
    elif not (overwrite or _is_free(run) or (unfinished and not run.saved)):
        hint = "choose another, or --overwrite to replace it"
        if unfinished:
            hint = f"resume it with {run.resume_command}; or {hint}"
        raise UserError(f"-n {run.name}: {run.out} already has a run of that name: {hint}")
    if record.checkpoint and run.folder.resolve() in Path(record.checkpoint).resolve().parents:
        raise UserError(f"-n {run.name} is the run that -pm loads: choose another name")
    return replace(record, digest=_digest(record.checkpoint))


def _resumed(run: Run, previous: Record, record: Record) -> Record:
    "The record of the start, with flags of the machine from this one. Exits with 0 if the run is finished."
    if previous.script != record.script:
        raise UserError(f"-n {run.name} was started by {previous.script}: {run.resume_command}")
    if previous.ended:
        print(f"run {run.name} is finished, nothing is left to resume; its best is {run.folder / 'best.pth'}")
        (run.folder / "state.safetensors").unlink(missing_ok=True)
        broadcast(None)
        sys.exit(0)
    for name, typed in record.flags.items():
        default = (previous.settings or {}).get(name)
        was = previous.flags.get(name, default)
        same = typed in (was, default) or os.path.realpath(str(typed)) == os.path.realpath(str(was))
        if not same and name not in {*runs.MACHINE, "data", "pretrained_model"}:  # the same content may be elsewhere
            flag = flags_of(name)[0]
            raise UserError(
                f"{flag} {typed}: --resume continues with the flags that the run was started with "
                f"({flag} was {'not given' if was is None else was}): run without {flag}, or start over with --overwrite"
            )
    checkpoint = record.checkpoint or previous.checkpoint
    if run.saved and previous.digest != _digest(checkpoint):
        changed = f"{checkpoint} is not the checkpoint that {run.name} was started from"
        raise UserError(f"{changed}: restore it, or start over with --overwrite")
    return replace(previous if run.saved else record, flags=previous.flags | record.flags)


def _is_free(run: Run) -> bool:
    return not os.path.lexists(run.folder) or {p.name for p in run.folder.glob("*")} <= {runs.LISTING}


def _check_folder(run: Run) -> None:
    "Raise `UserError` if a folder or file of that name is not a run: --overwrite would delete it."
    names = {p.name for p in run.folder.glob("*")}
    if os.path.lexists(run.folder) and not (run.folder.is_dir() and (not names or names & runs.RUN_FILES)):
        raise UserError(f"{run.folder} exists and is not the folder of a run: choose another name, or another --out")


def _digest(path: str) -> str:
    if not path:
        return ""
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError as e:
        raise UserError(f"{path} cannot be read ({reason(e)}): if it is elsewhere now, say so with -pm") from None


@contextmanager
def _ending(run: Run) -> Iterator[None]:
    "Add the resume command to the message of a run that fails or is stopped; undo a run that has saved nothing."
    kept = [runs.LISTING]
    try:
        yield
    except (KeyboardInterrupt, BrokenPipeError, RuntimeError) as e:
        if isinstance(e, RuntimeError) and not process_ended(e):
            raise
        kept.append("run.json")
        text = f"{'the state is saved' if run.saved else 'nothing was saved yet'}; resume with: {run.resume_command}"
        if run.overwrites:
            text = "nothing was saved yet; the run that was to be overwritten is unchanged"
        if process_ended(e):
            raise Stopped(f"another process of the run has ended; {text}", 1) from None
        raise Stopped(text, getattr(e, "code", UNREAD if isinstance(e, BrokenPipeError) else 130)) from None
    except UserError as e:
        if run.saved and "--overwrite" not in str(e):
            e.hint = f"then resume with: {run.resume_command}"
        raise
    finally:
        if is_first() and run.old.exists():
            run.repair()
        elif is_first() and not run.saved:
            run.discard(*kept)


def claim_output(out: str | os.PathLike, name: str) -> Run:
    "A run to write predictions into; earlier predictions of the same checkpoint are replaced."
    _make_folder(out)
    run = Run(out, name)
    remove_temporary_files(run.folder)  # of a prediction that was killed
    if not {path.name for path in run.folder.glob("*")} <= {runs.OVERLAY}:  # all that a stopped one may have left
        _check_folder(run)
    return run


def _make_folder(out: str | os.PathLike) -> None:
    try:
        os.makedirs(out, exist_ok=True)
    except OSError as e:
        raise UserError(f"output folder {out} cannot be written to ({e.strerror}): choose another with --out") from None
