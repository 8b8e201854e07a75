"Readers of JSON: COCO keypoints, Label Studio, labelme, VIA 2."

import csv
import json
from collections.abc import Iterable, Sequence
from itertools import count
from pathlib import Path, PureWindowsPath
from typing import Any
from urllib.parse import unquote, urlsplit

from landmarks_fastai.data.formats.table import (
    EDGE,
    Box,
    LabelTable,
    Rows,
    group_points,
    read_json,
    read_text,
    rotated_box,
)
from landmarks_fastai.data.formats.xml_files import label_studio_order
from landmarks_fastai.errors import UserError

OBJECT = {"object", "object_id", "group", "group_id", "id", "instance"}  # VIA: attributes that hardly name points


def read_coco(rows: Rows, files: Sequence[Path]) -> LabelTable:
    """COCO keypoints, counted from the pixel's centre. Of Roboflow's two files that in the folder `valid` has the validation rows.

    Visibility 0 is missing. A category without names (MMPose's converters write those) numbers its points.
    """
    rows.kind = "COCO keypoints"
    for path in files:
        split = path.parent.relative_to(rows.root).as_posix()
        prefix = "" if split == "." else f"{split}/"
        content = read_json(path)
        images = {image["id"]: image for image in content["images"]}
        categories = {c["id"]: c for c in content.get("categories") or ()}
        for annotation in content["annotations"]:
            rows.place = f"{prefix}annotation {annotation.get('id')}"
            keypoints, image = annotation.get("keypoints"), images.get(annotation["image_id"])
            if annotation.get("iscrowd"):
                rows.left_out["crowds"] += 1
            elif image is None:
                rows.left_out["annotations of an image that is not listed"] += 1
            elif not keypoints or not any(keypoints[2::3]):
                rows.left_out["annotations without a keypoint"] += 1
            else:
                lists = {k: v for k, v in annotation.items() if k.endswith("_kpts") and isinstance(v, list)}
                # COCO-WholeBody's
                rows.left_out.update(f"lists of {key}" for key, values in lists.items() if any(values[2::3]))
                about = categories.get(annotation.get("category_id"), {})
                _add_coco(rows, annotation, prefix + image["file_name"], image, about, split == "valid")
    return rows.table()


def _add_coco(rows: Rows, annotation: dict, file: str, image: dict, about: dict, valid: bool) -> None:
    keypoints, name = annotation["keypoints"], str(about.get("name", annotation.get("category_id", "")))
    names, fault = [str(n) for n in about.get("keypoints") or ()], ""
    if len(keypoints) % 3:
        fault = f"{len(keypoints)} numbers of keypoints found, x, y, visibility a point expected"
    points: Any = [(x, y) if v else (float("nan"),) * 2 for x, y, v in zip(*[iter(keypoints)] * 3, strict=False)]
    if names and len(set(names)) == len(names):
        if len(names) != len(points):
            fault = fault or f"{len(points)} keypoints found, {len(names)} as in its category expected"
        points = {n: xy for n, xy, v in zip(names, points, keypoints[2::3], strict=False) if v}
        rows.names[name] = names
    bones = about.get("skeleton") or ()
    first = 0 if any(0 in bone for bone in bones) else 1  # COCO counts from 1; some writers do not
    rows.skeletons[name] = [(a - first, b - first) for a, b in bones]
    box = annotation.get("bbox")
    if box:
        x, y, width, height = box
        box = x, y, x + width, y + height
    size = image.get("width") or 0, image.get("height") or 0
    rows.add(file, points, box or None, "", valid, name, size, fault)


def read_label_studio(rows: Rows, files: Sequence[Path]) -> LabelTable:
    """Label Studio's export, JSON and JSON-MIN: percent of the picture as it is shown, counted from the pixel's edge.

    Points belong to the region of their parentID, else to the rectangle around them. Of several annotations of a picture
    the one that is the ground truth is read, else the latest; JSON-MIN has a record an annotation.
    """
    rows.kind, rows.origin, rows.upright = "Label Studio", EDGE, True
    tasks: dict[Any, dict] = {}
    for number, task in enumerate(records := read_json(files[0])):
        key = ("task", task["id"]) if {"id", "annotation_id"} <= task.keys() else number
        if key not in tasks or _date(task) >= _date(tasks[key]):
            tasks[key] = task
    rows.left_out["further annotations of a picture"] = len(records) - len(tasks)
    for task in tasks.values():
        rows.place = f"task {task.get('id')}"
        results = _label_studio_results(rows, task)
        points, boxes, size, pictures = [], {}, (0, 0), set()
        for number, result in enumerate(results):
            value = result.get("value")
            labels = isinstance(value, dict) and (value.get("keypointlabels") or value.get("labels"))
            if not isinstance(value, dict) or "x" not in value or "points" in value:
                continue
            if "height" in value and (labels or "rectanglelabels" in value or result.get("type") == "rectangle"):
                size = result["original_width"], result["original_height"]
                boxes[result.get("id", number)] = _percent_box(value, *size)
            elif labels and "height" not in value and "radiusX" not in value:
                size = result["original_width"], result["original_height"]
                x, y = value["x"] * size[0] / 100, value["y"] * size[1] / 100
                points.append((str(labels[0]), x, y, result.get("parentID") or None))
                pictures |= {str(result["to_name"])} if result.get("to_name") else set()
        if len(pictures) > 1:
            rows.left_out["tasks with points in several pictures"] += 1
            continue
        if not points:
            rows.left_out["tasks without a point"] += bool(results)
        for named, box, fault in group_points(points, boxes):
            rows.add(_task_image(task), named, box, size=size, fault=fault)
    return rows.table([*label_studio_order(files[0].parent), *rows.sorted_names()])


