"""Parse a `landmarks.csv` block by block into file names, points, and the faults of single rows.

Rows of integers, which is what the competition's file holds, are parsed by a few numpy passes over the bytes. A block with
anything else (decimals, signs, spaces, mistakes) is parsed by pandas, which also shows what is wrong with each row.
`benchmarks/startup.py` measures time and memory of both.
"""

import os
import re
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from io import BytesIO
from itertools import chain, pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from landmarks_fastai.errors import UserError

BLOCK = 8 << 20  # bytes of CSV parsed at a time: bounds the memory, large enough for pandas' overhead of 2,000 columns
PIECE = 1 << 20  # bytes of a block that one thread parses: numpy's temporary arrays stay in a core's cache
LIMIT = 32767  # largest absolute coordinate, in pixels: fits int16
DIGITS = 5  # of LIMIT
TAB, NEWLINE, MINUS, ZERO = b"\t\n-0"
EXPECTED = f"a number between -{LIMIT} and {LIMIT} expected"
NUMERIC = b"0123456789.+-eE \t"
NUMBER = rb" *[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)? *"
_is_number = re.compile(NUMBER + rb"[\r\n]*").fullmatch
NOT_A_NUMBER = re.compile(rb"\t(?!" + NUMBER + rb"(?:\t|\Z))([^\t]*)")
MAX_TEXTS = 1000  # error texts kept of a block, and of a file
MAX_NAME = 1000  # bytes of a file name: all names of a file are stored with the width of the longest
Piece = tuple[np.ndarray, np.ndarray]  # file names (rows,) as bytes, values (rows, n_values) int16


class Rows(NamedTuple):
    "Successive rows of a `landmarks.csv`."

    lines: np.ndarray  # (rows,) line numbers in the file; the header is line 1
    names: np.ndarray  # (rows,) file names as bytes
    points: np.ndarray  # (rows, n_points, 2) int16 or float64, pixels of the image as stored; 0 in faulty rows
    faults: dict[int, str]  # index of a faulty row -> its first fault; empty after the first `MAX_TEXTS`


def read_rows(csv: Path) -> Iterator[Rows]:
    "Yield the rows of `csv` in order. Raises `UserError` for a file that is empty or has no valid header line."
    with open(csv, "rb") as f, ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as threads:
        n_values = 2 * _count_points(csv, f.readline())
        line = 2
        blocks = (b if b.endswith(b"\n") else b + b"\n" for b in iter(lambda: f.read(BLOCK) + f.readline(), b""))
        submitted = ((block, _submit_pieces(block, n_values, threads)) for block in blocks)
        # Each block is submitted before the one before it is yielded: threads parse while the caller writes.
        for (block, futures), _ in pairwise(chain(submitted, [(b"", [])])):
            pieces = [piece for future in futures if (piece := future.result())]
            if len(pieces) < len(futures):
                yield from _parse_with_pandas(line, block, n_values)
                line += block.count(b"\n")
                continue
            for names, values in pieces:
                points, faults = values.reshape(len(names), -1, 2), {}
                _check_equal_points(points, faults)
                yield Rows(line + np.arange(len(names)), names, points, faults)
                line += len(names)


def _count_points(csv: Path, header: bytes) -> int:
    "Return the number of points that the header line has columns for."
    if not header.strip():
        raise UserError(f"{csv} is empty: a header line and one line per image are needed")
    if b"\0" in header or not _is_utf8(header):
        raise UserError(f"{csv} line 1: not UTF-8 text: save the file as UTF-8")
    columns = header.split(b"\t")
    if any(map(_is_number, columns[1:])):
        raise UserError(f"{csv} line 1 holds numbers: add a header line (file_name, then one name per column) above it")
    if len(columns) < 3 or len(columns) % 2 == 0:
        raise UserError(
            f"{csv} line 1: {len(columns)} TAB-separated columns found, file_name and x, y per point expected"
        )
    return len(columns) // 2


def _submit_pieces(block: bytes, n_values: int, threads: ThreadPoolExecutor) -> list[Future[Piece | None]]:
    "Start `_parse_piece` on the pieces of a block."
    if b"\r" in block:
        block = block.replace(b"\r\n", b"\n")
    futures, start = [], 0
    while start < len(block):
        end = block.find(b"\n", start + PIECE) + 1 or len(block)
        futures.append(threads.submit(_parse_piece, block[start:end], n_values))
        start = end
    return futures


def _parse_piece(piece: bytes, n_values: int) -> Piece | None:
    "Parse complete lines of a name and `n_values` integers each; None if a line is anything else."
    data = np.frombuffer(piece, np.uint8)
    ends = np.flatnonzero(data <= NEWLINE)  # TAB, newline, and control characters that are refused below
    if len(ends) % (n_values + 1):
        return None
    ends = ends.reshape(-1, n_values + 1)
    separators = data.take(ends)
    if (separators[:, :-1] != TAB).any() or (separators[:, -1] != NEWLINE).any():
        return None
    starts = [0, *(ends[:-1, -1] + 1).tolist()]
    names = [piece[a:b] for a, b in zip(starts, ends[:, 0].tolist(), strict=True)]
    text = b"\n".join(names)  # the newlines keep two halves of a UTF-8 character in two names apart
    if not all(names) or max(map(len, names)) > MAX_NAME or b"\r" in text or not _is_utf8(text):
        return None
    values = _parse_integers(data, ends, b"-" in piece)
    return None if values is None else (np.array(names), values)


