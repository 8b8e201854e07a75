"""Which reader a source of labels is for, and where its images are.

A source is a file or a folder as its tool wrote it. Names of images that are not found as they stand are understood where
only one file can be meant: another prefix of folders, letters composed otherwise, `.JPG`, backslashes, quotes.
"""

import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from landmarks_fastai.data.formats import csv_tables, json_files, text_files, xml_files
from landmarks_fastai.data.formats.table import DAMAGE, LabelTable, Rows, counted
from landmarks_fastai.data.formats.text_files import IMAGES
from landmarks_fastai.data.images import SIDEWAYS, exif_turn, open_undecoded
from landmarks_fastai.data.labels import Labels, check_values, frame_labels, open_labels
from landmarks_fastai.errors import UserError
from landmarks_fastai.utils.files import check_folder

if TYPE_CHECKING:
    import pandas as pd

MAX_FILES = 2_000_000  # of a folder that is searched for images
COCO = "_annotations.coco.json"  # Roboflow's name, in a folder a split
OTHER = {
    ".zip": "unpack it and name the folder",
    ".tar": "unpack it and name the folder",
    ".gz": "unpack it and name the folder",
    ".h5": "DeepLabCut writes the same labels as CSV: name the project's folder",
    ".slp": "convert it: sio convert labels.slp -o labels.json --to coco",
    ".mat": "save the labels as a CSV: docs/labels.md lists the formats",
}
Turn = Image.Transpose | None


def read_source(source: Path, category: str = "", image_folder: Path | None = None) -> tuple[Labels, Path]:
    """Read the labels of a file or folder, and find their images. Prints what the source was taken for.

    Returns the labels and the folder that their file names are relative to. Raises `UserError`.
    """
    if source.is_dir() and (csv := source / "train" / "landmarks.csv").is_file():
        folder = image_folder or csv.parent / "images"
        if is_positional(csv):
            return open_labels(csv), folder
        table, roots, source = csv_tables.read_plain(csv), [folder], csv
    else:
        table = _read_table(source, category)
        root = source if source.is_dir() else source.parent
        above = [root, *root.resolve().parents[:2]] if source.is_file() else [root, root.resolve().parent]
        roots = [image_folder] if image_folder else above
    folder, missing = find_images(table, roots, source)
    keep = np.flatnonzero([not name or table.kind == "CSV" for name in missing])
    table.left_out["rows whose image was not found, as " + next(filter(None, missing), "")] = len(missing) - len(keep)
    turned = to_stored_pixels(table, folder, keep.tolist())
    labels = labels_of(table, keep, source)
    labels.turned = turned
    images = len(set(labels.names))
    what = f"{table.kind}: {len(labels)} rows, {images} images, {labels.n_points} points"
    print(what + (f"; left out: {said}" if (said := counted(table.left_out)) else ""), flush=True)
    return labels, folder


def is_positional(csv: Path) -> bool:
    "Return whether a landmarks.csv is to be read by the position of its columns: TAB-separated, or with no names of x and y."
    with suppress(UserError, OSError), open(csv, "rb") as f:
        if b"\r" in f.readline().rstrip(b"\r\n"):
            return False
        columns, separator = csv_tables.split_header(line := csv_tables.first_line(csv))
        header = csv_tables.parse_header(columns, str(csv))
        return not header.names or (separator == "\t" and header.positional and not line.endswith("\t"))
    return True


def _read_table(source: Path, category: str) -> LabelTable:
    rows = Rows(source, "labels", 0)
    try:
        return (_read_folder if source.is_dir() else _read_file)(source, rows, category)
    except DAMAGE as e:
        what = f"{type(e).__name__}: {str(e)[:80]}"
        raise UserError(
            f"{source}{rows.place and ' ' + rows.place}: damaged, or not as {rows.kind} has it ({what})"
        ) from None


def _read_file(path: Path, rows: Rows, category: str) -> LabelTable:
    kind, root = kind_of(path), path.parent
    readers: dict[str, Callable[[], LabelTable]] = {
        "COCO": lambda: json_files.read_coco(rows, [(path, "", False)], category),
        "Label Studio": lambda: json_files.read_label_studio(rows, path),
        "labelme": lambda: json_files.read_labelme(rows, [path], root),
        "VIA": lambda: json_files.read_via(rows, path),
        "CVAT": lambda: xml_files.read_cvat(rows, path, category),
        "dlib": lambda: xml_files.read_dlib(rows, path, category),
        "YOLO": lambda: text_files.read_yolo(rows, path, category),
        "pts": lambda: text_files.read_pts(rows, [path], root),
        "WFLW": lambda: text_files.read_wflw(rows, [path]),
        "DeepLabCut": lambda: csv_tables.read_deeplabcut(rows, [path], root),
        "CSV": lambda: csv_tables.read_plain(path),
    }
    return readers[kind]()


