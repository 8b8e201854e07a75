#!/usr/bin/env python
"""What missing points cost: the score, over complete labels of held-out faces, of networks trained on labels with gaps.

    python benchmarks/missing.py
    python benchmarks/missing.py -d DIR --seeds 1

A network at 48 px from random weights, on drawn faces or on a folder in the competition's layout, whose last fifth of the
rows is held out. Each row of the table is the mean over the seeds; the ratio is to complete labels. Of the point that is
labelled in one row of twenty its own score is given too. On one core about two minutes a network.
"""

import argparse
import io
import sys
import tempfile
import warnings
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import pandas as pd
from measure import ROOT, print_table

sys.path.insert(0, str(ROOT))

from landmarks_fastai.data.block import landmark_dataloaders
from landmarks_fastai.data.items import labelled_images
from landmarks_fastai.inference.scoring import predict_rows
from landmarks_fastai.synthetic.sample import make_sample
from landmarks_fastai.training.learner import landmark_learner
from landmarks_fastai.utils.hardware import Machine

RARE = 30  # the point that few rows have: of the drawn faces' 68 the tip of the nose


def half(points: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    left = points[..., 0] < np.median(points[..., 0], axis=1, keepdims=True)
    return left == (rng.random((len(points), 1)) < 0.5)


def rare(points: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    missing = np.zeros(points.shape[:2], bool)
    missing[:, RARE] = rng.permutation(len(points)) >= len(points) // 20
    return missing


GAPS = {  # points (rows, n, 2), random numbers -> which are missing (rows, n)
    "complete": lambda points, rng: np.zeros(points.shape[:2], bool),
    "30% of the points, at random": lambda points, rng: rng.random(points.shape[:2]) < 0.3,
    "the left or the right half of each face": half,
    "one point, but in 5% of the rows": rare,
}


def errors(table: pd.DataFrame, images: Path, gaps: str, seed: int, arch: str, epochs: int) -> np.ndarray:
    "Squared errors (rows, n_points, 2) of the held-out rows, in pixels of the images as stored."
    rng, kept = np.random.default_rng(seed), int(0.8 * len(table))
    points = table.iloc[:, 1:].to_numpy(np.float32).reshape(len(table), -1, 2)
    train = points[:kept].copy()
    train[GAPS[gaps](train, rng)] = np.nan
    frame = pd.concat([table.iloc[:kept, :1], pd.DataFrame(train.reshape(kept, -1), table.index[:kept])], axis=1)
    with redirect_stdout(io.StringIO()):
        machine = Machine(workers=0, cache=True)
        settings = {"size": 48, "batch_size": 16, "seed": seed, "valid_pct": 0.05}
        dls = landmark_dataloaders(frame, image_folder=images, machine=machine, **settings)
        learn = landmark_learner(dls, arch, "none", machine=machine, sched="none")
        with learn.no_bar(), learn.no_logging():
            learn.fit_one_cycle(epochs, 8e-3)
        pairs = list(
            predict_rows(learn.predictor(), list(labelled_images(table.iloc[kept:], images).sample(len(table))))
        )
    return np.array([(result.objects[0].points - item.points) ** 2 for item, result in pairs])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-d", "--data", type=Path, help="folder in the competition's layout (default: drawn faces)")
    parser.add_argument("--points", type=int, nargs="+", default=[68, 971], help="of the drawn faces")
    parser.add_argument("--rows", type=int, default=400, help="of the drawn faces")
    parser.add_argument("--arch", default="resnet18")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("-e", "--epochs", type=int, default=40)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    lines = []
    with tempfile.TemporaryDirectory() as drawn:
        for n in args.points if not args.data else [0]:
            data = args.data or make_sample(Path(drawn, str(n)), args.rows, 1, n, processes=1)
            table = pd.read_csv(data / "train" / "landmarks.csv", sep="\t")
            base = {}
            for gaps in GAPS:
                found = [
                    errors(table, data / "train/images", gaps, k, args.arch, args.epochs) for k in range(args.seeds)
                ]
                scores = {gaps: [e.mean() for e in found]}
                if gaps in (next(iter(GAPS)), list(GAPS)[-1]):
                    scores |= {f"{gaps}: point {RARE}": [e[:, RARE].mean() for e in found]}
                for name, values in scores.items():
                    before = base.setdefault(":" in name, float(np.mean(values)))
                    ratios = float(np.mean(values)) / before
                    span = f"{min(values):.3g}, {max(values):.3g}"
                    lines.append([table.shape[1] // 2, name, float(np.mean(values)), span, ratios])
                    print(*lines[-1], file=sys.stderr, flush=True)
    print_table(["points", "missing", "score", "lowest, highest", "ratio"], lines)


if __name__ == "__main__":
    main()
