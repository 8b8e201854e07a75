"A comparison: `python -m landmarks_fastai.compare -d DIR -n NAME --arch resnet18 resnet34 --seeds 3`."

import argparse
import itertools
import json
import os
import queue
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from landmarks_fastai.cli import app, finetune, options, train
from landmarks_fastai.cli.search import JOURNAL, Search
from landmarks_fastai.errors import UserError, one_line
from landmarks_fastai.runs import run as runs
from landmarks_fastai.runs.claim import process_lock
from landmarks_fastai.runs.run import PLAN, flags_of, results_of
from landmarks_fastai.utils.files import write_text
from landmarks_fastai.utils.hardware import available_cores, gpu_count

if TYPE_CHECKING:
    import pandas as pd

LATER = {*runs.MACHINE, "minutes"}  # flags that the later stages of a run get, too
PACKAGES = str(Path(__file__).resolve().parents[2])


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


def make_plan(args: argparse.Namespace, flags: dict[str, list[str]]) -> dict[str, Any]:
    """The runs of a comparison, in the order in which they start, and the values to compare with each other.

    Raises `UserError` for a flag or value that the script refuses.
    """
    later = flags.keys() & set(flags_of("pretrained_model"))
    script = "finetune.py" if later else "train.py"
    parser = finetune.finetune_parser() if later else train.train_parser()
    parser.raises = True
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
        name = f"{runs.plain_name(re.sub('(^| )-+', ' ', label(values)).strip())[:150]}_seed_{seed}"
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
    kept = {k: v[:1] for k, v in flags.items() if re.sub("^--(no-)?", "", k).replace("-", "_") in LATER}
    return {"groups": groups, "later": options.words_of(parser, kept), "runs": planned}


