#!/usr/bin/env python
"""The score on damaged copies of the validation images: dark, blurred, half covered, strongly compressed.

    python benchmarks/robustness.py -pm NAME … -d DIR            # DIR: the folder that NAME was trained on

Scores are the competition's, of the validation rows, in pixels of the images as stored, as `predict.py` computes them. The damage
to an image is a function of its row, so that it is the same for each checkpoint. Hidden points count.
"""

import argparse
import io
import sys
from collections.abc import Callable

import numpy as np
from measure import ROOT, print_table, validation_images
from PIL import Image, ImageFilter

sys.path.insert(0, str(ROOT))
LIGHT, NOISE = 0.2, 4.0  # factor of the pixel values; standard deviation of the noise, in 255ths
BLUR = 0.04  # standard deviation, in sides of the object
QUALITY = 6  # of the JPEG


def darken(image: Image.Image, points: np.ndarray, rng: np.random.Generator) -> Image.Image:
    pixels = np.asarray(image) * LIGHT + rng.normal(0, NOISE, (image.height, image.width, 3))
    return Image.fromarray(np.rint(pixels).clip(0, 255).astype(np.uint8))


def blur(image: Image.Image, points: np.ndarray, rng: np.random.Generator) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(BLUR * float(np.sqrt(np.prod(np.ptp(points, axis=0))))))


def cover(image: Image.Image, points: np.ndarray, rng: np.random.Generator) -> Image.Image:
    "One half of the points' box, left, right, upper or lower, in one random colour."
    (left, top), (right, bottom) = points.min(0), points.max(0)
    middle_x, middle_y = (left + right) / 2, (top + bottom) / 2
    halves = [
        (left, top, middle_x, bottom), (middle_x, top, right, bottom),
        (left, top, right, middle_y), (left, middle_y, right, bottom),
    ]  # fmt: skip
    image = image.copy()
    image.paste(tuple(rng.integers(0, 256, 3).tolist()), tuple(np.rint(halves[rng.integers(4)]).astype(int).tolist()))
    return image


def compress(image: Image.Image, points: np.ndarray, rng: np.random.Generator) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=QUALITY)
    return Image.open(file).convert("RGB")


DAMAGES: dict[str, Callable | None] = {
    "as stored": None, "dark": darken, "blurred": blur, "half covered": cover, "JPEG": compress,
}  # fmt: skip


def damaged(items: list, damage: Callable | None) -> list[Image.Image]:

    images = [item.picture.image() for item in items]
    if damage is None:
        return images
    return [damage(image, item.points, np.random.default_rng([0, item.row]))
            for image, item in zip(images, items, strict=True)]  # fmt: skip


def main():
    from landmarks_fastai.inference.predictor import Predictor

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-pm", required=True, nargs="+", help="checkpoints, trained on the same rows")
    parser.add_argument("-d", "--data", required=True, help="labelled folder")
    parser.add_argument("-N", type=int, default=272, help="images (default: 272)")
    args = parser.parse_args()
    predictors = [Predictor(name) for name in args.pm]
    items, truth = validation_images(args.data, predictors[0], args.N)
    scores = [
        [float(((np.stack([o.points for o in predictor(images)]) - truth) ** 2).mean()) for predictor in predictors]
        for images in (damaged(items, damage) for damage in DAMAGES.values())
    ]
    print(f"{len(items)} images\n")
    print_table(["images", *(p.networks[0].name for p in predictors)],
                [[name, *row] for name, row in zip(DAMAGES, scores, strict=True)])  # fmt: skip


if __name__ == "__main__":
    main()
