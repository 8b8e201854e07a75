"""Property tests with hypothesis: the parsers, the pixel maps, the submission.

`EXAMPLES=20000 python -m pytest tests/test_properties.py` searches longer than the few hundred of every day.
"""

import builtins
import os
import re
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from landmarks_fastai import competition
from landmarks_fastai.data import landmarks_csv
from landmarks_fastai.data.labels import open_labels
from landmarks_fastai.errors import UserError
from landmarks_fastai.geometry import PixelMap, fit_image, input_to_unit, pixel_map, unit_to_input
from landmarks_fastai.settings import FITS

# the same examples every time: a failure in CI is one here
search = settings(max_examples=int(os.environ.get("EXAMPLES", 300)), deadline=None, derandomize=True, database=None)

MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # thousands of small files, each of them synced

# A legal file name: UTF-8 text without TAB, line ends and NUL. Commas, quotes and spaces are as good as letters.
ODD = st.sampled_from(" ,\"'\ufeff\x0b\x0c\x1c\x1d\x1e\x85\u2028\xa0#;\\[]0-.я😀")
LETTER = st.characters(exclude_categories=["Cs"], exclude_characters="\t\n\r\0")
NAME = st.text(ODD | LETTER, min_size=1, max_size=12)


def folder():
    return tempfile.TemporaryDirectory(dir=MEMORY, ignore_cleanup_errors=True)


def read_bytes(data: bytes, reader, name="a.csv"):
    "What `reader` makes of a file that holds `data`; a `UserError` is its text, without the folder."
    with folder() as path:
        csv = Path(path) / name
        csv.write_bytes(data)
        try:
            return reader(csv)
        except UserError as e:
            return str(e).replace(path, "")


# --- landmarks.csv -----------------------------------------------------------------------------------------------


def label_rows(csv):
    "(line, name, points, fault or None) of the rows of a landmarks.csv."
    labels = open_labels(csv)
    points = [labels.points(i) for i in range(len(labels))]
    assert all(p.shape == (labels.n_points, 2) and p.dtype == np.float32 for p in points)
    assert all((np.isnan(p[:, 0]) == np.isnan(p[:, 1])).all() for p in points)
    # -1e6 for a missing coordinate: NaN is not equal to itself
    values = [np.nan_to_num(p, nan=-1e6).tolist() for p in points]
    return [(labels.lines[i], labels.name(i), p, labels.faults.get(i)) for i, p in enumerate(values)]


@st.composite
def integers(draw, forms=("{}", "{}", "{}", "+{}", " {}", "{} ", "0{}", "{}.0", "{}e0")):
    "A text of an integer, and its value."
    value = draw(st.integers(-9, 99) | st.integers(-landmarks_csv.LIMIT, landmarks_csv.LIMIT))
    form = draw(st.sampled_from(forms)) if value >= 0 else "{}"
    return form.format(value), np.float32(value)


@st.composite
def decimal(draw):
    "A text of a number with decimals, and its value."
    value = draw(st.floats(-landmarks_csv.LIMIT, landmarks_csv.LIMIT, width=32))
    return draw(st.sampled_from([repr(float(value)), str(np.float32(value)), f"{value:.9e}"])), np.float32(value)


PLAIN = integers(forms=("{}",))
COLUMN = st.text(LETTER, max_size=6).filter(lambda text: not re.fullmatch(landmarks_csv.NUMBER, text.encode()))


@st.composite
def tables(draw):
    "(bytes of a right landmarks.csv, line numbers, names, points)"
    n = draw(st.integers(1, 4))
    number = draw(st.sampled_from([PLAIN, PLAIN, integers(), PLAIN | decimal()]))
    names, cells, lines, text = [], [], [], []
    header = draw(st.lists(COLUMN, min_size=2 * n + 1, max_size=2 * n + 1))
    assume("".join(header).encode().strip())
    for _ in range(draw(st.integers(1, 6))):
        text += [""] * draw(st.sampled_from([0, 0, 0, 1, 2]))
        row = draw(st.lists(number, min_size=2 * n, max_size=2 * n))
        names.append(draw(NAME))
        cells.append([value for _, value in row])
        lines.append(len(text) + 2)
        text.append("\t".join([names[-1], *(t for t, _ in row)]))
    end = draw(st.sampled_from(["\n", "\r\n"]))
    last = draw(st.sampled_from([end, end * 2, ""]))
    data = (end.join(["\t".join(header), *text]) + last).encode()
    return data, lines, names, np.array(cells, np.float32).reshape(len(names), n, 2)


