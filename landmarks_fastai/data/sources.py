"Which reader a source of labels is for: a file or a folder, as its tool wrote it."

import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from landmarks_fastai.data.formats import csv_tables, json_files, text_files, xml_files
from landmarks_fastai.data.formats.table import DAMAGE, LabelTable, Rows, counted, read_json
from landmarks_fastai.data.image_search import find_images
from landmarks_fastai.data.labels import Labels, frame_labels, open_labels
from landmarks_fastai.data.landmarks_csv import find_point_faults
from landmarks_fastai.data.stored_pixels import to_stored_pixels
from landmarks_fastai.errors import UserError
from landmarks_fastai.utils.files import check_folder

if TYPE_CHECKING:
    import pandas as pd

COCO = "_annotations.coco.json"  # Roboflow's name, in a folder a split
HINT = "-d must be labels, or the folder that holds train/ and test/"
TRIED = 20  # rows of a landmarks.csv: if the image of one is there, its names are those of the images
OTHER = {
    **dict.fromkeys((".zip", ".tar", ".gz"), "is an archive: unpack it and name the folder"),
    **dict.fromkeys((".xlsx", ".xls"), "is a workbook: export the sheet as CSV"),
    **dict.fromkeys((".pth", ".onnx", ".safetensors"), f"is a network: -pm NAME; {HINT}"),
    **dict.fromkeys(text_files.IMAGES, f"is a picture: {HINT}"),
    ".h5": "is not read: DeepLabCut writes the same labels as CSV: name the project's folder",
    ".slp": "is not read, convert it: sio convert labels.slp -o labels.json --to coco",
    ".mat": "is not read: save the labels as a CSV: docs/labels.md lists the formats",
}
TABLES = (".json", ".xml", ".csv", ".tsv")


def read_source(source: Path, category: str = "", image_folder: Path | None = None) -> tuple[Labels, Path]:
    """Read the labels of a file or folder, and find their images. Prints what the source was taken for.

    Returns the labels and the folder that their file names are relative to. Raises `UserError`.
    """
    if source.is_dir() and (csv := source / "train" / "landmarks.csv").is_file():
        folder = image_folder or csv.parent / "images"
        if is_positional(csv):
            return _with_found_images(open_labels(csv), folder), folder
        table, roots, source = csv_tables.read_plain(csv), [folder], csv
    else:
        root = source if source.is_dir() else source.parent
        above = [root, *root.resolve().parents[:2]] if source.is_file() else [root, root.resolve().parent]
        roots = [image_folder] if image_folder else above
        table, source = _read_table(source, category)
    folder, table.files, missing = find_images(table.files, roots, source)
    keep = np.flatnonzero([not name or table.kind == "CSV" for name in missing])
    table.left_out["rows whose image was not found, as " + next(filter(None, missing), "")] = len(missing) - len(keep)
    turned = to_stored_pixels(table, folder, keep.tolist())
    labels = labels_of(table, keep, source)
    labels.turned = turned
    images = len(set(labels.names))
    what = f"{table.kind}: {len(labels)} rows, {images} images, {labels.n_points} points"
    print(what + (f"; left out: {said}" if (said := counted(table.left_out)) else ""), flush=True)
    return labels, folder


def _with_found_images(labels: Labels, folder: Path) -> Labels:
    "Return the labels with the names that their images have, which are searched if none of the first rows' is there."
    first = [labels.name(row) for row in range(min(TRIED, len(labels)))]
    if not folder.is_dir() or any(os.path.isfile(os.path.join(folder, name)) for name in first):
        return labels
    _, found, _ = find_images(names := labels.all_names(), [folder], labels.csv)
    # without checksums they are not opened again from the cache file, which has the names of the CSV
    return labels if found == names else replace(labels, names=found, checksums=None)


def is_labels(path: Path) -> bool:
    "Return whether a path is a source of labels, and not a text file of file names."
    if path.is_dir() or path.suffix.lower() in (*OTHER, ".json", ".xml", ".yaml", ".yml", ".pts"):
        return path.exists()
    with suppress(UserError):
        return text_files.is_wflw(line := csv_tables.first_line(path)) or len(csv_tables.split_header(line)[0]) > 2
    return False


