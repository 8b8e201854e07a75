"""The competition's files: the points to submit (`test_points.csv`), the submission, and its score.

`python -m landmarks_fastai.competition score SUBMISSION TEST_POINTS TRUTH` prints the competition's score.
"""

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from landmarks_fastai.data.labels import Labels, read_labels
from landmarks_fastai.errors import UserError
from landmarks_fastai.missing import nan_mean

INDEX_LIST = re.compile(r"\[\s*-?\d{1,18}(?:\s*,\s*-?\d{1,18})*(?:\s*,)?\s*\]")  # no ambiguity: linear time


class TestPoints(Labels):
    "The rows of a `test_points.csv`: each has the indices of the points to submit, int64 (rows, points to submit)."

    __test__ = False  # pytest takes the name for a test class

    def __init__(self, csv: Path, names: list[str], lines: np.ndarray, indices: np.ndarray):
        super().__init__(csv, names, lines, np.zeros((len(names), 0, 2), np.float32))
        self.indices = indices

    def check_range(self, n_points: int) -> None:
        "Raise `UserError` for the first index that a network of `n_points` points does not predict."
        wrong = np.argwhere((self.indices < 0) | (self.indices >= n_points))
        if wrong.size:
            row, k = wrong[0]
            index = f"{self.place(row)}: point index {self.indices[row, k]}"
            raise UserError(f"{index} asked for, the network predicts {n_points} points (0 to {n_points - 1})")


def read_test_points(csv: str | Path) -> TestPoints:
    """Read a `test_points.csv`: TAB-separated, with a header line, and file_name and a list like [742, 385] in each row.

    The lists are parsed, never evaluated. Raises `UserError` with the number of a bad line.
    """
    csv = Path(csv)
    names, lines, indices, n_submitted = [], [], [], 0
    for number, text in _read_lines(csv):
        name, _, field = text.partition("\t")
        field, where = field.strip().strip('"'), f"{csv} line {number}"
        if number == 1:
            if INDEX_LIST.fullmatch(field):
                raise UserError(f"{csv} line 1 holds a row: add a header line (file_name, point_index_list) above it")
            continue
        if not name or "\t" not in text:
            raise UserError(f"{where}: a file name, a TAB and a list of point indices expected")
        if not INDEX_LIST.fullmatch(field):
            raise UserError(f"{where}: {field[:40]!r} is not a list of point indices like [742, 385]")
        row = np.array(re.findall(r"-?\d+", field), np.int64)
        n_submitted = n_submitted or len(row)
        if len(row) != n_submitted:
            raise UserError(f"{where}: {len(row)} indices found, {n_submitted} as in the rows before expected")
        names.append(name)
        lines.append(number)
        indices.append(row)
    if not names:
        raise UserError(f"{csv} has no rows: a header line and one line per image are needed")
    return TestPoints(csv, names, np.array(lines), np.stack(indices))


def _read_lines(csv: Path) -> Iterator[tuple[int, str]]:
    "Yield (number, text) of the lines that are not blank; the first line is 1."
    try:
        with open(csv, encoding="utf-8-sig", newline=None) as f:
            for number, text in enumerate(f, 1):
                if text.strip():
                    yield number, text.rstrip("\n")
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{csv} not found") from None
    except OSError as e:
        raise UserError(f"{csv} cannot be read: {e.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{csv}: not UTF-8 text") from None


def round_points(points: np.ndarray, rounding: str) -> np.ndarray:
    "Round to nearest (the default), floor or none. (The organisers' script truncates: floor, but for negative numbers.)"
    return {"nearest": np.rint, "floor": np.floor, "none": np.asarray}[rounding](points)


def submission_header(n_points: int) -> str:
    "Format the header line of a submission with `n_points` points a row."
    return ",".join(["file_name", *(f"Point_M{k}_{axis}" for k in range(n_points) for axis in "XY")]) + "\n"


