"""The competition's folders and files: what is there to train on, what is asked for, what is handed in, how it is scored.

`python -m landmarks_fastai.competition score SUBMISSION TEST_POINTS TRUTH` prints the competition's score.
"""

import re
import sys
from array import array
from pathlib import Path

import numpy as np

from landmarks_fastai.data.labels import identity, read_labels
from landmarks_fastai.errors import UserError

LIST = re.compile(r"\[\s*-?\d{1,18}(?:\s*,\s*-?\d{1,18})*(?:\s*,)?\s*\]")  # each space fits one place: no long search


class TestPoints:
    """The rows of a `test_points.csv`: file names and, for each, the indices of the points to submit.

    `names`: list of str. `indices`: int array (rows, asked). `lines`: each row's line in the file.
    """

    __test__ = False  # pytest takes the name for a test class

    def __init__(self, csv: Path, names: list[str], indices: np.ndarray, lines: np.ndarray):
        self.csv, self.names, self.indices, self.lines = csv, names, indices, lines
        self.key = identity(csv)

    def __len__(self):
        return len(self.names)

    def name(self, row: int) -> str:
        return self.names[row]

    def line(self, row: int) -> int:
        return int(self.lines[row])

    def lines_and_names(self):
        return zip(self.lines.tolist(), self.names, strict=True)

    def check_range(self, n_points: int):
        "Raise `UserError` for the first index that a network of `n_points` points has no answer to."
        wrong = np.argwhere((self.indices < 0) | (self.indices >= n_points))
        if wrong.size:
            row, k = wrong[0]
            raise UserError(
                f"{self.csv} line {self.lines[row]}: point index {self.indices[row, k]} asked for, "
                f"the network predicts {n_points} points (0 to {n_points - 1})"
            )


def read_test_points(
    csv,  # path of a test_points.csv: TAB-separated, a header line, file_name and a list like [742, 385]
) -> TestPoints:
    "Read the rows to submit. The lists are parsed, never evaluated; a bad line raises `UserError` with its number."
    csv = Path(csv)
    names, lines, indices, n_asked = (
        [],
        array("q"),
        array("q"),
        0,
    )  # plain numbers: a list of lists takes six times as much
    for number, text in _lines(csv):
        name, tab, field = text.partition("\t")
        field = field.strip().strip('"')
        if number == 1:
            if LIST.fullmatch(field):
                raise UserError(
                    f"{csv} line 1 holds a row: a header line (file_name, point_index_list) must stand above"
                )
            continue
        if not tab or not name:
            raise UserError(f"{csv} line {number}: a file name, a TAB and a list of point indices expected")
        if not LIST.fullmatch(field):
            raise UserError(f"{csv} line {number}: {field[:40]!r} is no list of point indices like [742, 385]")
        found = [int(index) for index in re.findall(r"-?\d+", field)]
        n_asked = n_asked or len(found)
        if len(found) != n_asked:
            raise UserError(
                f"{csv} line {number}: {len(found)} indices found, {n_asked} as in the rows before expected"
            )
        names.append(name)
        lines.append(number)
        indices.extend(found)
    if not names:
        raise UserError(f"{csv} has no rows: a header line and one line per image are needed")
    return TestPoints(csv, names, _small(indices).reshape(-1, n_asked), _small(lines))


def _small(numbers) -> np.ndarray:
    "The integers in the fewest bytes that hold them and a sign."
    numbers = np.asarray(numbers)
    return numbers.astype(np.min_scalar_type(min(numbers.min(), -1 - numbers.max())))


def _lines(csv: Path):
    "Yield (number, text) of the lines that are not blank; the first is 1."
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
    "nearest (the default), floor, or none. (The organisers' script cuts decimals off: floor, but for negative numbers.)"
    return {"nearest": np.rint, "floor": np.floor, "none": np.asarray}[rounding](points)


def submission_header(n_asked: int) -> str:
    return ",".join(["file_name"] + [f"Point_M{k}_{axis}" for k in range(n_asked) for axis in "XY"]) + "\n"


def submission_line(name: str, points: np.ndarray) -> str:
    "One row: `points` (asked, 2) in pixels of the image as stored, whole numbers written without a point."
    if not np.isfinite(points).all():
        raise UserError(f"the network's prediction for {name} is NaN or infinite: its weights are ruined, train again")
    return ",".join([name] + [str(int(v)) if v == int(v) else str(v) for v in points.reshape(-1)]) + "\n"


def read_submission(csv) -> tuple[list[str], np.ndarray]:
    "File names and points, float64 (rows, asked, 2), of a submission. Raises `UserError` with the bad line's number."
    csv = Path(csv)
    names, rows, width = [], [], None
    for number, text in _lines(csv):
        fields = text.rsplit(",", width - 1) if width else text.split(",")
        if number == 1:
            width = len(fields)
            continue
        if width is None:  # the first line is blank
            break
        try:
            values = np.array(fields[1:], np.float64)
        except ValueError:
            raise UserError(f"{csv} line {number}: a field is no number") from None
        if len(fields) != width or not np.isfinite(values).all():
            raise UserError(f"{csv} line {number}: a file name and {width - 1} finite numbers expected")
        names.append(fields[0])
        rows.append(values)
    if not names or width % 2 == 0 or width < 3:
        raise UserError(
            f"{csv} is no submission: a header file_name,Point_M0_X,Point_M0_Y,… and one line per image expected"
        )
    return names, np.stack(rows).reshape(len(rows), -1, 2)


def score(
    submission,  # path of a submission
    test_points,  # path of the test_points.csv that it answers
    truth,  # path of a file in landmarks.csv's form with the same images
) -> float:
    "The competition's score: mean squared error over all submitted coordinates, in pixels of the images as stored."
    test_points = read_test_points(test_points)
    names, points = read_submission(submission)
    if names != test_points.names:
        k = next(
            (k for k, (a, b) in enumerate(zip(names, test_points.names, strict=False)) if a != b),
            min(len(names), len(test_points)),
        )
        raise UserError(
            f"{submission} does not answer {test_points}: {len(names)} rows for {len(test_points)}, the first that differs is row {k + 1}"
        )
    if points.shape[1] != test_points.indices.shape[1]:
        raise UserError(f"{submission}: {points.shape[1]} points a row found, {test_points.indices.shape[1]} asked for")
    labels = read_labels(truth)
    test_points.check_range(labels.n_points)
    rows = {name: i for i, (_, name) in enumerate(labels.lines_and_names())}
    if absent := [n for n in names if n not in rows]:
        raise UserError(f"{truth}: no row for {absent[0]} ({len(absent)} images are absent in all)")
    errors = [
        (p - labels.points(rows[n]).astype(np.float64)[i]) ** 2
        for n, p, i in zip(names, points, test_points.indices, strict=True)
    ]
    return float(np.mean(errors))


def main(argv=None) -> int:
    import argparse

    parser = argparse.ArgumentParser(prog="python -m landmarks_fastai.competition", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("score", help="print the competition's score of a submission")
    command.add_argument("submission", help="the submission, as predict.py wrote it")
    command.add_argument("test_points", help="the test_points.csv that it answers")
    command.add_argument("truth", help="the true points, in landmarks.csv's form")
    args = parser.parse_args(argv)
    try:
        print(score(args.submission, args.test_points, args.truth))
    except UserError as e:
        for line in e.lines:
            print(f"error: {line}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
