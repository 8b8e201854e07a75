"Which reader a source of labels is for: a file or a folder, as its tool wrote it."

import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from landmarks_fastai.data.formats import csv_tables, json_files, text_files, xml_files
from landmarks_fastai.data.formats.table import DAMAGE, LabelTable, Rows, counted, read_json
from landmarks_fastai.data.image_search import find_images
from landmarks_fastai.data.labels import Labels, concatenate, frame_labels, open_labels
from landmarks_fastai.data.landmarks_csv import find_point_faults
from landmarks_fastai.data.stored_pixels import to_stored_pixels
from landmarks_fastai.errors import UserError
from landmarks_fastai.utils.files import check_folder

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
        if (names := names_by_position(csv)) is not None:
            return _with_found_images(replace(open_labels(csv), point_names=names), folder), folder
        table, roots = csv_tables.read_plain(csv), [folder]
    else:
        root = source if source.is_dir() else source.parent
        above = [root, *root.resolve().parents[:2]] if source.is_file() else [root, root.resolve().parent]
        roots = [image_folder] if image_folder else above
        table = _read_table(source, category)
    labels = table.labels
    folder, labels.names, missing = find_images(labels.all_names(), roots, labels.csv)
    keep = np.flatnonzero([not name or table.kind == "CSV" for name in missing])
    table.left_out["rows whose image was not found, as " + next(filter(None, missing), "")] = len(missing) - len(keep)
    to_stored_pixels(table, folder, keep.tolist())
    labels = labels.at(keep)
    labels.faults = find_point_faults(labels.stored) | labels.faults
    images = len(set(labels.names))
    what = f"{table.kind}: {len(labels)} rows, {images} images, {labels.n_points} points"
    print(what + (f"; left out: {said}" if (said := counted(table.left_out)) else ""), flush=True)
    return labels, folder


def _with_found_images(labels: Labels, folder: Path) -> Labels:
    "Return the labels with the names that their images have, which are searched if none of the first rows' is there."
    first = [labels.name(row) for row in range(min(TRIED, len(labels)))]
    if not folder.is_dir() or any(os.path.isfile(os.path.join(folder, name)) for name in first):
        return labels
    _, paths, _ = find_images(names := labels.all_names(), [folder], labels.csv)
    # without checksums they are not opened again from the cache file, which has the names of the CSV
    return labels if paths == names else replace(labels, names=paths, checksums=None)


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
        other = other.in_order(labels.point_names, labels.n_points, f"a network of {labels.csv}")
    except UserError as e:
        raise UserError(f"--valid {valid}: {str(e).replace('; -d must', '; it must')}") from None
    root = Path(os.path.commonpath([os.path.abspath(folder), os.path.abspath(other_folder)]))
    first = _renamed(labels, folder, root)
    second = _renamed(other, other_folder, root, f"with --valid {other.csv}, ")
    named, seen = set(second.names), set(first.names)
    new = np.flatnonzero([name not in seen for name in second.names])
    result = concatenate([first, second.at(new)])
    result.valid = np.array([name in named for name in result.names], bool)
    result.point_names = labels.point_names or other.point_names
    return result, root


def _renamed(labels: Labels, folder: Path, root: Path, source: str = "") -> Labels:
    "Return labels whose file names are relative to `root`, and whose places begin with `source`."
    names = [os.path.relpath(os.path.join(os.path.abspath(folder), name), root) for name in labels.all_names()]
    return replace(labels, names=names, places=[source + labels.where(row) for row in range(len(labels))])


def names_by_position(csv: Path) -> tuple[str, ...] | None:
    """Return the names of the points of a landmarks.csv that is to be read by the position of its columns; None of another.

    By position: TAB-separated, or with no names of x and y.
    """
    with suppress(UserError, OSError), open(csv, "rb") as f:
        if b"\r" in f.readline().rstrip(b"\r\n") or b'"' in f.readline():
            return None
        columns, separator = csv_tables.split_header(line := csv_tables.first_line(csv))
        header = csv_tables.parse_header(columns, str(csv))
        if header.names and (separator != "\t" or not header.positional or line.endswith("\t")):
            return None
        return header.point_names
    return ()


