"Degraded training images: some are blurred, some darkened, some partly covered, as pictures outside of a data set are."

import math

import numpy as np
import torch
from fastai.vision.core import TensorImage
from torchvision.transforms.v2.functional import gaussian_blur

from landmarks_fastai.data.augment import BatchAugmentation

BLUR = 0.04  # largest standard deviation, of the input's side
DARK = 2.0  # largest reduction of the light, in the logarithm: to 0.14
COVER = 0.3  # largest half side of the covered rectangle, of the input's side


class Degrade(BatchAugmentation):
    "Blur, darken, and cover a rectangle of images (batch, 3, h, w) in 0..1, each with a probability, independently."

    order = 51  # after Augment
    stream = (1,)

    def __init__(self, probability: float, seed: int = 0):
        super().__init__(seed)
        self.probability = probability

    def encodes(self, item):
        images, *rest = item
        rng, n, part = self.next_batch(len(images))
        blurred, darkened, covered = (rng.random((3, n)) < self.probability)[:, part]
        sigma, light = rng.uniform(0, BLUR, n)[part], np.exp(rng.uniform(-DARK, 0, n))[part]
        middle, half = rng.uniform(-1, 1, (n, 2))[part], rng.uniform(0, 2 * COVER, (n, 2))[part]  # unit coordinates
        colour = torch.from_numpy(rng.uniform(0, 1, (n, 3))[part]).to(images)
        images = images.as_subclass(torch.Tensor).clone()
        sides = np.array([images.shape[3], images.shape[2]])
        for k in np.flatnonzero(blurred):
            pixels = max(1e-3, sigma[k] * sides[0])
            images[k] = gaussian_blur(images[k], 2 * [2 * math.ceil(3 * pixels) + 1], 2 * [pixels])
        for k in np.flatnonzero(darkened):
            images[k] *= light[k]
        for k in np.flatnonzero(covered):
            corners = np.rint((np.stack([middle[k] - half[k], middle[k] + half[k]]) + 1) / 2 * sides)
            (left, top), (right, bottom) = np.clip(corners, 0, sides).astype(int).tolist()
            images[k, :, top:bottom, left:right] = colour[k, :, None, None]
        return TensorImage(images), *rest
