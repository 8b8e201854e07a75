"Parsing landmarks.csv, error messages with line numbers, and the cache file."

import os
import pickle

import numpy as np
import pandas as pd
import pytest

from landmarks_fastai.data import labels, landmarks_csv
from landmarks_fastai.data.labels import frame_labels, open_labels, read_labels
from landmarks_fastai.errors import UserError
from tests.helpers import LINUX, finish, peak_memory, python

HEADER = "file_name\t" + "\t".join(f"Point_M{k}_{a}" for k in range(3) for a in "XY")
ROW = "{}.jpg\t1\t2\t3\t4\t5\t6"


def write(path, *rows, header=HEADER, end="\n"):
    path.write_bytes(end.encode().join(row if isinstance(row, bytes) else row.encode() for row in (header, *rows, "")))
    return path


@pytest.fixture
def csv(tmp_path):
    return write(tmp_path / "landmarks.csv", ROW.format("a"), "b.jpg\t-7\t8\t9\t10\t11\t32767", ROW.format("c"))


def test_read_labels_returns_names_points_and_lines(csv):
    labels = read_labels(csv)
    assert (len(labels), labels.n_points) == (3, 3)
    assert [labels.name(i) for i in range(3)] == ["a.jpg", "b.jpg", "c.jpg"]
    assert labels.points(1).tolist() == [[-7, 8], [9, 10], [11, 32767]] and labels.points(1).dtype == np.float32
    assert [labels.lines[i] for i in range(3)] == [2, 3, 4]


@pytest.mark.parametrize("block", [1 << 23, 3000, 64])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_numbers_are_read_for_any_block_size(tmp_path, monkeypatch, block, end):
    "Of one to five digits, negative, in blocks that hold a blank line, a sign or decimals, and in those that do not."
    monkeypatch.setattr(landmarks_csv, "BLOCK", block)
    rng = np.random.default_rng(0)
    points = (rng.integers(-32767, 32768, (400, 6)) / 10.0 ** rng.integers(0, 5, (400, 6))).astype(int).astype(float)
    points[7] = [0, -0, 32767, -32767, 9, -9]
    text = [f"{'я' * (i % 5)}{i}.jpg\t" + "\t".join(f"{v:g}" for v in p) for i, p in enumerate(points)]
    text[100] = text[100].replace("\t", "\t+", 1).replace("+-", "-")
    text[200] = text[200].split("\t", 1)[0] + "\t007\t 2\t3.0\t4e0\t5\t6"
    text[399] = text[399].split("\t", 1)[0] + "\t0.25\t2\t3\t4\t5\t-6.5"
    points[200], points[399] = [7, 2, 3, 4, 5, 6], [0.25, 2, 3, 4, 5, -6.5]
    labels = read_labels(write(tmp_path / "l.csv", *text[:50], "", *text[50:], end=end))
    assert np.array_equal([labels.points(i).reshape(-1) for i in range(400)], points)
    assert [labels.name(i) for i in range(400)] == [t.split("\t")[0] for t in text]
    assert [labels.lines[i] for i in (0, 49, 50, 399)] == [2, 51, 53, 402]


def started(code, csv):
    "A process that reads a CSV."
    return python(f"import sys; csv = {str(csv)!r}; from landmarks_fastai.data import labels; {code}")


def test_later_start_does_not_import_pandas(csv):
    read_labels(csv)
    assert finish(started("print(len(labels.read_labels(csv)), 'pandas' in sys.modules)", csv)) == "3 False\n"


def value(text):
    "A row with a text in the place of point 1's x."
    return f"b.jpg\t1\t2\t{text}\t4\t5\t6"