def _label_studio_results(rows: Rows, task: dict) -> list[dict]:
    "Return the results of a task's annotation, or of a line of JSON-MIN."
    annotations = task.get("annotations", task.get("completions"))
    if annotations is None:
        lists = [value for value in task.values() if isinstance(value, list)]
        return [{**item, "value": item} for values in lists for item in values if isinstance(item, dict)]
    kept = [a for a in annotations if not (a.get("was_cancelled") or a.get("skipped"))]
    rows.left_out["cancelled annotations"] += len(annotations) - len(kept)
    rows.left_out["further annotations of a picture"] += max(0, len(kept) - 1)
    if not kept:
        rows.left_out["tasks without annotations"] += not annotations
        return []
    return max(kept, key=lambda a: (bool(a.get("ground_truth")), _date(a)))["result"]


def _date(annotation: dict) -> str:
    return str(annotation.get("updated_at") or annotation.get("created_at") or "")


def _percent_box(value: dict, width: float, height: float) -> Box:
    x, w = (value[k] * width / 100 for k in ("x", "width"))
    y, h = (value[k] * height / 100 for k in ("y", "height"))
    return rotated_box(x, y, w, h, value.get("rotation") or 0, (x, y))


def _task_image(task: dict) -> str:
    """Return the name of a task's image. Its path is one of the server: it begins with `/`, as that of another machine.

    Local files are `/data/local-files/?d=PATH`, uploads `/data/upload/1/NAME`, others a URL.
    """
    values = task["data"] if isinstance(task.get("data"), dict) else task
    texts = [text for text in values.values() if isinstance(text, str)]
    images = [text for text in texts if Path(urlsplit(text).query or urlsplit(text).path).suffix[1:].isalnum()]
    url = values.get("image") or (images or [task.get("file_upload")])[0]
    parts = urlsplit(str(url or ""))
    path = parts.query.removeprefix("d=") if parts.query.startswith("d=") else parts.path
    return unquote(path) if not (parts.scheme or path != parts.path) else "/" + unquote(path).lstrip("/")


def read_labelme(rows: Rows, files: Sequence[Path]) -> LabelTable:
    "labelme: a JSON a picture, counted from the pixel's edge; shapes of one group_id are an object."
    rows.kind, rows.origin, rows.upright, root = "labelme", EDGE, True, rows.root
    for path in files:
        rows.place = path.relative_to(root).as_posix()
        content = read_json(path)
        points, boxes = [], {}
        for shape in content["shapes"]:
            corners, key = shape["points"], shape.get("group_id")
            if shape.get("shape_type", "point" if len(corners) == 1 else "") == "point":
                points.append((str(shape["label"]), *corners[0], key))
            elif shape.get("shape_type") == "rectangle":
                x, y = zip(*corners, strict=True)
                boxes[("box", len(boxes)) if key is None else key] = min(x), min(y), max(x), max(y)
            else:
                rows.left_out["shapes that are not points"] += 1
        if not points:
            rows.left_out["pictures without a point"] += 1
        name = PureWindowsPath(content["imagePath"]).as_posix()
        below = path.parent.relative_to(root).as_posix()
        size = content.get("imageWidth") or 0, content.get("imageHeight") or 0
        for named, box, fault in group_points(points, boxes):
            rows.add(name if below == "." else f"{below}/{name}", named, box, size=size, fault=fault)
    listed = root / "labels.txt"  # labelme's --labels
    return rows.table(read_text(listed).splitlines() if listed.is_file() else ())


