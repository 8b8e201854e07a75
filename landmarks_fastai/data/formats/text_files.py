"Readers of text files: YOLO-pose, 300-W's .pts, WFLW."

import os
import re
from collections.abc import Iterator, Sequence
from itertools import compress
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import yaml

from landmarks_fastai.data.formats.table import EDGE, ONE, LabelTable, Rows, checked, read_text
from landmarks_fastai.errors import UserError
from landmarks_fastai.settings import check_flip_indices

IMAGES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".pgm", ".ppm", ".mpo", ".jp2"}


def read_yaml(path: Path) -> dict[Any, Any]:
    "Parse a YAML file of plain values. Raises `UserError` with the place of a fault."
    try:
        content = yaml.safe_load(read_text(path))
    except (yaml.YAMLError, ValueError, RecursionError) as e:
        mark = getattr(e, "problem_mark", None)
        raise UserError(f"{path}{f' line {mark.line + 1}' if mark else ''} is damaged, or not YAML") from None
    return content if isinstance(content, dict) else {}


def read_yolo(rows: Rows, files: Sequence[Path]) -> LabelTable:
    """YOLO-pose: `data.yaml`, and a text file an image with a line an object: class, box, points, as fractions.

    They are counted from the edge of the picture as it is shown: ultralytics opens pictures with their EXIF rotation.
    The files of its `val` are the validation rows. Without a visibility column (0, 0) is missing.
    """
    rows.kind, rows.origin, rows.upright = "YOLO-pose", EDGE, True
    (path,), root, seen = files, rows.root, set[Path]()
    about = read_yaml(path)
    if "kpt_shape" not in about:
        raise UserError(f"{path} has no kpt_shape: it is of boxes, not of points")
    n_points, n_values = about["kpt_shape"]
    if type(n_points) is not int or n_points < 1 or n_values not in (2, 3):
        raise UserError(f"{path}: kpt_shape is {about['kpt_shape']}, [number of points, 2 or 3] expected")
    names = about.get("names") or {}
    classes = {str(k): str(v) for k, v in (names.items() if isinstance(names, dict) else enumerate(names))}
    points = about.get("kpt_names") or {}
    points = points if isinstance(points, dict) else {0: points}
    for key, listed in points.items():
        if isinstance(listed, list) and len({str(n) for n in listed}) == n_points:
            rows.names[classes.get(str(key), str(key))] = [str(n) for n in listed]
    for split in ("train", "val"):
        for image in _yolo_images(path, about, split):
            file = image.relative_to(root).as_posix()
            if image not in seen:  # val may be train
                _add_yolo(rows, root, file, split == "val", classes, n_points, n_values)
            seen.add(image)
    table = rows.table()
    table.fractions, table.labels.flip_indices = True, tuple(about.get("flip_idx") or ())
    try:
        check_flip_indices(table.labels.flip_indices, n_points)
    except UserError:
        raise UserError(f"{path}: flip_idx is not a permutation of {n_points} points that is its own inverse") from None
    return table


def _yolo_images(path: Path, about: dict, split: str) -> Iterator[Path]:
    "Yield the images of a split: of folders, or of text files that list images. They must be below data.yaml's folder."
    root, places = path.parent, about.get(split) or ()
    bases = [root / str(about["path"]), root] if about.get("path") else [root]
    for place in [places] if isinstance(places, str) else places:
        # Roboflow writes ../train/images for train/images; an absolute path may be of another machine
        parts = PureWindowsPath(place).parts
        tries = [base / place for base in bases] + [root.joinpath(*parts[k:]) for k in range(1, len(parts))]
        tries = [Path(os.path.normpath(p)) for p in tries if Path(os.path.normpath(p)).is_relative_to(root)]
        source = next((p for p in tries if p.exists()), None)
        if source is None:
            raise UserError(
                f"{path}: {split}: {place} not found in its folder: put data.yaml into the folder of the data"
            )
        if source.is_dir():
            yield from (p for p in sorted(source.rglob("*")) if p.suffix.lower() in IMAGES)
        else:
            names = [line.strip() for line in read_text(source).splitlines() if line.strip()]
            images = [Path(os.path.normpath(source.parent / name)) for name in names]
            images = [p if p.is_relative_to(root) else root.joinpath(*p.parts[1:]) for p in images]
            yield from (p for p in images if p.is_relative_to(root))


