#!/usr/bin/env python
"""Which wrong labels the doctor finds: a seeded script damages 1% of the rows in eight ways.

    python benchmarks/doctor.py -d DIR                                  # by the points alone, and their place in the image
    python benchmarks/doctor.py -d DIR --folds runs/doctor --weights W  # and by three networks
    python benchmarks/doctor.py --drawn 393930                          # time and memory of that many drawn shapes

DIR is a folder in the competition's layout; its first four fifths are used. The networks are trained once, on rows with the
damage of the first seed; other seeds damage other rows, and are judged by the same networks. A row counts as found if it is
among the first 1.5% of the ranking, or if the check before training refuses it.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from measure import peak_mb, print_table  # noqa: E402

KINDS = (
    "shifted",
    "another image's",
    "mirrored",
    "scaled",
    "40 neighbours",
    "one point",
    "two exchanged",
    "indices rotated",
)
TRAINED, SHARE, FIRST = 0.8, 0.01, 0.015


def damage(points: np.ndarray, seed: int, share: float = SHARE) -> tuple[np.ndarray, dict[int, str]]:
    "Damage a share of the rows (rows, n, 2), at least one of each kind; returns the points and the kind of each such row."
    rng, changed, kinds = np.random.default_rng(seed), points.copy(), {}
    count, n = points.shape[:2]
    for k, row in enumerate(rng.permutation(count)[: max(len(KINDS), round(share * count))].tolist()):
        kind, xy = KINDS[k % len(KINDS)], points[row].astype(float)
        middle, side, angle = xy.mean(0), np.sqrt(np.prod(np.ptp(xy, axis=0))), rng.uniform(0, 2 * np.pi)
        way = side * np.array([np.cos(angle), np.sin(angle)])
        if kind == "shifted":  # by 5 to 20% of the face: of the square root of its box's area
            xy += rng.uniform(0.05, 0.2) * way
        elif kind == "another image's":
            xy = points[(row + rng.integers(1, count)) % count].astype(float)
        elif kind == "mirrored":  # in place, without renaming
            xy[:, 0] = 2 * middle[0] - xy[:, 0]
        elif kind == "scaled":  # by 0.7 to 0.9 or 1.1 to 1.3
            xy = middle + (xy - middle) * rng.choice([rng.uniform(0.7, 0.9), rng.uniform(1.1, 1.3)])
        elif kind == "40 neighbours":  # of 971, as many by area of 68: 3
            near = np.argsort(((xy - xy[rng.integers(n)]) ** 2).sum(1))[: max(3, round(40 * n / 971))]
            xy[near] += 0.1 * way
        elif kind == "one point":
            xy[rng.integers(n)] += 0.15 * way
        elif kind == "two exchanged":
            pair = rng.choice(n, 2, replace=False)
            xy[pair] = xy[pair[::-1]]
        else:
            xy = np.roll(xy, 1, axis=0)
        changed[row], kinds[row] = np.rint(xy), kind
    return changed, kinds


def damaged_images(args, seed: int, folder: Path):
    "Labelled images of the first rows and some of the points, damaged, in a folder of the competition's layout."
    from landmarks_fastai.data.items import labelled_images
    from landmarks_fastai.data.labels import read_labels

    labels = read_labels(args.data / "train" / "landmarks.csv")
    rows = int(len(labels) * TRAINED + 1e-9)
    chosen = (
        np.linspace(0, labels.n_points - 1, min(args.points or labels.n_points, labels.n_points)).round().astype(int)
    )
    points, kinds = damage(labels.stored[: min(args.rows or rows, rows)][:, chosen].astype(np.int64), seed)
    (folder / "train").mkdir(parents=True, exist_ok=True)
    if not (folder / "train" / "images").exists():
        (folder / "train" / "images").symlink_to((args.data / "train" / "images").resolve())
    with open(folder / "train" / "landmarks.csv", "w") as f:
        f.write("\t".join(["file_name", *(f"{axis}{k}" for k in range(len(chosen)) for axis in "xy")]) + "\n")
        for row, xy in enumerate(points):
            f.write("\t".join([labels.name(row), *map(str, xy.ravel().tolist())]) + "\n")
    images = labelled_images(folder, on_bad="skip")
    return images[np.setdiff1d(images.rows, images.left_out)], kinds


def found(images, values: np.ndarray, kinds: dict[int, str]) -> dict[str, list[bool]]:
    "Whether each damaged row is among the first of the ranking by `values`, or refused by the check before training, by kind."
    order, count = np.argsort(-np.fmax.reduce(values, 1), kind="stable"), int(np.ceil(FIRST * len(images.labels)))
    first = {*images.rows[order[:count]].tolist(), *images.left_out.tolist()}
    return {kind: [row in first for row, k in kinds.items() if k == kind] for kind in KINDS}


def recall(args) -> None:
    from landmarks_fastai.data.file_check import image_facts
    from landmarks_fastai.data.shape_check import SCORES
    from landmarks_fastai.inference import picture_check
    from landmarks_fastai.inference.doctor import Diagnosis
    from landmarks_fastai.settings import Settings
    from landmarks_fastai.utils.hardware import Machine

    picture_check.predict_rows = predicted_once(picture_check.predict_rows)
    results, times, checkpoints, machine = {}, [], [], Machine()
    for seed in range(args.seeds):
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            images, kinds = damaged_images(args, seed, folder)
            if args.folds and not checkpoints:
                checkpoints = networks(args, images, folder, Settings, machine)
            start, cpu = time.monotonic(), time.process_time()
            diagnosis = Diagnosis(images, checkpoints, machine, image_facts(images))
            times.append((time.monotonic() - start, time.process_time() - cpu))
        n = len(SCORES)
        lists = {"points": slice(n), "points and place": slice(n + 1), "joined": slice(None)}
        for name, columns in list(lists.items())[: 3 if checkpoints else 2]:
            hits = found(images, diagnosis.values[:, columns], kinds)
            for kind in KINDS:
                results.setdefault(name, {}).setdefault(kind, []).extend(hits[kind])
            print(f"# seed {seed}, {name}: {np.mean(sum(hits.values(), [])):.3f}", file=sys.stderr, flush=True)
    table = [[kind, *(f"{sum(r[kind])} of {len(r[kind])}" for r in results.values())] for kind in KINDS]
    table.append(["all", *(f"{100 * np.mean(sum(r.values(), [])):.1f}%" for r in results.values())])
    print_table(["damage", *results], table)
    what = "with" if checkpoints else "without"
    print(
        f"{what} networks: {np.mean([t for t, _ in times]):.1f} s, {np.mean([c for _, c in times]):.1f} s of CPU time a set"
    )


def predicted_once(predict_rows):
    "As `predict_rows`, but a row is predicted once: the seeds change labels, not pictures."
    known = {}

    def predict(predictor, items):
        new = [item for item in items if item.row not in known]
        known.update((item.row, result) for item, result in predict_rows(predictor, new))
        return ((item, known[item.row]) for item in items)

    return predict


def networks(args, images, folder: Path, Settings, machine):
    "The fold networks in --folds, trained there on these rows if they are not there yet."
    from landmarks_fastai.runs.checkpoint import read_checkpoint
    from landmarks_fastai.training.folds import train_folds

    files = sorted(args.folds.glob("*/best.pth"))
    if files:
        return [read_checkpoint(file) for file in files]
    settings = Settings(
        arch=args.arch, size=64, data=str(folder), on_bad="skip", epochs=1, sched="onecycle", confidence=True
    )
    start = time.monotonic()
    checkpoints = train_folds(images, 3, settings, args.weights, machine, args.folds.resolve())
    print(f"# trained in {(time.monotonic() - start) / 60:.1f} minutes", file=sys.stderr)
    return checkpoints


def drawn_points(rng: np.random.Generator, n: int) -> np.ndarray:
    "The points of a random face (n, 2), without the picture: as `render_face` has them."
    from landmarks_fastai.synthetic import face_template, faces, mesh

    template, weights, _ = face_template.landmark_layout(n)
    shapes = faces._random_shapes(rng, faces._random_look(rng))
    nodes = face_template.bend_sheet(shapes[0], *np.meshgrid(*mesh.sheet_mesh()[:2]))
    plain = face_template.control_points(face_template.Shape(), face_template.Shape())
    positions = template + weights @ (face_template.control_points(*shapes) - plain)
    return faces._random_views(rng)[0].project(mesh.points_on_mesh(positions, nodes))[0]


def drawn(count: int) -> None:
    "Score that many shapes of drawn faces, in a mapped file of the cache's kind, by the points alone."
    from landmarks_fastai.data.labels import Labels
    from landmarks_fastai.data.shape_check import check_shapes

    rng, points = np.random.default_rng(0), 971
    with tempfile.TemporaryDirectory() as temporary:
        path, shapes = Path(temporary) / "points", np.stack([drawn_points(rng, points) for _ in range(2000)])
        with open(path, "wb") as f:
            for start in range(0, count, 2000):  # mixtures of two shapes
                a, b = shapes[rng.integers(len(shapes), size=(2, min(2000, count - start)))]
                share = rng.uniform(size=(len(a), 1, 1))
                f.write(np.rint(share * a + (1 - share) * b).astype(np.int16).data)
        stored = np.memmap(path, np.int16, "r", shape=(count, points, 2)).view(np.ndarray)
        labels = Labels(path, np.zeros(count, "S1"), np.arange(count), stored)
        del shapes, a, b, share
        before, start, cpu = peak_mb(), time.monotonic(), time.process_time()
        check_shapes(labels, np.arange(count))
        seconds, used = time.monotonic() - start, time.process_time() - cpu
        print_table(
            ["shapes", "seconds", "CPU seconds", "peak MB", "MB before"], [[count, seconds, used, peak_mb(), before]]
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-d", "--data", type=Path, help="folder in the competition's layout")
    parser.add_argument("--points", type=int, help="as many of the points, evenly spaced")
    parser.add_argument("--rows", type=int, help="as many of the rows")
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--folds", type=Path, help="folder of the networks; they are trained if it has none")
    parser.add_argument("--arch", default="resnet18")
    parser.add_argument("--weights", default="imagenet")
    parser.add_argument("--drawn", type=int, help="time and memory of so many drawn shapes")
    args = parser.parse_args()
    drawn(args.drawn) if args.drawn else recall(args)


if __name__ == "__main__":
    main()
