"Degraded training images: some are blurred, some darkened, some partly covered, as pictures outside of a data set are."

import math

import numpy as np
import torch
from fastai.vision.core import TensorImage
from torch.nn import functional as F

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
        blurred, darkened, covered = (
            np.flatnonzero(of_kind) for of_kind in (rng.random((3, n)) < self.probability)[:, part]
        )
        sigma, light = rng.uniform(0, BLUR, n)[part], np.exp(rng.uniform(-DARK, 0, n))[part]
        middle, half = rng.uniform(-1, 1, (n, 2))[part], rng.uniform(0, 2 * COVER, (n, 2))[part]
        colour = rng.uniform(0, 1, (n, 3))[part]
        images = images.as_subclass(torch.Tensor).clone()

        def on_device(values: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(values.astype(np.float32)).to(images.device)

        if len(blurred):
            images[blurred] = blur_images(images[blurred], on_device(sigma[blurred] * images.shape[-1]))
        if len(darkened):
            images[darkened] *= on_device(light[darkened])[:, None, None, None]
        if len(covered):
            parts = (on_device(values[covered]) for values in (middle, half, colour))
            images[covered] = cover_images(images[covered], *parts)
        return TensorImage(images), *rest


def blur_images(images: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    "Images (batch, 3, h, w) through Gaussian filters of standard deviations (batch,), pixels."
    batch, channels, height, width = images.shape
    # torchvision's `gaussian_blur` takes one standard deviation for all images
    reach = math.ceil(3 * BLUR * width)
    away = torch.arange(-reach, reach + 1, device=images.device)
    kernel = torch.exp(-(away**2) / (2 * sigma[:, None].clamp(min=1e-3) ** 2))
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(channels, 0)[:, None]
    flat = F.pad(images.reshape(1, -1, height, width), (reach,) * 4, mode="reflect")
    flat = F.conv2d(flat, kernel[:, :, :, None], groups=batch * channels)
    return F.conv2d(flat, kernel[:, :, None], groups=batch * channels).reshape(images.shape)


def cover_images(images: torch.Tensor, middle: torch.Tensor, half: torch.Tensor, colour: torch.Tensor) -> torch.Tensor:
    """Images (batch, 3, h, w) with a rectangle in one colour (batch, 3) each.

    Its `middle` and half sides `half` (batch, 2) are unit coordinates.
    """
    x, y = (torch.linspace(-1, 1, side, device=images.device) for side in (images.shape[3], images.shape[2]))
    in_x, in_y = ((xy - middle[:, k, None]).abs() < half[:, k, None] for k, xy in enumerate((x, y)))
    inside = in_y[:, None, :, None] & in_x[:, None, None, :]
    return torch.where(inside, colour[:, :, None, None], images)
