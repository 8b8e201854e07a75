"""Is every row's image there, and whole? Told before training, of all rows at once.

The first check opens each image's header and reads its end: 65 us on one core, where decoding takes 170 (3,000 drawn
faces; two threads wait for each other, at 99 to one's 35 in Pillow). What it found good is kept beside the CSV's cache
with each file's size and time: a later start looks at those, at 5 us a row, and opens what has changed.
"""

import csv
import errno
import json
import os
import re
import stat
import zlib
from array import array
from contextlib import suppress
from pathlib import Path, PurePosixPath, PureWindowsPath

import numpy as np

from landmarks_fastai.data.images import check_mode, image_end, is_deep, is_turned, max_pixels, opened
from landmarks_fastai.errors import Problem, UserError
from landmarks_fastai.utils.files import atomic_write, cache_places
from landmarks_fastai.utils.parallel import bar

FORMAT = 1  # of the file that the result is kept in
BLOCK = 256  # rows between two steps of the progress bar
FAR = 1.0  # images' sides: a point farther outside is another image's, or a slip; a face at the edge has points 0.5 outside
KEPT = 1000  # texts of damaged images
ENDS = {"JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}  # of other formats each is decoded
PLAIN = re.compile(r"[^/\\:]+")  # a name of a file in the folder itself, on every system

LEAVES, MISSING, NO_FILE, CLOSED, DAMAGED = range(1, 6)
TEXTS = {
    LEAVES: "file name {name!r} leaves the image folder {folder}, itself or as a link: it was not opened; remove the line",
    MISSING: "image {name} not found in {folder}: add it or remove the line",
    NO_FILE: "image {path} is a folder or no plain file: replace it or remove the line",
    CLOSED: "image {path} cannot be looked at: mind its permissions, or remove the line",
    DAMAGED: "image {path} cannot be used: replace it or remove the line",
}
NOTES = {  # what an image is -> what is made of it
    "animated or of several pages": "the first picture is used",
    "CMYK": "made RGB",
    "of 16 bits": "made RGB of 8",
    "grey": "made RGB",
    "of a palette": "made RGB",
    "with transparency": "made RGB, what is transparent black",
    "with EXIF rotation": "which is not applied: landmarks are pixels of the file's own rows and columns",
}


class Found:
    "The bad rows of a check, in the file's order, and what is wrong with each."

    def __init__(self, table, folder: Path, faults: np.ndarray, details: dict[int, str]):
        self.table, self.folder, self.faults, self.details = table, folder, faults, details
        self.rows = np.flatnonzero(faults)

    def text(self, row: int) -> str:
        name = self.table.name(row)
        fact = TEXTS[self.faults[row]].format(name=name, folder=self.folder, path=self.folder / name)
        return self.details.get(row, fact)

    def problem(self, row: int) -> Problem:
        return Problem(self.table.csv, self.table.line(row), self.table.name(row), self.text(row))


def check_images(
    table,  # rows that name images: `Labels` or `TestPoints`
    folder: Path,  # that the images must lie in; it may be a link itself
    points=None,  # of rows start to stop, where the table has them
    without=(),  # rows that are bad already
    progress=bar,
) -> Found:
    """What is wrong with the images of a table's rows. What is odd, but can be used, is printed, a line a kind.

    Raises `UserError` for a folder that cannot be read.
    """
    _check_folder(table.csv, folder)
    stamps, faults, names = _look(table, folder)
    if len(without):
        stamps[without], faults[without] = -1, 0
    kept = _read_kept(table)
    fresh = (stamps[:, 0] >= 0) if kept is None else (stamps[:, 0] >= 0) & (stamps != kept).any(1)
    details, notes = {}, {}
    blocks = np.unique(np.flatnonzero(fresh) // BLOCK)
    for block in progress(blocks, len(blocks), "images are checked") if len(blocks) else ():
        rows = block * BLOCK + np.flatnonzero(fresh[block * BLOCK : (block + 1) * BLOCK])
        _check_block(table, folder, rows, points, faults, details, notes)
    if kept is None:
        _note_twins(table, names)
    _print_notes(table, notes)
    stamps[faults > 0] = -1  # looked at anew at each start: a cause may be gone that leaves a file's time as it was
    if kept is None or (stamps != kept).any():
        _keep(table, stamps)
    return Found(table, folder, faults, details)


def _check_folder(csv, folder):
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; {csv.name} names images in it")
    try:
        os.listdir(folder)
    except OSError as e:
        raise UserError(f"{folder} cannot be read ({e.strerror})") from None


def _look(table, folder: Path):
    "Each row's image file as the folder has it: (size and time, -1 where there is none; faults; hashes of the names)."
    stamps, faults, names, prefix = array("q"), bytearray(), array("q"), os.path.join(folder, "")
    for _, name in table.lines_and_names():
        fault, found = _look_at(folder, prefix, name)
        faults.append(fault)
        names.append(hash(name))
        stamps.extend((-1, -1) if fault else (found.st_size, found.st_mtime_ns))
    return np.array(stamps).reshape(-1, 2), np.frombuffer(faults, np.uint8).copy(), np.array(names)


def _look_at(folder, prefix, name):
    try:
        plain = PLAIN.fullmatch(name) and name not in (".", "..")
        found = os.stat(prefix + name, follow_symlinks=False) if plain else None
        if not found or stat.S_ISLNK(found.st_mode):
            if leaves(folder, name):
                return LEAVES, None
            found = os.stat(prefix + name)
    except (FileNotFoundError, NotADirectoryError):
        return MISSING, None
    except (OSError, ValueError) as e:
        return (MISSING if getattr(e, "errno", 0) == errno.ENAMETOOLONG else CLOSED), None
    return (0, found) if stat.S_ISREG(found.st_mode) else (NO_FILE, None)


def leaves(folder: Path, name: str) -> bool:
    "Whether a file name leads out of the folder: by `..`, a root, a drive, or a link inside the folder."
    windows, posix = PureWindowsPath(name), PurePosixPath(name)
    if windows.drive or windows.root or posix.is_absolute() or ".." in windows.parts or "\0" in name:
        return True
    try:
        return not (folder / name).resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError):  # links that lead in a circle
        return True


def _check_block(table, folder, rows, points, faults, details, notes):
    "Open the images of some rows of one block, and compare their sizes with the rows' points."
    sizes = {}
    for row in rows.tolist():
        try:
            sizes[row], kinds = look_inside(os.path.join(folder, table.name(row)))
        except UserError as e:
            faults[row] = DAMAGED
            if len(details) < KEPT:
                details[row] = e.line
            continue
        for kind in kinds:
            count, first = notes.get(kind, (0, row))
            notes[kind] = count + 1, first
    if points is None or not sizes:
        return
    start = min(sizes)
    values = points(start, max(sizes) + 1)
    least, most = values.min((1, 2)), values.max((1, 2))
    for row, (width, height) in sizes.items():
        side, k = min(width, height), row - start
        if least[k] >= -side and most[k] < side:  # the usual face: no point is looked at by itself
            continue
        if text := _far_outside(values[k], width, height):
            faults[row] = DAMAGED
            details[row] = f"{text} the {width} x {height} image {folder / table.name(row)}: fix or remove the line"


def look_inside(path) -> tuple[tuple[int, int], list[str]]:
    "Width, height and what is odd of an image file. Raises `UserError` where it is damaged."
    with opened(path) as image:
        check_mode(image)
        odd = (
            image.format != "MPO" and _is_animated(image),
            image.mode == "CMYK",
            is_deep(image),
            image.mode in ("1", "L", "LA", "La") or image.mode[0] == "I",
            image.mode in ("P", "PA"),
            image.has_transparency_data,
            is_turned(image),
        )
        size, end = image.size, ENDS.get(image.format)
        if not end or end not in image_end(image):
            image.load()
    return size, [kind for kind, is_so in zip(NOTES, odd, strict=True) if is_so]


def _is_animated(image):
    with suppress(Exception):  # a later frame may be damaged in as many ways as a file: the first one is used
        return getattr(image, "is_animated", False)
    return True


def _far_outside(points, width, height) -> str:
    sides = np.array([width, height])
    far = ((points < -FAR * sides) | (points > (1 + FAR) * sides)).any(1)
    if not far.any():
        return ""
    k = int(far.argmax())
    return f"point {k} ({points[k, 0]:g}, {points[k, 1]:g}) lies more than an image's side outside"


def _note_twins(table, names):
    if len(names) == len(np.unique(names)):
        return
    order = np.argsort(names, kind="stable")
    again = np.sort(order[1:][np.diff(names[order]) == 0])
    first = int(again[0])
    print(
        f"note: images named in more than one row: {len(again)}; "
        f"the first: {table.csv} line {table.line(first)}, {table.name(first)}"
    )


def _print_notes(table, notes):
    for kind, made in NOTES.items():
        if kind in notes:
            count, row = notes[kind]
            what = "1 image is" if count == 1 else f"{count} images are"
            print(f"note: {what} {kind}, {made}; the first: {table.csv} line {table.line(row)}, {table.name(row)}")


def write_listing(path, problems):
    "The bad rows as a CSV: line, file_name, problem."
    with atomic_write(Path(path)) as f:
        rows = csv.writer(f, lineterminator="\n")
        rows.writerow(["line", "file_name", "problem"])
        rows.writerows((p.line, p.file_name, p.text) for p in problems)


def append_listing(path, problem: Problem) -> bool:
    "One more row of a list that may not be there yet; False where it has that row already."
    there = os.path.exists(path)
    if there:
        with open(path, encoding="utf-8", newline="") as f:
            if str(problem.line) in {row[0] for row in csv.reader(f) if row}:
                return False
    with open(path, "a", encoding="utf-8", newline="") as f:
        rows = csv.writer(f, lineterminator="\n")
        if not there:
            rows.writerow(["line", "file_name", "problem"])
        rows.writerow((problem.line, problem.file_name, problem.text))
    return True


def _places(table):
    return cache_places(table.csv.with_name(f"{table.csv.name}-images")) if table.csv.is_file() else []


def _read_kept(table) -> np.ndarray | None:
    "Sizes and times of the images that a check of this very table found good; -1 of the others."
    for place in _places(table):
        with suppress(OSError, ValueError, TypeError, KeyError):
            head, _, data = place.read_bytes().partition(b"\n")
            facts = json.loads(head)
            if facts["key"] == _key(table) and facts["crc"] == zlib.crc32(data):
                return np.frombuffer(data, np.int64).reshape(len(table), 2)
    return None


def _keep(table, stamps):
    data = stamps.tobytes()
    head = json.dumps({"key": _key(table), "crc": zlib.crc32(data)}).encode()
    for place in _places(table):
        with suppress(OSError):  # a read-only or full place: without it the next start checks again
            place.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(place, "wb") as f:
                f.write(head + b"\n" + data)
            return


def _key(table) -> dict:
    return {"check": FORMAT, "rows": len(table), "pixels": max_pixels()} | table.key