def _read_table(source: Path, category: str) -> LabelTable:
    "Return the table of a file or folder; of a folder with one file of labels, of that file."
    rows = Rows(source, category)
    try:
        return (_read_folder if source.is_dir() else _read_file)(source, rows)
    except DAMAGE as e:
        what = f"{type(e).__name__}: {str(e)[:80]}"
        raise UserError(
            f"{rows.source}{rows.place and ' ' + rows.place}: damaged, or not as {rows.kind} has it ({what})"
        ) from None
    finally:
        read_json.cache_clear()  # of a large file, gigabytes


READERS: dict[str, Callable[[Rows, Sequence[Path]], LabelTable]] = {
    "COCO": json_files.read_coco,
    "Label Studio": json_files.read_label_studio,
    "labelme": json_files.read_labelme,
    "VIA": json_files.read_via,
    "CVAT": xml_files.read_cvat,
    "dlib": xml_files.read_dlib,
    "YOLO": text_files.read_yolo,
    "pts": text_files.read_pts,
    "WFLW": text_files.read_wflw,
    "DeepLabCut": csv_tables.read_deeplabcut,
    "CSV": lambda rows, files: csv_tables.read_plain(files[0]),
}


def _read_file(path: Path, rows: Rows) -> LabelTable:
    return READERS[kind_of(path)](rows, [path])


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


def _read_folder(folder: Path, rows: Rows) -> LabelTable:
    check_folder(folder, HINT)
    yolo = [p for p in sorted(folder.glob("*.y*ml")) if "kpt_shape" in text_files.read_yaml(p)]
    if len(yolo) == 1:
        return text_files.read_yolo(rows, yolo)
    if files := list(csv_tables.deeplabcut_files(folder)):
        return csv_tables.read_deeplabcut(rows, files)
    if files := [file for side in ("train", "valid") if (file := folder / side / COCO).is_file()]:
        return json_files.read_coco(rows, files)
    if files := sorted(folder.rglob("*.pts")):
        return text_files.read_pts(rows, files)
    if files := sorted(folder.rglob("list_98pt_*.txt")):
        return text_files.read_wflw(rows, [p for p in files if "rect_attr" in p.name] or files)
    kinds = {p: kind for p in [*folder.iterdir(), *folder.glob("annotations/*.json")] if (kind := _kind_or_none(p))}
    others = sorted(p for p, kind in kinds.items() if kind != "labelme")
    below = () if others else sorted(folder.rglob("*.json"))
    if files := [p for p in below if (kinds.get(p) or _kind_or_none(p)) == "labelme"]:
        return json_files.read_labelme(rows, files)
    missing = f"{folder / 'train' / 'landmarks.csv'} not found; -d must be the folder that holds train/ and test/"
    unread = [p for p in folder.iterdir() if p.suffix.lower() in (*TABLES, ".xlsx", ".xls")]
    if len(files := others or unread) == 1:
        rows.source = files[0]
        try:
            return _read_file(files[0], rows)
        except UserError as e:
            sides = not others and any((folder / side).is_dir() for side in ("train", "test"))
            raise UserError(f"{e}; {missing}" if sides else str(e)) from None
    listed = f": {', '.join(p.name for p in others[:9])}: name one of them"
    raise UserError(
        f"{missing}{listed if others else ', nor labels of another tool'}; docs/labels.md lists the formats"
    )


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


def read_frame(frame: pd.DataFrame) -> Labels:
    "Return the labels of a DataFrame: by the names of its columns, else a column of file names, then x0, y0, x1, y1, …"
    columns = [str(column) for column in frame.columns]
    header = csv_tables.parse_header(columns, "the DataFrame")
    if not header.names or header.positional or header.file < 0 or not len(frame):
        return replace(frame_labels(frame), point_names=header.point_names if header.positional else ())
    texts = frame.astype(object).where(frame.notna(), "").astype(str).to_numpy().tolist()
    labels = csv_tables.table_of(header, texts, "row {}", 0, Path("DataFrame")).labels
    return replace(labels, faults=find_point_faults(labels.stored) | labels.faults, absolute=True)
