"The network inputs of the rows, read from image files or from a cache file."

import json
import os
import shutil
import struct
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image

from landmarks_fastai.data.images import read_crop, read_input
from landmarks_fastai.errors import UserError
from landmarks_fastai.geometry import PixelMap
from landmarks_fastai.utils.files import atomic_write, cache_places, read_at, write_at

FORMAT = 4  # of the cache file
HEADER = 4096  # bytes
PLACE = struct.Struct("<q")  # offset of a row's record in the file; 0: none
FACTS = struct.Struct("<I6dqq")  # of a record: checksum, map, size and time of the image file


class InputCache:
    """A file of fitted images, one record for each row, written when a row is first read.

    A record has a checksum, and the size and time of its image file: a missing or incomplete record, or one of an image
    that has changed, is written again. Records are appended in the order in which they are created; a table after the
    header has their offsets. With fixed offsets NTFS would allocate the whole file at the first write. It is pickled
    without the open file.
    """

    file: IO[bytes]  # not set in an exported Learner on another machine, which predicts files and reads no rows

    def __init__(
        self,
        path: Path,
        rows: int,
        size: int,  # of the network's input
        key: dict,  # of what the records depend on besides their image files
    ):
        self.path, self.rows, self.size, self.key = Path(path), rows, size, key
        self.record = FACTS.size + size * size * 3
        self._open()

    def _open(self) -> None:
        head = json.dumps({"format": FORMAT, "size": self.size, "rows": self.rows} | self.key).encode()
        head = head.ljust(HEADER, b"\0")
        with suppress(OSError):
            self.file = open(self.path, "r+b", buffering=0)
            if read_at(self.file, HEADER, 0) == head:
                return
            self.file.close()
        with atomic_write(self.path, "wb") as f:
            f.write(head + bytes(PLACE.size * self.rows))
        self.file = open(self.path, "r+b", buffering=0)

    def __getstate__(self) -> dict:
        return {k: v for k, v in self.__dict__.items() if k != "file"}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        if self.path.parent.is_dir():
            self._open()

    @property
    def missing_bytes(self) -> int:
        "Bytes by which the file may still grow."
        places = np.frombuffer(read_at(self.file, PLACE.size * self.rows, HEADER), np.int64)
        return int((places == 0).sum()) * self.record

    def get(self, row: int, path: str | Path) -> tuple[Image.Image, PixelMap] | None:
        "Return the row's input and map; None if there is no valid record or the image file has changed."
        (place,) = PLACE.unpack(read_at(self.file, PLACE.size, HEADER + PLACE.size * row))
        data = read_at(self.file, self.record, place) if place else b""
        if len(data) < self.record:
            return None
        crc, *to_input, length, time = FACTS.unpack_from(data)
        if zlib.crc32(memoryview(data)[4:]) != crc or (length, time) != _stamp(path):
            return None
        side = (self.size, self.size)
        pixels = memoryview(data)[FACTS.size :]
        # Pillow takes any buffer; its annotation lacks memoryview
        image = Image.frombuffer("RGB", side, pixels, "raw", "RGB", 0, 1)  # pyright: ignore[reportArgumentType]
        return image, PixelMap(*to_input)

    def put(self, row: int, stamp: tuple[int, int], image: Image.Image, to_input: PixelMap) -> None:
        "Write a row's record; nothing is written if the disk is full."
        data = bytearray(FACTS.pack(0, *to_input, *stamp) + image.tobytes())
        struct.pack_into("<I", data, 0, zlib.crc32(memoryview(data)[4:]))
        with (
            suppress(OSError),
            open(self.path, "ab", buffering=0) as end,
        ):  # not `self.file`: forked workers share its position
            same = os.path.samestat(os.fstat(end.fileno()), os.fstat(self.file.fileno()))  # the file was not replaced
            if same and end.write(data) == len(data):
                write_at(self.file, PLACE.pack(end.tell() - len(data)), HEADER + PLACE.size * row)


def _stamp(path: str | Path) -> tuple[int, int]:
    try:
        stat = os.stat(path)
    except OSError:
        return (-1, -1)
    return stat.st_size, stat.st_mtime_ns


def open_cache(folder: Path, rows: int, fit: str, size: int, key: dict, other: InputCache | None = None) -> InputCache:
    """Open the cache of an image folder: beside it, or in the user's cache folder if that place cannot be written to.

    Raises `UserError` if the disk has too little space for all rows of it, and of an `other` cache that grows beside it.
    """
    refused = None
    for place in cache_places(folder.with_name(f"{folder.name}-{size}-{fit}")):
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            cache = InputCache(place, rows, size, {"fit": fit} | key)
        except OSError as e:
            refused = e
            continue
        free, needed = shutil.disk_usage(place.parent).free, cache.missing_bytes + (other.missing_bytes if other else 0)
        if needed > free:
            files = f"{place} and {other.path.name}" if other else place
            raise UserError(
                f"--cache: {files} may grow by {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free: "
                "make room, or run without --cache"
            )
        return cache
    raise UserError(f"--cache: no place beside {folder} or in the cache folder can be written to: {refused}")


class Inputs:
    "The network inputs of the rows, from the caches if there are any, else from the image files."

    def __init__(self, fit: str, size: int, cache: InputCache | None = None, crops: InputCache | None = None):
        self.fit, self.size, self.cache, self.crops = fit, size, cache, crops

    def __call__(self, row: int, path: str | Path, where: str = "") -> tuple[Image.Image, PixelMap]:
        "Return the row's input, (size, size) RGB, and its map from pixels of the image as stored."
        return _cached(self.cache, row, path, lambda: self.read(path, where))

    def read(self, path: str | Path, where: str = "") -> tuple[Image.Image, PixelMap]:
        "Return the input and the map of any image file."
        return read_input(path, self.fit, self.size, where)

    def crop(self, row: int, path: str | Path, to_input: PixelMap, where: str = "") -> tuple[Image.Image, PixelMap]:
        "Return the input of the row's aligned crop, and its map."
        return _cached(self.crops, row, path, lambda: (read_crop(path, to_input, self.size, where), to_input))


def _cached(
    cache: InputCache | None, row: int, path: str | Path, read: Callable[[], tuple[Image.Image, PixelMap]]
) -> tuple[Image.Image, PixelMap]:
    cached = cache and cache.get(row, path)
    if cached:
        return cached
    stamp = _stamp(path)  # before reading: if the file changes meanwhile, the record does not match it
    found = read()
    if cache:
        cache.put(row, stamp, *found)
    return found