def submission_line(name: str, points: np.ndarray) -> str:
    "Format a row of points (n, 2), pixels of the image as stored. Raises `UserError` for points that are NaN or infinite."
    if not np.isfinite(points).all():
        raise UserError(f"the network's prediction for {name} is NaN or infinite: its weights are ruined, train again")
    return ",".join([name, *(str(int(v)) if v == int(v) else str(v) for v in points.reshape(-1))]) + "\n"


def read_submission(csv: str | Path) -> tuple[list[str], np.ndarray]:
    "Read file names and points, float64 (rows, points, 2), pixels as stored. Raises `UserError` with a bad line's number."
    csv = Path(csv)
    lines = list(_read_lines(csv))
    n_values = lines[0][1].count(",") if lines else 0
    if len(lines) < 2 or lines[0][0] > 1 or n_values % 2 or not n_values:  # a blank first line: the header is unknown
        raise UserError(f"{csv} is not a submission: a header file_name,Point_M0_X,… and one line per image expected")
    names, points = [], []
    for number, text in lines[1:]:
        name, *fields = text.rsplit(",", n_values)
        try:
            values = np.array(fields, np.float64)
        except ValueError:
            raise UserError(f"{csv} line {number}: a field is not a number") from None
        if len(values) != n_values or not np.isfinite(values).all():
            raise UserError(f"{csv} line {number}: a file name and {n_values} finite numbers expected")
        names.append(name)
        points.append(values)
    return names, np.reshape(points, (len(names), -1, 2))


def score(submission: str | Path, test_points: str | Path, truth: str | Path) -> float:
    """Return the competition's score: mean squared error over all submitted coordinates, in pixels of the images as stored.

    `truth` has the true points of the same images, in the format of landmarks.csv; what is missing there does not count.
    Raises `UserError` if a file cannot be read, the files do not match, or no submitted point has a truth.
    """
    return float(nan_mean(squared_errors(submission, test_points, truth)))


def squared_errors(submission: str | Path, test_points: str | Path, truth: str | Path) -> np.ndarray:
    "Return the squared error of each submitted coordinate, (images, points, 2), NaN where there is no truth; as `score`."
    wanted = read_test_points(test_points)
    names, points = read_submission(submission)
    if names != wanted.names:
        differ = (k for k, (a, b) in enumerate(zip(names, wanted.names, strict=False)) if a != b)
        row = 1 + next(differ, min(len(names), len(wanted)))
        difference = f"{len(names)} rows for {len(wanted)}, the first that differs is row {row}"
        raise UserError(f"{submission} does not match {test_points}: {difference}")
    if points.shape[1] != wanted.indices.shape[1]:
        raise UserError(f"{submission}: {points.shape[1]} points a row found, {wanted.indices.shape[1]} expected")
    labels = read_labels(truth)
    wanted.check_range(labels.n_points)
    rows = {labels.name(row): row for row in range(len(labels))}
    if missing := [name for name in names if name not in rows]:
        raise UserError(f"{truth}: no row for {missing[0]} ({len(missing)} images are missing in all)")
    true = np.stack([labels.points(rows[name])[i] for name, i in zip(names, wanted.indices, strict=True)])
    if np.isnan(true).all():
        raise UserError(f"{truth}: none of the submitted points is labelled")
    return (points - true) ** 2


def main(argv: list[str] | None = None) -> None:
    "Run the command `python -m landmarks_fastai.competition`."
    parser = argparse.ArgumentParser(prog="python -m landmarks_fastai.competition", description="Score a submission.")
    parser.add_argument("command", choices=["score"], help="print the competition's score of a submission")
    parser.add_argument("submission", help="the submission, as predict.py wrote it")
    parser.add_argument("test_points", help="the test_points.csv that it was made for")
    parser.add_argument("truth", help="the true points, in the format of landmarks.csv")
    args = parser.parse_args(argv)
    try:
        errors = squared_errors(args.submission, args.test_points, args.truth)
        labelled = ~np.isnan(errors[..., 0])
        counted = "" if labelled.all() else f" ({labelled.sum()} of {labelled.size} points)"
        print(f"{float(nan_mean(errors))}{counted}")
    except UserError as e:
        sys.exit("\n".join(f"error: {line}" for line in e.lines))


if __name__ == "__main__":
    main()