def read_via(rows: Rows, files: Sequence[Path]) -> LabelTable:
    """VIA 2, JSON (a project, or its annotations alone) and CSV: point regions, counted from the pixel's edge.

    The region attribute with the most values names the points. If a name stands twice in a picture, the attribute
    that tells the two apart is the object.
    """
    rows.kind, rows.origin, rows.upright = "VIA", EDGE, True
    entries, options = _via_entries(files[0])
    pictures = [(file, [r for r in regions if r["shape_attributes"].get("name")]) for file, regions in entries]
    shapes = [region for _, regions in pictures for region in regions]
    points = [r for r in shapes if r["shape_attributes"]["name"] == "point"]
    rows.left_out["regions that are not points or boxes"] = sum(
        r["shape_attributes"]["name"] not in ("point", "rect") for r in shapes
    )
    values = {key: {_via_value(r, key) for r in points} for key in {k for r in points for k in r["region_attributes"]}}
    name_key = max(sorted(values), key=lambda key: (len(values[key]), key.lower() not in OBJECT), default="")
    name_key = name_key if len(values.get(name_key, ())) > 1 else ""  # one value of all points is not their name
    object_key = _via_object(pictures, sorted(values.keys() - {name_key}), name_key)
    for file, regions in pictures:
        rows.place, named, boxes = f"picture {file}", [], {}
        numbers = count()
        for region in regions:
            shape, key = region["shape_attributes"], _via_value(region, object_key) or None
            if shape["name"] == "point":
                name = _via_value(region, name_key) or str(next(numbers))
                named.append((name, shape["cx"], shape["cy"], key))
            elif shape["name"] == "rect":
                x, y, width, height = (shape[k] for k in ("x", "y", "width", "height"))
                boxes[key or ("box", len(boxes))] = x, y, x + width, y + height
        rows.left_out["pictures without a point"] += not named
        for by_name, box, fault in group_points(named, boxes):
            numbered = list(by_name.values()) if not name_key else by_name
            rows.add(file, numbered, box, fault=fault)
    return rows.table(list(options.get(name_key) or ()))


def _via_entries(path: Path) -> tuple[list[tuple[str, list[dict]]], dict[str, Any]]:
    "Return file name and regions of each picture, and the options of each region attribute."
    if path.suffix.lower() == ".csv":
        entries: dict[str, list[dict]] = {}
        for line in csv.DictReader(read_text(path).splitlines()):
            file = line.get("filename") or line["#filename"]
            shape, attributes = (json.loads(line[f"region_{k}attributes"] or "{}") for k in ("shape_", ""))
            entries.setdefault(file, []).append({"shape_attributes": shape, "region_attributes": attributes})
        return list(entries.items()), {}
    content = read_json(path)
    about = (content.get("_via_attributes") or {}).get("region") or {}
    options = {key: attribute.get("options") for key, attribute in about.items()}
    metadata = content.get("_via_img_metadata", content)
    pictures = [(e["filename"], e["regions"]) for e in metadata.values() if isinstance(e, dict) and "regions" in e]
    return [(file, list(r.values() if isinstance(r, dict) else r)) for file, r in pictures], options


def _via_value(region: dict, key: str) -> str:
    "Return the value of a region attribute; of check boxes the first that is set."
    value = region["region_attributes"].get(key, "")
    return next((str(k) for k, on in value.items() if on), "") if isinstance(value, dict) else str(value)


def _via_object(pictures: list[tuple[str, list[dict]]], keys: Iterable[str], name_key: str) -> str:
    "Return the attribute that tells objects apart; empty if none is needed, or none does."
    points = [(file, r) for file, regions in pictures for r in regions if r["shape_attributes"]["name"] == "point"]

    def repeated(key: str) -> bool:
        return len({(file, _via_value(r, name_key), _via_value(r, key)) for file, r in points}) < len(points)

    return next((key for key in keys if not repeated(key)), "") if name_key and repeated("") else ""


def kind_of_json(path: Path) -> str:
    "Return which tool's JSON this is. Raises `UserError` for another."
    content = read_json(path)
    if isinstance(content, list) and content and all(isinstance(task, dict) for task in content):
        return "Label Studio"
    if isinstance(content, dict):
        if "annotations" in content and "images" in content:
            return "COCO"
        if "shapes" in content and "imagePath" in content:
            return "labelme"
        if "_via_img_metadata" in content or any(isinstance(e, dict) and "regions" in e for e in content.values()):
            return "VIA"
        if {"project", "metadata", "view"} <= content.keys():
            raise UserError(f"{path} is of VIA 3: export it from VIA 2, or as COCO")
    raise UserError(
        f"{path} is not JSON of COCO keypoints, Label Studio, labelme or VIA 2: docs/labels.md lists the formats"
    )
