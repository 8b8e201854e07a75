"Open an image file, decode it no larger than needed, and fit it to the network's input."

import os
import re
import struct
import warnings
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.ImageFile import ImageFile

from landmarks_fastai.errors import MissingImage, UserError
from landmarks_fastai.geometry import PixelMap, cut_image, fit_image
from landmarks_fastai.utils.files import reason
from landmarks_fastai.utils.hardware import max_pixels

SPARE = 2  # decoded sides are at least this many times the input's, like `reducing_gap` of Pillow's thumbnails
ORIENTATION = 0x0112  # EXIF tag; its values and what they ask of a viewer:
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90,
}  # fmt: skip
SIDEWAYS = {turn for value, turn in TURNS.items() if value >= 5}  # those that swap width and height
# Pillow's decoders raise more than OSError for damaged files.
REFUSALS = (
    OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError, struct.error,
    zlib.error, ArithmeticError, MemoryError, RuntimeError,
)  # fmt: skip
EIGHT_BITS = ("1", "L", "P", "LA", "PA", "La", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV")
# Pillow's errors become `UserError`s; its warnings (a large image, odd metadata) need no action.
warnings.filterwarnings("ignore", module=r"PIL\.")


def open_image(path: str | Path, where: str = "", exif: bool = False) -> Image.Image:
    """Open an image as RGB. EXIF rotation is applied with `exif` only: landmarks are pixels of the image as stored.

    Raises `UserError`, which begins with `where`, for a file that is missing, damaged or cut short.
    """
    with open_undecoded(path, where) as image:
        return _decoded(image, image.size, exif)


def exif_turn(image: Image.Image) -> Image.Transpose | None:
    "Return what EXIF asks viewers to do with an opened image; None if it is stored as it is shown."
    with suppress(*REFUSALS):
        if "rotated" in image.info:
            return TURNS.get(image.info["rotated"])
        if "exif" in image.info or image.format == "TIFF":
            return TURNS.get(image.getexif().get(ORIENTATION, 1))
    return None


def image_size(path: str | Path, where: str = "") -> tuple[int, int]:
    "Read the width and height of the image as stored from the file's header. Raises like `open_image`."
    with open_undecoded(path, where) as image:
        return image.size


def shown_size(path: str | Path, where: str = "") -> tuple[tuple[int, int], bool]:
    "Read the width and height of the image as shown, and whether EXIF asks viewers to turn it. Raises like `open_image`."
    with open_undecoded(path, where) as image:
        turn = exif_turn(image)
        return (image.height, image.width) if turn in SIDEWAYS else image.size, turn is not None


def read_input(
    path: str | Path, fit: str, size: int, where: str = "", exif: bool = False
) -> tuple[Image.Image, PixelMap]:
    """Read an image as the network's input of `size` x `size` pixels, with the map from pixels of the image as stored.

    With `exif`, of the image as shown: EXIF rotation is applied. Raises like `open_image`. A JPEG much larger than the
    input is decoded at 1/2, 1/4 or 1/8 of its sides.
    """
    with open_undecoded(path, where) as image:
        width, height = image.size
        least = (SPARE * size, SPARE * size)
        if fit != "squish":
            scale = SPARE * size / (min if fit == "crop" else max)(width, height)
            least = (max(1, int(width * scale)), max(1, int(height * scale)))
        decoded = _decoded(image, least, exif)
        return fit_image(decoded, fit, size, round(max(width, height) / max(decoded.size)))


def read_crop(path: str | Path, to_input: PixelMap, size: int, where: str = "") -> Image.Image:
    "Read the network's input that a map describes. Raises like `open_image`."
    return read_crops(path, [to_input], size, where)[0]


def read_crops(
    path: str | Path, maps: Sequence[PixelMap], size: int, where: str = "", exif: bool = False
) -> list[Image.Image]:
    """Read the network's inputs that maps describe; the image is decoded once, a JPEG no larger than the crops need.

    With `exif` the maps are of the image as shown. Raises like `open_image`.
    """
    with open_undecoded(path, where) as image:
        long, scale = max(image.size), SPARE * max(to_input.scale for to_input in maps)
        least = (max(1, int(image.width * scale)), max(1, int(image.height * scale)))
        decoded = _decoded(image, least, exif)
        return [cut_image(decoded, to_input, size, round(long / max(decoded.size))) for to_input in maps]


def read_reduced(path: str | Path, side: int, where: str = "", exif: bool = False) -> tuple[Image.Image, float]:
    """Read an image whose long side is at most `side` pixels, and how many times smaller than the file's it is.

    With `exif` it is the image as shown. Raises like `open_image`.
    """
    with open_undecoded(path, where) as image:
        long = max(image.size)
        decoded = _decoded(image, (min(SPARE * side, image.width), min(SPARE * side, image.height)), exif)
        decoded.thumbnail((side, side), Image.Resampling.BILINEAR, reducing_gap=None)
        return decoded, long / max(decoded.size)


def _decoded(image: ImageFile, least: tuple[int, int], exif: bool) -> Image.Image:
    "Decode an opened image as RGB; a JPEG at a half, a quarter or an eighth of its sides, if it has `least` pixels then."
    turn = exif_turn(image) if exif else None
    image.draft(None, least)  # type: ignore[arg-type] (None keeps the mode)
    decoded = to_rgb(image)
    return decoded if turn is None else decoded.transpose(turn)


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an opened image to 8-bit RGB. Raises `ValueError` for modes that have no defined conversion.

    Transparent pixels become black, 16 bits lose their lower 8, an animation gives its first frame.
    """
    check_mode(image)
    if is_16_bit(image) and image.mode[0] == "I":
        grey = np.asarray(image)
        high_byte = (grey >> 8).astype(np.uint8)
        high_byte[grey == image.info.get("transparency", -1)] = 0
        return Image.fromarray(high_byte).convert("RGB")
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
    tiles = (str(tile.args) for tile in getattr(image, "tile", ()))
    return image.mode.startswith("I;16") or any(re.search(r";16[BLN]?(?!\w)", args) for args in tiles)


@contextmanager
def open_undecoded(path: str | Path, where: str = "") -> Iterator[ImageFile]:
    "Open a file with Pillow, without decoding it. Pillow's errors, then and in the block, become `UserError`s."
    Image.MAX_IMAGE_PIXELS = max_pixels() / 2  # type: ignore[assignment] (Pillow refuses twice as many, which may be odd)
    try:
        with Image.open(path) as image:
            if image.format == "TIFF" and exif_turn(image) is not None:  # the only format that Pillow rotates by itself
                image.info["rotated"] = image.getexif()[ORIENTATION]
                image.getexif()[ORIENTATION] = 1
                image._size = image._tile_size  # type: ignore[attr-defined] (of Pillow's TiffImageFile)
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