def kind_of(path: Path) -> str:
    "Return which tool's file this is. Raises `UserError` for another."
    suffix = path.suffix.lower()
    if not path.is_file():
        raise UserError(f"{path}: no such folder or file; -d must be labels, or the folder that holds train/ and test/")
    if suffix in OTHER:
        raise UserError(f"{path}: {suffix} files are not read: {OTHER[suffix]}")
    if suffix == ".json":
        return json_files.kind_of_json(path)
    if suffix == ".xml":
        return xml_files.kind_of_xml(path)
    if suffix in (".yaml", ".yml", ".pts"):
        return "pts" if suffix == ".pts" else "YOLO"
    line = csv_tables.first_line(path)
    if text_files.is_wflw(line):
        return "WFLW"
    if csv_tables.is_deeplabcut(path):
        return "DeepLabCut"
    return "VIA" if "region_shape_attributes" in line else "CSV"


def _read_folder(folder: Path, rows: Rows, category: str) -> LabelTable:
    check_folder(folder, "-d must be labels, or the folder that holds train/ and test/")
    yolo = [p for p in sorted(folder.glob("*.y*ml")) if "kpt_shape" in text_files.read_yaml(p)]
    if len(yolo) == 1:
        return text_files.read_yolo(rows, yolo[0], category)
    if files := list(csv_tables.deeplabcut_files(folder)):
        config = folder / "config.yaml"
        order = text_files.read_yaml(config).get("bodyparts") if config.is_file() else ()
        return csv_tables.read_deeplabcut(
            rows, files, folder, [str(n) for n in order] if isinstance(order, list) else ()
        )
    splits = [(folder / s / COCO, f"{s}/", s != "train") for s in ("train", "valid") if (folder / s / COCO).is_file()]
    if splits:
        return json_files.read_coco(rows, splits, category)
    if files := sorted(folder.rglob("*.pts")):
        return text_files.read_pts(rows, files, folder)
    if files := sorted(folder.rglob("list_98pt_*.txt")):
        return text_files.read_wflw(rows, [p for p in files if "rect_attr" in p.name] or files)
    kinds = {p: kind for p in [*folder.iterdir(), *folder.glob("annotations/*.json")] if (kind := _kind_or_none(p))}
    others = sorted(p for p, kind in kinds.items() if kind != "labelme")
    if not others and (files := sorted(p for p in folder.rglob("*.json") if _kind_or_none(p) == "labelme")):
        return json_files.read_labelme(rows, files, folder)
    if len(others) == 1:
        return _read_file(others[0], rows, category)
    several = (
        f": {', '.join(p.name for p in others[:9])}: name one of them" if others else ", nor labels of another tool"
    )
    missing = f"{folder / 'train' / 'landmarks.csv'} not found; -d must be the folder that holds train/ and test/"
    raise UserError(f"{missing}{several}; docs/labels.md lists the formats")


def _kind_or_none(path: Path) -> str | None:
    "Return the kind of a file that may be of labels; None for others."
    with suppress(UserError):
        if path.suffix.lower() in (".json", ".xml"):
            return kind_of(path)
        if path.suffix.lower() in (".csv", ".tsv"):
            kind = kind_of(path)
            columns, _ = csv_tables.split_header(csv_tables.first_line(path))
            return kind if kind != "CSV" or csv_tables.parse_header(columns, "").names else None
    return None


# --- where the images are


def find_images(table: LabelTable, roots: Sequence[Path], source: Path) -> tuple[Path, list[str]]:
    """Set the table's file names to those of images below the first root that has any.

    Returns the root, and for each row an empty text, or the name that is not found. Raises `UserError` if no image is found.
    """
    distinct = dict.fromkeys(table.files)
    for root in roots:
        names = resolve(list(distinct), root)
        if any(names.values()):
            missing = ["" if names[name] else name for name in table.files]
            table.files = [names[name] or name for name in table.files]
            return root, missing
    leaving = next((n for n in distinct if _parts(n)[0] == ".."), None)
    name, hint = (
        leaving or next(iter(distinct)),
        "put the labels beside the images, with the names that the images have",
    )
    where = (
        f"{name!r} leaves the folder of the labels"
        if leaving
        else f"none of {len(distinct)} images is found, as {name!r}"
    )
    raise UserError(f"{source}: {where}; looked in {roots[0]}: {hint}")