BLOCKS = st.sampled_from([1 << 23, 1, 40, 100])  # bytes that the reader takes at a time


def read_blocks(data, block):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(landmarks_csv, "BLOCK", block)
        return read_bytes(data, label_rows)


@search
@given(tables(), BLOCKS)
def test_every_table_reads_back_equal(table, block):
    data, lines, names, points = table
    assume(points.shape[1] == 1 or (points != points[:, :1]).any((1, 2)).all())  # all points in one place are a fault
    assert read_blocks(data, block) == [*zip(lines, names, points.tolist(), [None] * len(lines), strict=True)]
    check_both_ways(data, block)


PIECES = [
    b"\t", b"\n", b"\r", b"\r\n", b"\0", b"-", b"+", b".", b"e", b" ", b'"', b"0", b"9", b"99999", b"nan", b"inf", b"True",
    b"\xff", b"\xef\xbb\xbf", "я".encode(), b"\x07", b"\x0b", b"1e400", b"0x1", b"1_0", b"18446744073709551615",
    b"-9223372036854775808", b"NA", b"", b"#", b",", b"1j", b"2020-01-01",
]  # fmt: skip


@st.composite
def mutated(draw, right):
    "A right file with a few of its bytes changed, doubled or gone."
    data = draw(right)
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(data)))
        end = draw(st.sampled_from([start, start, start + 1, start + 1, start + 3, start + 20]))
        data = data[:start] + draw(st.sampled_from(PIECES) | st.binary(max_size=3)) + data[end:]
    return data


def check_both_ways(data, block):
    "The rows of a file are the same beside a bad row, with which each line is examined; they are no more than its lines."
    rows, others = read_blocks(data, block), read_blocks(data + b"\nbad", 1 << 23)
    if isinstance(others, str):
        assert rows == others
        return
    *others, bad = others
    assert bad[1] == "bad" and "1 fields found" in bad[3]
    assert rows == others or (not others and "has a header but no rows" in rows)
    lines = [line for line, *_ in others]
    assert lines == sorted(set(lines)) and all(2 <= line <= data.count(b"\n") + 1 for line in lines)
    for _, name, points, fault in others:
        points = np.array(points)
        assert np.isfinite(points).all() and (np.abs(points) <= landmarks_csv.LIMIT)[points != -1e6].all()
        assert fault or (points != -1e6).any()
        assert fault or (name and not set(name) & set("\t\n\r\0"))


@search
@given(mutated(tables().map(lambda table: table[0])), BLOCKS)
def test_mutated_table_has_the_same_rows_beside_a_bad_one(data, block):
    check_both_ways(data, block)


@search
@example(b"\xc3\t1\t2\n\xa9\t1\t2\n", 1 << 23)  # two halves of a letter, complete in neither name
@example(b"\xef\xbb\xbfa\t1\t2\n", 1 << 23)  # a byte order mark that belongs to a name
@example(b"a\rb\t1\t2\n", 1 << 23)
@given(st.binary(max_size=60) | st.lists(st.sampled_from(PIECES), max_size=30).map(b"".join), BLOCKS)
def test_any_bytes_have_the_same_rows_beside_a_bad_one(data, block):
    check_both_ways(b"n\tx\ty\n" + data, block)
    read_bytes(data, label_rows)


# --- test_points.csv and the submission --------------------------------------------------------------------------


def point_rows(csv):
    found = competition.read_test_points(csv)
    assert found.indices.dtype.kind in "iu" and found.indices.shape == (
        len(found),
        found.indices.size // len(found),
    )
    return found.lines.tolist(), found.names, found.indices.tolist()


SPACE = st.sampled_from(["", "", " ", "  "])


