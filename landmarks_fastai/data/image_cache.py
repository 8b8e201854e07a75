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

FORMAT = 5  # of the cache file
HEADER = 4096  # bytes
PLACE = struct.Struct("<q")  # offset of a row's record in the file; 0: none
FACTS = struct.Struct("<I6dqq")  # of a record: checksum, map, size and time of the image file
Input = tuple[np.ndarray, PixelMap]  # (3, size, size) uint8, and its map from pixels of the image as stored


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
        # row -> place of a record that this process has found valid. Records are only appended, so one check will do; it
        # would take a third of the time of a cached input.
        self.checked = np.zeros(self.rows, np.int64)
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
        return {k: v for k, v in self.__dict__.items() if k not in ("file", "checked")}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        if self.path.parent.is_dir():
            self._open()

    @property
    def missing_bytes(self) -> int:
        "Bytes by which the file may still grow."
        places = np.frombuffer(read_at(self.file, PLACE.size * self.rows, HEADER), np.int64)
        return int((places == 0).sum()) * self.record

    def get(self, row: int, path: str | Path) -> Input | None:
        "Return the row's input; None if there is no valid record or the image file has changed."
        place = int(self.checked[row])
        if not place:
            (place,) = PLACE.unpack(read_at(self.file, PLACE.size, HEADER + PLACE.size * row))
        data = read_at(self.file, self.record, place) if place else b""
        if len(data) < self.record:
            return None
        crc, *to_input, length, time = FACTS.unpack_from(data)
        valid = bool(self.checked[row]) or zlib.crc32(memoryview(data)[4:]) == crc
        self.checked[row] = place if valid and (length, time) == _stamp(path) else 0
        if not self.checked[row]:
            return None
        pixels = np.frombuffer(data, np.uint8, offset=FACTS.size).reshape(3, self.size, self.size)
        return pixels, PixelMap(*to_input)

    def put(self, row: int, stamp: tuple[int, int], pixels: np.ndarray, to_input: PixelMap) -> None:
        "Write a row's record; nothing is written if the disk is full."
        data = bytearray(FACTS.pack(0, *to_input, *stamp) + pixels.tobytes())
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


def open_cache(folder: Path, rows: int, fit: str, size: int, key: dict) -> InputCache:
    """Open the cache of an image folder: beside it, or in the user's cache folder if that place cannot be written to.

    Raises `UserError` if the disk has too little space for all rows.
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
                "make room, or run without --cache"
            )
        return cache
    raise UserError(f"--cache: no place beside {folder} or in the cache folder can be written to: {refused}")


class Inputs:
    "The network inputs of the rows, from the caches if there are any, else from the image files."

    def __init__(self, fit: str, size: int, cache: InputCache | None = None, crops: InputCache | None = None):
        self.fit, self.size, self.cache, self.crops = fit, size, cache, crops

    def __call__(self, row: int, path: str | Path, where: str = "") -> Input:
        "Return the row's input, the whole image."

        def read() -> Input:
            image, to_input = self.read(path, where)
            return to_pixels(image), to_input

        found = _cached(self.cache, row, path, read)
        assert found
        return found

    def read(self, path: str | Path, where: str = "") -> tuple[Image.Image, PixelMap]:
        "Return the input and the map of any image file."
        return read_input(path, self.fit, self.size, where)

    def crop(self, path: str | Path, to_input: PixelMap, where: str = "") -> Input:
        "Return the input of any map, which is not cached."
        return to_pixels(read_crop(path, to_input, self.size, where)), to_input

    def aligned(self, row: int, path: str | Path, find: Callable[[], PixelMap | None], where: str = "") -> Input | None:
        "Return the input of the row's aligned crop, whose map `find` returns if it is not cached; None if that is None."

        def read() -> Input | None:
            to_input = find()
            return self.crop(path, to_input, where) if to_input else None

        return _cached(self.crops, row, path, read)


def to_pixels(image: Image.Image) -> np.ndarray:
    "Convert an RGB image to an array (3, h, w) uint8, as it is in a batch."
    return np.asarray(image).transpose(2, 0, 1)


def to_image(pixels: np.ndarray) -> Image.Image:
    "Convert an array (3, h, w) uint8 to an image."
    return Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))


def _cached(cache: InputCache | None, row: int, path: str | Path, read: Callable[[], Input | None]) -> Input | None:
    if cached := cache and cache.get(row, path):
        return cached
    stamp = _stamp(path)  # before reading: if the file changes meanwhile, the record does not match it
    found = read()
    if cache and found:
        cache.put(row, stamp, *found)
    return found