def resolve(names: Sequence[str], root: Path) -> dict[str, str]:
    "Return the path below the root that each name means, or an empty text."
    known: dict[str, str] = {}
    for name in names:
        path = "/".join(_parts(name))
        inside = os.path.isabs(name) and Path(os.path.normpath(name)).is_relative_to(root.absolute())
        if inside:
            path = Path(os.path.normpath(name)).relative_to(root.absolute()).as_posix()
        exact = [name] if not os.path.isabs(name) and ".." not in PureWindowsPath(name).parts else []
        with suppress(ValueError):  # a NUL
            for tried in [*exact, path] if inside or not name.startswith(("/", "..")) else exact:
                if not tried.startswith("..") and os.path.isfile(root / tried):
                    known[name] = tried
                    break
    if len(known) < len(names):
        _search(names, root, known)
    return {name: known.get(name, "") for name in names}


def _parts(name: str) -> list[str]:
    "Return the folders and the name of a path as any system writes it: without quotes, drive and root; `..` stays in front."
    text = os.path.normpath(name.strip().strip("\"'").replace("\\", "/").strip())
    parts = PureWindowsPath(text)
    return [part for part in parts.parts if part != parts.anchor] or ["."]


def _key(part: str) -> str:
    return unicodedata.normalize("NFC", part).casefold()


def _search(names: Sequence[str], root: Path, known: dict[str, str]) -> None:
    """Add names to `known` that end like exactly one path below the root, whose file no other name means.

    Either is a whole end of the other; only the folders of another machine may differ, each for one folder here.
    """
    files = defaultdict(list)
    for path in _image_files(root):
        files[_key(path.name)].append(path)
    claims: dict[str, dict[str, float]] = defaultdict(dict)  # path -> name -> how much of the name is the path's
    for name, path in known.items():
        claims[path][name] = np.inf
    folders: dict[tuple[str, ...], tuple[str, ...]] = {}
    for name in (name for name in names if name not in known):
        parts = [part for part in _parts(name) if part != ".."]
        elsewhere = name.startswith("/") or bool(PureWindowsPath(name).drive)
        paths = files[_key(parts[-1])] or (files[_key(re.sub(r"^[0-9a-f]{8}-", "", parts[-1]))] if elsewhere else [])
        best = sorted(((_common(path.parts, parts), path) for path in paths), key=lambda pair: -pair[0])
        if not best or (len(best) > 1 and best[0][0] == best[1][0]):
            continue
        n, path = best[0]
        if n < min(len(parts), len(path.parts)):
            here = path.parts[: len(path.parts) - n]
            if not elsewhere or folders.setdefault(tuple(parts[: len(parts) - n]), here) != here:
                continue
        claims[path.as_posix()][name] = n
    for path, lengths in claims.items():
        longest = [name for name, n in lengths.items() if n == max(lengths.values())]
        if max(lengths.values()) == np.inf or len({tuple(map(_key, _parts(name))) for name in longest}) == 1:
            known |= dict.fromkeys(longest, path)


def _common(path: Sequence[str], name: Sequence[str]) -> int:
    "Return how many parts at the end are equal; at least 1."
    pairs = zip(path[::-1], name[::-1], strict=False)
    return max(1, next((k for k, (a, b) in enumerate(pairs) if _key(a) != _key(b)), min(len(path), len(name))))


def _image_files(root: Path) -> Iterator[PurePosixPath]:
    count = 0
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        below = PurePosixPath(Path(folder).relative_to(root).as_posix())
        for file in files:
            if os.path.splitext(file)[1].lower() in IMAGES:
                yield below / file
        if (count := count + len(files)) > MAX_FILES:
            return


# --- pixels of the images as stored


