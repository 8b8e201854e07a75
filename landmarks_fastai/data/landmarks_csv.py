"""Parse a `landmarks.csv` block by block into file names, points, and the faults of single rows.

pandas parses a block. Where it fails, or a check of the whole block does, each line is examined: that is slow, and tells
which field of which row is wrong. `benchmarks/growth.py` measures time and memory.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np

from landmarks_fastai.errors import UserError

BLOCK = 8 << 20  # bytes of CSV parsed at a time: bounds the memory, large enough for pandas' overhead of 2,000 columns
LIMIT = 32767  # largest absolute coordinate, in pixels: fits int16
EXPECTED = f"a number between -{LIMIT} and {LIMIT} expected"
NUMERIC = b"0123456789.+-eE \t\n"
NUMBER = rb" *[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)? *"
MISSING = rb" *(?:[nN][aA][nN] *)?"  # a point that is not labelled: both fields are blank or nan
MISSING_FIELD = re.compile(rb"(?<![^\t\n])" + MISSING + rb"(?![^\t\n])")
NOT_A_NUMBER = re.compile(rb"\t(?!(?:" + NUMBER + rb"|" + MISSING + rb")(?:\t|\Z))([^\t]*)")
MAX_NAME = 1000  # bytes: all file names of a file are stored with the width of the longest
NAME = re.compile(rb"[^\r\0]{1,%d}" % MAX_NAME)


class Rows(NamedTuple):
    "Successive rows of a `landmarks.csv`."

    lines: np.ndarray  # (rows,) line numbers in the file; the header is line 1
    names: np.ndarray  # (rows,) file names as bytes
    points: np.ndarray  # (rows, n_points, 2) float32, pixels of the image as stored; NaN: missing; 0 in faulty rows
    faults: dict[int, str]  # index of a faulty row -> its first fault


def read_rows(csv: Path) -> Iterator[Rows]:
    "Yield the rows of `csv` in order. Raises `UserError` for a file that is empty or has no valid header line."
    with open(csv, "rb") as f:
        n_values, first = 2 * _count_points(csv, f.readline()), 2
        while block := f.read(BLOCK) + f.readline():
            lines = [line.removesuffix(b"\r") for line in block.removesuffix(b"\n").split(b"\n")]
            if any(lines):
                numbers = first + np.flatnonzero([bool(line) for line in lines])
                yield Rows(numbers, *_parse_lines([line for line in lines if line], n_values))
            first += len(lines)


def _count_points(csv: Path, header: bytes) -> int:
    "Return the number of points that the header line has columns for."
    if not header.strip():
        raise UserError(f"{csv} is empty: a header line and one line per image are needed")
    if b"\0" in header or not _is_utf8(header):
        raise UserError(f"{csv} line 1: not UTF-8 text: save the file as UTF-8")
    columns = header.rstrip(b"\r\n").split(b"\t")
    if any(re.fullmatch(NUMBER, column) for column in columns[1:]):
        raise UserError(f"{csv} line 1 holds numbers: add a header line (file_name, then one name per column) above it")
    if len(columns) < 3 or len(columns) % 2 == 0:
        expected = f"{len(columns)} TAB-separated columns found, file_name and x, y per point expected"
        raise UserError(f"{csv} line 1: {expected}")
    return len(columns) // 2


def _parse_lines(lines: list[bytes], n_values: int) -> tuple[np.ndarray, np.ndarray, dict[int, str]]:
    "Return the names, points and faults of lines that are not empty."
    names, _, fields = zip(*(line.partition(b"\t") for line in lines), strict=True)
    values, faults = _parse_numbers(names, fields, n_values), {}
    if values is None:
        faults = {row: fault for row, line in enumerate(lines) if (fault := _find_fault(line, n_values))}
        names = [name.replace(b"\0", b"")[:MAX_NAME] for name in names]
        values = np.zeros((len(lines), n_values))
        if rows := [row for row in range(len(lines)) if row not in faults]:
            values[rows] = _parse_numbers([names[row] for row in rows], [fields[row] for row in rows], n_values)
    beyond = abs(values) > LIMIT
    for row in np.flatnonzero(beyond.any(1)).tolist():
        k = int(beyond[row].argmax())
        number = fields[row].split(b"\t")[k].decode().strip()
        faults[row] = f"{_coordinate(k)} is {number[:40]}, {EXPECTED}"
        values[row] = 0
    points = np.ascontiguousarray(values, np.float32).reshape(len(lines), -1, 2)
    faults = {row: fault for row, fault in find_point_faults(points).items() if row not in faults} | faults
    points[list(faults)] = 0
    return np.array(names), points, faults


def find_point_faults(
    points: np.ndarray,  # (rows, n_points, 2) float32, pixels of the image as stored; NaN: missing
) -> dict[int, str]:
    "Return the first fault in the points of each row that has one: the same check for every source of labels."
    missing, beyond = np.isnan(points), abs(points) > LIMIT
    half, labelled = missing[..., 0] != missing[..., 1], (~missing[..., 0]).sum(1)
    # zeros, or an object that was not found
    equal = (np.fmin.reduce(points, 1) == np.fmax.reduce(points, 1)).all(1) & (labelled > 1)
    faults = {}
    for row in np.flatnonzero(beyond.any((1, 2)) | half.any(1) | (labelled == 0) | equal).tolist():
        if beyond[row].any():
            k = int(beyond[row].argmax())
            faults[row] = f"{_coordinate(k)} is {points[row].flat[k]:g}, {EXPECTED}"
        elif half[row].any():
            k = int(half[row].argmax())
            which = _coordinate(2 * k + missing[row, k, 1])
            faults[row] = f"{which} is missing: fill it in, or leave both coordinates blank"
        elif not labelled[row]:
            faults[row] = "no point is labelled: remove the line"
        else:
            x, y = points[row][~missing[row, :, 0]][0]
            faults[row] = f"all {labelled[row]} points are ({x:g}, {y:g}): fix or remove the line"
    return faults


def _parse_numbers(names: Sequence[bytes], fields: Sequence[bytes], n_values: int) -> np.ndarray | None:
    "Parse rows of a file name and `n_values` numbers or gaps each, float64 (rows, n_values); None if a row is anything else."
    import pandas as pd  # 0.2 s of import, which a start with cached labels does without

    text = b"\n".join(fields)
    # the newlines between the names keep two halves of a UTF-8 character in two names apart
    if not all(map(NAME.fullmatch, names)) or not _is_utf8(b"\n".join(names)):
        return None
    for gaps in (False, True):  # the search for gaps takes as long as the parsing
        if gaps:
            text = MISSING_FIELD.sub(b"nan", text)
        if (text.replace(b"nan", b"") if gaps else text).translate(None, NUMERIC):
            continue
        with suppress(ValueError):
            values = pd.read_csv(
                BytesIO(text), sep="\t", header=None, dtype=np.float64, quoting=3, na_filter=gaps, na_values="nan",
                keep_default_na=False, low_memory=False,
            ).to_numpy()  # fmt: skip
            if values.shape == (len(names), n_values) and np.isnan(values).sum() == text.count(b"nan"):
                return values
    return None


def _find_fault(line: bytes, n_values: int) -> str:
    "Describe the first fault in the text of a row, or return an empty text."
    if not _is_utf8(line):
        return "not UTF-8 text: fix or remove the line"
    if b"\0" in line:
        return "holds a NUL byte: fix or remove the line"
    if b"\r" in line:
        return "holds a carriage return within the line: fix or remove it"
    if (n_tabs := line.count(b"\t")) != n_values:
        content = f"file_name and {n_values // 2} points, TAB-separated"
        return f"{n_tabs + 1} fields found, {n_values + 1} expected ({content}): fix or remove the line"
    if not (length := line.find(b"\t")):
        return "the file name is empty: fix or remove the line"
    if length > MAX_NAME:
        return f"the file name has more than {MAX_NAME} bytes: fix or remove the line"
    if not (field := NOT_A_NUMBER.search(line)):
        return ""
    name, text = _coordinate(line.count(b"\t", 0, field.start())), field[1].decode().strip()
    if text.lower().lstrip("+-") in ("inf", "infinity"):
        return f"{name} is {float(text)}, {EXPECTED}"
    return f"{name} is {not_a_number(text)}"


def not_a_number(text: str) -> str:
    "Return the fault of a text in a number's place."
    point = " with a decimal point" if re.fullmatch(r"[-+]?\d*,\d+", text.strip()) else ""
    return f"{text[:40]!r}, a number{point} expected"


def _coordinate(k: int) -> str:
    return f"point {k // 2}'s {'xy'[k % 2]}"


def _is_utf8(text: bytes) -> bool:
    with suppress(UnicodeDecodeError):
        text.decode("utf-8")
        return True
    return False
