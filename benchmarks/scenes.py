#!/usr/bin/env python
"""What the box of a face is worth: the same faces in their own pictures, and in larger scenes with exact, detected and loose boxes.

    python benchmarks/scenes.py -pm NAME -d DIR            # DIR: the folder that NAME was trained on

Held-out photographs are pasted, four at a time, into scenes of 1000 x 1000 px. Scores are the competition's, of the pictures as stored,
with the flip test. A loose box has its size changed by up to 20%, and its place by up to 20% of its size, seeded.
"""

import argparse
import sys

import numpy as np
from measure import ROOT, print_table, validation_images
from PIL import Image

sys.path.insert(0, str(ROOT))
SIDE, LOOSE = 1000, 0.2


def scene_of(items, rng):
    "A scene with up to four photographs, and their points in it."

    noise = rng.integers(0, 255, (8, 8, 3), np.uint8)
    scene, points = Image.fromarray(noise).resize((SIDE, SIDE), Image.Resampling.BICUBIC), []
    for k, item in enumerate(items):
        image = item.picture.image()
        assert max(image.size) <= SIDE // 2, f"{item.path} is larger than a quarter of the scene"
        x = SIDE // 2 * (k % 2) + int(rng.integers(0, SIDE // 2 - image.width + 1))
        y = SIDE // 2 * (k // 2) + int(rng.integers(0, SIDE // 2 - image.height + 1))
        scene.paste(image, (x, y))
        points.append(item.points + [x, y])
    return scene, points


def main():
    from landmarks_fastai.inference.detector import FaceDetector
    from landmarks_fastai.inference.predictor import Predictor

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-pm", required=True, help="checkpoint")
    parser.add_argument("-d", "--data", required=True, help="labelled folder")
    parser.add_argument("-N", type=int, default=200, help="faces (default: 200)")
    args = parser.parse_args()
    predictor, rng = Predictor(args.pm), np.random.default_rng(0)
    items, _ = validation_images(args.data, predictor, args.N)
    own = predictor([item.path for item in items])
    errors = {"own picture": [((o.points - item.points) ** 2).mean() for o, item in zip(own, items, strict=True)]}
    found, faces = 0, 0
    detect = Predictor(predictor.networks, detector=FaceDetector())
    for start in range(0, len(items), 4):
        scene, points = scene_of(items[start : start + 4], rng)
        exact = [(*p.min(0), *(p.max(0) + 1)) for p in points]  # edges
        loose = []
        for left, top, right, bottom in exact:
            size = np.array([right - left, bottom - top]) * (1 + rng.uniform(-LOOSE, LOOSE))
            middle = np.array([left + right, top + bottom]) / 2 + rng.uniform(-LOOSE, LOOSE, 2) * size
            loose.append((*(middle - size / 2), *(middle + size / 2)))
        for name, objects in [("exact box", predictor(scene, exact)), ("box off by 20%", predictor(scene, loose))]:
            errors.setdefault(name, []).extend(
                ((o.points - p) ** 2).mean() for o, p in zip(objects, points, strict=True)
            )
        objects = detect(scene)
        for p in points:
            near = [
                ((o.points - p) ** 2).mean() for o in objects if np.linalg.norm((o.points - p).mean(0)) < np.ptp(p) / 4
            ]
            faces, found = faces + 1, found + bool(near)
            errors.setdefault("detected", []).extend([min(near)] if near else [])
    reference = np.mean(errors["exact box"])
    print(f"{predictor.networks[0].name}: {len(items)} faces, {found} of {faces} found by the detector\n")
    print_table(["faces cut from", "score", "ratio to exact boxes"],
                [[name, float(np.mean(e)), float(np.mean(e) / reference)] for name, e in errors.items()])  # fmt: skip


if __name__ == "__main__":
    main()
