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
    """Where a pixel of the image as stored lies in the network's input: an affine map with an inverse.

    `x_input = a * x + b * y + c` and `y_input = d * x + e * y + f`. The fields are floats, or tensors of shape (batch, 1)
    for a batch of images.
    """

    a: float
    b: float
    c: float
    d: float
    e: float
    f: float

    def to_input(self, points):
        "Points (…, n, 2) in pixels of the image as stored -> pixels of the network's input."
        x, y = points[..., 0], points[..., 1]
        return _stack(points, x * self.a + y * self.b + self.c, x * self.d + y * self.e + self.f)

    def to_image(self, points):
        "Points (…, n, 2) in pixels of the network's input -> pixels of the image as stored."
        x, y = points[..., 0] - self.c, points[..., 1] - self.f
        det = self.a * self.e - self.b * self.d
        return _stack(points, (x * self.e - y * self.b) / det, (y * self.a - x * self.d) / det)

    def after_resize(
        self, scale_x: float, scale_y: float | None = None, left: float = 0.0, top: float = 0.0
    ) -> "PixelMap":
        """The map that first crops at the pixel edges (left, top) and resizes by the scales, then does as this one.

        This one starts from the resized crop; the returned one starts from the image before it was cropped and resized.
        """
        scale_y = scale_x if scale_y is None else scale_y
        # a pixel's centre is half a pixel from its edge, before and after: part = (stored + 0.5 - left) * scale - 0.5
        x, y = (0.5 - left) * scale_x - 0.5, (0.5 - top) * scale_y - 0.5
        a, b, c, d, e, f = self
        return PixelMap(a * scale_x, b * scale_y, a * x + b * y + c, d * scale_x, e * scale_y, d * x + e * y + f)

    @property
    def scale(self) -> float:
        "Pixels of the input in one pixel of the image as stored: the square root of the areas' ratio."
        return abs(self.a * self.e - self.b * self.d) ** 0.5

    @classmethod
    def from_batch(cls, rows):
        "The maps of a batch, a tensor (batch, 6) of rows in the order of the fields, as one map that broadcasts."
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
    return PixelMap(1.0, 0.0, 0.0, 0.0, 1.0, 0.0).after_resize(scale_x, scale_y, left, top)


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
    to_input = pixel_map(*image.size, fit, size).after_resize(1 / reduced)
    if fit == "pad" and image.width != image.height:
        canvas = Image.new(image.mode, (right - left, bottom - top))
        canvas.paste(image, (-left, -top))
        image, left, top, right, bottom = canvas, 0, 0, canvas.width, canvas.height
    return image.resize((size, size), Image.Resampling.BILINEAR, box=(left, top, right, bottom)), to_input


def cut_image(
    image: Image.Image,  # the image as stored
    to_input: PixelMap,
    size: int,
    reduced: float = 1.0,  # how many times smaller than stored the image was decoded
) -> Image.Image:
    """The network's input that a map describes, resampled from the image; outside of the image it is black.

    An image that becomes smaller is resized first, with a filter as wide as the reduction: a warp alone would alias.
    """
    left, top, right, bottom = _covered_box(to_input, size)
    box = [max(0.0, left / reduced), max(0.0, top / reduced), right / reduced, bottom / reduced]
    box[2:] = min(image.width, box[2]), min(image.height, box[3])
    from_decoded = to_input.after_resize(reduced)
    if from_decoded.scale < 1 and box[2] > box[0] and box[3] > box[1]:
        sides = [max(1, round((b - a) * from_decoded.scale)) for a, b in zip(box[:2], box[2:], strict=True)]
        image = image.resize(sides, Image.Resampling.BILINEAR, box=tuple(box))
        scales = [(b - a) / side for a, b, side in zip(box[:2], box[2:], sides, strict=True)]
        from_decoded = from_decoded.after_resize(*scales, -box[0] / scales[0], -box[1] / scales[1])
    a, b, c, d, e, f = from_decoded
    det = a * e - b * d
    back = np.array([[e, -b], [-d, a]]) / det
    shift = 0.5 - back @ [c + 0.5, f + 0.5]  # Pillow counts from edges
    rows = [*back[0], shift[0], *back[1], shift[1]]
    # Pillow's bicubic warp moves a dot by up to a tenth of a pixel: its cubic does not reproduce a ramp
    return image.transform((size, size), Image.Transform.AFFINE, rows, Image.Resampling.BILINEAR)


def _covered_box(to_input: PixelMap, size: int):
    "The box (left, top, right, bottom), in pixel edges of the image as stored, that the input shows a part of."
    corners = np.array([[-0.5, -0.5], [size - 0.5, -0.5], [-0.5, size - 0.5], [size - 0.5, size - 0.5]])
    corners = to_input.to_image(corners) + 0.5
    return *corners.min(0), *corners.max(0)


def input_to_unit(points, size: int):
    "Points in pixels of a `size` x `size` input -> unit coordinates, [-1, 1] from edge to edge."
    return (points + 0.5) * (2 / size) - 1


def unit_to_input(points, size: int):
    "The inverse of `input_to_unit`."
    return (points + 1) * (size / 2) - 0.5
