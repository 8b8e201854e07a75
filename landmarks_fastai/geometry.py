"""Image pixels <-> network input: one invertible map, used by data, metric, prediction and drawing alike.

The pixel convention, named once. Two kinds of numbers describe a place in a picture:

- *pixels*: a landmark's (x, y) counts pixel CENTRES; the centre of the top-left pixel is (0, 0).
  This is what `landmarks.csv` holds, what OpenCV and dlib mean, and what a person reads off a viewer.
  "Pixels of the image as stored" and "pixels of the network's input" are both of this kind.
- *unit* coordinates: [-1, 1] from the picture's left EDGE to its right edge (top to bottom for y).
  This is what the network predicts and what `grid_sample(align_corners=False)` samples by.

fastai's `PointScaler` divides by the size alone, which takes a pixel centre for an edge: half an input pixel off.
The half is added here, in `PixelMap.to_input` and `input_to_unit`, and nowhere else.
"""

from typing import NamedTuple

import numpy as np
import torch
from PIL import Image


class PixelMap(NamedTuple):
    """Where a pixel of the image as stored lies in the network's input: `input = stored * scale + shift`, per axis.

    The fields are floats, or tensors of shape (batch, 1) for a batch of images.
    """

    scale_x: float
    scale_y: float
    shift_x: float
    shift_y: float

    def to_input(self, points):
        "Points (…, n, 2) in pixels of the image as stored -> pixels of the network's input."
        return _stack(
            points, points[..., 0] * self.scale_x + self.shift_x, points[..., 1] * self.scale_y + self.shift_y
        )

    def to_image(self, points):
        "Points (…, n, 2) in pixels of the network's input -> pixels of the image as stored."
        return _stack(
            points, (points[..., 0] - self.shift_x) / self.scale_x, (points[..., 1] - self.shift_y) / self.scale_y
        )

    def from_stored(self, reduced: int) -> "PixelMap":
        "The map from the image as stored, of a map from one that was decoded `reduced` times smaller."
        centre = 0.5 / reduced - 0.5  # where the first stored pixel's centre lies in the smaller image
        x, y = self.scale_x / reduced, self.scale_y / reduced
        return PixelMap(x, y, self.shift_x + centre * self.scale_x, self.shift_y + centre * self.scale_y)

    @classmethod
    def from_batch(cls, rows):
        "The maps of a batch, a tensor (batch, 4) of rows in the order of the fields, as one map that broadcasts."
        return cls(*rows[:, :, None].unbind(1))


def _stack(points, x, y):
    return torch.stack([x, y], -1) if isinstance(points, torch.Tensor) else np.stack([x, y], -1)


def pixel_map(
    width: int,  # of the image as stored
    height: int,
    fit: str,  # crop, pad or squish
    size: int,  # of the network's input, which is square
) -> PixelMap:
    """The map of one image.

    crop: the short side becomes `size`, the middle is kept (the published entry's way); points may fall outside.
    pad: the long side becomes `size`, black is added around.
    squish: both sides become `size`, the aspect is lost.
    """
    left, top, right, bottom = _source_box(width, height, fit)
    scale_x, scale_y = size / (right - left), size / (bottom - top)
    # Edges map to edges; a centre is half a pixel from its edge on either side of the map.
    return PixelMap(scale_x, scale_y, (0.5 - left) * scale_x - 0.5, (0.5 - top) * scale_y - 0.5)


def _source_box(width, height, fit):
    "The box (left, top, right, bottom), in pixel edges of the image as stored, that becomes the input."
    if fit == "squish":
        return 0.0, 0.0, float(width), float(height)
    side = {"crop": min, "pad": max}[fit](width, height)
    # pad's margins are whole pixels, so that the black border is pasted, not interpolated
    half = (lambda margin: margin / 2) if fit == "crop" else (lambda margin: margin // 2)
    left, top = half(width - side), half(height - side)
    return left, top, left + side, top + side


def fit_image(
    image: Image.Image,  # the image as stored
    fit: str,
    size: int,
    reduced: int = 1,  # how many times smaller than stored the image was decoded
) -> tuple[Image.Image, PixelMap]:
    "An image as the network's input, and the map that made it, `pixel_map`'s: no size or margin is rounded."
    left, top, right, bottom = _source_box(*image.size, fit)
    to_input = pixel_map(*image.size, fit, size).from_stored(reduced)
    if fit == "pad" and image.width != image.height:
        canvas = Image.new(image.mode, (right - left, bottom - top))
        canvas.paste(image, (-left, -top))
        image, left, top, right, bottom = canvas, 0, 0, canvas.width, canvas.height
    return image.resize((size, size), Image.Resampling.BILINEAR, box=(left, top, right, bottom)), to_input


def input_to_unit(points, size: int):
    "Points in pixels of a `size` x `size` input -> unit coordinates, [-1, 1] from edge to edge."
    return (points + 0.5) * (2 / size) - 1


def unit_to_input(points, size: int):
    "The inverse of `input_to_unit`."
    return (points + 1) * (size / 2) - 0.5
