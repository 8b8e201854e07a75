"A place to keep network inputs, and where they come from."

import json
import os
import shutil
import struct
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np
from PIL import Image

from landmarks_fastai.data.images import read_crop, read_input
from landmarks_fastai.errors import UserError
from landmarks_fastai.geometry import PixelMap
from landmarks_fastai.utils.files import atomic_write, cache_places, read_at, write_at

FORMAT = 4  # of the cache file
HEADER = 4096  # bytes of it
PLACE = struct.Struct("<q")  # of a row's record in the file, 0: it has none
FACTS = struct.Struct("<I6dqq")  # checksum; the map; the image file's size and time


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
        with atomic_write(self.path, "wb") as f:
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
                "make room, or run without --cache"
            )
        return cache
    raise UserError(f"--cache: no place beside {folder} or in the cache folder can be written to: {refused}")


class Inputs:
    "Rows of image files as network inputs, from the caches where there are some."

    def __init__(self, fit: str, size: int, cache: InputCache | None = None, crops: InputCache | None = None):
        self.fit, self.size, self.cache, self.crops = fit, size, cache, crops

    def __call__(self, row: int, path, where: str = "") -> tuple[Image.Image, PixelMap]:
        "The row's input, (size, size) RGB, and its map from pixels of the image as stored."
        return _cached(self.cache, row, path, lambda: self.read(path, where))

    def read(self, path, where: str = "") -> tuple[Image.Image, PixelMap]:
        "The input and the map of any image file."
        return read_input(path, self.fit, self.size, where)

    def crop(
        self, row: int, path, to_input: PixelMap, where: str = "", cached: bool = True
    ) -> tuple[Image.Image, PixelMap]:
        "The input that a map describes; `cached` where the row always has that map."
        return _cached(
            self.crops if cached else None, row, path, lambda: (read_crop(path, to_input, self.size, where), to_input)
        )


def _cached(cache: InputCache | None, row: int, path, read):
    kept = cache and cache.get(row, path)
    if kept:
        return kept
    stamp = _stamp(path)  # before it is read: a file that changes meanwhile does not match its record
    found = read()
    if cache:
        cache.put(row, stamp, *found)
    return found
