#!/usr/bin/env python
"""What each pass of a prediction is worth, and what it costs.

    python benchmarks/passes.py -pm NAME -d DIR            # DIR: the folder that NAME was trained on

Scores are the competition's, of the validation rows, in pixels of the images as stored. Each row is timed from files to points;
the rows take turns, and images/s are of the best round. The second pass has the flip test in every row but the first two.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
from measure import ROOT, print_table

sys.path.insert(0, str(ROOT))
# row -> first pass: side of its input as a fraction of the network's, flip test; second pass: made, flip test
WAYS = {
    "first pass": (1, False, False, False),
    "both passes": (1, False, True, False),
    "both, flip test in both": (1, True, True, True),
    "both, flip test in the second": (1, False, True, True),
    "both, first at three quarters of the size": (0.75, False, True, True),
    "both, first at half the size": (0.5, False, True, True),
}


def predict(network, pictures, maps, size: int, flip_test: bool, batch_size: int = 32) -> np.ndarray:
    "Points (images, n_points, 2) of one pass, pixels of the images as stored. A map is None for the whole picture."
    from landmarks_fastai.geometry import unit_to_input

    points = []
    for start in range(0, len(pictures), batch_size):
        part = slice(start, start + batch_size)
        inputs = [
            picture.inputs([m], network.settings.fit, size)[0]
            for picture, m in zip(pictures[part], maps[part], strict=True)
        ]
        pixels, to_input = zip(*inputs, strict=True)
        unit = network(np.stack(pixels), flip_test).points.astype(np.float64)
        points += [m.to_image(unit_to_input(u, size)) for u, m in zip(unit, to_input, strict=True)]
    return np.stack(points)


def two_passes(network, pictures, way) -> np.ndarray:
    "Points (images, n_points, 2), pixels of the images as stored."
    from landmarks_fastai.data.align import alignment_of

    fraction, first_flip, second, second_flip = way
    size = network.settings.size
    points = predict(network, pictures, [None] * len(pictures), round(size * fraction), first_flip)
    if second:
        maps = alignment_of(network.settings).maps(points)
        rows = [row for row, to_crop in enumerate(maps) if to_crop]
        crops = predict(network, [pictures[k] for k in rows], [maps[k] for k in rows], size, second_flip)
        points[rows] = crops
    return points


def main():
    from landmarks_fastai.inference.pictures import Picture

    from landmarks_fastai.data.block import landmark_dataloaders
    from landmarks_fastai.inference.predictor import open_network

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-pm", required=True, help="checkpoint with aligned crops and a flip map")
    parser.add_argument("-d", "--data", required=True, help="labelled folder")
    parser.add_argument("--out", default="runs", help="default: runs")
    parser.add_argument("--rounds", type=int, default=3, help="default: 3")
    args = parser.parse_args()
    network = open_network(args.pm, args.out)
    items = list(landmark_dataloaders(args.data, network.settings).valid.items.sample(10**9))
    pictures, true = [Picture(Path(item.path), exif=False) for item in items], np.stack([item.points for item in items])
    scores, speeds = {}, {}
    for _ in range(args.rounds):
        for name, way in WAYS.items():
            start = time.perf_counter()
            points = two_passes(network, pictures, way)
            speeds.setdefault(name, []).append(len(items) / (time.perf_counter() - start))
            scores[name] = float(((points - true) ** 2).mean())
    print(f"{network.name}: {len(items)} images, {network.settings.size} px\n")
    reference = max(speeds["both, flip test in both"])
    print_table(["way", "score", "images/s", "ratio of speeds"],
                [[name, scores[name], max(s), max(s) / reference] for name, s in speeds.items()])  # fmt: skip


if __name__ == "__main__":
    main()
