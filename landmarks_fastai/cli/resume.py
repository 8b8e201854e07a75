"What `--resume` goes on with: the flags that run.json stores. Nothing heavy is imported here."

import argparse
import os
import sys
from pathlib import Path

from landmarks_fastai.errors import UserError
from landmarks_fastai.runs.claim import check_name, lock
from landmarks_fastai.runs.run import Record, Run, checkpoint_places, read_record, stopped_runs

FLAGS = {  # setting -> how it is typed, where that is not --its-name
    "batch_size": ("-b", "--batch-size"),
    "epochs": ("-e", "--epochs"),
    "lr": ("-lr", "--lr", "--learning-rate"),
    "data": ("-d", "--data"),
}
NOT_STORED = ("name", "out", "overwrite", "resume", "script")  # of the start, not of the run
UNTYPED = object()


def flag_of(name: str) -> str:
    "How a setting is typed."
    return "-pm" if name == "pretrained_model" else FLAGS.get(name, ("--" + name.replace("_", "-"),))[0]


def record_of(args: argparse.Namespace) -> Record:
    "What run.json says of a start: its flags as they were parsed, with what they name in this folder made absolute."
    stored = {k: v for k, v in vars(args).items() if k not in NOT_STORED}
    return Record(args.script, {k: _absolute(k, v) for k, v in stored.items()})


def _absolute(name, value):
    is_path = name in ("data", "pretrained_model") or (name == "weights" and value not in ("imagenet", "none"))
    return os.path.abspath(value) if is_path and value is not None else value


def resumed(parser: argparse.ArgumentParser, args: argparse.Namespace, words: list[str]) -> argparse.Namespace:
    """The flags that the run was started with, or those typed, where nothing of the run is there.

    Raises `UserError` for a flag that differs from the run's start. Ends the program where the run is finished.
    """
    if not args.name or args.overwrite:
        there = stopped_runs(args.out) or "none"
        raise UserError(f"--resume goes with -n NAME, and not with --overwrite; stopped runs in {args.out}: {there}")
    check_name(args.name, args.out)
    run = Run(args.out, args.name)
    if run.old.exists():
        with lock(run) as taken:
            if taken:
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
    kinds = (str, int, float, type(None))
    if record.args.keys() | set(NOT_STORED) != vars(args).keys() or not all(
        isinstance(v, kinds) for v in record.args.values()
    ):
        raise UserError(
            f"{run.file('run.json')} holds other flags than {record.script} has: start over with --overwrite"
        )
    _check_typed(parser, words, record, args.out)
    return argparse.Namespace(**vars(args) | record.args)


def _check_start(args):
    "Raise `UserError` where nothing of the run is there and what was typed does not tell what to start."
    if (Path(args.out) / f"{args.name}_run.json").exists():
        raise UserError(
            f"-n {args.name} is a run of an earlier version, which this one cannot resume: start over with --overwrite"
        )
    if any(Path(args.out).glob("[!.]*/run.json")) and args.data is None and not getattr(args, "pretrained_model", None):
        there = stopped_runs(args.out) or "none"
        raise UserError(
            f"-n {args.name}: nothing of that run is in {args.out}, stopped runs there: {there}; to start it, give -d too"
        )


def _check_typed(parser, words, record: Record, out):
    "Raise `UserError` for a flag that was typed and differs from the run's start."
    typed = parser.parse_args(words, argparse.Namespace(**dict.fromkeys(record.args, UNTYPED)))
    for name, was in record.args.items():
        value = getattr(typed, name)
        if value is UNTYPED or _absolute(name, value) == was:
            continue
        if name == "pretrained_model" and os.path.realpath(was) in map(os.path.realpath, checkpoint_places(value, out)):
            continue
        flag = flag_of(name)
        raise UserError(
            f"{flag} {value}: --resume goes on with the flags that the run was started with "
            f"({flag} was {'not given' if was is None else was}): run without {flag}, or start over with --overwrite"
        )
