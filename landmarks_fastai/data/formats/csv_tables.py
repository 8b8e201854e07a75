"Readers of tables: a plain CSV whose header names x and y of each point, DeepLabCut, lightning-pose."

import csv
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path, PurePosixPath, PureWindowsPath

import numpy as np
import pandas as pd

from landmarks_fastai.data.formats.table import LabelTable, Rows, checked, read_text
from landmarks_fastai.data.formats.text_files import read_yaml
from landmarks_fastai.data.labels import Labels, concatenate
from landmarks_fastai.data.landmarks_csv import LIMIT
from landmarks_fastai.errors import UserError

AXIS = "x|y|v|vis|visible|visibility"
# nose_x, x_nose, x0, 0x, noseX
COLUMNS = [
    re.compile(rf"(?P<name>.+?)[ _.:/-]+(?P<axis>{AXIS})", re.I),
    re.compile(rf"(?P<axis>{AXIS})[ _.:/-]+(?P<name>.+)", re.I),
    re.compile(rf"(?P<axis>{AXIS})(?P<name>\d+)", re.I),
    re.compile(rf"(?P<name>\d+)(?P<axis>{AXIS})", re.I),
    re.compile(r"(?P<name>.*[a-z0-9])(?P<axis>[XYV])"),
    re.compile(r"(?P<axis>[xy])(?P<name>)", re.I),
]
FILE = "file_name filename file image_path img_path path image image_name img name image_id".split()  # the first counts
BOX = [  # left, top, right, bottom; with or without box_ or bbox_
    {"left", "x_min", "xmin", "min_x"}, {"top", "y_min", "ymin", "min_y"},
    {"right", "x_max", "xmax", "max_x"}, {"bottom", "y_max", "ymax", "max_y"},
]  # fmt: skip
CORNER = [{"x", "x_min", "min_x", "x_center"}, {"y", "y_min", "min_y", "y_center"}, {"w", "width"}, {"h", "height"}]
HEADS = ("scorer", "individuals", "bodyparts", "coords")  # DeepLabCut's rows
MISSING = {"", "nan", "na", "n/a", "none", "null", "<na>"}
CELLS, WIDTH = 100_000, 1000  # parsed at a time, characters of a cell: 400 MB at most
HINT = "docs/labels.md lists the formats"


@dataclass
class Header:
    "Which columns of a table are what."

    file: int = -1
    names: list[str] = field(default_factory=list)
    xy: list[int] = field(default_factory=list)  # x0, y0, x1, y1, …
    visible: list[int] = field(default_factory=list)  # of each point; -1: none
    box: list[int] = field(default_factory=list)
    group: int = -1
    corner: list[str] = field(default_factory=list)  # columns of a box's corner and size, which are not a point's
    n_columns: int = 0
    unused: dict[int, str] = field(default_factory=dict)

    @property
    def positional(self) -> bool:
        "Whether the table is file_name, x0, y0, x1, y1, … and nothing else."
        return self.file == 0 and self.xy == list(range(1, self.n_columns)) and not self.box and self.group < 0

    @property
    def point_names(self) -> tuple[str, ...]:
        "The names of a positional table's points; empty if they are numbered in order: p0, p1, …, or from 1."
        parts, n = [re.fullmatch(r"(.*?)(\d{1,9})", name) for name in self.names], len(self.names)
        numbers, prefixes = [int(part[2]) for part in parts if part], {part and part[1] for part in parts}
        numbered = len(prefixes) == 1 and numbers in ([*range(n)], [*range(1, n + 1)])
        return tuple(self.names) if any(self.names) and not numbered else ()