def run_all(
    folder: Path, plan: dict[str, Any], jobs: int | None, finished: Callable[[], None], search: Search | None
) -> None:
    "Run what is not finished, and call `finished` after each run. A signal stops the processes; they save their states."
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if "--gpu" in plan["later"] else [""]
    gpus = gpus if gpus[0] or "--gpu" not in plan["later"] else [*map(str, range(gpu_count()))] or [""]
    jobs, places, processes, stopping = jobs or len(gpus), queue.SimpleQueue(), [], threading.Event()
    share = max(1, available_cores() // jobs)
    machine = [] if os.environ.get("OMP_NUM_THREADS") else ["--threads", str(share)]  # words after these replace them
    machine += ["--workers", str(min(8, share if gpus[0] else share // 2 if share > 2 else 0))]
    for k in range(jobs):
        places.put(gpus[k % len(gpus)])
    missing = search.todo if search else [run for run in plan["runs"] if not results_of(folder, run["stages"])]
    minutes = [run["minutes"] * len(run["stages"]) / jobs for run in missing]
    about = search.about if search else dict.fromkeys(run["label"] for run in plan["runs"])
    print("\n".join(f"  {line}" for line in about))
    long = f"{sum(minutes):.3g} minutes" if all(minutes) else "for as long as their epochs take"
    print(f"{len(plan['runs'])} runs in {folder}, {len(missing)} of them to do, {jobs} at a time, {long}", flush=True)

    def run_one(run: dict[str, Any]) -> str:
        "Run the stages of a run that are not finished; return the line of what failed."
        gpu, line = places.get(), ""
        try:
            watch = search.begin(run) if search else None
            script, words = run["script"], run["words"]
            for name in run["stages"]:
                if not line and not results_of(folder, [name]):
                    line = run_stage(script, name, [*machine, *words], gpu, watch)
                script, words = "finetune.py", ["-pm", str(folder / name / "best.pth"), *plan["later"]]
            return search.end(run, line) if search and not stopping.is_set() else line
        finally:
            places.put(gpu)

    def run_stage(script: str, name: str, words: list[str], gpu: str, watch: Callable[[], bool] | None) -> str:
        "Run a stage in a process, whose output is added to NAME.log; return its error's line. `watch` may stop it."
        locked = True
        while locked and not stopping.wait(0.2):  # the process of a comparison that was killed saves its state
            with process_lock(folder / f".{name}.lock") as free:
                locked = not free
        if stopping.is_set():
            return "stopped"
        resume = ["--resume"] if (folder / name / "run.json").exists() else []
        code = f"from {__name__} import stage_process; stage_process({script.removesuffix('.py')!r})"
        command = [sys.executable, "-c", code, *words, "-n", name, "--out", str(folder), *resume]
        env = {"PYTHONPATH": os.pathsep.join(filter(None, [PACKAGES, os.environ.get("PYTHONPATH")]))}
        env |= {"CUDA_VISIBLE_DEVICES": gpu} if gpu else {}
        with open(folder / f"{name}.log", "a+", encoding="utf-8", errors="replace") as log:
            begin = log.seek(0, os.SEEK_END)
            # in a session of its own: it gets a Ctrl-C once, by the end of its stdin
            files = {"stdin": subprocess.PIPE, "stdout": log, "stderr": log, "start_new_session": True}
            process: Any = subprocess.Popen(command, env=os.environ | env, **files)
            processes.append(process)
            if stopping.is_set():
                process.stdin.close()
            while watch and process.poll() is None and not stopping.is_set():
                if watch():
                    process.stdin.close()
                with suppress(subprocess.TimeoutExpired):
                    process.wait(1)
            status = process.wait()
            log.seek(begin)
            lines = [line.strip() for line in log if line.strip()]
        if status < 0:
            return f"killed by signal {-status}, as the system does where memory is short"
        errors = [line.removeprefix("error: ") for line in lines if line.startswith(("error: ", "stopped: "))]
        return one_line((errors or lines or [f"exit code {status}"])[-1]) if status else ""

    begun = time.monotonic()
    with ThreadPoolExecutor(jobs) as pool:
        futures = {pool.submit(run_one, run): run for run in missing}
        try:
            for k, future in enumerate(as_completed(futures), 1):
                run, left = futures[future], (time.monotonic() - begun) / k * (len(missing) - k) / 60
                run["failed"] = future.result()
                said = run["failed"] or f"score {results_of(folder, run['stages'])['score']:.6g}"
                about = f"{run['label']}, seed {run['seed']}: {said}"
                print(f"{k} of {len(missing)}: {about}; {left:.1f} minutes left", flush=True)
                finished()
        except BaseException:
            stopping.set()
            pool.shutdown(wait=False, cancel_futures=True)
            for process in processes:
                process.stdin.close()
            print("stopping: the runs save their states, and the same command continues", file=sys.stderr, flush=True)
            raise


def stage_process(script: str) -> None:
    "What the process of a stage executes: the script, stopped as by SIGTERM when the comparison stops, or is killed."

    def stop_with_comparison() -> None:
        os.read(0, 1)  # nobody writes: it returns when the other end of the pipe is closed
        if getattr(signal.getsignal(signal.SIGTERM), "number", None) is None:  # a second signal would end it at once
            os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop_with_comparison, daemon=True).start()
    import_module(f"landmarks_fastai.cli.{script}").command()


def run_comparison(words: Sequence[str]) -> "tuple[Path, pd.DataFrame]":
    "Run what is missing of the comparison of a command line; return its folder and leaderboard. Raises `UserError`."
    args, rest = Parser().parse_known_args(words)

    from landmarks_fastai.inference.leaderboard import write_leaderboard

    folder = Path(args.out, args.name)
    if not runs.is_plain_name(args.name):
        raise UserError(f"-n {args.name!r} is not a plain file name: choose a short name without / and other marks")
    if args.show:
        return folder, write_leaderboard(folder)
    flags = split_flags(rest)
    if flags.keys() & {"--overwrite", "--resume"}:
        raise UserError("--overwrite and --resume are for a single run: the same command continues a comparison")
    search = Search(args, flags) if args.suggest else None
    plan: dict[str, Any] = {"runs": []} if search else make_plan(args, flags)
    plan["command"] = f"python -m landmarks_fastai.compare {shlex.join(words)}"
    os.makedirs(args.out, exist_ok=True)
    with process_lock(Path(args.out, f".{args.name}.lock")) as locked:
        if not locked:
            raise UserError(f"-n {args.name}: another process is running it: let it end; --show shows what there is")
        searched = (folder / JOURNAL).exists()
        before: list[dict[str, Any]] = runs.read_plan(folder)["runs"] if folder.exists() and not searched else []
        if folder.exists() and searched != bool(search):
            raise UserError(f"-n {args.name} is {'a search' if searched else 'a comparison'}: choose another name")
        words_before = {run["stages"][0]: run["words"] for run in before}
        for name, planned in ((run["stages"][0], run["words"]) for run in plan["runs"]):
            if words_before.get(name, planned) != planned:
                was = f"its run {name} was started with {shlex.join(words_before[name])}"
                raise UserError(f"-n {args.name}: {was}: choose another name, or the same flags")
        if search:
            search.open(folder)

        def save() -> None:
            plan.update(search.plan() if search else {})
            write_text(folder / PLAN, json.dumps(plan, indent=1))
            write_leaderboard(folder)

        save()
        run_all(folder, plan, args.jobs, save, search)
        return folder, write_leaderboard(folder)


def compare(name: str, **flags: Any) -> "pd.DataFrame":
    """Run what is missing of a comparison, as `python -m landmarks_fastai.compare -n NAME`; return its `leaderboard`.

    `flags` are those of the command, by name: a value, or a list of values to compare, as in
    `compare("heads", data="faces", head=["linear", "512,relu"], freeze=[False, True], seeds=3)`. The line of a run that fails is in
    the column `failed`. Raises `UserError` for a flag or value that is refused, and while another process runs it.
    """
    words = ["-n", name]
    for flag, value in flags.items():
        values = value if isinstance(value, (list, tuple)) else [value]
        texts = [("off", "on")[v] if isinstance(v, bool) else str(v) for v in values]
        words += [flags_of(flag)[0], *texts] if value is not True else [flags_of(flag)[0]]
    return run_comparison(words)[1]


def main() -> None:
    folder, board = run_comparison(sys.argv[1:])
    print(f"\n{(folder / 'leaderboard.md').read_text(encoding='utf-8')}\nlook at {folder / 'leaderboard.html'}")
    if failed := sum(board["failed"] != ""):
        raise UserError(f"{failed} combinations have runs that failed: their output is in the .log files of {folder}")


command = partial(app.run_main, main)