X = "line 3: point 1's x is "
BAD = {
    "few": ("b.jpg\t1\t2\t3\t4\t5", "line 3: 6 fields found, 7 expected"),
    "many": (ROW.format("b") + "\t7", "line 3: 8 fields found, 7 expected"),
    "a TAB at the end": (ROW.format("b") + "\t", "line 3: 8 fields found, 7 expected"),
    "a name alone": ("b.jpg", "line 3: 1 fields found"),
    "commas": (ROW.format("b").replace("\t", ","), "line 3: 1 fields found, 7 expected"),
    "spaces": (ROW.format("b").replace("\t", "  "), "line 3: 1 fields found"),
    "a row of spaces": ("   ", "line 3: 1 fields found"),
    "another header": (HEADER, "line 3: point 0's x is 'Point_M0_X', a number expected"),
    "text": ("b.jpg\t1\t2\t3\tx4\t5\t6", "line 3: point 1's y is 'x4', a number expected"),
    "half a point": (value(""), X + "missing: fill it in, or leave both coordinates blank"),
    "half a nan": ("b.jpg\t1\t2\t3\t nan\t5\t6", "line 3: point 1's y is missing"),
    "a sign before nan": (value("-nan"), X + "'-nan', a number expected"),
    "another word": (value("NA"), X + "'NA', a number expected"),
    "no point": ("b.jpg" + "\t" * 6, "line 3: no point is labelled: remove the line"),
    "all labelled points equal": ("b.jpg\t7\t8\t\t\t7\t8", "line 3: all 2 points are (7, 8)"),
    "infinite": ("b.jpg\t1\t2\t3\t4\t5\t-inf", "line 3: point 2's y is -inf, a number between"),
    "infinity": (value("inf"), X + "inf, a number between -32767 and 32767 expected"),
    "hexadecimal": (value("0x1F"), X + "'0x1F'"),
    "a decimal comma": (value("12,5"), X + "'12,5'"),
    "thousands set apart": (value("1_000"), X + "'1_000'"),
    "a truth value": (value("True"), X + "'True'"),
    "a quoted number": (value('"12"'), X + "'\"12\"'"),
    "minus alone": ("b.jpg\t1\t-\t3\t4\t5\t6", "line 3: point 0's y is '-', a number expected"),
    "control": ("b.jpg\t1\t2\t3\x074\t5\t6\t7", X),
    "large": ("b.jpg\t1\t40000\t3\t4\t5\t6", "line 3: point 0's y is 40000, a number between -32767 and 32767"),
    "just too large": (value("-32768"), X + "-32768, a number between"),
    "beyond 63 bits": (value("10000000000000000000"), X + "10000000000000000000, a number"),
    "least of all": (value("-9223372036854775808"), X + "-9223372036854775808, a number"),
    "huge": (value("9" * 30), X + "9" * 30),
    "large decimal": (value("1e300"), X + "1e300, a number"),
    "code": (value("__import__('os').mkdir('owned')"), X + '"__import__('),
    "no UTF-8": (b"\xff\xfe.jpg\t1\t2\t3\t4\t5\t6", "line 3: not UTF-8"),
    "half a letter": (b"a\xc3\t1\t2\t3\t4\t5\t6", "line 3: not UTF-8"),
    "NUL": ("b.jpg\0\t1\t2\t3\t4\t5\t6", "line 3: holds a NUL byte"),
    "carriage return": ("b\r.jpg\t1\t2\t3\t4\t5\t6", "line 3: holds a carriage return within the line"),
    "nameless": ("\t1\t2\t3\t4\t5\t6", "line 3: the file name is empty"),
    "a long name": ("x" * 2000 + ROW.format("")[4:], "line 3: the file name has more than 1000 bytes"),
    "all points zero": ("b.jpg" + "\t0" * 6, "line 3: all 3 points are (0, 0)"),
    "all points equal": ("b.jpg" + "\t7.5\t-2" * 3, "line 3: all 3 points are (7.5, -2)"),
}


@pytest.mark.parametrize("row,message", BAD.values(), ids=BAD)
def test_bad_row_is_reported_with_its_line(tmp_path, row, message):
    csv = write(tmp_path / "l.csv", ROW.format("a"), row, ROW.format("c"))
    with pytest.raises(UserError) as e:
        read_labels(csv)
    assert str(csv) in str(e.value) and message in str(e.value) and len(e.value.problems) == 1
    assert sorted(os.listdir(tmp_path)) == ["l.csv", "l.csv.cache"]  # nothing half-written, nothing executed
    with pytest.raises(UserError) as again:  # from the cache
        read_labels(csv)
    assert str(again.value) == str(e.value)


