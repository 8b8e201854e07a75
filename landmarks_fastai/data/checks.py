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
from array import array
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath, PureWindowsPath

import numpy as np
from PIL.ImageFile import ImageFile

from landmarks_fastai.data.images import SIDEWAYS, check_mode, exif_turn, is_16_bit, open_undecoded
from landmarks_fastai.data.labels import Labels
from landmarks_fastai.errors import Problem, UserError
from landmarks_fastai.utils.files import atomic_write, cache_places, check_folder
from landmarks_fastai.utils.hardware import max_pixels
from landmarks_fastai.utils.parallel import bar

FORMAT = 3  # of the file of stamps; another number after a new check
FAR = 1.0  # image sides: a point farther outside is a mistake; a face at the edge has points 0.5 outside
ENDS = {"JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}  # images of other formats are decoded
PLAIN_NAME = re.compile(r"[^/\\:]+")  # a file in the folder itself, on every system
COLUMNS = ["line", "file_name", "problem"]

ROTATED = "with EXIF rotation"
NOTES = {  # unusual property of an image -> what is done with it
    "animated or of several pages": "the first frame is used",
    "CMYK": "converted to RGB",
    "16-bit": "converted to 8-bit RGB: grey by the bits that it uses (8 to 16), colours by their upper 8",
    "grey": "converted to RGB",
    "palette-based": "converted to RGB",
    "with transparency": "converted to RGB, transparent pixels black",
    ROTATED: "which is not applied: landmarks are pixels of the image as stored",
}


def check_images(labels: Labels, folder: Path) -> dict[int, str]:
    """Return what is wrong with the images of the rows, by row; print one line for each kind of unusual image.

    Rows with a fault in their text are left out. `folder`, which the images must be in, may be a link itself. Raises
    `UserError` if it cannot be read.
    """
    check_folder(folder, f"{labels.csv.name} names images in it")
    stamps, faults = _stat_images(labels, folder)
    stored = _read_stamps(labels)
    changed = (stamps[:, 0] >= 0) & (True if stored is None else (stamps != stored).any(1))
    rows, notes, outside = np.flatnonzero(changed).tolist(), {}, 0.0
    for row in bar(rows, len(rows), "checking images") if rows else ():
        try:
            kinds, share, fault = _check_image(labels, folder, row)
            outside += share
            if fault:
                faults[row] = fault
            for kind in kinds:
                if kind != ROTATED or labels.turned is None or not labels.turned[row]:
                    notes.setdefault(kind, []).append(row)
        except UserError as e:
            faults[row] = e.line
    _check_rotation(labels, folder, notes.get(ROTATED, []))
    if labels.n_points > 1 and 2 * outside > len(labels):  # before the stamps: the next start finds it again
        raise UserError(
            f"{labels.csv}: most points lie outside of their images: were the images resized, or x and y exchanged?"
        )
    if stored is None:
        _print_repeated(labels)
    for kind in [kind for kind in NOTES if kind in notes]:
        (row, *_), count = notes[kind], len(notes[kind])
        images = "1 image is" if count == 1 else f"{count} images are"
        print(f"note: {images} {kind}, {NOTES[kind]}; the first: {labels.place(row)}, {labels.name(row)}")
    stamps[list(faults)] = -1  # opened again at each start: the cause may go without a change of the file's time
    if stored is None or (stamps != stored).any():
        _write_stamps(labels, stamps)
    return faults


def _stat_images(labels: Labels, folder: Path) -> tuple[np.ndarray, dict[int, str]]:
    "Return size and time of each row's image, int64 (rows, 2), -1 if there is none, and the faults."
    stamps, faults, prefix = array("q"), {}, os.path.join(folder, "")
    for row in range(len(labels)):
        stamp = (-1, -1)
        if row not in labels.faults:
            try:
                stamp = _stat_image(folder, prefix, labels.name(row), labels.absolute)
            except UserError as e:
                faults[row] = str(e)
        stamps.extend(stamp)
    return np.array(stamps).reshape(-1, 2), faults


def _stat_image(folder: Path, prefix: str, name: str, absolute: bool = False) -> tuple[int, int]:
    """Return size and time of an image file; `prefix` is the folder as text. Raises `UserError` if it cannot be used.

    A name that leaves the folder is refused, unless it is an absolute path and `absolute` allows it.
    """
    try:
        plain = PLAIN_NAME.fullmatch(name) and name not in (".", "..")
        status = os.stat(prefix + name, follow_symlinks=False) if plain else None
        if not status or stat.S_ISLNK(status.st_mode):
            absolute = absolute and os.path.isabs(name)
            if not absolute and leaves_folder(folder, name):
                refused = "by its path or a link: it was not opened; copy the image there, or remove the line"
                raise UserError(f"file name {name!r} leaves the image folder {folder}, {refused}")
            status = os.stat(name if absolute else prefix + name)
    except (OSError, ValueError) as e:
        if getattr(e, "errno", 0) in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG):
            raise UserError(f"image {name} not found in {folder}: add it or remove the line") from None
        raise UserError(f"image {folder / name} cannot be accessed: fix its permissions, or remove the line") from None
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"image {folder / name} is a folder or not a plain file: replace it or remove the line")
    return status.st_size, status.st_mtime_ns


