#!/usr/bin/env python
"""Which pictures to label next: 50 more rows by expected error and variety, beside 50 more at random.

    python benchmarks/suggest.py -d DIR --weights W --out OUT

A network is trained on 100 random rows of the first four fifths of DIR, and ranks 1,000 others, whose labels it does not see.
From the same weights, networks are trained on 150 rows, with the same settings and random seed. All are scored on the last fifth,
without the flip test; none selects an epoch. OUT has a file for each run that is done, which is not made again.
"""

import argparse
import io
import json
import sys
import tempfile
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import pandas as pd
from measure import ROOT, print_table
from scipy.stats import rankdata, spearmanr
from sklearn.cluster import KMeans

sys.path.insert(0, str(ROOT))

from landmarks_fastai.data.block import landmark_dataloaders
from landmarks_fastai.data.items import labelled_images
from landmarks_fastai.inference.predictor import Predictor
from landmarks_fastai.inference.scoring import predict_rows, score_rows
from landmarks_fastai.inference.torch_network import TorchNetwork
from landmarks_fastai.models.networks import PointsAndSpread
from landmarks_fastai.training.confidence import fit_spread
from landmarks_fastai.training.learner import landmark_learner
from landmarks_fastai.utils.hardware import Machine

HELD, ROWS, MORE, CANDIDATES = 0.2, 100, 50, 1000
METHODS = {"worst third, clusters": 1 / 3, "all, clusters": 1.0}
MACHINE = Machine(workers=0, cache=True, threads=1)


def worst_of_clusters(expected: np.ndarray, features: np.ndarray, count: int, share: float) -> np.ndarray:
    "Indices of `count` pictures: of the `share` with the largest expected errors, the worst of each cluster of features."
    first = np.argsort(-expected, kind="stable")[: max(count, round(share * len(expected)))]
    clusters = KMeans(count, n_init=4, random_state=0).fit_predict(features[first])
    return first[np.sort(np.unique(clusters, return_index=True)[1])]


def train(args, table: pd.DataFrame, images: Path, rows: np.ndarray, seed: int):
    "A Learner after one cycle over these rows."
    length = {"batch_size": 16, "repeats": max(1, round(args.steps * 16 / len(rows))), "epochs": 1, "all_rows": True}
    settings = length | {"size": 64, "aug": 1.5, "seed": seed}
    dls = landmark_dataloaders(table.iloc[rows], image_folder=images, machine=MACHINE, **settings)
    learn = landmark_learner(dls, "tf_efficientnet_lite0", args.weights, machine=MACHINE, sched="none")
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(1, 8e-3)
    learn.model.eval()
    return learn


def figures(learn, items: list) -> dict[str, np.ndarray]:
    "Of each picture, relative to its face: mean spread, distance of the flip test, true error; and the body's features."
    model, shape, values, features = learn.model, (learn.settings.fit, learn.settings.size), [], []
    model.spread = fit_spread(model, learn.dls.train)
    network, body = (TorchNetwork(m, learn.settings, learn.facts, MACHINE) for m in (PointsAndSpread(model), model[0]))
    once, both = (predict_rows(Predictor(network, flip_test=flip), items) for flip in (False, True))
    for (item, plain), (_, mean) in zip(once, both, strict=True):
        (plain,), (mean,) = plain.objects, mean.objects
        distances = (np.linalg.norm(plain.points - points, axis=1).mean() for points in (mean.points, item.points))
        values.append(np.array([mean.confidence.mean(), *distances]) / np.linalg.norm(np.ptp(mean.points, axis=0)))
    for k in range(0, len(items), 32):
        inputs = [item.picture.inputs([None], *shape)[0][0] for item in items[k : k + 32]]
        features.append(body(np.stack(inputs)).points)
    spread, flip, error = np.array(values).T
    return {"spread": spread, "flip": flip, "error": error, "features": np.concatenate(features)}


def scores(args, table: pd.DataFrame, images: Path, seed: int) -> dict[str, dict]:
    "Results of a seed's networks: of the first rows, of more at random, and of more by each method."
    pool, held = np.split(np.arange(len(table)), [int((1 - HELD) * len(table) + 1e-9)])
    order, found = np.random.default_rng(seed).permutation(pool), {}
    labelled, candidates = np.split(order[: ROWS + CANDIDATES], [ROWS])
    for name in ["first", "random", *METHODS]:
        path, ranked = args.out / f"{seed} {name}.json", args.out / f"{seed}.npz"
        more, facts = np.arange(MORE if name == "random" else 0), {}
        if name in METHODS:
            known = np.load(ranked)
            expected, error = rankdata(known["spread"]) + rankdata(known["flip"]), known["error"].astype(float)
            more = worst_of_clusters(expected, known["features"], MORE, METHODS[name])
            facts = {"rank": spearmanr(expected, error).statistic, "harder": error[more].mean() / error.mean()}
        if not path.exists():
            with redirect_stdout(io.StringIO()):
                learn = train(args, table, images, np.concatenate([labelled, candidates[more]]), seed)
                score = score_rows(learn.predictor(flip_test=False), list(labelled_images(table.iloc[held], images)))
                if name == "first":
                    np.savez(ranked, **figures(learn, list(labelled_images(table.iloc[candidates], images))))
            path.write_text(json.dumps({"score": score.score, "nme": score.nme}))
            print(f"# seed {seed}, {name}: {score.score:.4g}, {score.nme:.4g}", file=sys.stderr, flush=True)
        found[name] = json.loads(path.read_text()) | facts
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-d", "--data", required=True, type=Path, help="folder in the competition's layout")
    parser.add_argument("--out", required=True, type=Path, help="folder of the results of each run")
    parser.add_argument("--weights", default="imagenet", help="of tf_efficientnet_lite0")
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    table = pd.read_csv(args.data / "train/landmarks.csv", sep="\t")
    with tempfile.TemporaryDirectory() as folder:
        images = Path(folder, "images")  # the image caches are written beside it
        images.symlink_to((args.data / "train/images").resolve())
        results = [scores(args, table, images, seed) for seed in range(args.seeds)]
    lines = []
    for name in METHODS:
        ratios = {key: [r[name][key] / r["random"][key] for r in results] for key in ("score", "nme")}
        for seed, (r, *ratio) in enumerate(zip(results, *ratios.values(), strict=True)):
            shown = [r[run]["score"] for run in ("first", "random", name)]
            lines.append([name, seed, *shown, *ratio, r[name]["rank"], r[name]["harder"]])
        means = [f"{np.mean(values):.3f} ± {np.std(values, ddof=1):.3f}" for values in ratios.values()]
        lines.append([name, "mean", "", "", "", *means, "", ""])
    runs = [f"{ROWS} rows", "random", "suggested", "ratio", "of the NME"]
    print_table(["method", "seed", *runs, "rank correlation", "harder"], lines)


if __name__ == "__main__":
    main()
