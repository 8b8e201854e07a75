"""Image pixels <-> network input: one invertible map, used by data, metrics, predictions and plots.

There are two kinds of coordinates:

- *pixels*: (0, 0) is the CENTRE of the top-left pixel, as in `landmarks.csv`, OpenCV and dlib. "Pixels of the image as
  stored" and "pixels of the network's input" are both of this kind.
- *unit* coordinates: [-1, 1] from the left EDGE of the input to its right edge (top to bottom for y). The network
  predicts them, and `grid_sample(align_corners=False)` samples by them.

fastai's `PointScaler` divides by the size alone, which takes a pixel's centre for its edge: half an input pixel off. The
half pixel is added in this file and nowhere else.
"""

from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
from PIL import Image

if TYPE_CHECKING:  # predictions with ONNX Runtime need no torch
    import torch

Box = tuple[float, float, float, float]  # left, top, right, bottom: pixel edges
Coordinates = TypeVar("Coordinates", np.ndarray, "torch.Tensor")  # what goes in as an array comes out as one


class PixelMap(NamedTuple):
    """The affine map from pixels of the image as stored to pixels of the network's input.

    `x_input = a * x + b * y + c` and `y_input = d * x + e * y + f`. The fields are floats, or tensors of shape (batch, 1)
    for a batch of images.
    """

    a: Any
    b: Any
    c: Any
    d: Any
    e: Any
    f: Any

    def to_input(self, points: Coordinates) -> Coordinates:
        "Map points (…, n, 2) in pixels of the image as stored -> pixels of the network's input."
        x, y = points[..., 0], points[..., 1]
        return _stack(points, x * self.a + y * self.b + self.c, x * self.d + y * self.e + self.f)

    def to_image(self, points: Coordinates) -> Coordinates:
        "Map points (…, n, 2) in pixels of the network's input -> pixels of the image as stored."
        x, y = points[..., 0] - self.c, points[..., 1] - self.f
        det = self.a * self.e - self.b * self.d
        return _stack(points, (x * self.e - y * self.b) / det, (y * self.a - x * self.d) / det)

    def after_resize(
        self, scale_x: float, scale_y: float | None = None, left: float = 0.0, top: float = 0.0
    ) -> "PixelMap":
        """Return the map of an image that is cropped at the pixel edges (left, top) and resized before this map applies.

        `self` maps pixels of the resized crop; the returned map takes pixels of the image before the crop.
        """
        scale_y = scale_x if scale_y is None else scale_y
        # a pixel's centre is half a pixel from its edge, before and after: part = (stored + 0.5 - left) * scale - 0.5
        x, y = (0.5 - left) * scale_x - 0.5, (0.5 - top) * scale_y - 0.5
        a, b, c, d, e, f = self
        return PixelMap(a * scale_x, b * scale_y, a * x + b * y + c, d * scale_x, e * scale_y, d * x + e * y + f)

    @property
    def scale(self) -> float:
        "Pixels of the input per pixel of the image as stored: the square root of the ratio of the areas."
        return abs(self.a * self.e - self.b * self.d) ** 0.5

    @classmethod
    def from_batch(cls, rows: "torch.Tensor") -> "PixelMap":
        "Make one map that broadcasts of a batch of maps (batch, 6), whose columns are the fields."
        return cls(*rows[:, :, None].unbind(1))


IDENTITY = PixelMap(1.0, 0.0, 0.0, 0.0, 1.0, 0.0)


def _stack(points: Coordinates, x: Coordinates, y: Coordinates) -> Coordinates:
    if isinstance(points, np.ndarray):
        return np.stack([x, y], -1)
    import torch

    return torch.stack([x, y], -1)  # pyright: ignore[reportArgumentType, reportReturnType] (all three are tensors)


def pixel_map(
    width: int,  # of the image as stored
    height: int,
    fit: str,  # crop, pad or squish
    size: int,  # of the network's input, which is square
) -> PixelMap:
    """Return the map of one image.

    crop: centre crop, the short side becomes `size` (as in the published entry); points may fall outside.
    pad: the long side becomes `size`, with a black border.
    squish: both sides become `size`, the aspect ratio changes.
    """
    left, top, right, bottom = _source_box(width, height, fit)
    scale_x, scale_y = size / (right - left), size / (bottom - top)
    # Edges map to edges; a centre is half a pixel from its edge on either side of the map.
    return IDENTITY.after_resize(scale_x, scale_y, left, top)


