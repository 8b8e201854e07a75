#!/usr/bin/env python
"""How time and memory grow with the number of images: of a start, of a training epoch, of a prediction.

    python benchmarks/growth.py
    python benchmarks/growth.py --what start --sizes 20000,100000,393930
    python benchmarks/growth.py --what prediction --sizes 10000,100000

A start is what train.py does before it makes a network: `landmarks.csv` read and every image checked; with the cache files
("later") and without ("first"). An epoch and a prediction are of resnet18 at 32 px, where a network's own time hides little.
Each figure is of a fresh process, imports not counted. The exponent is the slope of log(time) over log(size): 1 is linear. Of
the memory the growth per 1,000 images is given: most of it is the network's and does not grow at all.
"""

import argparse
import json
import math
import sys
import tempfile
import time
import warnings
from pathlib import Path

from faces import write_faces
from measure import ROOT, fresh, peak_mb, print_table, write_network

sys.path.insert(0, str(ROOT))
SIZES = {"start": "2000,6000,18000", "epoch": "500,1500,4500", "prediction": "500,1500,4500"}
DISTINCT = 40  # image files; the others are links to them


def start(folder: Path):
    from landmarks_fastai.data.items import labelled_images

    before, begin = peak_mb(), time.perf_counter()
    labelled_images(folder)
    return time.perf_counter() - begin, peak_mb() - before


def epoch(folder: Path):
    import torchvision  # noqa: F401

    from landmarks_fastai.runs.run import Run
    from landmarks_fastai.settings import Settings
    from landmarks_fastai.training.builders import first_stage
    from landmarks_fastai.training.stage import fit_stage
    from landmarks_fastai.utils.hardware import Machine

    settings = Settings(arch="resnet18", size=32, epochs=1, data=str(folder), mirror="none")
    machine = Machine()
    machine.prepare()
    run = Run(folder, "g")
    begin = time.perf_counter()
    learn = first_stage(settings, "none", machine, run)
    learn.logger = lambda values: None
    with learn.no_bar():
        fit_stage(learn, run)
    return time.perf_counter() - begin, peak_mb()


def prediction(folder: Path):
    import torchvision  # noqa: F401

    from landmarks_fastai.inference.predictor import Predictor
    from landmarks_fastai.inference.submission import predict_test
    from landmarks_fastai.runs.run import Run
    from landmarks_fastai.utils.hardware import Machine

    machine = Machine()
    machine.prepare()
    begin = time.perf_counter()
    predictor = Predictor(folder / "b" / "best.pth", machine=machine, flip_test=False)
    predict_test(predictor, folder, Run(folder, "g"))
    return time.perf_counter() - begin, peak_mb()


def child(what: str, folder: Path):
    import torch  # noqa: F401

    seconds, mb = {"start": start, "epoch": epoch, "prediction": prediction}[what](folder)
    print(json.dumps({"seconds": seconds, "mb": mb}))


def measure(what: str, n: int, points: int) -> dict:
    "Figures of each of the thing's rows in the table."
    with tempfile.TemporaryDirectory() as folder:
        side = "test" if what == "prediction" else "train"
        write_faces(Path(folder), side, n, points=points, pixels=100, links=min(n, DISTINCT))
        if what == "prediction":
            write_network(Path(folder), "resnet18", 32, points)
        found = {what: fresh(__file__, "--child", what, folder)}
        if what == "start":
            found = {"first start": found[what], "later start": fresh(__file__, "--child", what, folder)}
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", choices=SIZES, help="default: all three")
    parser.add_argument("--sizes", help=f"images, of --what (defaults: {SIZES})".replace("'", ""))
    parser.add_argument("--points", type=int, default=971, help="default: 971")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        warnings.simplefilter("ignore")
        return child(args.child[0], Path(args.child[1]))
    rows = []
    for what in [args.what] if args.what else SIZES:
        sizes = [int(n) for n in (args.sizes if args.what and args.sizes else SIZES[what]).split(",")]
        found = [measure(what, n, args.points) for n in sizes]
        for row in found[0]:
            seconds, mb = ([f[row][k] for f in found] for k in ("seconds", "mb"))
            per_thousand = (mb[-1] - mb[0]) / (sizes[-1] - sizes[0]) * 1000
            rows.append([row, _list(sizes), _list(seconds), exponent(sizes, seconds), _list(mb), per_thousand])
    print_table(["what", "images", "seconds", "exponent", "peak MB", "MB more per 1,000 images"], rows)


def exponent(sizes, values) -> float:
    "Least-squares slope of log(value) over log(size)."
    x, y = [math.log(s) for s in sizes], [math.log(v) for v in values]
    mx, my = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True)) / sum((a - mx) ** 2 for a in x)


def _list(values) -> str:
    return ", ".join(f"{v:.3g}" if isinstance(v, float) and v < 100 else f"{v:.0f}" for v in values)


if __name__ == "__main__":
    main()
