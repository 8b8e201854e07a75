"""An image file -> the network's input: opened, decoded no larger than needed, fitted; and a place to keep that."""

import os
import re
import struct
import warnings
import zlib
from contextlib import contextmanager, suppress

import numpy as np
from PIL import Image, UnidentifiedImageError

from landmarks_fastai.errors import MissingImage, UserError
from landmarks_fastai.geometry import PixelMap, cut_image, fit_image
from landmarks_fastai.utils.hardware import MAX_PIXELS, Machine

SPARE = 2  # decoded sides are at least this many times the input's: Pillow's own gap for thumbnails
ORIENTATION = 0x0112  # EXIF's tag
# What Pillow's decoders make of damaged files is not only an OSError.
REFUSALS = (
    OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError, struct.error,
    zlib.error, ArithmeticError, MemoryError, RuntimeError,
)  # fmt: skip
EIGHT_BITS = ("1", "L", "P", "LA", "PA", "La", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV")
# What Pillow refuses is an error of ours; what it only wonders at (a large image, odd metadata) is nothing to act upon.
warnings.filterwarnings("ignore", module=r"PIL\.")


def open_image(path, where: str = "") -> Image.Image:
    """The image as stored, RGB. EXIF rotation is not applied: landmarks are pixels of the file's own rows and columns.

    Raises `UserError` naming the file, and `where` it was named, for one that is missing, damaged or cut short.
    """
    with opened(path, where) as image:
        return to_rgb(image)


def image_size(path, where: str = "") -> tuple[int, int]:
    "Width and height of the image as stored; only its header is read. Raises as `open_image`."
    with opened(path, where) as image:
        return image.size


def read_input(
    path,
    fit: str,
    size: int,  # of the network's input
    where: str = "",
) -> tuple[Image.Image, PixelMap]:
    """The image as the network's input, and the map from pixels of the image as stored. Raises as `open_image`.

    A JPEG much larger than the input is decoded at a half, a quarter or an eighth of its sides: its file has them.
    """
    with opened(path, where) as image:
        width, height = image.size
        image.draft(None, _least_sides(width, height, fit, size))
        reduced = round(width / image.width)
        return fit_image(to_rgb(image), fit, size, reduced)


def read_crop(path, to_input: PixelMap, size: int, where: str = "") -> Image.Image:
    "The network's input that a map describes. Decodes a JPEG at a half, a quarter or an eighth where that is enough."
    with opened(path, where) as image:
        width = image.width
        least = SPARE * to_input.scale
        image.draft(None, (max(1, int(width * least)), max(1, int(image.height * least))))
        return cut_image(to_rgb(image), to_input, size, round(width / image.width))


def _least_sides(width, height, fit, size):
    "The sides that a decoded image must have at least."
    if fit == "squish":
        return SPARE * size, SPARE * size
    scale = SPARE * size / (min if fit == "crop" else max)(width, height)
    return max(1, int(width * scale)), max(1, int(height * scale))


def to_rgb(image: Image.Image) -> Image.Image:
    "8-bit RGB of an opened image: what is transparent is black, 16 bits lose their lower 8, of an animation the first frame."
    check_mode(image)
    if is_deep(image) and image.mode[0] == "I":
        grey = np.asarray(image)
        light = (grey >> 8).astype(np.uint8)
        light[grey == image.info.get("transparency", -1)] = 0
        return Image.fromarray(light).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    if is_deep(image) and isinstance(image.info.get("transparency"), tuple):
        image.info["transparency"] = tuple(v >> 8 for v in image.info["transparency"])
    return Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image.convert("RGBA")).convert("RGB")


def check_mode(image: Image.Image):
    "Refuse pixels that no rule makes 8-bit RGB: 32-bit numbers, whose white nobody knows, and Lab."
    if image.mode not in EIGHT_BITS and not is_deep(image):
        raise ValueError(
            f"its pixels are of Pillow's mode {image.mode}, which has no certain RGB: save it as 8-bit RGB"
        )
    if not all(image.size):
        raise ValueError(f"it is {image.width} x {image.height} pixels large")


def is_deep(image: Image.Image) -> bool:
    "Whether an opened image, not yet decoded, has 16 bits a channel. Pillow gives PGM's as mode I, which is a TIFF's 32."
    if image.mode == "I" and image.format == "PPM":
        return True
    return image.mode.startswith("I;16") or any(
        re.search(r";16[BLN]?(?!\w)", str(tile.args)) for tile in getattr(image, "tile", ())
    )


def is_turned(image: Image.Image) -> bool:
    "Whether EXIF asks for the image to be turned before it is shown."
    with suppress(*REFUSALS):
        return (
            image.info.get("turned")
            or ("exif" in image.info or image.format == "TIFF")
            and image.getexif().get(ORIENTATION, 1) not in (0, 1)
        )
    return False


def image_end(image: Image.Image, n: int = 64) -> bytes:
    "The last bytes of an opened image's file."
    place = image.fp.tell()
    image.fp.seek(max(0, image.fp.seek(0, os.SEEK_END) - n))
    end = image.fp.read(n)
    image.fp.seek(place)
    return end


def max_pixels() -> int:
    "The pixels that an image may have at most: `Machine.max_pixels`."
    return int(os.environ.get(MAX_PIXELS) or 1e6 * Machine.max_pixels)


@contextmanager
def opened(path, where: str = ""):
    "Pillow's image of a file, not yet decoded. Its refusals, then and in the block, are `UserError`s."
    Image.MAX_IMAGE_PIXELS = max_pixels() / 2  # Pillow warns above it, and refuses what is twice as large
    try:
        with Image.open(path) as image:
            if image.format == "TIFF" and is_turned(image):
                image.info["turned"] = True
                image.getexif()[ORIENTATION] = 1  # of all formats, Pillow turns this one by itself
                image._size = image._tile_size
            yield image
    except FileNotFoundError:
        raise MissingImage(f"{where}image {path} not found") from None
    except Image.DecompressionBombError as e:
        pixels = int(re.search(r"\d+", str(e))[0])
        raise UserError(
            f"{where}image {path} has {pixels / 1e6:.4g} million pixels, --max-pixels allows {max_pixels() / 1e6:.4g} million: "
            "make it smaller, remove its line, or raise --max-pixels"
        ) from None
    except REFUSALS as e:
        why = "is cut short" if "truncated" in str(e).lower() else "cannot be read as an image"
        raise UserError(f"{where}image {path} {why} ({_reason(e, path)}): replace it or remove its line") from None


def _reason(error, path) -> str:
    if isinstance(error, UnidentifiedImageError):
        empty = os.path.isfile(path) and not os.path.getsize(path)
        return "it has no bytes" if empty else "of a format that Pillow does not know"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