def _source_box(width: int, height: int, fit: str) -> tuple[float, float, float, float]:
    "The box (left, top, right, bottom), in pixel edges of the image as stored, that becomes the input; ints for pad."
    if fit == "squish":
        return 0.0, 0.0, float(width), float(height)
    side = {"crop": min, "pad": max}[fit](width, height)
    # pad's margins are whole pixels, so that the black border is pasted, not interpolated
    half = (lambda margin: margin / 2) if fit == "crop" else (lambda margin: margin // 2)
    left, top = half(width - side), half(height - side)
    return left, top, left + side, top + side


def fit_image(
    image: Image.Image,  # the image as stored
    fit: str,  # crop, pad or squish
    size: int,  # of the network's input
    reduced: int = 1,  # how many times smaller than stored the image was decoded
) -> tuple[Image.Image, PixelMap]:
    "Fit an image to the network's input, (size, size); returns it with its map from the image as stored."
    left, top, right, bottom = _source_box(*image.size, fit)
    to_input = pixel_map(*image.size, fit, size).after_resize(1 / reduced)
    if fit == "pad" and image.width != image.height:
        canvas = Image.new(image.mode, (int(right - left), int(bottom - top)))
        canvas.paste(image, (-int(left), -int(top)))
        image, left, top, right, bottom = canvas, 0, 0, canvas.width, canvas.height
    return image.resize((size, size), Image.Resampling.BILINEAR, box=(left, top, right, bottom)), to_input


def cut_image(
    image: Image.Image,  # the image as stored
    to_input: PixelMap,
    size: int,  # of the network's input
    reduced: float = 1.0,  # how many times smaller than stored the image was decoded
) -> Image.Image:
    """Resample the network's input, (size, size), through a map; black outside of the image.

    An image that becomes smaller is first resized with an antialiasing filter, which an affine transform lacks.
    """
    left, top, right, bottom = (edge / reduced for edge in _covered_box(to_input, size))
    left, top, right, bottom = max(0.0, left), max(0.0, top), min(image.width, right), min(image.height, bottom)
    from_decoded = to_input.after_resize(reduced)
    if from_decoded.scale < 1 and right > left and bottom > top:
        width, height = (max(1, round(side * from_decoded.scale)) for side in (right - left, bottom - top))
        image = image.resize((width, height), Image.Resampling.BILINEAR, box=(left, top, right, bottom))
        scale_x, scale_y = (right - left) / width, (bottom - top) / height
        from_decoded = from_decoded.after_resize(scale_x, scale_y, -left / scale_x, -top / scale_y)
    a, b, c, d, e, f = from_decoded
    det = a * e - b * d
    back = np.array([[e, -b], [-d, a]]) / det
    shift = 0.5 - back @ [c + 0.5, f + 0.5]  # Pillow's coordinates start at pixel edges
    rows = [*back[0], shift[0], *back[1], shift[1]]
    # not bicubic: Pillow's moves a dot by up to a tenth of a pixel, its kernel does not reproduce a linear ramp
    return image.transform((size, size), Image.Transform.AFFINE, rows, Image.Resampling.BILINEAR)


def _covered_box(to_input: PixelMap, size: int) -> tuple[float, float, float, float]:
    "The bounding box (left, top, right, bottom) of the input, in pixel edges of the image as stored."
    corners = np.array([[-0.5, -0.5], [size - 0.5, -0.5], [-0.5, size - 0.5], [size - 0.5, size - 0.5]])
    corners = to_input.to_image(corners) + 0.5
    (left, top), (right, bottom) = corners.min(0).tolist(), corners.max(0).tolist()
    return left, top, right, bottom


BOX_MARGIN = 1.25  # side of the input, as a multiple of the box's, where objects are cut from their boxes in training
BOXED = (-1 / BOX_MARGIN, -1 / BOX_MARGIN, 1 / BOX_MARGIN, 1 / BOX_MARGIN)  # the box in such an input, unit coordinates


def box_map(
    box: Box,  # of an object's points, pixels as stored
    points_box: tuple[float, ...],  # where the points' box lay in the training inputs, unit coordinates
    size: int,  # of the network's input
) -> PixelMap:
    """Return the map that puts a box where the points' box lay in training: same middle, same area, nothing squeezed."""
    left, top, right, bottom = box
    target = [(edge + 1) * size / 2 for edge in points_box]  # edges, pixels of the input
    area = (target[2] - target[0]) * (target[3] - target[1])
    scale = (area / ((right - left) * (bottom - top))) ** 0.5
    input_left = (left + right - (target[0] + target[2]) / scale) / 2  # edges of the input, pixels as stored
    input_top = (top + bottom - (target[1] + target[3]) / scale) / 2
    return IDENTITY.after_resize(scale, left=input_left, top=input_top)


def square_map(
    points: np.ndarray,  # (n, 2) pixels; NaN: missing
    margin: float,  # side of the square, as a multiple of the longer side of the points' box
    size: int,  # of the view
    least: float,  # side of the square, at least
) -> PixelMap:
    "Return the map to a square view around points."
    low, high = np.nanmin(points, axis=0), np.nanmax(points, axis=0)
    side = max(margin * float((high - low).max()), least)
    left, top = ((low + high + 1 - side) / 2).tolist()
    return IDENTITY.after_resize(size / side, left=left, top=top)


def input_to_unit(points: Coordinates, size: int) -> Coordinates:
    "Convert points (…, 2) in pixels of a `size` x `size` input to unit coordinates, [-1, 1] from edge to edge."
    return (points + 0.5) * (2 / size) - 1


def unit_to_input(points: Coordinates, size: int) -> Coordinates:
    "Convert points (…, 2) in unit coordinates to pixels of the input: the inverse of `input_to_unit`."
    return (points + 1) * (size / 2) - 0.5
