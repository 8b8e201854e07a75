#!/usr/bin/env python
"""Training beside other busy programs: steps a second with several rules for PyTorch's threads.

    python benchmarks/contention.py [--arch resnet18 --size 48 --batch 16] [--predict]

The neighbours are its own: a Python loop, and one or two trainings with the same rule. The figure is the median of `--rounds`
measurements, made in turns.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from measure import fresh, print_table

PASSIVE = {"OMP_WAIT_POLICY": "PASSIVE"}
RULES = {
    "PyTorch's default": {},
    "one thread": {"OMP_NUM_THREADS": "1"},
    "OMP_WAIT_POLICY=PASSIVE": PASSIVE,
    "the same, GOMP_SPINCOUNT=10000": PASSIVE | {"GOMP_SPINCOUNT": "10000"},
    "follows the load (this program)": {"FOLLOW": "1"},
}
BESIDE = {"nothing": [], "a Python loop": ["loop"], "one training": ["step"], "two trainings": ["step", "step"]}
WARM = 8  # seconds before a measurement: two of the load's


def work(arch: str, size: int, batch: int, predict: bool, seconds: float) -> float:
    "Training steps, or batches predicted, a second, after `WARM` seconds."
    import timm
    import torch

    from landmarks_fastai.training.callbacks import FollowLoad

    network = timm.create_model(arch, num_classes=142).to(memory_format=torch.channels_last)
    network.train(not predict)
    images = torch.randn(batch, 3, size, size).to(memory_format=torch.channels_last)
    optimiser, follow = torch.optim.AdamW(network.parameters(), fused=True), FollowLoad()
    follow.before_fit()

    def step():
        if os.environ.get("FOLLOW"):
            follow.before_batch()
        with torch.set_grad_enabled(not predict):
            loss = network(images).square().mean()
        if not predict:
            loss.backward()
            optimiser.step()
            optimiser.zero_grad()

    start = time.monotonic()
    while time.monotonic() < start + WARM:
        step()
    start, steps = time.monotonic(), 0
    while time.monotonic() < start + seconds:
        step()
        steps += 1
    return steps / (time.monotonic() - start)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="resnet18")
    parser.add_argument("--size", type=int, default=48)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--predict", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=8)
    parser.add_argument("--step", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.step:
        print(work(args.arch, args.size, args.batch, args.predict, args.seconds))
        return
    words = ["--step", "--arch", args.arch, "--size", args.size, "--batch", args.batch]
    words += ["--predict"] if args.predict else []
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_"))}
    figures = {(rule, beside): [] for beside in BESIDE for rule in RULES}
    for round in range(args.rounds):
        for rule, beside in figures:
            os.environ.clear()
            os.environ.update(clean | RULES[rule])
            endless = {"loop": ["-c", "while True: pass"], "step": [__file__, *map(str, words), "--seconds", "1e6"]}
            neighbours = [
                subprocess.Popen([sys.executable, *endless[kind]], stdout=subprocess.DEVNULL) for kind in BESIDE[beside]
            ]
            try:
                time.sleep(WARM if neighbours else 0)  # a training imports its libraries first
                figures[rule, beside].append(fresh(__file__, *words, "--seconds", args.seconds))
                print(f"# {round}, {rule}, {beside}: {figures[rule, beside][-1]:.3g}", file=sys.stderr, flush=True)
            finally:
                for neighbour in neighbours:
                    neighbour.kill()
                    neighbour.wait()
    rows = [[rule, *(statistics.median(figures[rule, beside]) for beside in BESIDE)] for rule in RULES]
    print_table(["threads", *BESIDE], rows)


if __name__ == "__main__":
    main()
