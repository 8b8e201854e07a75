"Open an image file with Pillow, and convert an image of any mode to RGB."

import os
import re
import stat
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.ImageFile import ImageFile

from landmarks_fastai.errors import MissingImage, UserError
from landmarks_fastai.utils.files import reason
from landmarks_fastai.utils.hardware import max_pixels

ORIENTATION = 0x0112  # EXIF tag; its values and what they ask of a viewer:
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90,
}  # fmt: skip
TIFF_WIDTH, TIFF_HEIGHT = 256, 257  # tags
SIDEWAYS = {turn for value, turn in TURNS.items() if value >= 5}  # those that swap width and height
# Pillow's decoders raise more than OSError for damaged files.
REFUSALS = (
    OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError, struct.error,
    zlib.error, ArithmeticError, MemoryError, RuntimeError,
)  # fmt: skip
EIGHT_BITS = ("1", "L", "P", "LA", "PA", "La", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV")
# Pillow's errors become `UserError`s; its warnings (a large image, odd metadata) need no action.
warnings.filterwarnings("ignore", module=r"PIL\.")


def exif_turn(image: Image.Image) -> Image.Transpose | None:
    "Return what EXIF asks viewers to do with an opened image; None if it is stored as it is shown."
    with suppress(*REFUSALS):
        if "rotated" in image.info:
            return TURNS.get(image.info["rotated"])
        if "exif" in image.info or image.format == "TIFF":
            return TURNS.get(image.getexif().get(ORIENTATION, 1))
    return None


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an opened image to 8-bit RGB. Raises `ValueError` for modes that have no defined conversion.

    Transparent pixels become black, 16 bits of grey become the upper 8 of those that the image uses, an animation gives its
    first frame.
    """
    check_mode(image)
    if is_16_bit(image) and image.mode[0] == "I":
        grey = np.asarray(image)
        bits = next(n for n in (8, 10, 12, 14, 16) if grey.max() < 1 << n)  # cameras write 10 or 12 into such files
        byte = (grey >> bits - 8).astype(np.uint8)
        byte[grey == image.info.get("transparency", -1)] = 0
        return Image.fromarray(byte).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    if is_16_bit(image) and isinstance(image.info.get("transparency"), tuple):
        image.info["transparency"] = tuple(v >> 8 for v in image.info["transparency"])
    return Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image.convert("RGBA")).convert("RGB")


def check_mode(image: Image.Image) -> None:
    "Raise `ValueError` for an empty image and for modes without a defined conversion to RGB: 32-bit numbers and Lab."
    if image.mode not in EIGHT_BITS and not is_16_bit(image):
        raise ValueError(f"its pixels, Pillow's mode {image.mode}, have no defined RGB: save it as 8-bit RGB")
    if not all(image.size):
        raise ValueError(f"its size is {image.width} x {image.height} pixels")


def is_16_bit(image: Image.Image) -> bool:
    "Return whether an opened image, not yet decoded, has 16 bits a channel."
    if image.mode == "I" and image.format == "PPM":  # mode I is a PGM's 16 bits, but a TIFF's 32
        return True
    tiles = (str(tile[3]) for tile in getattr(image, "tile", ()))  # decoder, box, offset, arguments
    return image.mode.startswith("I;16") or any(re.search(r";16[BLN]?(?!\w)", args) for args in tiles)


@contextmanager
def open_undecoded(path: str | Path, where: str = "") -> Iterator[ImageFile]:
    """Open a file with Pillow, without decoding it. Pillow's errors, then and in the block, become `UserError`s.

    These say what is wrong: the file is missing, damaged, cut short or too large. They begin with `where`.
    """
    Image.MAX_IMAGE_PIXELS = max_pixels() / 2  # type: ignore[assignment] (Pillow refuses twice as many, which may be odd)
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # a FIFO may never have anything to read
            raise UserError(f"{where}image {path} is a folder or not a plain file: replace it")
        with Image.open(path) as image:
            if image.format == "TIFF" and exif_turn(image) is not None:  # the only format that Pillow rotates by itself
                image.info["rotated"] = image.getexif()[ORIENTATION]
                image.getexif()[ORIENTATION] = 1
                image._size = (image.tag_v2[TIFF_WIDTH], image.tag_v2[TIFF_HEIGHT])  # type: ignore[attr-defined] (of TiffImageFile)
            yield image
    except FileNotFoundError:
        raise MissingImage(f"{where}image {path} not found") from None
    except Image.DecompressionBombError as e:
        pixels = int("".join(re.findall(r"\d+", str(e))[:1]))
        raise UserError(
            f"{where}image {path} has {pixels / 1e6:.4g} million pixels, --max-pixels allows {max_pixels() / 1e6:.4g} million: "
            f"make it smaller, {'remove its line, ' if where else ''}or raise --max-pixels"
        ) from None
    except REFUSALS as e:
        fault = "is cut short" if "truncated" in str(e).lower() else "cannot be read as an image"
        why = reason(e)
        if isinstance(e, UnidentifiedImageError):
            empty = os.path.isfile(path) and not os.path.getsize(path)
            why = "it has no bytes" if empty else "of a format that Pillow does not know"
        raise UserError(
            f"{where}image {path} {fault} ({why}): replace it{' or remove its line' if where else ''}"
        ) from None
