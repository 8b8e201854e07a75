"""An image file -> the network's input: opened, decoded no larger than needed, fitted; and a place to keep that."""

import json
import os
import re
import shutil
import struct
import warnings
import zlib
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from landmarks_fastai.errors import MissingImage, UserError
from landmarks_fastai.files import cache_places, read_at, whole_file, write_at
from landmarks_fastai.geometry import PixelMap, fit_image
from landmarks_fastai.machine import MAX_PIXELS, Machine

SPARE = 2  # decoded sides are at least this many times the input's: Pillow's own gap for thumbnails
FORMAT = 3  # of the cache file
HEADER = 4096  # bytes of it
ORIENTATION = 0x0112  # EXIF's tag
# What Pillow's decoders make of damaged files is not only an OSError.
REFUSALS = (
    OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError, struct.error,
    zlib.error, ArithmeticError, MemoryError, RuntimeError,
)  # fmt: skip
EIGHT_BITS = ("1", "L", "P", "LA", "PA", "La", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV")
PLACE = struct.Struct("<q")  # of a row's record in the file, 0: it has none
FACTS = struct.Struct("<I4dqq")  # checksum; the map; the image file's size and time

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


class InputCache:
    """A file of fitted images, a record a row, written as they are first asked for.

    A record holds the image file's size and time and a checksum of itself: one that is not yet written, torn, or of a
    file that has changed since is made anew. Records are appended in the order in which they are made, and a table behind
    the header says where each row's is: NTFS would allocate the room of all rows at once where one far from the start is
    written at its place. Pickles as the file's name.
    """

    def __init__(
        self,
        path: Path,
        rows: int,
        size: int,  # of the network's input
        key: dict,  # what the records depend on beyond their image files
    ):
        self.path, self.rows, self.size, self.key = Path(path), rows, size, key
        self.record = FACTS.size + size * size * 3
        self._open()

    def _open(self):
        head = json.dumps({"format": FORMAT, "size": self.size, "rows": self.rows} | self.key).encode()
        head = head.ljust(HEADER, b"\0")
        with suppress(OSError):
            self.file = open(self.path, "r+b", buffering=0)
            if read_at(self.file, HEADER, 0) == head:
                return
            self.file.close()
        with whole_file(self.path, "wb") as f:
            f.write(head + bytes(PLACE.size * self.rows))
        self.file = open(self.path, "r+b", buffering=0)

    def __getstate__(self):
        return {k: v for k, v in self.__dict__.items() if k != "file"}

    def __setstate__(self, state):
        self.__dict__.update(state)
        if self.path.parent.is_dir():
            self._open()
        else:  # an exported Learner, on another machine: it predicts files, and asks for no row
            self.file = None

    @property
    def missing_bytes(self) -> int:
        "How much the file may still grow."
        places = np.frombuffer(read_at(self.file, PLACE.size * self.rows, HEADER), np.int64)
        return int((places == 0).sum()) * self.record

    def get(self, row: int, path) -> tuple[Image.Image, PixelMap] | None:
        "The row's input and map, if they were kept and the image file at `path` is as it was."
        (place,) = PLACE.unpack(read_at(self.file, PLACE.size, HEADER + PLACE.size * row))
        data = read_at(self.file, self.record, place) if place else b""
        if len(data) < self.record:
            return None
        crc, *to_input, length, time = FACTS.unpack_from(data)
        if zlib.crc32(memoryview(data)[4:]) != crc or (length, time) != _stamp(path):
            return None
        side = (self.size, self.size)
        return Image.frombuffer("RGB", side, memoryview(data)[FACTS.size :], "raw", "RGB", 0, 1), PixelMap(*to_input)

    def put(self, row: int, stamp: tuple, image: Image.Image, to_input: PixelMap):
        "Keep a row's input. Where the disk is full, it is not kept."
        data = bytearray(FACTS.pack(0, *to_input, *stamp) + image.tobytes())
        struct.pack_into("<I", data, 0, zlib.crc32(memoryview(data)[4:]))
        with suppress(OSError), open(self.path, "ab", buffering=0) as end:  # each process has a position of its own
            same = os.path.samestat(os.fstat(end.fileno()), os.fstat(self.file.fileno()))  # none has replaced the file
            if same and end.write(data) == len(data):
                write_at(self.file, PLACE.pack(end.tell() - len(data)), HEADER + PLACE.size * row)


def _stamp(path) -> tuple[int, int]:
    try:
        stat = os.stat(path)
    except OSError:
        return (-1, -1)
    return stat.st_size, stat.st_mtime_ns


def open_cache(folder: Path, rows: int, fit: str, size: int, key: dict) -> InputCache:
    """The cache of an image folder: beside it, or in the user's cache folder where that place cannot be written to.

    Raises `UserError` where the disk has no room for all rows.
    """
    refused = None
    for place in cache_places(folder.with_name(f"{folder.name}-{size}-{fit}")):
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            cache = InputCache(place, rows, size, {"fit": fit} | key)
        except OSError as e:
            refused = e
            continue
        free = shutil.disk_usage(place.parent).free
        if cache.missing_bytes > free:
            raise UserError(
                f"--cache: {place} may grow by {cache.missing_bytes / 1e9:.1f} GB, {free / 1e9:.1f} GB are free: "
                "make room, or leave --cache away"
            )
        return cache
    raise UserError(f"--cache: no place beside {folder} or in the cache folder can be written to: {refused}")


class Inputs:
    "Rows of image files as network inputs, from the cache where there is one."

    def __init__(self, fit: str, size: int, cache: InputCache | None = None):
        self.fit, self.size, self.cache = fit, size, cache

    def __call__(self, row: int, path, where: str = "") -> tuple[Image.Image, PixelMap]:
        "The row's input, (size, size) RGB, and its map from pixels of the image as stored."
        kept = self.cache and self.cache.get(row, path)
        if kept:
            return kept
        stamp = _stamp(path)  # before it is read: a file that changes meanwhile does not match its record
        found = self.read(path, where)
        if self.cache:
            self.cache.put(row, stamp, *found)
        return found

    def read(self, path, where: str = "") -> tuple[Image.Image, PixelMap]:
        "Any image file's input and map."
        return read_input(path, self.fit, self.size, where)
