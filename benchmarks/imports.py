#!/usr/bin/env python
"""How long a person waits before anything happens.

    python benchmarks/imports.py

    help      `python predict.py --help`
    bare      a process that imports torch and the parts of fastai that this program names, and ends
    star      one that does `from fastai.vision.all import *`
    step      `python train.py` on a small set of faces that is there already, up to its first optimiser step: resnet18
              at 64 px, random weights, with the flip map learned and the picture of the first batch drawn

The best of `--rounds` fresh processes each, from the start of the process.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from measure import ROOT, print_table

BARE = (
    "import torch; from fastai.learner import Learner; from fastai.data.block import DataBlock;"
    "from fastai.vision.data import ImageBlock, PointBlock; from fastai.callback.tracker import TrackerCallback;"
    "from fastai.callback.fp16 import MixedPrecision; from fastai.callback.schedule import SuggestionMethod"
)
STAR = "from fastai.vision.all import *"
STEP = """
import json, runpy, sys, time
from fastai.learner import Learner
real = Learner._step
def step(self):
    real(self)
    print(json.dumps(time.time()), flush=True)
    import os
    os._exit(0)
Learner._step = step
sys.argv = ["train.py", "-d", sys.argv[1], "--arch", "resnet18", "--weights", "none", "--size", "64", "--out", sys.argv[2]]
runpy.run_path({train!r}, run_name="__main__")
"""


def wall(*words) -> float:
    start = time.time()
    subprocess.run([sys.executable, "-W", "ignore", *words], check=True, stdout=subprocess.DEVNULL)
    return time.time() - start


def first_step(data: Path, out: Path) -> float:
    shutil.rmtree(out, ignore_errors=True)
    code = STEP.replace("{train!r}", repr(str(ROOT / "train.py")))
    start = time.time()
    words = [sys.executable, "-W", "ignore", "-c", code, str(data), str(out)]
    said = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(said.splitlines()[-1]) - start


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-N", type=int, default=200, help="faces of the small set (default: 200)")
    parser.add_argument("--rounds", type=int, default=3, help="default: 3")
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    from landmarks_fastai.synthetic.sample import make_sample

    with tempfile.TemporaryDirectory() as folder:
        data = make_sample(Path(folder) / "faces", args.N, 1)
        found = {
            "predict.py --help": [wall(str(ROOT / "predict.py"), "--help") for _ in range(args.rounds)],
            "bare imports": [wall("-c", BARE) for _ in range(args.rounds)],
            "star import": [wall("-c", STAR) for _ in range(args.rounds)],
            "first step": [first_step(data, Path(folder) / "runs") for _ in range(args.rounds)],
        }
    bare = min(found["bare imports"])
    print_table(["what", "seconds", "more than the bare imports", "as a ratio to them"],
                [[k, min(v), min(v) - bare, min(v) / bare] for k, v in found.items()])  # fmt: skip


if __name__ == "__main__":
    main()