def parse_header(columns: Sequence[str], where: str) -> Header:
    """Find the columns of points, file names, boxes and groups. `names` is empty if the header does not name x and y.

    Raises `UserError` for a name that stands twice.
    """
    columns = [column.strip().strip("\"'").strip() for column in columns]
    plain = [re.sub(r"^b?box[ _.]", "", column.lower()) for column in columns]
    header = Header(n_columns=len(columns))
    header.box, corner = (
        [next((k for k, name in enumerate(plain) if name in edge), -1) for edge in edges] for edges in (BOX, CORNER)
    )
    header.box = [] if -1 in header.box else header.box
    axes: dict[str, dict[str, int]] = {}
    for k, column in enumerate(columns):
        match = next((m for pattern in COLUMNS if (m := pattern.fullmatch(column))), None)
        if match and k not in header.box:
            point = axes.setdefault(match["name"], {})
            if (axis := match["axis"].lower()[0]) in point:
                raise UserError(f"{where}: column {column!r} stands twice")
            point[axis] = k
    points = {name: point for name, point in axes.items() if {"x", "y"} <= point.keys()}
    header.names = list(points)
    header.xy = [point[axis] for point in points.values() for axis in "xy"]
    side_by_side = corner == [*range(corner[0], corner[0] + 4)]  # else the size may be the picture's
    if not header.box and side_by_side and len(points) > 1 and {*corner[:2]} <= {*header.xy}:
        header.corner = [columns[k] for k in corner]
    header.visible = [point.get("v", -1) for point in points.values()]
    header.group = plain.index("group") if "group" in plain else -1
    used = {*header.xy, *header.visible, *header.box, header.group}
    named = [plain.index(name) for name in FILE if name in plain and plain.index(name) not in used]
    others = [
        k for k, name in enumerate(plain) if k not in used and name and not re.match(r"unnamed: \d+|index$", name)
    ]
    header.file = (named + others + [-1])[0]
    header.unused = {k: columns[k] for k in others if k != header.file}
    return header


def first_line(path: Path) -> str:
    "Return a text file's first line. Raises `UserError` if it is not UTF-8."
    try:
        with open(path, encoding="utf-8-sig", newline=None) as f:
            return f.readline(1 << 22).rstrip("\n")
    except UnicodeDecodeError:
        raise UserError(f"{path} line 1: not UTF-8 text: save the file as UTF-8") from None
    except OSError as e:
        raise UserError(f"{path} cannot be read: {e.strerror}") from None


def split_header(line: str) -> tuple[list[str], str]:
    "Return the columns of a header line, and what separates them. A TAB at the end is not one more column."
    separator = max("\t,;", key=line.count)
    columns = next(csv.reader([line], delimiter=separator), [])
    return columns[:-1] if columns and not columns[-1].strip() else columns, separator


def read_plain(path: Path) -> LabelTable:
    "A CSV, TAB or comma, whose header names x and y of each point; counted from the pixel's centre."
    columns, separator = split_header(line := first_line(path))
    if not line.strip():
        raise UserError(f"{path} is empty: a header line and one line per object are needed")
    header = parse_header(columns, f"{path} line 1")
    if not header.names:
        raise UserError(f"{path} line 1 names no points: x and y of each expected, as in nose_x, nose_y; {HINT}")
    if header.file < 0:
        raise UserError(f"{path} line 1: no column of file names: name it file_name")
    return table_of(header, _rows_below_header(path, separator), "line {}", 2, path)


def _rows_below_header(path: Path, separator: str) -> Iterator[list[str]]:
    "Yield the fields of each row. Raises `UserError` with the line of a row whose quotes are wrong."
    number = 2
    try:
        with open(path, encoding="utf-8-sig") as f:
            f.readline()
            reader = csv.reader(f, delimiter=separator, strict=True)
            for row in reader:
                yield row
                number = reader.line_num + 2
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text") from None
    except csv.Error as e:
        raise UserError(f"{path} line {number} cannot be read ({e})") from None


