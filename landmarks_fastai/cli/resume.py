"The flag --resume: the flags of the first start are stored in run.json. Nothing heavy is imported here."

import argparse
import os
import sys
from pathlib import Path

from landmarks_fastai.errors import UserError
from landmarks_fastai.runs.claim import check_name, lock
from landmarks_fastai.runs.run import Record, Run, checkpoint_places, read_record, stopped_runs

FLAGS = {  # setting -> its flags, if they are not --its-name
    "batch_size": ("-b", "--batch-size"),
    "epochs": ("-e", "--epochs"),
    "lr": ("-lr", "--lr", "--learning-rate"),
    "data": ("-d", "--data"),
}
NOT_STORED = ("name", "out", "overwrite", "resume", "script")
UNTYPED = object()  # value of a flag that is not on the command line


def flag_of(name: str) -> str:
    "The flag of a setting."
    return "-pm" if name == "pretrained_model" else FLAGS.get(name, ("--" + name.replace("_", "-"),))[0]


def record_of(args: argparse.Namespace) -> Record:
    "The record of a start: its parsed flags, with absolute paths."
    stored = {k: v for k, v in vars(args).items() if k not in NOT_STORED}
    return Record(args.script, {k: _absolute(k, v) for k, v in stored.items()})


def _absolute(name, value):
    is_path = name in ("data", "pretrained_model") or (name == "weights" and value not in ("imagenet", "none"))
    return os.path.abspath(value) if is_path and value is not None else value


def resumed(parser: argparse.ArgumentParser, args: argparse.Namespace, words: list[str]) -> argparse.Namespace:
    """The flags that the run was started with; `args` if there is no such run yet.

    Raises `UserError` for a flag that differs from the start. Exits with code 0 if the run is finished.
    """
    if not args.name or args.overwrite:
        stopped = f"stopped runs in {args.out}: {stopped_runs(args.out)}"
        raise UserError(f"--resume needs -n NAME, and excludes --overwrite; {stopped}")
    check_name(args.name, args.out)
    run = Run(args.out, args.name)
    if run.old.exists():
        with lock(run) as locked:
            if locked:
                run.repair()
    record = read_record(run)
    if record is None:
        _check_start(args)
        return args
    if record.script != args.script:
        command = Run(args.out, args.name, record).resume_command
        raise UserError(f"-n {args.name} was started by {record.script}: {command}")
    if record.ended:
        print(f"run {run.name} is finished, nothing is left to resume; its best is {run.file('best.pth')}")
        run.file("state.safetensors").unlink(missing_ok=True)
        sys.exit(0)
    known = record.args.keys() | set(NOT_STORED) == vars(args).keys()
    if not known or not all(isinstance(v, (str, int, float, type(None))) for v in record.args.values()):
        hint = f"holds other flags than {record.script} has: start over with --overwrite"
        raise UserError(f"{run.file('run.json')} {hint}")
    _check_typed(parser, words, record, args.out)
    return argparse.Namespace(**vars(args) | record.args)


def _check_start(args):
    "Raise `UserError` if there is no run of that name, and the flags do not say what to start."
    if (Path(args.out) / f"{args.name}_run.json").exists():
        why = "is a run of an earlier version, which this one cannot resume"
        raise UserError(f"-n {args.name} {why}: start over with --overwrite")
    if args.data is None and not getattr(args, "pretrained_model", None):
        stopped = f"no such run in {args.out}, stopped runs there: {stopped_runs(args.out)}"
        raise UserError(f"-n {args.name}: {stopped}; to start it, give -d too")


def _check_typed(parser, words, record: Record, out):
    "Raise `UserError` for a flag on the command line that differs from the run's start."
    typed = parser.parse_args(words, argparse.Namespace(**dict.fromkeys(record.args, UNTYPED)))
    for name, was in record.args.items():
        value = getattr(typed, name)
        if value is UNTYPED or _absolute(name, value) == was:
            continue
        if name == "pretrained_model" and os.path.realpath(was) in map(os.path.realpath, checkpoint_places(value, out)):
            continue
        flag = flag_of(name)
        raise UserError(
            f"{flag} {value}: --resume continues with the flags that the run was started with "
            f"({flag} was {'not given' if was is None else was}): run without {flag}, or start over with --overwrite"
        )
