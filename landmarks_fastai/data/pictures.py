"The pictures to predict: files, PIL images and arrays, alone, in folders, or from an iterator."

import csv
import glob
import math
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from landmarks_fastai.data.images import (
    image_size,
    open_image,
    read_crops,
    read_input,
    read_reduced,
    shown_size,
    to_rgb,
)
from landmarks_fastai.errors import UserError, one_line
from landmarks_fastai.geometry import Box, PixelMap, cut_image, fit_image
from landmarks_fastai.utils.files import reason

Source = str | Path | Image.Image | np.ndarray
VIDEOS = {".mp4", ".mov", ".webm", ".avi", ".mkv", ".m4v", ".mpg", ".mpeg"}


class Picture:
    """One picture. Its pixels are those that a viewer shows: with `exif`, the EXIF rotation of a file is applied.

    A file is opened again for each pass, at no more than the resolution that the pass needs, so that a list of large
    photographs takes no more memory than one. Raises `UserError` for a source of another kind.
    """

    def __init__(self, source: Source, exif: bool = True, where: str = ""):
        self.exif, self.where = exif, where
        self.name = str(source) if isinstance(source, (str, Path)) else ""
        self.source = Path(source) if isinstance(source, (str, Path)) else _as_rgb(source)

    def size_and_rotated(self) -> tuple[tuple[int, int], bool]:
        "Return width and height, and whether the picture is shown otherwise than the file stores it."
        if isinstance(self.source, Path):
            return shown_size(self.source, self.where) if self.exif else (image_size(self.source, self.where), False)
        return self.source.size, False

    def whole(self, fit: str, size: int) -> tuple[np.ndarray, PixelMap]:
        "Return the whole picture as the network's input, uint8 (size, size, 3), and its map."
        if isinstance(self.source, Path):
            fitted, to_input = read_input(self.source, fit, size, self.where, self.exif)
        else:
            fitted, to_input = fit_image(self.source, fit, size)
        return np.asarray(fitted), to_input

    def crops(self, maps: Sequence[PixelMap], size: int) -> list[np.ndarray]:
        "Return the network's inputs that maps describe, uint8 (size, size, 3) each."
        if not maps:
            return []
        if isinstance(self.source, Path):
            return [np.asarray(crop) for crop in read_crops(self.source, maps, size, self.where, self.exif)]
        return [np.asarray(cut_image(self.source, to_input, size)) for to_input in maps]

    def inputs(self, maps: Sequence[PixelMap | None], fit: str, size: int) -> list[tuple[np.ndarray, PixelMap]]:
        "Return the input of each map, with the map: the whole picture for None."
        crops = iter(self.crops([m for m in maps if m], size))
        return [(next(crops), m) if m else self.whole(fit, size) for m in maps]

    def reduced(self, side: int) -> tuple[Image.Image, float]:
        "Return the picture with a long side of at most `side` pixels, and how many times smaller it is."
        if isinstance(self.source, Path):
            return read_reduced(self.source, side, self.where, self.exif)
        image = self.source.copy()
        image.thumbnail((side, side), Image.Resampling.BILINEAR)
        return image, max(self.source.size) / max(image.size)

    def image(self) -> Image.Image:
        "Return all pixels, RGB."
        return open_image(self.source, self.where, self.exif) if isinstance(self.source, Path) else self.source


def _as_rgb(source: Any) -> Image.Image:
    if isinstance(source, Image.Image):
        try:
            return to_rgb(source)
        except ValueError as e:
            raise UserError(f"the picture cannot be used: {e}") from None
    if isinstance(source, np.ndarray) and source.dtype == np.uint8 and source.size:
        if source.ndim == 2 or (source.ndim == 3 and source.shape[2] == 3):
            return Image.fromarray(source).convert("RGB")
    found = f"{source.dtype} array {source.shape}" if isinstance(source, np.ndarray) else type(source).__name__
    raise UserError(f"a picture is a path, a PIL image or a uint8 array (h, w, 3); {found} found")


def find_pictures(paths: Iterable[str]) -> Iterator[Path]:
    """Return the files that paths mean: files, folders with all below them, patterns, and `-` for a list on stdin.

    In folders and patterns, files whose suffix is neither that of a picture nor of a video are left out; a file named
    by itself never is. Raises `UserError`, before the first is predicted, for a path that does not exist, and for a folder
    or pattern without pictures; a line of stdin that does not exist is yielded as it is.
    """
    return chain.from_iterable([_lines_of_stdin() if path == "-" else _files_of(path) for path in paths])