def leaves_folder(folder: Path, name: str) -> bool:
    "Return whether a file name leads out of the folder: by `..`, a root, a drive, or a link inside the folder."
    windows, posix = PureWindowsPath(name), PurePosixPath(name)
    if windows.drive or windows.root or posix.is_absolute() or ".." in windows.parts or "\0" in name:
        return True
    try:
        return not (folder / name).resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError):  # circular links
        return True


def _check_image(labels: Labels, folder: Path, row: int) -> tuple[list[str], float, str]:
    """Return the `NOTES` that apply to a row's image, the share of its points outside, and the fault if one is far outside.

    Raises `UserError` if the image is damaged.
    """
    path = folder / labels.name(row)
    size, kinds = inspect_image(path)
    points, sides = labels.points(row), np.array(size)
    share = float(((points < -1) | (points > sides)).any(1).sum() / max(1, (~np.isnan(points[:, 0])).sum()))
    outside = np.flatnonzero(((points < -FAR * sides) | (points > (1 + FAR) * sides)).any(1))
    if not len(outside):
        return kinds, share, ""
    k, (width, height) = outside[0], size
    x, y = points[k]
    far = f"point {k} ({x:g}, {y:g}) lies more than an image's side outside the {width} x {height} image"
    return [], share, f"{far} {path}: fix or remove the line"


def _check_rotation(labels: Labels, folder: Path, rows: Sequence[int]) -> None:
    "Raise `UserError` if the points of images with EXIF rotation fit them as they are shown, not as they are stored."
    as_shown, as_stored = [], []
    for row in rows:
        with open_undecoded(folder / labels.name(row)) as image:
            size, sideways = np.array(image.size), exif_turn(image) in SIDEWAYS
        points = labels.points(row)
        outside, outside_shown = ((points < -1) | (points > size)).any(), ((points < -1) | (points > size[::-1])).any()
        if sideways and outside != outside_shown:
            (as_stored if outside_shown else as_shown).append(row)
    if len(as_shown) > len(as_stored):
        row, stored = as_shown[0], "as stored"
        x, y = np.nanmax(labels.points(row), axis=0)
        fit = f"the points of {len(as_shown)} images with EXIF rotation fit them as they are shown, not {stored}"
        first = f"{labels.place(row)}, {labels.name(row)} has points up to ({x:g}, {y:g})"
        raise UserError(
            f"{fit}; the first: {first}. Landmarks are pixels {stored}: save the images without EXIF rotation"
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


def _read_end(image: ImageFile) -> bytes:
    "Read the last 64 bytes of an opened image's file."
    file = image.fp
    assert file
    position = file.tell()
    file.seek(max(0, file.seek(0, os.SEEK_END) - 64))
    end = file.read()
    file.seek(position)
    return end


def _is_animated(image: ImageFile) -> bool:
    with suppress(Exception):  # damage to a later frame raises many kinds of error; the first frame is used
        return getattr(image, "is_animated", False)
    return True


def _print_repeated(labels: Labels) -> None:
    "Print how many rows name an image that an earlier row names, where few do."
    if labels.several:
        return
    first_rows = np.unique(list(map(hash, labels.all_names())), return_index=True)[1]
    repeated = np.setdiff1d(np.arange(len(labels)), first_rows)
    if len(repeated):
        first = f"{labels.place(repeated[0])}, {labels.name(repeated[0])}"
        print(f"note: images named in more than one row: {len(repeated)}; the first: {first}")


def write_listing(path: str | Path, problems: Iterable[Problem]) -> None:
    "Write bad rows as a CSV with the columns line, file_name, problem."
    with atomic_write(Path(path)) as f:
        csv.writer(f, lineterminator="\n").writerows([COLUMNS, *map(_listed, problems)])


def _listed(problem: Problem) -> list[str]:
    "Return a bad row of the listing: the line is its number alone."
    return [problem.where.removeprefix("line "), *problem[2:]]


def append_listing(path: str | Path, problem: Problem) -> bool:
    "Append a bad row to such a CSV, which is created if needed; return False if the row is listed already."
    with open(path, "a+", encoding="utf-8", newline="") as f:
        f.seek(0)
        listed, row = {row[0] for row in csv.reader(f) if row}, _listed(problem)
        if row[0] in listed:
            return False
        csv.writer(f, lineterminator="\n").writerows([row] if listed else [COLUMNS, row])
    return True


def _stamp_files(labels: Labels) -> tuple[list[Path], str]:
    "Return the possible files for the stamps of a CSV's images, none for a DataFrame, and the key that must be in them."
    files = cache_places(labels.csv.with_name(f"{labels.csv.name}-images")) if labels.csv.is_file() else []
    return files, json.dumps([FORMAT, max_pixels(), labels.identity])


def _read_stamps(labels: Labels) -> np.ndarray | None:
    "Read (size, time) of the images that an earlier check of these rows accepted; -1 for the others."
    files, key = _stamp_files(labels)
    for file in files:
        with suppress(Exception), np.load(file) as stored:  # missing, or damaged, which raises many kinds of error
            if stored["key"] == key:
                return stored["stamps"]
    return None


def _write_stamps(labels: Labels, stamps: np.ndarray) -> None:
    files, key = _stamp_files(labels)
    for file in files:
        with suppress(OSError):  # a read-only or full folder: without the file the next start checks again
            file.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(file, "wb") as f:
                np.savez(f, key=key, stamps=stamps)
            return
