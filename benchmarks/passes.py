#!/usr/bin/env python
"""What each pass of a prediction is worth, and what it costs.

    python benchmarks/passes.py -pm NAME -d DIR            # DIR: the folder that NAME was trained on

Scores are the competition's, of the validation rows, in pixels of the images as stored. Each row is timed from files to points;
the rows take turns, and images/s are of the best round.
"""

import argparse
import copy
import sys
import time

import numpy as np
from measure import ROOT, print_table, validation_images

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


def predict(network, pictures, way) -> np.ndarray:
    "Points (images, n_points, 2), pixels of the images as stored."
    from landmarks_fastai.data.align import alignment_of
    from landmarks_fastai.inference.predictor import Predictor

    fraction, first_flip, second, second_flip = way
    first = copy.copy(network)
    first.settings = network.settings.replace(align=0.0, size=round(network.settings.size * fraction))
    results = Predictor(first, flip_test=first_flip).stream(pictures)
    points = np.stack([result.objects[0].points for result in results])
    if second:
        crops = alignment_of(network.settings, network.facts).maps(points)
        results = Predictor(network, flip_test=second_flip).stream(pictures, crops=crops)
        points = np.stack([result.objects[0].points for result in results])
    return points


def main():
    from landmarks_fastai.data.pictures import Picture
    from landmarks_fastai.inference.predictor import Predictor

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-pm", required=True, help="checkpoint with aligned crops and a flip map")
    parser.add_argument("-d", "--data", required=True, help="labelled folder")
    parser.add_argument("--rounds", type=int, default=3, help="default: 3")
    args = parser.parse_args()
    predictor = Predictor(args.pm)
    network = predictor.networks[0]
    items, truth = validation_images(args.data, predictor, 10**9)
    pictures, scores, speeds = [Picture(item.path, exif=False) for item in items], {}, {}
    for _ in range(args.rounds):
        for name, way in WAYS.items():
            start = time.perf_counter()
            points = predict(network, pictures, way)
            speeds.setdefault(name, []).append(len(items) / (time.perf_counter() - start))
            scores[name] = float(((points - truth) ** 2).mean())
    print(f"{network.name}: {len(items)} images, {network.settings.size} px\n")
    reference = max(speeds["both, flip test in both"])
    print_table(["way", "score", "images/s", "ratio of speeds"],
                [[name, scores[name], max(s), max(s) / reference] for name, s in speeds.items()])  # fmt: skip


if __name__ == "__main__":
    main()
