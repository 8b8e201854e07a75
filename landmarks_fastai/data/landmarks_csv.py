"""The text of a `landmarks.csv`: blocks of rows become names and numbers, and what is wrong with them by the line.

Whole numbers, which is what the competition's file holds, are read by a few passes of numpy over the bytes. What those do
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
TAB, NEWLINE, RETURN, MINUS, ZERO = b"\t\n\r-0"
WANTED = f"a number between -{LIMIT} and {LIMIT} expected"
NUMERIC = b"0123456789.+-eE \t"
KEPT = 1000  # texts of faults: of a file that is wrong from end to end they say enough
LONGEST = 1000  # bytes of a file name: each row's takes as much room as the longest


def read_rows(csv: Path):
    """Yield (line numbers, names as an S-array, numbers (rows, n_points, 2), faults) of the CSV's pieces.

    The numbers are int16, or float64 in a block with decimals. The faults are what is wrong with single rows, whose
    numbers are 0 where they are none: (indices of the rows, {index: text}), with few of the texts where there are many.
    Raises `UserError` for a file that is wrong as a whole.
    """
    with open(csv, "rb") as f, ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as threads:
        n_values = 2 * _read_columns(csv, f.readline())
        line, texts = 2, KEPT
        for block, found in _one_ahead((block, _parse_whole(block, n_values, threads)) for block in _blocks(f)):
            pieces = [piece.result() for piece in found]
            if not all(pieces):
                for found in _parse_slowly(line, block, n_values, texts):
                    texts -= len(found[-1][1])
                    yield found
                line += block.count(b"\n")
                continue
            for names, values in pieces:
                values = values.reshape(len(names), -1, 2)
                faults = Faults(texts)
                _check_equal(values, faults)
                yield line + np.arange(len(names)), names, values, faults.found
                line, texts = line + len(names), texts - len(faults.texts)


class Faults:
    "What is wrong with rows of a block: each row's first fault, the texts of `keep` of them."

    def __init__(self, keep: int):
        self.rows, self.texts, self.keep = [], {}, keep

    def add(self, rows, text):
        "`text` is called with a row, and with its place in `rows`."
        self.rows.append(np.asarray(rows, np.int64))
        for k, row in enumerate(self.rows[-1][: self.keep].tolist()):
            if row not in self.texts and len(self.texts) < self.keep:
                self.texts[row] = text(row, k)

    @property
    def found(self):
        rows = np.unique(np.concatenate([*self.rows, np.zeros(0, np.int64)]))
        return rows, self.texts


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
    if not all(names) or max(map(len, names)) > LONGEST or b"\r" in text or not _is_utf8(text):
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


def _parse_slowly(first_line: int, block: bytes, n_values: int, keep: int):
    "As `read_rows`, of one block: by pandas, with what is wrong with its rows."
    data = np.frombuffer(block, np.uint8)
    ends = np.flatnonzero(data == NEWLINE)
    starts = np.concatenate([[0], ends[:-1] + 1])
    rows = np.flatnonzero(~((ends == starts) | ((ends == starts + 1) & (data[starts] == RETURN))))  # not blank
    if not len(rows):
        return
    tabs = np.diff(np.searchsorted(np.flatnonzero(data == TAB), ends), prepend=0)[rows]
    texts, faults = (
        [block[a:b].removesuffix(b"\r") for a, b in zip(starts[rows], ends[rows], strict=True)],
        Faults(keep),
    )
    whole = _check_lines(texts, tabs, n_values, faults)
    values = np.zeros((len(rows), n_values // 2, 2), np.int16)
    if whole.any():
        parsed = _parse_rows(b"\n".join(texts[i] for i in np.flatnonzero(whole)), np.flatnonzero(whole), faults)
        values = values.astype(parsed.dtype)
        values[whole] = parsed
    if bad := faults.found[0].tolist():
        values[bad] = 0
    if (values == np.rint(values)).all():
        values = values.astype(np.int16)
    _check_equal(values, faults, without=np.array(bad, np.int64))
    names = np.array([_name(text) for text in texts])
    yield first_line + rows, names, values, faults.found


def _name(text: bytes) -> bytes:
    "The file name of a row, as much of it as is one."
    name = text.split(b"\t", 1)[0].replace(b"\0", b"")
    return name if len(name) <= LONGEST and _is_utf8(name) else b""


def _check_lines(texts, tabs, n_values, faults):
    "Which rows have the right number of fields, a file name, and are text."
    whole = np.ones(len(texts), bool)
    for wrong, text in (
        ([not _is_utf8(t) for t in texts], lambda row, k: "not UTF-8 text: fix or remove the line"),
        ([b"\0" in t for t in texts], lambda row, k: "holds a NUL byte: fix or remove the line"),
        ([b"\r" in t for t in texts], lambda row, k: "holds a carriage return within the line: fix or remove it"),
        (
            tabs != n_values,
            lambda row, k: (
                f"{tabs[row] + 1} fields found, {n_values + 1} expected "
                f"(file_name and {n_values // 2} points, TAB-separated): fix or remove the line"
            ),
        ),
        ([t.startswith(b"\t") for t in texts], lambda row, k: "the file name is empty: fix or remove the line"),
        (
            [t.find(b"\t") > LONGEST for t in texts],
            lambda row, k: f"the file name has more than {LONGEST} bytes: fix or remove the line",
        ),
        # before pandas sees them: of a column with one word in it it makes objects, and is thirty times as slow
        ([_is_odd(t) for t in texts], lambda row, k: _odd_field(texts[row])),
    ):
        faults.add(np.flatnonzero(wrong & whole), text)
        whole &= ~np.asarray(wrong, bool)
    return whole


def _read_columns(csv: Path, header: bytes) -> int:
    "The number of points that the header line names."
    if not header.strip():
        raise UserError(f"{csv} is empty: a header line and one line per image are needed")
    if b"\0" in header or not _is_utf8(header):
        raise UserError(f"{csv} line 1: not UTF-8 text: save the file as UTF-8")
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


def _is_odd(text: bytes) -> bool:
    "Whether a field is empty, or holds what is in no number."
    return b"\t\t" in text or text.endswith(b"\t") or bool(text[text.find(b"\t") + 1 :].translate(None, NUMERIC))


def _odd_field(text: bytes) -> str:
    for k, field in enumerate(text.split(b"\t")[1:]):
        if not field or field.translate(None, NUMERIC):
            word = field.decode("utf-8").strip()
            if word.lower().lstrip("+-") in ("inf", "infinity"):
                return f"{_field(k)} is {float(word)}, {WANTED}"
            return f"{_field(k)} is {word[:40]!r}, a number expected"


def _parse_rows(block: bytes, rows: np.ndarray, faults: Faults) -> np.ndarray:
    "The numbers of whole rows, (rows, n_points, 2) of int64 or float64; what is no number, or does not fit, is a fault."
    import pandas as pd  # 0.2 s of import that a start with a cache file does not need

    # Quotes mean nothing in the competition's files; na_filter off makes an empty field an error, not a NaN.
    kwargs = dict(sep="\t", header=None, quoting=3, na_filter=False, low_memory=False, dtype={0: str})
    frame = pd.read_csv(BytesIO(block), skip_blank_lines=False, **kwargs).iloc[:, 1:]
    texts = frame.select_dtypes(exclude="number").astype(str)
    if len(texts.columns):
        numbers = texts.apply(pd.to_numeric, errors="coerce")  # whole numbers beyond 64 bits become 1e19
        wrong = numbers.isna().to_numpy()
        first = wrong.argmax(1)

        def text(row, k):
            return f"{_field(texts.columns[first[at[k]]] - 1)} is {texts.iat[at[k], first[at[k]]][:40]!r}, a number expected"

        at = np.flatnonzero(wrong.any(1))
        faults.add(rows[at], text)
        frame = frame.copy()
        frame[texts.columns] = numbers
    values = frame.to_numpy(np.float64 if any(t.kind == "f" for t in frame.dtypes) else None)
    beyond = ~((values >= -LIMIT) & (values <= LIMIT))  # True for NaN too
    where = np.flatnonzero(beyond.any(1))
    column = beyond.argmax(1)
    faults.add(
        rows[where],
        lambda row, k: f"{_field(column[where[k]])} is {values[where[k], column[where[k]]]}, {WANTED}",
    )
    return values.reshape(len(rows), -1, 2)


def _field(k: int) -> str:
    return f"point {k // 2}'s {'xy'[k % 2]}"


def _check_equal(values, faults, without=()):
    "A row whose points all lie in one place is a slip of whoever made it: zeros, or a face that was not found."
    n = values.shape[1]
    if n < 2:
        return
    rows = np.flatnonzero((values[:, 0] == values[:, 1]).all(1))  # almost none: the others are not looked at
    rows = np.setdiff1d(rows[(values[rows] == values[rows, :1]).all((1, 2))], without)
    if len(rows):
        faults.add(
            rows,
            lambda row, k: f"all {n} points are ({values[row, 0, 0]:g}, {values[row, 0, 1]:g}): fix or remove the line",
        )


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
