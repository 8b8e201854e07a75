#!/usr/bin/env python
"""Another task, untouched by tuning: drawn beetles, 68 points, 200 pictures, `--size 96`, from random weights.

    python benchmarks/other_object.py

No constant of faces may have crept into the defaults: they are trained here as they are, beside the baseline's. The
test side is 100 more beetles, scored by the program's submission. Pictures are of many sizes; the beetles lie at
any angle up to 40 degrees and may leave the picture.
"""

import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from landmarks_fastai.runs.checkpoint import read_checkpoint  # noqa: E402

N = 68


def outline(rng) -> np.ndarray:
    """Points (68, 2) of an upright beetle, left and right a little different.

    32 of the shell, 12 of the head, 18 of the legs, 6 of the seam.
    """
    wide, long, head = rng.uniform(0.42, 0.6), rng.uniform(0.8, 1.0), rng.uniform(0.2, 0.3)
    t = np.linspace(0, 2 * np.pi, 32, endpoint=False)
    shell = np.stack([wide * np.sin(t), -long * np.cos(t) * 0.75 + 0.2], -1)
    s = np.linspace(0, 2 * np.pi, 12, endpoint=False)
    skull = np.stack([head * np.sin(s), -0.62 * long - head * (0.4 + np.cos(s))], -1)
    legs = []
    for side in (-1, 1):
        for k, y in enumerate((-0.2, 0.15, 0.5)):
            reach, drop = rng.uniform(0.25, 0.4), (k - 1) * 0.25 + rng.normal(0, 0.04)
            hip = np.array([side * wide * 0.95, y])
            knee = hip + [side * reach, drop * 0.4]
            legs.append(np.stack([hip, knee, knee + [side * reach * 0.5, drop + 0.12]]))
    seam = np.stack([np.zeros(6), np.linspace(-0.5, 0.9, 6) * long * 0.85], -1)
    points = np.concatenate([shell, skull, *legs, seam])
    return points + rng.normal(0, 0.004, points.shape)


def beetle(rng) -> tuple[Image.Image, np.ndarray]:
    "A picture and its points, pixels."
    width, height = rng.integers(110, 260, 2)
    points = outline(rng)
    turn, side = np.deg2rad(rng.uniform(-40, 40)), min(width, height) * rng.uniform(0.26, 0.42)
    matrix = side * np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    points = points @ matrix.T + [width * rng.uniform(0.4, 0.6), height * rng.uniform(0.42, 0.58)]
    low, high = sorted(rng.uniform(90, 230, (2, 3)).tolist())
    ground = np.random.default_rng(rng.integers(1 << 30)).uniform(0, 1, (9, 9, 1)) * (np.subtract(high, low)) + low
    image = Image.fromarray(ground.astype(np.uint8)).resize((int(width) * 2, int(height) * 2), Image.Resampling.BICUBIC)
    draw, big = ImageDraw.Draw(image), points * 2 + 1
    shell, dark = rng.integers(20, 140, 3), rng.integers(0, 50, 3)
    for k in range(6):
        draw.line([tuple(p) for p in big[44 + 3 * k : 47 + 3 * k]], fill=tuple(dark), width=max(2, int(side * 0.1)))
    draw.polygon([tuple(p) for p in big[32:44]], fill=tuple(dark))
    draw.polygon([tuple(p) for p in big[:32]], fill=tuple(shell))
    draw.line([tuple(p) for p in big[62:68]], fill=tuple(dark), width=max(2, int(side * 0.04)))
    image = image.resize((int(width), int(height)), Image.Resampling.LANCZOS)
    return image.filter(ImageFilter.GaussianBlur(rng.uniform(0, 0.8))), points


def make(folder: Path, n_train: int, n_test: int, seed: int = 0) -> Path:
    "A folder in the competition's layout; returns the truth of its test side, beside it."
    rng = np.random.default_rng(seed)
    header = "file_name\t" + "\t".join(f"Point_M{i}_{c}" for i in range(N) for c in "XY")
    truth = folder / "truth.csv"
    for side, n in (("train", n_train), ("test", n_test)):
        (folder / side / "images").mkdir(parents=True)
        rows, test_points = [header], ["file_name\tpoint_index_list"]
        for i in range(n):
            image, points = beetle(rng)
            image.save(folder / side / "images" / f"{i}.jpg", quality=92)
            rows.append(f"{i}.jpg\t" + "\t".join(str(v) for v in np.rint(points).astype(int).ravel()))
            test_points.append(f"{i}.jpg\t{list(range(N))}")
        (truth if side == "test" else folder / "train" / "landmarks.csv").write_text("\n".join(rows) + "\n")
        if side == "test":
            (folder / "test" / "test_points.csv").write_text("\n".join(test_points) + "\n")
    return truth


def main():
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary).resolve()
        truth = make(folder / "beetles", n_train=200, n_test=100)
        print("| recipe | stage 1 | stage 2 | stage 3 | test side |\n| --- | --- | --- | --- | --- |")
        for recipe in ("best", "baseline"):
            scores = stages(folder, recipe)
            submission = folder / "runs" / f"{recipe}+6+6" / "submit.csv"
            test_points = folder / "beetles" / "test" / "test_points.csv"
            printed = run("-m", "landmarks_fastai.competition", "score", submission, test_points, truth)
            print(f"| --recipe {recipe} | {' | '.join(scores)} | {printed.strip()} |", flush=True)


def stages(folder: Path, recipe: str) -> list[str]:
    "The three stages at their defaults and a submission; the scores on the validation rows."
    data, body = folder / "beetles", ["--arch", "resnet18", "--weights", "none", "--size", "96"]
    names = [recipe, f"{recipe}+6", f"{recipe}+6+6"]
    common = ["--out", folder / "runs", "--workers", "0"]
    run(ROOT / "train.py", "-d", data, *body, "--recipe", recipe, "-n", names[0], *common)
    for previous, name in pairwise(names):
        run(ROOT / "finetune.py", "-pm", previous, "-n", name, *common)
    run(ROOT / "predict.py", "-pm", names[-1], *common)
    return [f"{read_checkpoint(folder / 'runs' / name / 'best.pth').score:.4g}" for name in names]


def run(*command) -> str:
    "Run Python with these arguments; returns what it printed."
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *map(str, command)], capture_output=True, text=True, cwd=ROOT
    )
    if done.returncode:
        sys.exit(done.stderr)
    return done.stdout


if __name__ == "__main__":
    main()