def _files_of(path: str) -> Iterable[Path]:
    if os.path.isdir(path):
        if not any(map(_is_media, _files_below(path))):
            raise UserError(f"{path} holds no picture that Pillow reads, and no video")
        return _below(path)
    if os.path.lexists(path):
        return [Path(path)]
    if glob.has_magic(path) and (matches := sorted(glob.glob(path, recursive=True))):
        return _matched(path, matches)
    raise UserError(one_line(f"{path} not found: no file, no folder, and no pattern that matches one"))


def _lines_of_stdin() -> Iterator[Path]:
    empty = True
    for line in (line.rstrip("\r\n") for line in sys.stdin):
        if line:
            empty = False
            try:
                yield from _files_of(line)
            except UserError:
                yield Path(line)  # its result is an error; those before it are kept
    if empty:
        raise UserError("stdin is empty: - reads a list of paths from it, one a line")


def _matched(pattern: str, matches: Sequence[str]) -> list[Path]:
    "Return the pictures and videos that a pattern matches, and those below folders that it matches, each once."
    below = (file for match in matches if os.path.isdir(match) for file in _files_below(match) if _is_media(file))
    files = (Path(match) for match in matches if not os.path.isdir(match) and _is_media(Path(match)))
    found = dict.fromkeys(chain(files, below))  # `**` matches a folder, its subfolders and their files
    if not found:
        raise UserError(one_line(f"{pattern} matches no picture that Pillow reads, and no video"))
    return sorted(found)


def read_boxes(path: str | Path) -> dict[str, list[Box]]:
    """Read a CSV of boxes: a header line, then file_name, left, top, right, bottom, in pixel edges; a row an object.

    Returns the boxes of each file name. Raises `UserError` with the line of a bad row.
    """
    boxes: dict[str, list[Box]] = {}
    try:
        with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            for number, row in enumerate(csv.reader(file), 1):
                if not row:
                    continue
                try:
                    box = as_box([float(cell) for cell in row[1:]])
                    if number == 1:
                        raise UserError(f"{path} line 1 is a box: add a header line, file_name,left,top,right,bottom")
                except ValueError:
                    if number == 1:
                        continue
                    wanted = "file_name,left,top,right,bottom with left < right and top < bottom expected"
                    raise UserError(one_line(f"{path} line {number}: {','.join(row)[:60]!r}: {wanted}")) from None
                boxes.setdefault(str(Path(row[0])), []).append(box)  # as a picture's name: ./a.jpg is a.jpg
    except (OSError, csv.Error) as e:
        raise UserError(f"{path} cannot be read as a CSV of boxes ({reason(e)})") from None
    if not boxes:
        raise UserError(f"{path} has no rows: a header line, and one line per object are needed")
    return boxes


def as_box(edges: Sequence[float]) -> Box:
    "Return left, top, right, bottom as a box. Raises `ValueError` unless they are four finite numbers with something inside."
    left, top, right, bottom = map(float, edges)
    if not (-math.inf < left < right < math.inf and -math.inf < top < bottom < math.inf):
        raise ValueError
    return left, top, right, bottom


def _below(folder: str) -> Iterator[Path]:
    """Yield the pictures and videos of a folder and its subfolders, sorted; hidden ones are left out.

    Prints how many other files there are. Raises `UserError` for a folder that cannot be read.
    """
    found, others = 0, 0
    for path in _files_below(folder):
        if _is_media(path):
            found += 1
            yield path
        else:
            others += 1
    if others:
        files = f"{others} of its {found + others} files are left out"
        print(f"note: {folder}: {files}: their names are not those of pictures or videos", file=sys.stderr, flush=True)


def _files_below(folder: str) -> Iterator[Path]:
    "Yield all files of a folder and its subfolders, sorted, but hidden ones. Raises `UserError` for one that cannot be read."

    def refuse(error: OSError):
        raise UserError(f"{error.filename} cannot be read ({reason(error)})")

    for place, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(place, name) for name in sorted(files) if not name.startswith("."))


def _is_media(path: Path) -> bool:
    suffix = path.suffix.lower()
    return is_video(path) or Image.registered_extensions().get(suffix) in Image.OPEN  # others are only written


def is_video(path: Path) -> bool:
    "Return whether the suffix is that of a video."
    return path.suffix.lower() in VIDEOS
