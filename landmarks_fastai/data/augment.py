"""The augmentation of training batches: one warp of images and points together, and colour changes.

A batch is rotated, scaled, shifted and flipped by one `grid_sample`, in the unit coordinates of geometry.py. The same
matrices move the points. Points of a flipped image are reordered by the flip indices (flip.py); fastai's `Flip` leaves
their order as it is, which teaches the network that left is right.
All random numbers are drawn in the main process, a function of (seed, epoch, batch).
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from fastai.vision.core import TensorImage, TensorPoint
from fasttransform import ItemTransform
from torch.nn import functional as F

# What strength 1 is: half-widths of the even distribution that each is drawn from.
TURN = 15.0  # degrees
SCALE = 0.15  # in the logarithm: from 0.86 to 1.16
SHIFT = 0.06  # of the picture's side
COLOUR = 0.2  # contrast and saturation, in the logarithm; half of it for brightness, a quarter for each channel


class BatchAugmentation(ItemTransform):
    "A transform of training batches whose random numbers are a function of (seed, epoch, batch)."

    split_idx = 0  # of the two sides, training
    stream: tuple[int, ...] = ()  # a transform with another one draws other random numbers

    def __init__(self, seed: int):
        super().__init__()
        self.seed = seed
        self.begin(0)

    def begin(self, epoch: int, batch: int = 0, share: tuple[int, int] = (0, 1)) -> None:
        "Set the epoch, the number of the next batch, and which part of it this process has: (rank, number of processes)."
        self.epoch, self.batch, self.share = epoch, batch, share

    def next_batch(self, n: int) -> tuple[np.random.Generator, int, slice]:
        "Return the next batch's random numbers, its size over all processes, and the part of this process's `n` images."
        rng = np.random.default_rng([self.seed, self.epoch, self.batch, *self.stream])
        self.batch += 1
        rank, processes = self.share
        return rng, n * processes, slice(rank * n, (rank + 1) * n)


class Augment(BatchAugmentation):
    """(images in 0..1, points in unit coordinates, maps) -> the same faces seen otherwise; training batches only.

    The maps are passed on as they are: they lead back to the images as stored from the input before the warp.
    """

    order = 50  # after IntToFloatTensor (10), before Normalize (99)

    def __init__(
        self,
        strength: float,  # 0: flips only
        flip_indices: Sequence[int] | torch.Tensor | None = None,  # None: no flips
        seed: int = 0,
    ):
        super().__init__(seed)
        self.strength = strength
        self.flip_indices = None if flip_indices is None else torch.as_tensor(flip_indices)

    def encodes(self, item):
        images, points, *maps = item
        rng, n, part = self.next_batch(len(images))
        matrix, mirrored = (drawn[part] for drawn in self.sample_warp(rng, n))
        back = invert(matrix).to(images.device)  # computed on the CPU: the batch has few matrices
        matrix, mirrored = matrix.to(images.device), mirrored.to(images.device)
        colours = [drawn[part].to(images.device) for drawn in self.sample_colour(rng, n)]
        moved = warp_images(images.as_subclass(torch.Tensor), back)
        if self.strength:
            moved = change_colours(moved, *colours)
        renamed = warp_points(rename(points.as_subclass(torch.Tensor), mirrored, self.flip_indices), matrix)
        return TensorImage(moved), TensorPoint(renamed), *maps

    def sample_warp(self, rng: np.random.Generator, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        "Matrices (n, 2, 3) that take unit coordinates before to those after, and which faces are mirrored (n,)."
        turn, scale = self._spread(rng, math.radians(TURN), n), self._spread(rng, SCALE, n).exp()
        x, y = self._spread(rng, 2 * SHIFT, n), self._spread(rng, 2 * SHIFT, n)
        mirrored = torch.from_numpy(rng.random(n) < 0.5) & (self.flip_indices is not None)
        sign = 1 - 2 * mirrored.float()
        cos, sin = turn.cos() * scale, turn.sin() * scale
        rows = [torch.stack([cos * sign, -sin, x], 1), torch.stack([sin * sign, cos, y], 1)]
        return torch.stack(rows, 1), mirrored

    def sample_colour(self, rng: np.random.Generator, n: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        "Contrast, saturation (n, 1, 1, 1) and what is added to each channel (n, 3, 1, 1)."
        grey, channel = (n, 1, 1, 1), (n, 3, 1, 1)
        contrast, saturation = self._spread(rng, COLOUR, grey).exp(), self._spread(rng, COLOUR, grey).exp()
        return contrast, saturation, self._spread(rng, COLOUR / 2, grey) + self._spread(rng, COLOUR / 4, channel)

    def _spread(self, rng: np.random.Generator, width: float, shape: int | tuple[int, ...]) -> torch.Tensor:
        return torch.from_numpy(rng.uniform(-width, width, shape).astype(np.float32)) * self.strength


def warp_points(points: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    "Points (batch, n, 2) through matrices (batch, 2, 3), both in unit coordinates."
    return points @ matrix[:, :, :2].transpose(1, 2) + matrix[:, None, :, 2]


def rename(points: torch.Tensor, mirrored: torch.Tensor, flip_indices: torch.Tensor | None) -> torch.Tensor:
    "The points of mirrored faces under their new names: (batch, n, 2), not moved."
    if flip_indices is None:
        return points
    return torch.where(mirrored[:, None, None], points[:, flip_indices.to(points.device)], points)


def invert(matrix: torch.Tensor) -> torch.Tensor:
    "Matrices (batch, 2, 3) that undo others."
    inverse = torch.linalg.inv(matrix[:, :, :2])
    return torch.cat([inverse, -inverse @ matrix[:, :, 2:]], 2)


def warp_images(images: torch.Tensor, back: torch.Tensor) -> torch.Tensor:
    """Images (batch, 3, h, w) warped; `back` are the inverse matrices: `grid_sample` asks where a pixel comes from.

    What lies outside is reflected in: no black corners.
    """
    grid = F.affine_grid(back, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


def change_colours(
    images: torch.Tensor, contrast: torch.Tensor, saturation: torch.Tensor, added: torch.Tensor
) -> torch.Tensor:
    "Contrast about each image's mean, saturation about each pixel's grey, then the channels' shifts; in 0..1."
    mean = images.mean((1, 2, 3), keepdim=True)
    images = (images - mean) * contrast + mean
    grey = images.mean(1, keepdim=True)
    return ((images - grey) * saturation + grey + added).clamp(0, 1)
