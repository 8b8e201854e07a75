"A comparison: `python -m landmarks_fastai.compare -d DIR -n NAME --arch resnet18 resnet34 --seeds 3`."

import argparse
import itertools
import json
import os
import re
import shlex
import sys
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from landmarks_fastai.cli import app, finetune, options, train
from landmarks_fastai.cli.processes import Runner
from landmarks_fastai.cli.search import JOURNAL, Search
from landmarks_fastai.errors import UserError
from landmarks_fastai.runs import run as runs
from landmarks_fastai.runs.claim import process_lock
from landmarks_fastai.runs.run import PLAN, flags_of, setting_of
from landmarks_fastai.utils.files import write_text

if TYPE_CHECKING:
    import pandas as pd

LATER = {*runs.MACHINE, "minutes"}  # flags that the later stages of a run get, too


class Parser(options.Parser):
    "The flags of a comparison itself; those of the script are parsed once a combination. Raises `UserError`."

    raises = True

    def __init__(self):
        super().__init__(
            "Compare settings: any flag of train.py with several values; with -pm NAME, any flag of finetune.py.\n"
            "A switch takes the values on and off: --freeze off on.\n\n"
            "  python -m landmarks_fastai.compare -d DIR -n heads --head linear 512,relu --opt adamw adam --seeds 3\n\n"
            "compares the first values (linear, adamw) with each other value, one factor at a time. Each combination is a run\n"
            "in OUT/NAME; one that fails is recorded, and the rest go on. After a stop, the same command continues.\n"
            "--suggest 20 --minutes 5 searches instead: learning rate, decay, size, augmentation, head, and flags with several values.",
            "Writes leaderboard.csv, leaderboard.md and leaderboard.html into OUT/NAME, again after every run.",
        )
        add, count = self.add_argument, options.number(int, 1, 1000, "number from 1 to 1000")
        add("-n", "--name", required=True, help="name of the comparison and of its folder")
        add("--grid", action="store_true", help="all combinations (default: one factor at a time)")
        about = "search: runs in all, whose settings Optuna suggests; a flag with one value is fixed"
        add("--suggest", type=count, metavar="N", help=about)
        add("--seeds", type=count, default=1, metavar="N", help="runs of each combination (default: 1)")
        add("--seed", type=int, default=0, metavar="N", help="random seed of the first; others count on (default: 0)")
        about = "stages of a run; the later ones as finetune.py makes them without flags (default: 1)"
        add("--stages", type=count, default=1, metavar="N", help=about)
        about = "runs side by side, each with its share of the cores (default: 1; with --gpu, one on each GPU)"
        add("--jobs", type=count, metavar="N", help=about)
        add("--show", action="store_true", help="write and print the leaderboard as it is now; run nothing")
        add("--out", default=runs.OUT, metavar="DIR", help=f"output folder (default: {runs.OUT})")


def split_flags(words: Sequence[str]) -> dict[str, list[str]]:
    "Flag -> values, of a command line. Raises `UserError` for a word before the first flag."
    flags: dict[str, list[str]] = {}
    flag = ""
    for word in words:
        if word[:1] == "-":
            flag, *value = word.split("=", 1)
            flags[flag] = value
        elif flag:
            flags[flag].append(word)
        else:
            raise UserError(f"unrecognized argument: {word}")
    return {flag: list(dict.fromkeys(values)) for flag, values in flags.items()}


def parser_of(script: str) -> options.Parser:
    parser = train.train_parser() if script == "train.py" else finetune.finetune_parser()
    parser.raises = True
    return parser


def fixed_flags(run: dict[str, Any]) -> dict[str, Any]:
    "The flags of a run that another start may not change."
    typed = options.typed_flags(parser_of(run["script"]).parse_args(run["words"]))
    return {name: value for name, value in typed.items() if name not in runs.MACHINE}


def make_plan(args: argparse.Namespace, flags: dict[str, list[str]]) -> dict[str, Any]:
    """The runs of a comparison, in the order in which they start, and the values to compare with each other.

    Raises `UserError` for a flag or value that the script refuses.
    """
    later = flags.keys() & set(flags_of("pretrained_model"))
    script = "finetune.py" if later else "train.py"
    parser = parser_of(script)
    flags |= {k: [os.path.abspath(runs.find_checkpoint_file(name, args.out)) for name in flags[k]] for k in later}

    varied = {flag: values for flag, values in flags.items() if len(values) > 1}
    first = {flag: values[0] for flag, values in varied.items()}
    combinations = [first, *(first | {flag: value} for flag, values in varied.items() for value in values[1:])]
    if args.grid:
        combinations = [dict(zip(varied, values, strict=True)) for values in itertools.product(*varied.values())]

    def label(values: dict[str, str]) -> str:  # those that are not the first ones, or all
        changed = {flag: value for flag, value in values.items() if value != first[flag]} or values
        return " ".join(f"{flag} {value}" for flag, value in changed.items()) or script

    planned = []
    for seed, values in itertools.product(range(args.seed, args.seed + args.seeds), combinations):
        chosen = {flag: [value] for flag, value in values.items()} | {"--seed": [str(seed)]}
        words = options.words_of(parser, flags | chosen)
        typed = options.typed_flags(parser.parse_args(words))
        if not later:
            train.first_settings(typed)
        # of a long one the end, where paths differ
        text = re.sub("(^| )-+", " ", label(values)).strip().encode()[-150:].decode(errors="ignore")
        name = f"{runs.plain_name(text)}_seed_{seed}"
        stages = [name, *(f"{name}_stage_{k}" for k in range(2, args.stages + 1))]
        about = {"label": label(values), "values": values, "seed": seed, "minutes": typed.get("minutes", 0)}
        planned.append(about | {"script": script, "words": words, "stages": stages, "failed": ""})
    if len(planned) < 2:
        raise UserError("nothing to compare: give a flag several values, as --arch resnet18 resnet34, or --seeds 3")
    if len({run["stages"][0] for run in planned}) < len(planned):
        raise UserError("two combinations would have the same name of a run: compare them by themselves")
    groups = {"": {run["label"]: run["label"] for run in planned}}
    if not args.grid and len(varied) > 1:
        groups = {flag: {v: label(first | {flag: v}) for v in values} for flag, values in varied.items()}
    kept = {k: v[:1] for k, v in flags.items() if setting_of(k) in LATER}
    return {"groups": groups, "later": options.words_of(parser, kept), "runs": planned}