def test_bad_row_in_a_later_block_has_the_right_line(tmp_path, monkeypatch):
    monkeypatch.setattr(landmarks_csv, "BLOCK", 100)
    csv = write(tmp_path / "l.csv", *[ROW.format(i) for i in range(500)], "", "b.jpg\t1\t2\tthree\t4\t5\t6")
    with pytest.raises(UserError, match="line 503: point 1's x is 'three'"):
        read_labels(csv)


@pytest.mark.parametrize("number", ["1", "1.5"])
def test_byte_order_mark_in_a_row_is_part_of_the_name(tmp_path, number):
    csv = write(tmp_path / "l.csv", f"\ufeffa.jpg\t{number}\t2\t3\t4\t5\t6")
    assert read_labels(csv).name(0) == "\ufeffa.jpg"


@pytest.mark.parametrize(
    "text,message",
    [
        ("", "is empty"),
        (HEADER + "\n", "no rows"),
        (ROW.format("a") + "\n" + ROW.format("b"), "line 1 holds numbers"),
        ("a,b,c\n1,2,3\n", "line 1"),
    ],
)
def test_files_without_rows_are_refused(tmp_path, text, message):
    csv = tmp_path / "l.csv"
    csv.write_text(text)
    with pytest.raises(UserError, match=message):
        read_labels(csv)
    assert os.listdir(tmp_path) == ["l.csv"]


def test_missing_file_is_reported(tmp_path):
    with pytest.raises(UserError, match="not found"):
        read_labels(tmp_path / "nothing.csv")


def cache_of(csv):
    return csv.with_name(csv.name + ".cache")


