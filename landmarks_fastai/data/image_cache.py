"The network inputs of the rows, read from image files or from a cache file."

import json
import os
import shutil
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np

from landmarks_fastai.data.pictures import Picture
from landmarks_fastai.errors import UserError
from landmarks_fastai.geometry import PixelMap
from landmarks_fastai.utils.files import atomic_path, cache_places


class InputCache:
    """A `.npy` file of fitted images, one record for each row, written when a row is first read.

    A record has a checksum, and the size and time of its image file: a missing or incomplete record, one of an image that
    has changed, or of another `key`, is written again. The file is sparse: it takes the space of the records written.

    It is read and written by its path, not mapped: what is mapped counts as memory of the process, here all 19 GB of the
    competition's images in each, and a write into a mapped file ends the process if the disk is full.
    """

    def __init__(
        self,
        path: Path,
        rows: int,
        size: int,  # of the network's input
        key: dict,  # of what the records depend on besides their image files
    ):
        self.path, self.key = Path(path), zlib.crc32(json.dumps(key).encode())
        facts = [("checksum", "u4"), ("map", "f8", 6), ("stamp", "i8", 2)]
        self.record = np.dtype([*facts, ("pixels", "u1", (size, size, 3))])
        self.start = 0
        with suppress(OSError, ValueError, EOFError):  # missing, damaged, or closed to this user
            records = np.load(self.path, mmap_mode="r")
            if records.dtype == self.record and records.shape == (rows,):
                self.start = records.offset
            del records  # Windows replaces no mapped file
        if not self.start:
            with atomic_path(self.path) as temporary:
                self.start = np.lib.format.open_memmap(temporary, "w+", self.record, (rows,)).offset
        self.bytes = self.start + rows * self.record.itemsize

    @property
    def missing_bytes(self) -> int:
        "Bytes by which the file may still grow."
        stat = os.stat(self.path)
        return max(0, self.bytes - getattr(stat, "st_blocks", stat.st_size // 512) * 512)

    def get(self, row: int, stamp: tuple[int, int]) -> tuple[np.ndarray, PixelMap] | None:
        "Return the row's input and map; None if there is no valid record of an image file with that `stamp`."
        data = b""
        with suppress(OSError), open(self.path, "rb", buffering=0) as f:
            f.seek(self.start + row * self.record.itemsize)
            data = f.read(self.record.itemsize)
        if len(data) < self.record.itemsize:
            return None
        record = np.frombuffer(data, self.record)[0]
        if record["checksum"] != zlib.crc32(memoryview(data)[4:], self.key) or tuple(record["stamp"]) != stamp:
            return None
        return record["pixels"], PixelMap(*record["map"].tolist())

    def put(self, row: int, stamp: tuple[int, int], pixels: np.ndarray, to_input: PixelMap) -> None:
        "Write a row's record; nothing is written if the disk is full, or the file was replaced by one of another shape."
        record = np.array((0, to_input, stamp, pixels), self.record)
        record["checksum"] = zlib.crc32(record.tobytes()[4:], self.key)
        with suppress(OSError), open(self.path, "r+b", buffering=0) as f:
            if os.fstat(f.fileno()).st_size == self.bytes:
                f.seek(self.start + row * self.record.itemsize)
                f.write(record.tobytes())


def image_stamp(path: str | Path) -> tuple[int, int]:
    "Return size and time of a file, -1 if there is none."
    with suppress(OSError):
        stat = os.stat(path)
        return stat.st_size, stat.st_mtime_ns
    return -1, -1


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

    def __call__(
        self,
        row: int,
        path: str | Path,
        where: str = "",  # first words of an error message: file and line
        crop: PixelMap | None = None,  # to the row's aligned crop; None: the first view
        view: PixelMap | None = None,  # the first view; None: the whole image
    ) -> tuple[np.ndarray, PixelMap]:
        "Return the row's input, uint8 (size, size, 3) RGB, and its map from pixels of the image as stored."
        cache = self.crops if crop else self.cache
        stamp = image_stamp(path)  # before reading: if the file changes meanwhile, the record does not match it
        cached = cache.get(row, stamp) if cache else None
        if cached is None:
            (cached,) = Picture(path, exif=False, where=where).inputs([crop or view], self.fit, self.size)
            if cache:
                cache.put(row, stamp, *cached)
        return cached