def to_stored_pixels(table: LabelTable, folder: Path, rows: Sequence[int]) -> np.ndarray:
    """Turn the coordinates of a source into pixels of the images as stored; return whether each row was turned by EXIF.

    The picture is taken as shown if the tool shows it so, unless the size that the source says is that of the stored one.
    """
    table.points -= 0 if table.fractions else np.float32(table.origin)
    turned, others = np.zeros(len(table.files), bool), []
    if not table.fractions and not table.upright and (table.sizes is None or not table.sizes.any()):
        return turned
    opened: dict[str, tuple[tuple[int, int], Turn]] = {}
    for row in rows:
        name = table.files[row]
        if name not in opened:
            opened[name] = (0, 0), None
            with suppress(UserError), open_undecoded(folder / name) as image:  # `check_images` tells what is wrong
                opened[name] = image.size, exif_turn(image)
        (width, height), turn = opened[name]
        if not width:
            continue
        said = tuple(table.sizes[row]) if table.sizes is not None else (0, 0)
        shown = (height, width) if turn in SIDEWAYS else (width, height)
        turns = turn is not None and (table.upright or said == shown)
        if turn in SIDEWAYS and width != height and said in ((width, height), (height, width)):
            turns = said == shown
        if all(said) and said not in ((width, height), shown):
            others.append(row)
        if table.fractions:
            table.points[row] = table.points[row] * (shown if turns else (width, height)) - table.origin
            if table.boxes is not None:
                table.boxes[row] *= (shown if turns else (width, height)) * 2
        if turns:
            _turn_back(table, row, turn, (width, height))
            turned[row] = True
    if n := turned.sum():
        print(
            f"note: {n} rows are of pictures with EXIF rotation: their points were turned back to the pixels as stored"
        )
    if others:
        row, n = others[0], len(others)
        said = " x ".join(f"{v:g}" for v in table.sizes[row]) if table.sizes is not None else ""
        size = " x ".join(map(str, opened[table.files[row]][0]))
        print(
            f"note: {n} rows are of images of another size than labelled, as {table.files[row]}: {size}, {said} in the labels"
        )
    return turned


def _turn_back(table: LabelTable, row: int, turn: Turn, size: tuple[int, int]) -> None:
    "Turn a row's points and box from the picture as shown to the image as stored."
    table.points[row] = stored_points(table.points[row], turn, size, 1)
    if table.boxes is not None:
        corners = stored_points(table.boxes[row].reshape(2, 2), turn, size, 0)
        table.boxes[row] = [*corners.min(0), *corners.max(0)]


def stored_points(points: np.ndarray, turn: Turn, size: tuple[int, int], pixel: int) -> np.ndarray:
    "Map (n, 2) of a picture as shown to the image of this size as stored; `pixel` is 1 for pixels, 0 for edges."
    x, y = points[:, ::-1].T if turn in SIDEWAYS else points.T
    flips = Image.Transpose
    if turn in (flips.FLIP_LEFT_RIGHT, flips.ROTATE_180, flips.ROTATE_90, flips.TRANSVERSE):
        x = size[0] - pixel - x
    if turn in (flips.FLIP_TOP_BOTTOM, flips.ROTATE_180, flips.ROTATE_270, flips.TRANSVERSE):
        y = size[1] - pixel - y
    return np.stack([x, y], 1)


def labels_of(table: LabelTable, rows: np.ndarray, source: Path) -> Labels:
    "Return the labels of some rows of a table."

    def of(values):
        return None if values is None else values[rows] if isinstance(values, np.ndarray) else [values[k] for k in rows]

    faults = {k: table.faults[row] for k, row in enumerate(rows.tolist()) if row in table.faults}
    labels = Labels(source, of(table.files), rows, np.ascontiguousarray(table.points[rows]), faults)  # pyright: ignore
    labels.point_names, labels.places, labels.boxes = table.names, of(table.places), of(table.boxes)
    labels.groups, labels.valid = of(table.groups), of(table.valid)
    labels.flip_indices, labels.skeleton = table.flip_indices, table.skeleton
    check_values(labels)
    return labels


def read_frame(frame: "pd.DataFrame") -> Labels:
    "Return the labels of a DataFrame: by the names of its columns, else a column of file names, then x0, y0, x1, y1, …"
    columns = [str(column) for column in frame.columns]
    header = csv_tables.parse_header(columns, "the DataFrame")
    if not header.names or header.positional or header.file < 0 or not len(frame):
        return frame_labels(frame)
    texts = frame.astype(object).where(frame.notna(), "").astype(str)
    table = csv_tables.table_of(header, [texts], "row {}", 0, Path("DataFrame"))
    labels = labels_of(table, np.arange(len(table.files)), Path("DataFrame"))
    labels.own_paths = True
    return labels