def check_earlier(folder: Path, plan: dict[str, Any], search: bool) -> None:
    "Raise `UserError` if the folder has another comparison, or runs of this one that were started with other flags."
    searched = (folder / JOURNAL).exists()
    before: list[dict[str, Any]] = runs.read_plan(folder)["runs"] if folder.exists() and not searched else []
    if folder.exists() and searched != search:
        raise UserError(f"-n {folder.name} is {'a search' if searched else 'a comparison'}: choose another name")
    started = {run["stages"][0]: run for run in before if any((folder / name).exists() for name in run["stages"])}
    if not search and started and not started.keys() & {run["stages"][0] for run in plan["runs"]}:
        raise UserError(
            f"-n {folder.name} compares others, as {next(iter(started))}: choose another name, or the same flags"
        )
    for run in plan["runs"]:
        was = started.get(run["stages"][0]) or run
        if fixed_flags(was) != fixed_flags(run):
            about = f"its run {run['stages'][0]} was started with {shlex.join(was['words'])}"
            raise UserError(f"-n {folder.name}: {about}: choose another name, or the same flags")


def run_comparison(words: Sequence[str]) -> "tuple[Path, pd.DataFrame]":
    "Run what is missing of the comparison of a command line; return its folder and leaderboard. Raises `UserError`."
    flags, rest = split_flags(words), Parser().parse_known_args(words)[1]
    # not `rest` alone: of --size 64 --seeds 2 3, it would be --size 64 3
    ours = [[flag, *flags.pop(flag)] for flag in flags.keys() - {word.split("=")[0] for word in rest}]
    args = Parser().parse_args([*itertools.chain(*ours)])

    from landmarks_fastai.inference.leaderboard import write_leaderboard

    folder = Path(args.out, args.name)
    if not runs.is_plain_name(args.name):
        raise UserError(f"-n {args.name!r} is not a plain file name: choose a short name without / and other marks")
    if args.show:
        return folder, write_leaderboard(folder)
    if flags.keys() & {"--overwrite", "--resume"}:
        raise UserError("--overwrite and --resume are for a single run: the same command continues a comparison")
    search = Search(args, flags) if args.suggest else None
    plan: dict[str, Any] = {"runs": []} if search else make_plan(args, flags)
    plan["command"] = f"python -m landmarks_fastai.compare {shlex.join(words)}"
    os.makedirs(args.out, exist_ok=True)
    with process_lock(Path(args.out, f".{args.name}.lock")) as locked:
        if not locked:
            raise UserError(f"-n {args.name}: another process is running it: let it end; --show shows what there is")
        check_earlier(folder, plan, bool(search))
        if search:
            search.open(folder)

        def save() -> None:
            plan.update(search.plan() if search else {})
            write_text(folder / PLAN, json.dumps(plan, indent=1))
            write_leaderboard(folder)

        save()
        Runner(folder, plan, args.jobs, search).run(save)
        return folder, write_leaderboard(folder)


def compare(name: str, **flags: Any) -> "pd.DataFrame":
    """Run what is missing of a comparison, as `python -m landmarks_fastai.compare -n NAME`; return its `leaderboard`.

    `flags` are those of the command, by name: a value, or a list of values to compare, as in
    `compare("heads", data="faces", head=["linear", "512,relu"], freeze=[False, True], seeds=3)`. The line of a run that fails is in
    the column `failed`. Raises `UserError` for a flag or value that is refused, and while another process runs it.
    """
    words = ["-n", str(name)]
    for flag, value in flags.items():
        if value is None or (value is False and flag in ("grid", "show")):
            continue
        values = value if isinstance(value, Iterable) and not isinstance(value, str) else [value]
        texts = [("off", "on")[v] if isinstance(v, bool) else str(v) for v in values]
        words += [flags_of(flag)[0], *texts] if value is not True else [flags_of(flag)[0]]
    return run_comparison(words)[1]


def main() -> None:
    folder, board = run_comparison(sys.argv[1:])
    print(f"\n{(folder / 'leaderboard.md').read_text(encoding='utf-8')}\nlook at {folder / 'leaderboard.html'}")
    if failed := sum(board["failed"] != ""):
        raise UserError(f"{failed} combinations have runs that failed: their output is in the .log files of {folder}")


command = partial(app.run_main, main)