@st.composite
def questions(draw):
    "(bytes of a right test_points.csv, line numbers, names, indices)"
    n = draw(st.integers(1, 4))
    lines, names, indices, text = [], [], [], ["file_name\tpoint_index_list"]
    for _ in range(draw(st.integers(1, 5))):
        text += [""] * draw(st.sampled_from([0, 0, 1]))
        numbers = draw(st.lists(st.integers(-10, 2000) | st.integers(1 - 10**18, 10**18 - 1), min_size=n, max_size=n))
        inside = ",".join(draw(SPACE) + str(number) + draw(SPACE) for number in numbers)
        quote = draw(st.sampled_from(["", "", '"']))
        names.append(draw(NAME))
        indices.append(numbers)
        text.append(f"{names[-1]}\t{quote}[{inside}{draw(st.sampled_from(['', ',']))}]{quote}{draw(SPACE)}")
        lines.append(len(text))
    end, mark = draw(st.sampled_from(["\n", "\r\n", "\r"])), draw(st.sampled_from(["", "\ufeff"]))
    return (mark + end.join(text) + draw(st.sampled_from(["", end]))).encode(), lines, names, indices


@search
@given(questions())
def test_every_index_list_reads_back_equal(question):
    data, *expected = question
    assert read_bytes(data, point_rows) == tuple(expected)


CODE = st.sampled_from([
    "[__import__('builtins').__dict__.update(evaluated=1)]", "[1, setattr(__import__('builtins'), 'evaluated', 1)]",
    "[*range(3)]", "[1 + 1]", "(1, 2)", "{1: 2}", "[[1]]", "[1e3]", "[0x1]", "[1_0]", "[True]", "[None]", "[٣, 四]", "[--1]",
])  # fmt: skip


@search
@given(CODE | st.text(st.sampled_from("[], -0123456789.\"'()ex_\t\n\r"), max_size=30) | st.text(max_size=30))
def test_any_text_is_an_index_list_or_refused_and_never_evaluated(text):
    found = read_bytes(
        f"file_name\tpoint_index_list\na.jpg\t[1]\nb.jpg\t{text}\n".encode("utf-8", "replace"), point_rows
    )
    assert isinstance(found, str) or all(type(index) is int for row in found[2] for index in row)
    assert not hasattr(builtins, "evaluated")


@search
@given(mutated(questions().map(lambda question: question[0])) | st.binary(max_size=60))
def test_any_bytes_are_test_points_or_refused(data):
    found = read_bytes(data, point_rows)
    assert isinstance(found, str) or all(name and "\t" not in name for name in found[1])


@st.composite
def answers(draw):
    "(names, points (rows, points per row, 2)) of a submission, as large or small as a float goes."
    shape = draw(st.integers(1, 4)), draw(st.integers(1, 4)), 2
    width = draw(st.sampled_from([32, 64]))
    number = st.floats(-1e4, 1e4, width=width) | st.floats(allow_nan=False, allow_infinity=False, width=width)
    size = int(np.prod(shape))
    points = np.array(draw(st.lists(number, min_size=size, max_size=size)), f"float{width}").reshape(shape)
    return draw(st.lists(NAME, min_size=shape[0], max_size=shape[0])), points


@search
@given(answers(), st.sampled_from(["nearest", "floor", "none"]))
def test_every_submission_reads_back_equal(answer, rounding):
    names, points = answer
    rounded = competition.round_points(points, rounding)
    text = competition.submission_header(points.shape[1]) + "".join(map(competition.submission_line, names, rounded))
    found_names, found = read_bytes(text.encode(), competition.read_submission)
    assert found_names == names and np.array_equal(found.astype(points.dtype), rounded)
    exact = points.astype(np.longdouble)
    if rounding == "none":
        assert np.array_equal(rounded, points)
    else:
        assert (rounded == np.trunc(rounded)).all()
        low, high = {"nearest": (-0.5, 0.5), "floor": (0, 1)}[rounding]
        assert ((low <= exact - rounded) & (exact - rounded <= high)).all()


RIGHT = answers().map(
    lambda answer: (
        competition.submission_header(answer[1].shape[1]) + "".join(map(competition.submission_line, *answer))
    ).encode()
)