def _add_yolo(rows: Rows, root: Path, file: str, valid: bool, classes: dict, n_points: int, n_values: int) -> None:
    parts = list(PurePosixPath(file).with_suffix(".txt").parts)
    if "images" in parts[:-1]:  # ultralytics replaces the last one
        parts[len(parts) - 2 - parts[:-1][::-1].index("images")] = "labels"
    labels = root.joinpath(*parts)
    if not os.path.isfile(labels):
        rows.left_out["images without labels"] += 1
        return
    for number, line in enumerate(read_text(labels).splitlines(), 1):
        fields, rows.place = line.split(), f"{'/'.join(parts)} line {number}"
        if not fields:
            continue
        category = classes.get(fields[0], fields[0])
        if len(fields) != 5 + n_points * n_values:
            expected = f"{5 + n_points * n_values} as kpt_shape says expected"
            rows.add(file, {}, valid=valid, category=category, fault=f"{len(fields)} numbers found, {expected}")
            continue
        x, y, width, height = (float(v) for v in fields[1:5])
        box = x - width / 2, y - height / 2, x + width / 2, y + height / 2
        points = [fields[k : k + n_values] for k in range(5, len(fields), n_values)]
        labelled = list(map(_is_labelled, points))
        if category in rows.names or not any(labelled):
            points = dict(compress(zip(rows.names.get(category, ()), points, strict=False), labelled))
        else:
            points = [p if on else ("nan", "nan") for p, on in zip(points, labelled, strict=True)]
        rows.add(file, points, box, valid=valid, category=category)


def _is_labelled(point: list[str]) -> bool:
    "Return whether a point is labelled. Ultralytics takes negative ones of two columns for missing, too."
    x, y, visible = (*(float(v) for v in point), 1.0)[:3]
    return visible > 0 if len(point) == 3 else not (x < 0 or y < 0 or x == y == 0)


def read_pts(rows: Rows, files: Sequence[Path]) -> LabelTable:
    "300-W: a .pts file an object, beside the picture of the same name; the top-left pixel's centre is (1, 1)."
    rows.kind, rows.origin, root = "300-W .pts", ONE, rows.root
    pictures: dict[Path, dict[str, list[str]]] = {}
    for path in files:
        rows.place = path.relative_to(root).as_posix()
        if path.parent not in pictures:
            beside = pictures.setdefault(path.parent, {})
            for p in sorted(path.parent.iterdir()):
                if p.suffix.lower() in IMAGES:
                    beside.setdefault(p.stem, []).append(p.relative_to(root).as_posix())
        stems = pictures[path.parent]
        # photo_0.pts and photo_1.pts are two objects of photo.jpg, but beside photo.pts their pictures are missing
        several = path.with_stem(re.sub(r"(?<=.)_\d+$", "", path.stem))
        names = stems.get(path.stem) or (not several.exists() and stems.get(several.stem)) or [rows.place[:-4] + ".jpg"]
        head, _, body = read_text(path).partition("{")
        points = [line.split()[:2] for line in body.partition("}")[0].splitlines() if line.strip()]
        said = re.search(r"n_points:\s*(\d+)", head)
        fault = f"n_points is {said and said[1]}, {len(points)} lines of x y found"
        if said and int(said[1]) == len(points):
            fault = ""
        if any(len(point) != 2 for point in points):
            points, fault = [], "a line is not x y"
        if len(names) > 1:
            fault = f"there are several pictures of this name: {', '.join(names)}"
        rows.add(names[0], points, fault=fault)
    return rows.table()


def is_wflw(line: str) -> bool:
    "Return whether a line is one of WFLW's lists: 98 points, with or without 4 numbers of the box and 6 attributes, a name."
    fields = line.split(None, 196)  # a table of 98 points and more has as many, but the name first
    rest = fields[-1].strip() if len(fields) == 197 else ""
    named = rest.count("\t") <= 10 and re.search(r"\.[a-z]\w*$", rest, re.I)
    return bool(named) and not any(checked(field)[1] for field in fields[:196])


def read_wflw(rows: Rows, files: Sequence[Path]) -> LabelTable:
    "WFLW: a line a face, counted from the pixel's centre. The list of the test images has the validation rows."
    rows.kind = "WFLW"
    for path in files:
        for number, line in enumerate(read_text(path).splitlines(), 1):
            rows.locate(path, number)
            if line.strip():
                fields = line.split(None, 206)
                fields = fields if len(fields) == 207 else line.split(None, 196)
                fault = "" if len(fields) in (197, 207) else f"{len(fields)} fields found, 207 expected"
                points = [fields[k : k + 2] for k in range(0, 196, 2)] if not fault else []
                box = fields[196:200] if len(fields) == 207 else None
                rows.add(fields[-1].strip(), points, box, valid="test" in path.stem, fault=fault)
    return rows.table()
