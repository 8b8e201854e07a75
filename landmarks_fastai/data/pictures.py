"The pictures to predict: files, PIL images and arrays, alone, in folders, or from an iterator."

import csv
import glob
import os
import sys
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from landmarks_fastai.data.images import SIDEWAYS, exif_turn, open_undecoded, to_rgb
from landmarks_fastai.errors import UserError, one_line
from landmarks_fastai.geometry import Box, PixelMap, cut_image, fit_image, pixel_map
from landmarks_fastai.utils.files import reason

Source = str | Path | Image.Image | np.ndarray
SPARE = 2  # decoded sides are at least this many times the input's, like `reducing_gap` of Pillow's thumbnails
MAX_BOXES = 10_000_000  # lines of a CSV: a file that never ends must not be read for ever
MAX_EDGE = 1e6  # pixels: beyond it, a box or its area leaves the range of float32
VIDEOS = {".mp4", ".mov", ".webm", ".avi", ".mkv", ".m4v", ".mpg", ".mpeg"}


class Picture:
    """One picture. With `exif` its pixels are those that a viewer shows: the EXIF rotation of a file is applied.

    Without it they are those of the image as stored, in which landmarks are labelled. A file is opened again for each pass,
    at no more than the resolution that the pass needs, so that a list of large photographs takes no more memory than one.
    Raises `UserError` for a source of another kind; the methods for a file that is missing, damaged or cut short.
    """

    def __init__(
        self,
        source: Source,
        exif: bool = True,
        where: str = "",  # first words of an error message: file and line
        boxes: Sequence[Box] | None = None,  # of its objects' points; None: they are searched for, or it is one object
    ):
        is_path = isinstance(source, (str, Path))
        self.name = str(source) if is_path else ""
        self.source = Path(source) if is_path else _as_rgb(source)
        self.exif, self.where, self.boxes = exif and is_path, where, boxes
        self.crop: PixelMap | None = None  # the aligned crop, where a first pass has found it

    def size_and_rotated(self) -> tuple[tuple[int, int], bool]:
        "Return width and height, and whether the picture is shown otherwise than the file stores it."
        with self._opened() as image:
            turn = exif_turn(image) if self.exif else None
            return (image.height, image.width) if turn in SIDEWAYS else image.size, turn is not None

    def inputs(self, maps: Sequence[PixelMap | None], fit: str, size: int) -> list[tuple[np.ndarray, PixelMap]]:
        """Return the network's input of each map, uint8 (size, size, 3) RGB, with the map: the whole picture for None.

        The picture is decoded once.
        """
        with self._opened() as image:
            scale = max((m or pixel_map(*image.size, fit, size)).scale for m in maps)
            decoded, reduced = self._decoded(image, SPARE * scale)
            inputs = (
                (cut_image(decoded, m, size, reduced), m) if m else fit_image(decoded, fit, size, reduced) for m in maps
            )
            return [(np.asarray(pixels), to_input) for pixels, to_input in inputs]

    def reduced(self, side: int) -> tuple[Image.Image, int]:
        "Return the picture, RGB, with a long side of at least `side` pixels, and how many times smaller it is."
        with self._opened() as image:
            return self._decoded(image, SPARE * side / max(image.size))

    def image(self) -> Image.Image:
        "Return all pixels, RGB."
        with self._opened() as image:
            return self._decoded(image, 1)[0]

    def _opened(self) -> AbstractContextManager[Image.Image]:
        if isinstance(self.source, Path):
            return open_undecoded(self.source, self.where)
        return nullcontext(self.source)

    def _decoded(self, image: Image.Image, scale: float) -> tuple[Image.Image, int]:
        """Decode an opened image as RGB; also return how many times smaller than the file it is.

        A JPEG is decoded at a half, a quarter or an eighth of its sides, if they are at least `scale` of the file's then.
        """
        if image is self.source:
            return image, 1
        long, turn = max(image.size), exif_turn(image) if self.exif else None
        least = (max(1, int(image.width * scale)), max(1, int(image.height * scale)))
        if turn is not None:  # an incomplete last pixel would come to lie at the left or at the top
            sides = [
                tuple(side // n for side in image.size) for n in (8, 4, 2) if not any(side % n for side in image.size)
            ]
            least = next((s for s in sides if s[0] >= least[0] and s[1] >= least[1]), image.size)
        image.draft(None, least)  # type: ignore[arg-type] (None keeps the mode)
        decoded = to_rgb(image)
        reduced = round(long / max(decoded.size))
        return (decoded if turn is None else decoded.transpose(turn)), reduced


def _as_rgb(source: Any) -> Image.Image:
    if isinstance(source, Image.Image):
        try:
            return to_rgb(source)
        except ValueError as e:
            raise UserError(f"the picture cannot be used: {e}") from None
    if isinstance(source, np.ndarray) and source.size and (source.ndim == 2 or source.shape[2:] in ((3,), (4,))):
        if source.dtype.kind == "f" and source.min() >= 0 and source.max() <= 1:
            source = np.rint(255 * source).astype(np.uint8)
        if source.dtype == np.uint8:
            return to_rgb(Image.fromarray(source))
    kind = f"{source.dtype} array {source.shape}" if isinstance(source, np.ndarray) else type(source).__name__
    arrays = "an array (h, w), (h, w, 3) or (h, w, 4), uint8 or of floats from 0 to 1"
    raise UserError(f"a picture is a path, a PIL image or {arrays}; {kind} found")


def find_pictures(
    paths: Iterable[str],
    videos: bool = True,  # whether videos are pictures too
    left_out: Collection[Path] = (),  # folders whose files are left out: what this program has written, or will write
) -> Iterator[Path]:
    """Return the files that paths mean: files, folders with all below them, patterns, and `-` for a list on stdin.

    In folders and patterns, files whose suffix is not that of a picture or video are left out, and hidden ones; a file named
    by itself never is. Raises `UserError`, before the first is predicted, for a path that does not exist, and for a folder
    or pattern without pictures; a line of stdin that does not exist is yielded as it is.
    """
    folders = {folder.resolve() for folder in left_out}
    return chain.from_iterable(
        [_lines_of_stdin(folders) if path == "-" else _files_of(path, videos, folders) for path in paths]
    )


def _files_of(path: str, videos: bool, left_out: Collection[Path]) -> Iterator[Path]:
    "Return the files that a path means. Of a folder, print how many are left out. Raises like `find_pictures`."
    is_folder = os.path.isdir(path)
    if not is_folder and os.path.lexists(path):
        return iter([Path(path)])
    matches = [path] if is_folder else sorted(glob.glob(_pattern(path), recursive=True))
    if not matches:
        raise UserError(one_line(f"{path} not found: no file, no folder, and no pattern that matches one"))
    files = chain.from_iterable(_files_below(match) if os.path.isdir(match) else [match] for match in matches)
    files = list(dict.fromkeys(files))  # `**` matches a folder, its subfolders and their files
    if written := {folder for folder in set(map(os.path.dirname, files)) if _lies_in(folder, left_out)}:
        n, files = len(files), [file for file in files if os.path.dirname(file) not in written]
        print(f"note: {path}: {n - len(files)} files that this program wrote are left out", file=sys.stderr, flush=True)
    pictures = [file for file in files if _is_picture(file) or (videos and is_video(file))]
    if not pictures:
        kinds = "picture that Pillow reads" + (", and no video" if videos else "")
        raise UserError(one_line(f"{path} {'holds' if is_folder else 'matches'} no {kinds}"))
    if is_folder and len(pictures) < len(files):
        others = f"{len(files) - len(pictures)} of its {len(files)} files are left out"
        kinds = "pictures or videos" if videos else "pictures"
        print(f"note: {path}: {others}: their names are not those of {kinds}", file=sys.stderr, flush=True)
    return map(Path, pictures)


def _pattern(path: str) -> str:
    "Return a pattern whose folders that exist are names, not patterns: `set [1]/*.jpg`."
    parts = Path(path).parts
    n = next(k for k in range(len(parts), -1, -1) if k == 0 or os.path.lexists(os.path.join(*parts[:k])))
    return os.path.join(*map(glob.escape, parts[:n]), *parts[n:])


def _lies_in(folder: str, folders: Collection[Path]) -> bool:
    path = Path(folder).resolve()
    return any(parent in folders for parent in (path, *path.parents))


def _files_below(folder: str) -> Iterator[str]:
    "Yield all files of a folder and its subfolders, sorted, but hidden ones. Raises `UserError` for one that cannot be read."

    def refuse(error: OSError):
        raise UserError(f"{error.filename} cannot be read ({reason(error)})")

    for place, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (os.path.join(place, name) for name in sorted(files) if not name.startswith("."))


def _lines_of_stdin(left_out: Collection[Path]) -> Iterator[Path]:
    empty = True
    for line in (line.rstrip("\r\n") for line in sys.stdin):
        if line:
            empty = False
            try:
                yield from _files_of(line, True, left_out)
            except UserError:
                yield Path(line)  # its result is an error; those before it are kept
    if empty:
        raise UserError("stdin is empty: - reads a list of paths from it, one a line")


def _is_picture(path: str) -> bool:
    kind = Image.registered_extensions().get(os.path.splitext(path)[1].lower())
    return kind in Image.OPEN or kind == "MPO"  # which the JPEG plugin opens; others are only written


def is_video(path: str | Path) -> bool:
    "Return whether the suffix is that of a video."
    return os.path.splitext(path)[1].lower() in VIDEOS


def read_boxes(path: str | Path) -> dict[str, list[Box]]:
    """Read a CSV of boxes: a header line, then file_name, left, top, right, bottom, in pixel edges; a row an object.

    Returns the boxes of each file name. Raises `UserError` with the line of a bad row.
    """
    boxes: dict[str, list[Box]] = {}
    header = False
    try:
        with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            for number, row in enumerate(csv.reader(file), 1):
                where, text = f"{path} line {number}", ",".join(row)
                if number > MAX_BOXES:
                    raise UserError(f"{path} has more than {MAX_BOXES} lines: divide it")
                if "\0" in text:
                    raise UserError(f"{where}: not UTF-8 text: save the file as UTF-8")
                box = None
                with suppress(ValueError):
                    box = as_box([float(cell) for cell in row[1:]])
                if box and not header:
                    raise UserError(f"{where} is a box: add a header line, file_name,left,top,right,bottom")
                if box:
                    boxes.setdefault(str(Path(row[0])), []).append(box)  # as a picture's name: ./a.jpg is a.jpg
                elif row and header:
                    wanted = "file_name,left,top,right,bottom with left < right and top < bottom expected"
                    raise UserError(one_line(f"{where}: {text[:60]!r}: {wanted}"))
                header = header or bool(row)
    except (OSError, csv.Error) as e:
        raise UserError(f"{path} cannot be read as a CSV of boxes ({reason(e)})") from None
    if not boxes:
        raise UserError(f"{path} has no rows: a header line, and one line per object are needed")
    return boxes


def as_box(edges: Sequence[float]) -> Box:
    """Return left, top, right, bottom as a box, pixel edges.

    Raises `ValueError` unless they are four numbers of at most `MAX_EDGE`, with a thousandth of a pixel inside at least.
    """
    left, top, right, bottom = map(float, edges)
    if not all(abs(edge) <= MAX_EDGE for edge in (left, top, right, bottom)) or min(right - left, bottom - top) < 1e-3:
        raise ValueError
    return left, top, right, bottom
