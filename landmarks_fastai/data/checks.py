"""Check before training that every row's image exists and is complete, and report all bad rows at once.

The first check opens each image's header and reads its end: 65 us on one core, where decoding takes 170 (3,000 drawn
faces; two threads wait for Pillow's lock, at 99 to 35 on one). Size and time of the images that passed are stored beside
the CSV's cache: a later start compares those, at 5 us a row, and opens only what has changed.
"""

import csv
import errno
import json
import os
import re
import stat
import zlib
from array import array
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path, PurePosixPath, PureWindowsPath

import numpy as np
from PIL.ImageFile import ImageFile

from landmarks_fastai.data.images import check_mode, exif_turn, is_16_bit, open_undecoded
from landmarks_fastai.data.labels import Table
from landmarks_fastai.errors import Problem, UserError
from landmarks_fastai.utils.files import atomic_write, cache_places, check_folder
from landmarks_fastai.utils.hardware import max_pixels
from landmarks_fastai.utils.parallel import bar

FORMAT = 1  # of the file of stamps
BLOCK = 256  # rows between two steps of the progress bar
FAR = 1.0  # image sides: a point farther outside is a mistake; a face at the edge has points 0.5 outside
MAX_TEXTS = 1000  # error texts kept of damaged images
ENDS = {"JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}  # images of other formats are decoded
PLAIN_NAME = re.compile(r"[^/\\:]+")  # a file in the folder itself, on every system
COLUMNS = ["line", "file_name", "problem"]
ReadPoints = Callable[[int, int], np.ndarray]  # (start, stop) -> points (rows, n_points, 2)

LEAVES, MISSING, NOT_A_FILE, NO_ACCESS, DAMAGED = range(1, 6)
TEXTS = {
    LEAVES: "file name {name!r} leaves the image folder {folder}, by its path or a link: it was not opened; remove the line",
    MISSING: "image {name} not found in {folder}: add it or remove the line",
    NOT_A_FILE: "image {path} is a folder or no plain file: replace it or remove the line",
    NO_ACCESS: "image {path} cannot be accessed: fix its permissions, or remove the line",
    DAMAGED: "image {path} cannot be used: replace it or remove the line",
}
NOTES = {  # unusual property of an image -> what is done with it
    "animated or of several pages": "the first frame is used",
    "CMYK": "converted to RGB",
    "16-bit": "converted to 8-bit RGB",
    "grey": "converted to RGB",
    "palette-based": "converted to RGB",
    "with transparency": "converted to RGB, transparent pixels black",
    "with EXIF rotation": "which is not applied: landmarks are pixels of the image as stored",
}


class ImageFaults:
    "The rows of a table whose images cannot be used."

    def __init__(self, table: Table, folder: Path, faults: np.ndarray):
        self.table, self.folder, self.faults = table, folder, faults
        self.details: dict[int, str] = {}

    @property
    def rows(self) -> np.ndarray:
        return np.flatnonzero(self.faults)

    def add_damaged(self, row: int, text: str) -> None:
        self.faults[row] = DAMAGED
        if len(self.details) < MAX_TEXTS:
            self.details[row] = text

    def problem(self, row: int) -> Problem:
        name = self.table.name(row)
        text = TEXTS[self.faults[row]].format(name=name, folder=self.folder, path=self.folder / name)
        return self.table.problem(row, self.details.get(row, text))


def check_images(
    table: Table,
    folder: Path,  # that the images must be in; it may be a link itself
    read_points: ReadPoints | None = None,
    skip: list[int] | tuple[int, ...] = (),  # rows that are bad already
) -> ImageFaults:
    """Find the rows whose images cannot be used; print one line for each kind of unusual image.

    Points are pixels of the image as stored. Raises `UserError` if the folder cannot be read.
    """
    check_folder(folder, f"{table.csv.name} names images in it")
    stamps, faults = _stat_images(table, folder)
    if len(skip):
        stamps[skip], faults[skip] = -1, 0
    stored = _read_stamps(table)
    changed = stamps[:, 0] >= 0
    if stored is not None:
        changed &= (stamps != stored).any(1)
    found, notes = ImageFaults(table, folder, faults), {}
    blocks = np.unique(np.flatnonzero(changed) // BLOCK)
    for block in bar(blocks, len(blocks), "checking images") if len(blocks) else ():
        rows = block * BLOCK + np.flatnonzero(changed[block * BLOCK : (block + 1) * BLOCK])
        _check_block(found, rows, read_points, notes)
    if stored is None:
        _print_repeated(table)
    for kind in sorted(notes, key=list(NOTES).index):
        count, row = notes[kind]
        images = "1 image is" if count == 1 else f"{count} images are"
        print(f"note: {images} {kind}, {NOTES[kind]}; the first: {table.csv} line {table.line(row)}, {table.name(row)}")
    stamps[faults > 0] = -1  # opened again at each start: the cause may go without a change of the file's time
    if stored is None or (stamps != stored).any():
        _write_stamps(table, stamps)
    return found


def _stat_images(table: Table, folder: Path) -> tuple[np.ndarray, np.ndarray]:
    "Return size and time of each row's image, int64 (rows, 2), -1 if there is none, and the faults, uint8 (rows,)."
    stamps, faults, prefix = array("q"), bytearray(), os.path.join(folder, "")
    for _, name in table.lines_and_names():
        fault, found = _stat_image(prefix, name)
        faults.append(fault)
        stamps.extend((found.st_size, found.st_mtime_ns) if found else (-1, -1))
    return np.array(stamps).reshape(-1, 2), np.frombuffer(faults, np.uint8).copy()


def _stat_image(prefix: str, name: str) -> tuple[int, os.stat_result | None]:
    try:
        plain = PLAIN_NAME.fullmatch(name) and name not in (".", "..")
        found = os.stat(prefix + name, follow_symlinks=False) if plain else None
        if not found or stat.S_ISLNK(found.st_mode):
            if _leaves(Path(prefix), name):
                return LEAVES, None
            found = os.stat(prefix + name)
    except (FileNotFoundError, NotADirectoryError):
        return MISSING, None
    except (OSError, ValueError) as e:
        return (MISSING if getattr(e, "errno", 0) == errno.ENAMETOOLONG else NO_ACCESS), None
    return (0, found) if stat.S_ISREG(found.st_mode) else (NOT_A_FILE, None)


def _leaves(folder: Path, name: str) -> bool:
    "Return whether a file name leads out of the folder: by `..`, a root, a drive, or a link inside the folder."
    windows, posix = PureWindowsPath(name), PurePosixPath(name)
    if windows.drive or windows.root or posix.is_absolute() or ".." in windows.parts or "\0" in name:
        return True
    try:
        return not (folder / name).resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError):  # circular links
        return True


def _check_block(found: ImageFaults, rows: np.ndarray, read_points: ReadPoints | None, notes: dict) -> None:
    "Open the images of `rows`, compare their sizes with the points; add to `found`, and (count, first row) to `notes`."
    sizes = {}
    for row in rows.tolist():
        try:
            sizes[row], kinds = inspect_image(os.path.join(found.folder, found.table.name(row)))
        except UserError as e:
            found.add_damaged(row, e.line)
            continue
        for kind in kinds:
            count, first = notes.get(kind, (0, row))
            notes[kind] = count + 1, first
    if read_points is None or not sizes:
        return
    rows, sides = np.array(list(sizes)), np.array(list(sizes.values()))
    points = read_points(rows[0], rows[-1] + 1)[rows - rows[0]]
    outside = (points.min(1) < -FAR * sides) | (points.max(1) > (1 + FAR) * sides)
    for i in np.flatnonzero(outside.any(1)).tolist():
        k = int(((points[i] < -FAR * sides[i]) | (points[i] > (1 + FAR) * sides[i])).any(1).argmax())
        (x, y), (width, height) = points[i, k], sides[i]
        found.add_damaged(
            int(rows[i]),
            f"point {k} ({x:g}, {y:g}) lies more than an image's side outside the {width} x {height} image "
            f"{found.folder / found.table.name(rows[i])}: fix or remove the line",
        )


def inspect_image(path: str | Path) -> tuple[tuple[int, int], list[str]]:
    "Return (width, height) of an image file and the `NOTES` that apply to it. Raises `UserError` if it is damaged."
    with open_undecoded(path) as image:
        check_mode(image)
        unusual = (
            image.format != "MPO" and _is_animated(image),
            image.mode == "CMYK",
            is_16_bit(image),
            image.mode in ("1", "L", "LA", "La") or image.mode[0] == "I",
            image.mode in ("P", "PA"),
            image.has_transparency_data,
            exif_turn(image) is not None,
        )
        size, end = image.size, ENDS.get(image.format or "")
        if not end or end not in _read_end(image):
            image.load()
    return size, [kind for kind, applies in zip(NOTES, unusual, strict=True) if applies]


def _read_end(image: ImageFile, n: int = 64) -> bytes:
    "Read the last bytes of an opened image's file."
    file = image.fp
    assert file
    position = file.tell()
    file.seek(max(0, file.seek(0, os.SEEK_END) - n))
    end = file.read(n)
    file.seek(position)
    return end


def _is_animated(image: ImageFile) -> bool:
    with suppress(Exception):  # damage to a later frame raises many kinds of error; the first frame is used
        return getattr(image, "is_animated", False)
    return True


def _print_repeated(table: Table) -> None:
    "Print how many rows name an image that an earlier row names."
    hashes = np.array([hash(name) for _, name in table.lines_and_names()])
    repeated = np.setdiff1d(np.arange(len(table)), np.unique(hashes, return_index=True)[1])
    if len(repeated):
        first = f"{table.csv} line {table.line(repeated[0])}, {table.name(repeated[0])}"
        print(f"note: images named in more than one row: {len(repeated)}; the first: {first}")


def write_listing(path: str | Path, problems: Iterable[Problem]) -> None:
    "Write bad rows as a CSV with the columns line, file_name, problem."
    with atomic_write(Path(path)) as f:
        csv.writer(f, lineterminator="\n").writerows([COLUMNS, *(problem[1:] for problem in problems)])


def append_listing(path: str | Path, problem: Problem) -> bool:
    "Append a bad row to such a CSV, which is created if needed; return False if the row is listed already."
    with open(path, "a+", encoding="utf-8", newline="") as f:
        f.seek(0)
        listed = {row[0] for row in csv.reader(f) if row}
        if str(problem.line) in listed:
            return False
        csv.writer(f, lineterminator="\n").writerows([problem[1:]] if listed else [COLUMNS, problem[1:]])
    return True


def _stamp_files(table: Table) -> tuple[list[Path], dict]:
    "Return the possible files for the stamps of a table, and the key that must be in it."
    files = cache_places(table.csv.with_name(f"{table.csv.name}-images")) if table.csv.is_file() else []
    return files, {"check": FORMAT, "rows": len(table), "pixels": max_pixels()} | table.key


def _read_stamps(table: Table) -> np.ndarray | None:
    "Read (size, time) of the images that an earlier check of this table accepted; -1 for the others."
    files, key = _stamp_files(table)
    for file in files:
        with suppress(OSError, ValueError, TypeError, KeyError):
            head, _, data = file.read_bytes().partition(b"\n")
            header = json.loads(head)
            if header["key"] == key and header["crc"] == zlib.crc32(data):
                return np.frombuffer(data, np.int64).reshape(len(table), 2)
    return None


def _write_stamps(table: Table, stamps: np.ndarray) -> None:
    files, key = _stamp_files(table)
    data = stamps.tobytes()
    for file in files:
        with suppress(OSError):  # a read-only or full folder: without the file the next start checks again
            file.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(file, "wb") as f:
                f.write(json.dumps({"key": key, "crc": zlib.crc32(data)}).encode() + b"\n" + data)
            return