def join_valid(labels: Labels, folder: Path, valid: Path, category: str = "") -> tuple[Labels, Path]:
    """Return the labels and their folder with the rows of `valid`, another source, which validate.

    Images that both have validate with the rows of the first. Raises `UserError` if the points are not the same.
    """
    try:
        other, other_folder = read_source(valid, category)
        other = other.in_order(labels.point_names, labels.n_points, str(labels.csv))
    except UserError as e:
        raise UserError(f"--valid {valid}: {str(e).replace('; -d must', '; it must')}") from None
    parts, folders = (labels, other), [os.path.abspath(folder), os.path.abspath(other_folder)]
    root = Path(os.path.commonpath(folders))
    paths = [
        [os.path.relpath(os.path.join(at, name), root) for name in part.all_names()]
        for part, at in zip(parts, folders, strict=True)
    ]
    first = set(paths[0])
    keep = [slice(None), np.array([path not in first for path in paths[1]], bool)]

    def joined(values: Callable[[Labels], Any], missing: Any) -> Any:
        "An array of each row's value, or None where neither source has it."
        if all(values(part) is None for part in parts):
            return None
        return np.concatenate([
            (np.full((len(part), *np.shape(missing)), missing) if values(part) is None else np.asarray(values(part)))[k]
            for part, k in zip(parts, keep, strict=True)
        ])  # fmt: skip

    result = Labels(
        labels.csv,
        joined(lambda part: paths[part is other], "").tolist(),
        joined(lambda part: part.lines, 0),
        np.concatenate([labels.stored, other.stored[keep[1]]]),
    )
    n, rows = len(labels), np.flatnonzero(keep[1])
    result.places = [labels.where(k) for k in range(n)] + [
        f"with --valid {other.csv}, {other.where(k)}" for k in rows.tolist()
    ]
    result.faults = labels.faults | {
        n + k: other.faults[row] for k, row in enumerate(rows.tolist()) if row in other.faults
    }
    result.boxes = joined(lambda part: part.boxes, np.full(4, np.nan, np.float32))
    result.groups = joined(lambda part: part.groups, "")
    result.turned = joined(lambda part: part.turned, False)
    named = set(paths[1])
    result.valid = np.array([path in named for path in result.names], bool)
    result.point_names = labels.point_names or other.point_names
    result.flip_indices, result.skeleton, result.category = labels.flip_indices, labels.skeleton, labels.category
    return result, root


def is_positional(csv: Path) -> bool:
    "Return whether a landmarks.csv is to be read by the position of its columns: TAB-separated, or with no names of x and y."
    with suppress(UserError, OSError), open(csv, "rb") as f:
        if b"\r" in f.readline().rstrip(b"\r\n") or b'"' in f.readline():
            return False
        columns, separator = csv_tables.split_header(line := csv_tables.first_line(csv))
        header = csv_tables.parse_header(columns, str(csv))
        return not header.names or (separator == "\t" and header.positional and not line.endswith("\t"))
    return True


def _read_table(source: Path, category: str) -> tuple[LabelTable, Path]:
    "Return the table of a file or folder, and the source: of a folder with one file of labels, that file."
    rows = Rows(source, "labels", 0)
    try:
        return (_read_folder if source.is_dir() else _read_file)(source, rows, category), rows.source
    except DAMAGE as e:
        what = f"{type(e).__name__}: {str(e)[:80]}"
        raise UserError(
            f"{rows.source}{rows.place and ' ' + rows.place}: damaged, or not as {rows.kind} has it ({what})"
        ) from None
    finally:
        read_json.cache_clear()  # of a large file, gigabytes


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
        raise UserError(f"{path}: no such folder or file; {HINT}")
    if suffix in OTHER:
        raise UserError(f"{path} {OTHER[suffix]}")
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
    check_folder(folder, HINT)
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
    below = () if others else sorted(folder.rglob("*.json"))
    if files := [p for p in below if (kinds[p] if p in kinds else _kind_or_none(p)) == "labelme"]:
        return json_files.read_labelme(rows, files, folder)
    missing = f"{folder / 'train' / 'landmarks.csv'} not found; -d must be the folder that holds train/ and test/"
    unread = [p for p in folder.iterdir() if p.suffix.lower() in (*TABLES, ".xlsx", ".xls")]
    if len(files := others or unread) == 1:
        rows.source = files[0]
        try:
            return _read_file(files[0], rows, category)
        except UserError as e:
            sides = not others and any((folder / side).is_dir() for side in ("train", "test"))
            raise UserError(f"{e}; {missing}" if sides else str(e)) from None
    several = (
        f": {', '.join(p.name for p in others[:9])}: name one of them" if others else ", nor labels of another tool"
    )
    raise UserError(f"{missing}{several}; docs/labels.md lists the formats")


def _kind_or_none(path: Path) -> str | None:
    "Return the kind of a file that may be of labels; None for others."
    with suppress(UserError):
        if path.suffix.lower() in TABLES:
            kind = kind_of(path)
            if path.suffix.lower() in (".json", ".xml"):
                return kind
            columns, _ = csv_tables.split_header(csv_tables.first_line(path))
            return kind if kind != "CSV" or csv_tables.parse_header(columns, "").names else None
    return None


def labels_of(table: LabelTable, rows: np.ndarray, source: Path) -> Labels:
    "Return the labels of some rows of a table."

    def of(values: Any) -> Any:
        return (
            None
            if values is None
            else values[rows]
            if isinstance(values, np.ndarray)
            else [values[k] for k in rows.tolist()]
        )

    faults = {k: table.faults[row] for k, row in enumerate(rows.tolist()) if row in table.faults}
    labels = Labels(source, of(table.files), rows, np.ascontiguousarray(table.points[rows]), faults)  # pyright: ignore
    labels.point_names, labels.places, labels.boxes = table.names, of(table.places), of(table.boxes)
    labels.groups, labels.valid = of(table.groups), of(table.valid)
    labels.flip_indices, labels.skeleton, labels.category = table.flip_indices, table.skeleton, table.category
    labels.faults = find_point_faults(labels.stored) | labels.faults
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