def test_cache_is_reused_until_the_csv_changes(csv):
    read_labels(csv)
    stamp = cache_of(csv).stat().st_mtime_ns
    read_labels(csv)
    assert cache_of(csv).stat().st_mtime_ns == stamp
    before = csv.stat()
    text = csv.read_text()
    csv.write_text(text.replace("b.jpg\t-7", "b.jpg\t-9"))  # as long, and as old as the file was
    os.utime(csv, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert read_labels(csv).points(1)[0, 0] == -9


def contents(labels):
    rows = range(len(labels))
    return [(labels.lines[i], labels.name(i), labels.points(i).tolist(), labels.faults.get(i)) for i in rows]


def test_damaged_label_cache_is_made_again(csv):
    "Cut, or with one bit flipped: of each byte of the points, and of some of the rest."
    with open(csv, "a") as f:
        f.write("bad.jpg\t1\n")
    right = contents(open_labels(csv))
    content, n_bytes = cache_of(csv).read_bytes(), 4 * 3 * 2 * 2  # of the points, which are first
    places = [*range(n_bytes), *range(n_bytes, len(content), 11)]
    flipped = [content[:k] + bytes([content[k] ^ 1 << k % 8]) + content[k + 1 :] for k in places]
    for damaged in [content[:-1], b"", bytes(5000), content[:100], *flipped]:
        cache_of(csv).write_bytes(damaged)
        assert contents(open_labels(csv)) == right
        assert cache_of(csv).read_bytes()[:n_bytes] == content[:n_bytes]


def damage_in_place(path):
    with open(path, "r+b") as f:
        f.seek(14)
        f.write(b"\1")


def test_cache_that_is_damaged_or_replaced_while_it_is_open(csv):
    first, second = read_labels(csv), read_labels(csv)
    right, inode = contents(first), cache_of(csv).stat().st_ino
    damage_in_place(cache_of(csv))
    assert contents(first) == right and cache_of(csv).stat().st_ino != inode
    inode = cache_of(csv).stat().st_ino
    assert contents(second) == right and cache_of(csv).stat().st_ino == inode  # what `first` has made
    third = read_labels(csv)
    damage_in_place(cache_of(csv))
    write(csv, ROW.format("x"), ROW.format("y"), ROW.format("z"))
    read_labels(csv)
    with pytest.raises(UserError, match="has changed since it was opened"):
        contents(third)


def test_identity_is_that_of_the_content(csv, tmp_path):
    first = read_labels(csv).identity
    os.utime(csv, (1, 1))
    other = tmp_path / "elsewhere.csv"
    other.write_bytes(csv.read_bytes().replace(b"\n", b"\r\n"))
    assert read_labels(csv).identity == read_labels(other).identity == first
    assert first["rows"] == 3 and first["points"] == 3
    for old, new in [("b.jpg\t-7", "b.jpg\t-8"), ("b.jpg", "d.jpg"), (ROW.format("c") + "\n", "")]:
        other.write_text(csv.read_text().replace(old, new))
        assert read_labels(other).identity != first
    frame = pd.DataFrame([["a.jpg", 1.0, 2.0], ["b.jpg", 3.0, 4.0]])
    changed = frame.replace(4.0, 5.0)
    assert frame_labels(frame).identity == frame_labels(frame.copy()).identity != frame_labels(changed).identity


def test_truncated_or_replaced_csv_is_read_again(csv):
    read_labels(csv)
    whole = csv.read_bytes()
    csv.write_bytes(whole[: whole.index(b"b.jpg")])
    assert len(read_labels(csv)) == 1
    csv.write_bytes(whole[:-7])  # half-written: the last row has lost its end
    with pytest.raises(UserError, match="line 4"):
        read_labels(csv)
    csv.write_bytes(whole)
    assert len(read_labels(csv)) == 3
    other = write(csv.with_name("other.csv"), ROW.format("x"), ROW.format("y"), ROW.format("z"))
    os.replace(other, csv)  # another file under its name
    assert read_labels(csv).name(0) == "x.jpg"


def test_csv_that_changes_while_it_is_read_is_refused(csv, monkeypatch):
    real = labels.read_rows

    def read_rows(path):
        yield from real(path)
        with open(path, "a") as f:
            f.write(ROW.format("d") + "\n")

    monkeypatch.setattr(labels, "read_rows", read_rows)
    with pytest.raises(UserError, match="changed while it was read"):
        read_labels(csv)
    assert os.listdir(csv.parent) == [csv.name]
    monkeypatch.undo()
    assert len(read_labels(csv)) == 4


def test_cache_of_another_format_is_replaced(csv, monkeypatch):
    monkeypatch.setattr(labels, "FORMAT", labels.FORMAT + 1)
    read_labels(csv)
    newer = cache_of(csv).read_bytes()
    monkeypatch.undo()
    read_labels(csv)
    assert cache_of(csv).read_bytes() != newer
    assert read_labels(csv).points(2).tolist() == [[1, 2], [3, 4], [5, 6]]


def test_concurrent_first_reads_all_succeed(tmp_path):
    "Eight at one time, none finding a cache: each gets the rows, and one whole cache and nothing else is left."
    text = [f"{i}.jpg\t" + "\t".join(str(v) for v in range(i, i + 400)) for i in range(3000)]
    csv = write(tmp_path / "l.csv", *text, header="file_name\t" + "\t".join(f"c{k}" for k in range(400)))
    code = "r = labels.read_labels(csv); print(len(r), int(sum(r.points(i).sum() for i in range(len(r)))))"
    outputs = {finish(process) for process in [started(code, csv) for _ in range(8)]}
    assert outputs == {f"3000 {sum(400 * i + 400 * 399 // 2 for i in range(3000))}\n"}
    assert sorted(os.listdir(tmp_path)) == ["l.csv", "l.csv.cache"]


def test_cache_of_a_read_only_folder_is_in_the_user_cache(csv, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(labels, "atomic_write", _refuse_in(csv.parent, labels.atomic_write))
    assert len(read_labels(csv)) == 3
    assert not cache_of(csv).exists() and len(list((tmp_path / "home" / "landmarks_fastai").glob("*.cache"))) == 1
    assert len(read_labels(csv)) == 3  # found again


def _refuse_in(folder, real):
    "A read-only folder: root, who runs the tests in many containers, is refused by no mode bits."

    def atomic_write(path, mode):
        if path.parent == folder:
            raise PermissionError(13, "Permission denied")
        return real(path, mode)

    return atomic_write


def test_labels_pickle_as_a_file_name(csv):
    labels = read_labels(csv)
    text = pickle.dumps(labels)
    assert len(text) < 2000 and contents(pickle.loads(text)) == contents(labels)
    cache_of(csv).unlink()
    os.utime(csv, (1, 1))
    assert contents(pickle.loads(text)) == contents(labels)
    frame = frame_labels(pd.DataFrame([["a.jpg", 1.0, 2.0], ["b.jpg", 3.0, np.nan]]))
    assert repr(contents(pickle.loads(pickle.dumps(frame)))) == repr(contents(frame))
    csv.write_text(csv.read_text().replace("b.jpg", "c.jpg"))
    with pytest.raises(UserError, match="has changed since it was opened: start again"):
        pickle.loads(text)


@LINUX
def test_memory_does_not_grow_with_the_file(tmp_path):
    "Five times the rows, the same peak but for the names: measured in fresh processes."
    text = [f"{i:032d}.jpg\t" + "\t".join(str(v % 300) for v in range(i, i + 400)) for i in range(8000)]
    header = "file_name\t" + "\t".join(f"c{k}" for k in range(400))
    peaks, sizes = [], []
    for n in (1, 5):
        csv = tmp_path / f"{n}.csv"
        csv.write_text("\n".join([header, *(text * n), ""]))
        sizes.append(csv.stat().st_size)
        code = "from landmarks_fastai.data import labels, landmarks_csv; landmarks_csv.BLOCK = 1 << 20"
        peaks.append(peak_memory(f"{code}; labels.read_labels({str(csv)!r})"))
    assert sizes[1] - sizes[0] > 40e6 and peaks[1] - peaks[0] < 10e6


@pytest.mark.parametrize("block", [1 << 23, 64])
def test_blank_fields_and_nan_are_missing_points(tmp_path, monkeypatch, block):
    monkeypatch.setattr(landmarks_csv, "BLOCK", block)
    rows = [ROW.format("a"), "b.jpg\t\t\t3\t4\t5\t6", "c.jpg\tnan\tNaN\t  \t\t-5\t6.5", "d.jpg\t1\t2\t3\t4\t NAN \t"]
    csv, gap = write(tmp_path / "l.csv", *rows), [np.nan, np.nan]
    expected = np.array([[[1, 2], [3, 4], [5, 6]], [gap, [3, 4], [5, 6]], [gap, gap, [-5, 6.5]], [[1, 2], [3, 4], gap]])
    for labels_read in (read_labels(csv), read_labels(csv), pickle.loads(pickle.dumps(read_labels(csv)))):
        assert np.array_equal([labels_read.points(i) for i in range(4)], expected, equal_nan=True)
    frame = pd.DataFrame(expected.reshape(4, -1)).convert_dtypes()  # pd.NA
    frame.insert(0, "file_name", list("abcd"))
    assert frame_labels(frame).faults == {}
    assert np.array_equal(frame_labels(frame).stored, expected, equal_nan=True)


def test_a_dataframe_has_the_faults_of_a_csv(tmp_path):
    rows = {
        "half": "nan\t2\t3\t4",
        "none": "nan\t" * 3 + "nan",
        "zeros": "0\t0\t0\t0",
        "far": "1\t2\t40000\t4",
        "right": "1\t2\t3\t4",
    }
    csv = write(tmp_path / "l.csv", *(f"{name}\t{row}" for name, row in rows.items()), header="n\tx\ty\tx\ty")
    faults = frame_labels(pd.read_csv(csv, sep="\t")).faults
    assert faults == open_labels(csv).faults and len(faults) == 4
    assert "point 0's x is inf" in frame_labels(pd.DataFrame([["a", np.inf, 1.0]])).faults[0]


def test_complete_whole_numbers_are_stored_in_two_bytes(csv):
    assert read_labels(csv).stored.dtype == np.int16