def _parse_integers(data: np.ndarray, ends: np.ndarray, has_minus: bool) -> np.ndarray | None:
    """Parse the fields of `data`, which end at `ends` (rows, 1 + n_values), into int16 (rows, n_values).

    None if one is not a plain integer, or too large. The k-th last digits of all fields are read at once. The first field,
    the name, is processed as one without digits, so that every array is contiguous.
    """
    length = np.diff(ends.reshape(-1), prepend=-1).reshape(ends.shape) - 1
    length[:, 0] = 1
    if length.min() < 1 or length.max() > DIGITS + 1:
        return None
    digits = length.astype(np.uint8)
    negative = data.take(ends - length) == MINUS if has_minus else None
    if negative is not None:
        digits -= negative
    digits[:, 0] = 1
    if digits.min() < 1 or digits.max() > DIGITS:
        return None
    digits[:, 0] = 0
    values = np.zeros(ends.shape, np.int16 if digits.max() < DIGITS else np.int32)
    for k in range(int(digits.max())):
        ends = ends - 1
        digit = data.take(ends, mode="wrap") - np.uint8(ZERO)  # uint8: characters before "0" wrap to more than 9
        digit *= digits > k
        if digit.max() > 9:
            return None
        values += digit * values.dtype.type(10**k)
    if values.max() > LIMIT:
        return None
    return (values if negative is None else np.where(negative, -values, values))[:, 1:].astype(np.int16)


def _parse_with_pandas(first_line: int, block: bytes, n_values: int, thorough: bool = False) -> Iterator[Rows]:
    "Yield the rows of a block that `_parse_piece` does not take, if it has any, with their faults."
    stripped = ((number, line.removesuffix(b"\r")) for number, line in enumerate(block.split(b"\n"), first_line))
    rows = [(number, line) for number, line in stripped if line]
    if not rows:
        return
    faults: dict[int, str] = {}
    for k, (_, line) in enumerate(rows):
        if fault := _find_line_fault(line, n_values, thorough):
            _add_fault(faults, k, fault)
    valid = np.setdiff1d(np.arange(len(rows)), list(faults))
    points = np.zeros((len(rows), n_values // 2, 2))
    try:
        if len(valid):
            points[valid] = _parse_numbers([rows[k][1] for k in valid], valid, faults)
    except ValueError:  # a field like "1-2"
        yield from _parse_with_pandas(first_line, block, n_values, thorough=True)
        return
    points[list(faults)] = 0
    if (points == np.rint(points)).all():
        points = points.astype(np.int16)
    _check_equal_points(points, faults)
    names = np.array([line.split(b"\t", 1)[0].replace(b"\0", b"")[:MAX_NAME] for _, line in rows])
    yield Rows(np.array([number for number, _ in rows]), names, points, faults)


def _find_line_fault(line: bytes, n_values: int, thorough: bool) -> str:
    "Describe the first fault in the text of a row, or return an empty text. Fields are matched if `thorough`, or suspicious."
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
    suspicious = b"\t\t" in line or line.endswith(b"\t") or line[length:].translate(None, NUMERIC)
    if not (thorough or suspicious) or not (field := NOT_A_NUMBER.search(line)):  # a slow search
        return ""
    name, text = _name_coordinate(line.count(b"\t", 0, field.start())), field[1].decode("utf-8").strip()
    if text.lower().lstrip("+-") in ("inf", "infinity"):
        return f"{name} is {float(text)}, {EXPECTED}"
    return f"{name} is {text[:40]!r}, a number expected"


def _parse_numbers(lines: list[bytes], rows: np.ndarray, faults: dict[int, str]) -> np.ndarray:
    "Parse the points of lines without a fault, float64 (rows, n_points, 2); add numbers beyond `LIMIT` to the faults of `rows`."
    import pandas as pd  # 0.2 s of import, which plain files and cached labels do without

    n_values = lines[0].count(b"\t")
    text = BytesIO(b"\n".join(lines))
    values = pd.read_csv(
        text, sep="\t", header=None, usecols=range(1, n_values + 1), dtype=np.float64, quoting=3, na_filter=False
    ).to_numpy()
    beyond = ~(abs(values) <= LIMIT)
    for k in np.flatnonzero(beyond.any(1)).tolist():
        c = int(beyond[k].argmax())
        field = lines[k].split(b"\t")[1 + c].decode().strip()
        _add_fault(faults, int(rows[k]), f"{_name_coordinate(c)} is {field[:40]}, {EXPECTED}")
    return values.reshape(len(rows), -1, 2)


def _check_equal_points(points: np.ndarray, faults: dict[int, str]) -> None:
    "Add rows whose points are all equal to the faults: zeros, or a face that was not found."
    if (n := points.shape[1]) < 2:
        return
    rows = np.flatnonzero((points[:, 0] == points[:, 1]).all(1))  # almost none: all points are compared in these only
    for row in rows[(points[rows] == points[rows, :1]).all((1, 2))].tolist():
        _add_fault(faults, row, "all {} points are ({:g}, {:g}): fix or remove the line".format(n, *points[row, 0]))


def _add_fault(faults: dict[int, str], row: int, text: str) -> None:
    "Record the fault of a row, unless it has one."
    faults.setdefault(row, text if len(faults) < MAX_TEXTS else "")


def _name_coordinate(k: int) -> str:
    return f"point {k // 2}'s {'xy'[k % 2]}"


def _is_utf8(text: bytes) -> bool:
    with suppress(UnicodeDecodeError):
        text.decode("utf-8")
        return True
    return False