def table_of(header: Header, rows: Iterable[Sequence[str]], place: str, first: int, source: Path) -> LabelTable:
    "Return the table of a plain CSV's or DataFrame's texts; `place` and `first` say what the first row is called."
    if header.corner:
        size = " and ".join(header.corner[2:])
        hint = f"name its edges left, top, right, bottom; if it is a point and the picture's size, remove {size}"
        raise UserError(f"{source}: columns {', '.join(header.corner)} are a box, not a point: {hint}")
    parts: list[Labels] = []
    pointless, texts = 0, iter(rows)
    while chunk := list(islice(texts, max(1, CELLS // header.n_columns))):
        cells = _cells(chunk, header.n_columns, place, first, source)
        filled = np.flatnonzero((cells != "").any(1))
        cells, lines, first = cells[filled], first + filled, first + len(cells)
        labels = _labels_of_cells(header, cells, lines, place, source)
        kept = np.flatnonzero(np.isfinite(labels.stored).any((1, 2)))
        pointless += len(labels) - len(kept)
        if not parts and header.names == [""] and (column := _column_of_landmarks(cells[kept], header)):
            found = f"found one line per landmark (column {column!r}, which is to be removed if it names objects)"
            raise UserError(f"{source}: one line per object expected, with columns NAME_x, NAME_y; {found}")
        if len(kept):
            parts.append(labels.at(kept))
    if not parts:
        why = "no row with a point" if pointless else "a header but no rows"
        raise UserError(f"{source} has {why}: one line per object is needed")
    unused = f"columns ({', '.join(header.unused.values())[:200]})"
    return LabelTable(concatenate(parts), "CSV", {"rows without a point": pointless, unused: len(header.unused)})


def _labels_of_cells(header: Header, cells: np.ndarray, lines: np.ndarray, place: str, source: Path) -> Labels:
    points, faults = _numbers(cells, header)
    boxes = [[checked(v or "nan", True)[0] for v in row] for row in cells[:, header.box]]
    return Labels(
        source,
        cells[:, header.file].tolist(),
        lines,
        points,
        faults,
        point_names=tuple(header.names if any(name != str(k) for k, name in enumerate(header.names)) else ()),
        places=[place.format(line) for line in lines],
        boxes=np.array(boxes, np.float32).reshape(-1, 4) if header.box else None,
        groups=cells[:, header.group].tolist() if header.group >= 0 else None,
    )


def _column_of_landmarks(rows: np.ndarray, header: Header) -> str:
    "Return the column whose texts each stand once in most images, in three at least; of classes of objects they do not."
    _, image, lines = np.unique(rows[:, header.file], return_inverse=True, return_counts=True)
    for k, name in header.unused.items():
        texts, text = np.unique(rows[:, k], return_inverse=True)
        once = len(np.unique(image * len(texts) + text)) == len(rows)
        if once and len(texts) > 1 and len(lines) > 2 and 2 * (lines == len(texts)).sum() > len(lines):
            return name
    return ""


def _cells(rows: list[Sequence[str]], n_columns: int, place: str, first: int, source: Path) -> np.ndarray:
    "Return the cells of rows without spaces around them, (rows, n_columns + 1): a row may have one field too many."
    for number, row in enumerate(rows, first):
        if len(row) > n_columns + 1:
            raise UserError(
                f"{source} cannot be read ({place.format(number)} has {len(row)} fields, {n_columns} expected)"
            )
        if max(map(len, row), default=0) > WIDTH:
            raise UserError(f"{source} {place.format(number)} has a field of more than {WIDTH} characters")
    return np.array([[cell.strip() for cell in row] + [""] * (n_columns + 1 - len(row)) for row in rows], np.str_)


def _numbers(cells: np.ndarray, header: Header) -> tuple[np.ndarray, dict[int, str]]:
    "Return points (rows, n_points, 2), NaN where they are missing, and the first fault of each faulty row."
    texts = cells[:, header.xy]
    missing = np.isin(np.strings.lower(texts), list(MISSING))
    for k, column in enumerate(header.visible):
        if column >= 0:
            visible = np.strings.lower(cells[:, column])
            zero = np.asarray(pd.to_numeric(visible.astype(object), errors="coerce")) == 0
            missing[:, 2 * k : 2 * k + 2] |= (zero | np.isin(visible, ["false", "no"]))[:, None]
    values, faults = np.full(texts.shape, np.nan), {}
    values[~missing] = pd.to_numeric(texts[~missing].astype(object), errors="coerce")
    for row, k in np.argwhere(~missing & ~(abs(values) <= LIMIT)).tolist():
        values[row, k], problem = checked(texts[row, k].item())
        if problem:
            faults.setdefault(row, f"point {header.names[k // 2]}'s {'xy'[k % 2]} is {problem}")
    extra = cells[:, header.n_columns :]
    for row in np.flatnonzero((extra != "").any(1)).tolist():
        faults.setdefault(row, f"more fields than the {header.n_columns} of the header: fix or remove the line")
    for row in np.flatnonzero(cells[:, header.file] == "").tolist():
        faults.setdefault(row, "the file name is empty: fix or remove the line")
    values[list(faults)] = 0
    return values.reshape(len(values), -1, 2).astype(np.float32), faults


def is_deeplabcut(path: Path) -> bool:
    "Return whether a CSV has the header rows of DeepLabCut and lightning-pose."
    try:
        with open(path, encoding="utf-8-sig", newline=None) as f:
            return any(line.split(",")[0].strip() == "bodyparts" for line, _ in zip(f, range(4), strict=False))
    except (OSError, UnicodeDecodeError):
        return False


def read_deeplabcut(rows: Rows, files: Iterable[Path]) -> LabelTable:
    """DeepLabCut and lightning-pose: CSVs with the header rows scorer, (individuals,) bodyparts, coords; from the pixel's centre.

    File names are paths, in one column or in three. The folder of an image, its video, is the group. A cell that is empty
    is missing. Bodyparts of no individual (unique ones) are left out where there are individuals.
    """
    rows.kind = "DeepLabCut CSV"
    for path in files:
        lines = list(csv.reader(read_text(path).splitlines()))
        heads = {line[0]: line for line in lines[:4] if line and line[0] in HEADS}
        parts, coords = heads["bodyparts"], heads["coords"]
        individuals, start = heads.get("individuals", [""] * len(parts)), coords.index("x")
        single = {part for part, i in zip(parts, individuals, strict=False) if i == "single"}
        if single and {*individuals[start:]} != {"single"}:
            rows.left_out["unique bodyparts"] += len(single)
            individuals = ["" if i == "single" else i for i in individuals]
        columns: dict[str, dict[str, dict[str, int]]] = {}
        for k in range(start, len(coords)):
            if "individuals" not in heads or individuals[k]:
                columns.setdefault(individuals[k], {}).setdefault(parts[k], {})[coords[k]] = k
        for number, cells in enumerate(lines[len(heads) :], len(heads) + 1):
            rows.locate(path, number)
            if any(cells[start:]):
                _add_deeplabcut(rows, cells, start, columns)
            else:
                rows.left_out["frames without a point"] += any(cells)
    config = rows.root / "config.yaml"  # of DeepLabCut's project
    order = read_yaml(config).get("bodyparts") if config.is_file() else ()
    return rows.table(map(str, order) if isinstance(order, list) else ())


def _add_deeplabcut(rows: Rows, cells: list[str], start: int, columns: dict[str, dict[str, dict[str, int]]]) -> None:
    name = "/".join(PureWindowsPath(cell).as_posix() for cell in cells[:start] if cell)
    for parts in columns.values():
        xy = {part: (cells[at["x"]].strip(), cells[at["y"]].strip()) for part, at in parts.items()}
        named = {part: [v or "nan" for v in p] for part, p in xy.items() if not all(v.lower() in MISSING for v in p)}
        half = next((part for part, p in named.items() if any(v.lower() in MISSING for v in p)), "")
        fault = f"point {half} has one coordinate of two" if half else ""
        if named:
            rows.add(name, named, group=PurePosixPath(name).parent.name, fault=fault)


def deeplabcut_files(folder: Path) -> Iterator[Path]:
    "Yield the CSVs of a DeepLabCut project or a lightning-pose data folder, without those of its out-of-distribution frames."
    for pattern in ("labeled-data/*/CollectedData_*.csv", "CollectedData*.csv"):
        files = (path for path in sorted(folder.glob(pattern)) if is_deeplabcut(path))
        yield from (path for path in files if path.parent != folder or not path.stem.endswith("_new"))