@search
@given(mutated(RIGHT) | st.binary(max_size=60))
def test_any_bytes_are_a_submission_or_refused(data):
    found = read_bytes(data, competition.read_submission)
    assert isinstance(found, str) or (np.isfinite(found[1]).all() and len(found[0]) == len(found[1]))


# --- geometry ----------------------------------------------------------------------------------------------------

SIDE = st.integers(1, 20000)
REDUCED = st.sampled_from([1, 2, 4, 8])
NUMPY_OR_TORCH = st.sampled_from([np.asarray, torch.from_numpy])


@search
@given(SIDE, SIDE, st.sampled_from(FITS), st.integers(1, 1024), REDUCED, NUMPY_OR_TORCH, st.randoms())
def test_every_pixel_map_has_an_inverse(width, height, fit, size, reduced, kind, random):
    stored = np.array([[random.uniform(-0.5, side * reduced - 0.5) for side in (width, height)] for _ in range(9)])
    fitted = pixel_map(width, height, fit, size).after_resize(1 / reduced)
    points = kind(stored)
    seen = fitted.to_input(points)
    assert type(seen) is type(points) and seen.shape == points.shape
    unit = input_to_unit(seen, size)
    assert np.abs(np.asarray(unit_to_input(unit, size) - seen)).max() < 1e-3
    assert np.abs(np.asarray(fitted.to_image(unit_to_input(unit, size))) - stored).max() < 1e-3
    together = PixelMap.from_batch(torch.tensor([fitted, fitted], dtype=torch.float64)).to_image(
        torch.from_numpy(np.asarray(seen)).expand(2, -1, -1)
    )
    assert np.abs(together.numpy() - stored).max() < 1e-3


@search
@given(SIDE, SIDE, st.sampled_from(FITS), st.integers(1, 1024), REDUCED)
def test_each_fit_fills_and_centres_the_input(width, height, fit, size, reduced):
    "In edges: unit coordinates are -1 and 1 where the picture's edges, or those of its short or long side, come to lie."
    stored = np.array([[0.0, 0.0], [width * reduced, height * reduced]]) - 0.5
    unit = input_to_unit(pixel_map(width, height, fit, size).after_resize(1 / reduced).to_input(stored), size)
    long = 0 if width >= height else 1
    fills = {"squish": [0, 1], "pad": [long], "crop": [1 - long]}[fit]
    assert unit[:, fills] == pytest.approx(np.array([[-1.0], [1.0]]).repeat(len(fills), 1), abs=1e-6)
    if fit != "squish":
        margin = 1e-9 + (2 / max(width, height) if fit == "pad" else 0)  # pad's margins are whole pixels
        assert abs(unit[0] + unit[1]).max() <= margin  # the middle stays the middle
        assert (unit[1, 0] - unit[0, 0]) / (unit[1, 1] - unit[0, 1]) == pytest.approx(width / height)


@search
@given(st.integers(1, 120), st.integers(1, 120), st.sampled_from(FITS), st.integers(1, 100), REDUCED, st.booleans())
def test_fitted_pixels_show_the_position_they_map_to(width, height, fit, size, reduced, down):
    "Two ramps, each pixel as light as its x and its y: the input's pixels must be as light as their place in the image."
    y, x = np.mgrid[: height * reduced, : width * reduced].astype(np.float32)
    v, u = np.mgrid[:size, :size]
    ramps = [Image.fromarray(ramp).reduce(reduced) for ramp in (x, y)]
    (seen_x, fitted), (seen_y, same_map) = (fit_image(ramp, fit, size, reduced) for ramp in ramps)
    assert fitted == same_map == pixel_map(width, height, fit, size).after_resize(1 / reduced)
    place = fitted.to_image(np.stack([u, v], -1).reshape(-1, 2).astype(float))
    seen = np.stack([np.asarray(seen_x), np.asarray(seen_y)], -1).reshape(-1, 2)
    reach = reduced * 1.5 + np.array([max(1 / fitted.a, reduced), max(1 / fitted.e, reduced)])  # of the filter
    sides = np.array([width, height]) * reduced
    inside = ((place >= reach) & (place <= sides - 1 - reach)).all(1)
    assert np.abs(seen - place)[inside].max(initial=0) < 0.1 * reduced
