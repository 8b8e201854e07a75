#!/usr/bin/env python
"""Few labelled images: the defaults, beside a sweep over length and schedule.

    python benchmarks/few.py -d DIR --arch A --weights W --rows 50 150 --seeds 3

Trains on the first rows of DIR (a fifth of them validates) and scores on the last fifth of all its rows, which no run sees
before; a subset that reaches them is scored on its own validation rows, which are the same. Each figure is a first stage in
a new process, on one core, without the flip test.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from measure import print_table  # noqa: E402

HELD = 0.2  # share of the rows that no subset sees
SWEEP = {"defaults": []} | {
    f"{schedule}, {steps} steps": ["--sched", schedule, "-b", "16", "--steps", str(steps)]
    for schedule in ("onecycle", "plateau")
    for steps in (400, 800, 1600, 3200)
}


def subset(data: Path, rows: int, folder: Path) -> Path:
    "A folder with the first rows of another."
    (folder / "train").mkdir(parents=True)
    (folder / "train" / "images").symlink_to(data / "train" / "images")
    with open(data / "train" / "landmarks.csv") as csv:
        lines = [line for _, line in zip(range(rows + 1), csv, strict=False)]
    (folder / "train" / "landmarks.csv").write_text("".join(lines))
    return folder


def flags(words: list[str], rows: int) -> list[str]:
    "The flags of a row of the sweep: `--steps N` becomes 20 epochs of as many passes as that takes."
    if "--steps" not in words:
        return words
    at = words.index("--steps")
    passes = max(1, round(int(words[at + 1]) / 20 / (rows * (1 - HELD) / 16)))
    epochs = max(1, round(int(words[at + 1]) * 16 / (rows * (1 - HELD) * passes)))
    return [*words[:at], *words[at + 2 :], "-e", str(epochs), "--repeats", str(passes)]


def run(args, rows: int, row: str, seed: int) -> tuple[float, float, str]:
    "Score on the held-out rows, minutes, and what the run said of its length."
    from landmarks_fastai.data.items import labelled_images
    from landmarks_fastai.inference.predictor import Predictor
    from landmarks_fastai.inference.scoring import score_rows
    from landmarks_fastai.inference.torch_network import open_checkpoint
    from landmarks_fastai.runs.checkpoint import read_checkpoint

    with tempfile.TemporaryDirectory() as temporary:
        folder = subset(args.data.resolve(), rows, Path(temporary) / "data")
        words = [*flags(SWEEP[row], rows), "--arch", args.arch, "--weights", args.weights, "--size", str(args.size)]
        words += ["-d", str(folder), "--seed", str(seed), "-n", "few", "--out", temporary]
        command = [sys.executable, "-W", "ignore", str(ROOT / "train.py"), *words, *args.flags.split()]
        start = time.monotonic()
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        minutes = (time.monotonic() - start) / 60
        if done.returncode:
            raise SystemExit(f"{row}: {done.stderr.strip()}")
        network = open_checkpoint(read_checkpoint(Path(temporary) / "few" / "best.pth"))
        images = labelled_images(args.data)
        held = images[slice(round(len(images) * (1 - HELD)), None)]
        score = score_rows(Predictor(network, flip_test=False), list(held)).score
    chosen = re.search(r".*image.*epoch.*", done.stdout)
    print(f"# {rows} rows, {row}, seed {seed}: {score:.4g}, {minutes:.1f} minutes", file=sys.stderr, flush=True)
    return score, minutes, chosen[0] if chosen else ""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-d", "--data", required=True, type=Path, help="folder in the competition's layout")
    parser.add_argument("--arch", default="tf_efficientnet_lite0")
    parser.add_argument("--weights", default="imagenet")
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--rows", type=int, nargs="+", default=[50, 150, 500, 2175])
    parser.add_argument("--only", default="", help="only rows of the sweep whose name matches this expression")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--flags", default="", help="more flags of train.py, for every run")
    args = parser.parse_args()
    table = []
    for rows in args.rows:
        for row in SWEEP:
            if not re.search(args.only, row):
                continue
            scores, minutes, chosen = zip(*(run(args, rows, row, seed) for seed in range(args.seeds)), strict=True)
            table.append([rows, row, mean(scores), f"{min(scores):.4g} to {max(scores):.4g}", mean(minutes)])
            if chosen[0]:
                print(f"# {chosen[0]}", file=sys.stderr)
    print_table(["rows", "stage", "score", "range", "minutes"], table)


if __name__ == "__main__":
    main()
