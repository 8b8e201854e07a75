#!/usr/bin/env python
"""What each part of the recipe is worth: every part taken away in turn, and added alone to the baseline.

    python benchmarks/score.py -d DIR --arch A --weights W --table parts

Each row is one first stage in a new process, from the same images for the same number of epochs; the table
gives the score on the validation rows (mean squared error, pixels of the images as stored) as a ratio to the first
row's. Small differences want `--seeds 3`. The defaults take about two minutes a row on one core; `--jobs` runs side by
side, each on its share of the cores.
"""

import argparse
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from landmarks_fastai.runs.checkpoint import read_checkpoint  # noqa: E402
from landmarks_fastai.settings import FITS, LOSSES, RECIPES, Settings  # noqa: E402

# part -> its settings: the baseline's value switches it off, the default switches it on
PARTS = {
    "mean start": ["init_head"],
    "rates": ["lr", "head_lr_mult"],
    "start and rates": ["init_head", "lr", "head_lr_mult"],
    "augmentation": ["aug"],
    "mirror": ["mirror"],
    "average": ["ema"],
    "second pass": ["align"],
}


def flags(settings: dict) -> list[str]:
    return [word for k, v in settings.items() for word in (f"--{k.replace('_', '-')}", str(v))]


def one(flag: str, values) -> dict[str, list[str]]:
    return {f"{flag} {v}": [flag, str(v)] for v in values}


def tables() -> dict[str, dict[str, list[str]]]:
    "Table -> row -> flags of train.py; the first row is what the others are compared with."
    off = RECIPES["baseline"]
    on = {k: getattr(Settings, k) for k in off}
    minus = {f"without {part}": flags({k: off[k] for k in names}) for part, names in PARTS.items()}
    plus = {
        f"baseline + {part}": ["--recipe", "baseline", *flags({k: on[k] for k in names})]
        for part, names in PARTS.items()
    }
    return {
        "parts": {"defaults": []} | minus,
        "baseline": {"baseline": ["--recipe", "baseline"]} | plus,
        "crops": {"defaults": []} | one("--align", (1.15, 1.5)) | one("--whole-pct", (0.1, 0.5)),
        "degrade": {"defaults": []} | one("--degrade", (0.1, 0.25)),
        "losses": {"defaults": []} | one("--loss", [v for v in LOSSES if v != Settings.loss]),
        "fits": {"defaults": []} | one("--fit", [v for v in FITS if v != Settings.fit]),
        "aug": {"defaults": []} | one("--aug", (0.5, 1.5, 2)),
        "ema": {"defaults": []} | one("--ema", (0.9, 0.98, 0.995, 0.998)),
        "rates": {"defaults": []} | one("-lr", ("3e-4", "1e-3", "4e-3")) | one("--head-lr-mult", (0.003, 0.1, 1)),
        "sched": {"defaults": []} | {"--sched onecycle -lr 4e-3": ["--sched", "onecycle", "-lr", "4e-3"]}
        | one("--sched", ("onecycle",)),
    }  # fmt: skip


def run(args, row: str, words: list[str], seed: int) -> tuple[float, float]:
    "One first stage: its score, and that of the flip test (the same where there is no flip map)."
    name = re.sub(r"[^\w.]+", "_", f"{row}_{seed}")
    threads = max(1, (os.cpu_count() or 1) // args.jobs)
    command = [
        sys.executable, "-W", "ignore", str(ROOT / "train.py"), "-d", args.data, "--arch", args.arch, "--weights", args.weights,
        "--size", str(args.size), "-e", str(args.epochs), "--seed", str(seed), "--workers", "0", "-n", name, "--overwrite",
        "--out", args.out, *words,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": str(threads)})
    if done.returncode:
        raise SystemExit(f"{row}: {done.stderr.strip()}")
    score = read_checkpoint(Path(args.out) / name / "best.pth").score
    second = re.search(r"flip test it scores ([\d.]+)", done.stdout)
    print(f"# {row}, seed {seed}: {score:.4g}", file=sys.stderr, flush=True)
    return score, float(second[1]) if second else score


def main():
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("-d", "--data", required=True, help="folder in the competition's layout")
    parser.add_argument("--arch", default="resnet18")
    parser.add_argument("--weights", default="none")
    parser.add_argument("--table", choices=tables(), nargs="+", default=["parts"])
    parser.add_argument("--rows", default="", help="only rows whose name matches this expression, and the first")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("-e", "--epochs", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", default="runs/benchmark")
    args = parser.parse_args()
    known = {}  # the first row stands in every table
    for title in args.table:
        rows = tables()[title]
        first = next(iter(rows))
        rows = {k: v for k, v in rows.items() if k == first or re.search(args.rows, k)}
        measure(args, rows, known)
        print(f"\n{title}: {args.arch}, {args.size} px, {args.epochs} epochs, seeds 0 to {args.seeds - 1}\n")
        print_table(args, rows, known)


def measure(args, rows: dict, known: dict):
    "Run what is not known yet, `--jobs` side by side."
    jobs = [(row, words, seed) for row, words in rows.items() for seed in range(args.seeds)]
    new = [job for job in jobs if (tuple(job[1]), job[2]) not in known]
    with ThreadPoolExecutor(args.jobs) as pool:
        for job, scores in zip(new, pool.map(lambda job: run(args, *job), new), strict=True):
            known[tuple(job[1]), job[2]] = scores


def print_table(args, rows: dict, known: dict):
    print("| row | score | lowest, highest | ratio | with the flip test |\n| --- | --- | --- | --- | --- |")
    base = None
    for row, words in rows.items():
        once, twice = zip(*(known[tuple(words), seed] for seed in range(args.seeds)), strict=True)
        base = base or mean(once)
        spread = f"{min(once):.4g}, {max(once):.4g}" if args.seeds > 1 else ""
        print(f"| {row} | {mean(once):.4g} | {spread} | {mean(once) / base:.2f} | {mean(twice):.4g} |", flush=True)


if __name__ == "__main__":
    main()
