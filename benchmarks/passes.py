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


class Flipped:
    "A network with the flip test inside, which makes no third pass."

    def __init__(self, network):
        self.network = network

    def __getattr__(self, name):
        return getattr(self.network, name)

    def __call__(self, pixels):
        from landmarks_fastai.inference.network import predict_flipped

        return predict_flipped(self.network, pixels)


def main():
    from landmarks_fastai.data.pictures import Picture
    from landmarks_fastai.inference.predictor import Predictor

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-pm", required=True, help="checkpoint with aligned crops and a flip map")
    parser.add_argument("-d", "--data", required=True, help="labelled folder")
    parser.add_argument("--rounds", type=int, default=3, help="default: 3")
    args = parser.parse_args()
    network = Predictor(args.pm).networks[0]
    whole = copy.copy(network)
    whole.settings = network.settings.replace(align=0.0)
    ways = {
        "first pass": Predictor(whole, flip_test=False),
        "both passes": Predictor(network, flip_test=False),
        "both, flip test": Predictor(Flipped(network), flip_test=False),
        "three, flip test (`predict.py`)": Predictor(network),
    }
    items, truth = validation_images(args.data, ways["first pass"], 10**9)
    pictures, scores, speeds = [Picture(item.path, exif=False) for item in items], {}, {}
    for _ in range(args.rounds):
        for name, way in ways.items():
            start = time.perf_counter()
            points = np.stack([result.objects[0].points for result in way.stream(pictures)])
            speeds.setdefault(name, []).append(len(items) / (time.perf_counter() - start))
            scores[name] = float(((points - truth) ** 2).mean())
    print(f"{network.name}: {len(items)} images, {network.settings.size} px\n")
    reference = max(speeds["both, flip test"])
    print_table(["way", "score", "images/s", "ratio of speeds"],
                [[name, scores[name], max(s), max(s) / reference] for name, s in speeds.items()])  # fmt: skip


if __name__ == "__main__":
    main()
