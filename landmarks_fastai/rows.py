"""The text of a `landmarks.csv`: blocks of rows become names and numbers, or an error that names the line.

Whole numbers, which is what the contest's file holds, are read by a few passes of numpy over the bytes. What those do
not take (decimals, signs, spaces, mistakes) pandas parses, block by block, and says what is wrong with it.
`benchmarks/startup.py` has the time and memory of both.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path

import numpy as np

from landmarks_fastai.errors import UserError

BLOCK = 8 << 20  # bytes of CSV parsed at a time: bounds the memory, large enough that pandas' 2,000 columns pay
PIECE = 1 << 20  # bytes that one thread takes of a block: what numpy makes of them stays in a core's cache
LIMIT = 32767  # of a coordinate, in pixels: what int16 holds
DIGITS = 5  # of the longest whole number within it
TAB, NEWLINE, MINUS, ZERO = b"\t\n-0"


def read_rows(csv: Path):
    """Yield (line numbers, names as an S-array, numbers (rows, n_points, 2)) of the CSV's pieces.

    The numbers are int16, or float64 in a block with decimals. Raises `UserError` for the first line that is wrong.
    """
    with open(csv, "rb") as f, ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as threads:
        n_values = 2 * _read_columns(csv, f.readline())
        line = 2
        for block, found in _one_ahead((block, _parse_whole(block, n_values, threads)) for block in _blocks(f)):
            pieces = [piece.result() for piece in found]
            if not all(pieces):
                yield from _parse_slowly(csv, line, block, n_values)
                line += block.count(b"\n")
                continue
            for names, values in pieces:
                yield line + np.arange(len(names)), names, values.reshape(len(names), -1, 2)
                line += len(names)


def _one_ahead(items):
    "The items, each handed out when the next has been begun: the threads work while the last block is written."
    held = []
    for item in items:
        held.append(item)
        if len(held) == 2:
            yield held.pop(0)
    yield from held


def _blocks(f):
    "Yield the bytes of whole lines until the file ends."
    while block := f.read(BLOCK):
        block += f.readline()
        yield block if block.endswith(b"\n") else block + b"\n"


def _parse_whole(block: bytes, n_values: int, threads) -> list:
    "Futures of (names, int16 (rows, n_values)) of a block's pieces; None of one that is not plain rows of whole numbers."
    if b"\r" in block:
        block = block.replace(b"\r\n", b"\n")
    found, start = [], 0
    while start < len(block):
        end = block.find(b"\n", start + PIECE) + 1 or len(block)
        found.append(threads.submit(_parse_piece, block[start:end], n_values))
        start = end
    return found


def _parse_piece(piece: bytes, n_values: int):
    "What one thread makes of some whole lines: see `_parse_whole`."
    data = np.frombuffer(piece, np.uint8)
    ends = np.flatnonzero(data <= NEWLINE)  # TAB, newline, and control characters that none may be
    if len(ends) % (n_values + 1):
        return None
    ends = ends.reshape(-1, n_values + 1)
    separators = data.take(ends)
    if (separators[:, :-1] != TAB).any() or (separators[:, -1] != NEWLINE).any():
        return None
    starts = [0, *(ends[:-1, -1] + 1).tolist()]
    names = [piece[a:b] for a, b in zip(starts, ends[:, 0].tolist(), strict=True)]
    text = b"\n".join(names)  # the newlines keep half a letter of one name from being whole with the next
    if not all(names) or b"\r" in text or not _is_utf8(text):
        return None
    values = _whole_numbers(data, ends, b"-" in piece)
    return None if values is None else (np.array(names), values)


def _whole_numbers(data, ends, signs: bool):
    """The fields of `data`, int16 (rows, n_values), where `ends` (rows, 1 + n_values) says that each field ends.

    None where one is no plain whole number, or too large. All of a row's k-th last digits are taken at once; its name,
    the first field, goes along with no digits, so that every array is one run of memory.
    """
    length = np.diff(ends.reshape(-1), prepend=-1).reshape(ends.shape) - 1
    length[:, 0] = 1
    if length.min() < 1 or length.max() > DIGITS + 1:
        return None
    digits = length.astype(np.uint8)
    if signs:
        negative = data.take(ends - length) == MINUS
        digits -= negative
    digits[:, 0] = 1
    if digits.min() < 1 or digits.max() > DIGITS:
        return None
    digits[:, 0] = 0
    values = np.zeros(ends.shape, np.int16 if digits.max() < DIGITS else np.int32)
    for k in range(int(digits.max())):
        ends = ends - 1
        digit = data.take(ends, mode="wrap") - np.uint8(ZERO)  # what stands before "0" becomes more than 9
        digit *= digits > k
        if digit.max() > 9:
            return None
        values += digit * values.dtype.type(10**k)
    if values.max() > LIMIT:
        return None
    return (np.where(negative, -values, values) if signs else values)[:, 1:].astype(np.int16)


def _parse_slowly(csv: Path, first_line: int, block: bytes, n_values: int):
    "As `read_rows`, of one block: by pandas, with an error for what is wrong."
    block, lines = _check_fields(csv, first_line, block, n_values)
    if lines.size:
        names, values = _parse_block(csv, block, lines)
        _check_values(csv, values, lines)
        yield lines, names, values if values.dtype.kind == "f" else values.astype(np.int16)


def _read_columns(csv: Path, header: bytes) -> int:
    "The number of points that the header line names."
    if not header.strip():
        raise UserError(f"{csv} is empty: a header line and one line per image are needed")
    n_fields = header.count(b"\t") + 1
    if any(_is_number(field) for field in header.split(b"\t")[1:]):
        raise UserError(
            f"{csv} line 1 holds numbers: a header line (file_name, then a name per column) must stand above"
        )
    if n_fields < 3 or n_fields % 2 == 0:
        raise UserError(
            f"{csv} line 1: {n_fields} TAB-separated columns found, file_name and an x and y per point expected"
        )
    return n_fields // 2


def _check_fields(csv: Path, first_line: int, block: bytes, n_values: int):
    "Refuse a row with too few or too many fields; drop blank lines. Returns (block, line number of each row)."
    data = np.frombuffer(block, np.uint8)
    ends = np.flatnonzero(data == 10)
    starts = np.concatenate([[0], ends[:-1] + 1])
    lines = first_line + np.arange(len(ends))
    blank = (ends == starts) | ((ends == starts + 1) & (data[starts] == 13))
    tabs = np.diff(np.searchsorted(np.flatnonzero(data == 9), ends), prepend=0)
    wrong = np.flatnonzero((tabs != n_values) & ~blank)
    if wrong.size:
        row = wrong[0]
        raise UserError(
            f"{csv} line {lines[row]}: {tabs[row] + 1} fields found, {n_values + 1} expected "
            f"(file_name and {n_values // 2} points): mend or remove the line"
        )
    returns = np.flatnonzero(data == 13)
    stray = returns[data[returns + 1] != 10]
    if stray.size:  # pandas ends a line at each
        raise UserError(
            f"{csv} line {lines[np.searchsorted(ends, stray[0])]}: a carriage return inside the line: remove it"
        )
    if blank.any():
        block = b"".join(block[s : e + 1] for s, e, b in zip(starts, ends, blank, strict=True) if not b)
    return block, lines[~blank]


def _parse_block(csv: Path, block: bytes, lines: np.ndarray):
    "Parse whole rows: (names as an S-array, numbers as (rows, n_points, 2) of int64 or float64)."
    import pandas as pd  # 0.2 s of import that a start with a cache file does not need

    # Quotes mean nothing in the contest's files; na_filter off makes an empty field an error, not a NaN.
    kwargs = dict(sep="\t", header=None, quoting=3, na_filter=False, low_memory=False, dtype={0: str})
    try:
        # The newline, a blank line that pandas passes over, keeps it from dropping a first name's byte order mark.
        frame = pd.read_csv(BytesIO(b"\n" + block), **kwargs)
    except UnicodeDecodeError:
        row = next(i for i, b in enumerate(block.splitlines()) if not _is_utf8(b))
        raise UserError(f"{csv} line {lines[row]}: not UTF-8 text") from None
    columns = frame.iloc[:, 1:]
    if not all(t.kind in "iuf" for t in columns.dtypes.unique()):
        _refuse_text(csv, columns, lines)
    encoded = [name.encode("utf-8") for name in frame[0]]
    for line, name in zip(lines, encoded, strict=True):
        if not name or b"\0" in name:
            raise UserError(f"{csv} line {line}: the file name is empty or holds a NUL")
    return np.array(encoded), columns.to_numpy().reshape(len(frame), -1, 2)


def _is_number(field: bytes) -> bool:
    try:
        float(field)
    except ValueError:
        return False
    return True


def _is_utf8(line: bytes) -> bool:
    try:
        line.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _refuse_text(csv: Path, columns, lines: np.ndarray):
    "Name the first field, in the file's order, that is no number."
    import pandas as pd

    texts = columns.select_dtypes(exclude="number").astype(str)
    bad = texts.apply(pd.to_numeric, errors="coerce").isna().to_numpy()
    if not bad.any():  # whole numbers beyond 64 bits: pandas keeps them as text
        bad = texts.apply(lambda c: c.str.len() > 18).to_numpy()
    row, k = np.argwhere(bad)[0]
    field = texts.columns[k] - 1
    raise UserError(
        f"{csv} line {lines[row]}: point {field // 2}'s {'xy'[field % 2]} is {texts.iat[row, k][:40]!r}, a number expected"
    )


def _check_values(csv: Path, values: np.ndarray, lines: np.ndarray):
    "Refuse what int16 cannot hold, in a file with decimals too: whether a row is right hangs on that row alone."
    fits = (values >= -LIMIT) & (values <= LIMIT)  # False for NaN too
    if fits.all():
        return
    row, point, axis = np.argwhere(~fits)[0]
    raise UserError(
        f"{csv} line {lines[row]}: point {point}'s {'xy'[axis]} is {values[row, point, axis]}, "
        f"a number between -{LIMIT} and {LIMIT} expected"
    )
