"Readers of XML: CVAT, dlib, Label Studio's configuration. Entities are refused, and one picture at a time is in memory."

import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from xml.etree.ElementTree import Element, TreeBuilder
from xml.parsers import expat

from landmarks_fastai.data.formats.table import EDGE, LabelTable, Rows, box_around, group_points, rotated_box
from landmarks_fastai.errors import UserError

CHUNK = 1 << 20
BONES = r'<line [^>]*data-node-from="(\d+)"[^>]*data-node-to="(\d+)"'  # of a skeleton, counted from 1


def iterate_xml(path: Path, *tags: str) -> Iterator[Element]:
    "Yield the elements of these tags, and at the end the root. Raises `UserError` for damage and for declared entities."

    def refuse(*_):
        raise UserError(f"{path} declares XML entities: they are not expanded, remove them")

    builder, parser, ready, depth = TreeBuilder(), expat.ParserCreate(), [], 0

    def start(tag: str, attributes: dict[str, str]) -> None:
        nonlocal depth
        depth += 1
        if depth > 100:
            raise UserError(f"{path} line {parser.CurrentLineNumber}: elements are nested more than 100 deep")
        builder.start(tag, attributes)

    def end(tag: str) -> None:
        nonlocal depth
        depth -= 1
        element = builder.end(tag)
        if tag in tags or not depth:
            ready.append(element)

    parser.StartElementHandler, parser.EndElementHandler = start, end
    parser.CharacterDataHandler, parser.EntityDeclHandler = builder.data, refuse
    try:
        with open(path, "rb") as f:
            while ready or (chunk := f.read(CHUNK)):
                if not ready:
                    parser.Parse(chunk)
                for element in ready:
                    yield element
                    element.clear()
                ready.clear()
            parser.Parse(b"", True)
    except OSError as e:
        raise UserError(f"{path} cannot be read: {e.strerror}") from None
    except (expat.ExpatError, LookupError, ValueError) as e:
        raise UserError(f"{path} is damaged, or not XML ({str(e)[:100]})") from None


def kind_of_xml(path: Path) -> str:
    "Return which tool's XML this is. Raises `UserError` for another."
    seen = {element.tag for element in islice(iterate_xml(path, "image", "track", "labels", "box"), 50)}
    if seen & {"track", "labels", "annotations"}:
        return "CVAT"
    if seen & {"image", "box"}:
        return "CVAT" if any(e.get("name") for e in iterate_xml(path, "image") if e.tag == "image") else "dlib"
    raise UserError(f"{path} is not XML of CVAT for images or dlib's imglab: docs/labels.md lists the formats")


def label_studio_order(folder: Path) -> list[str]:
    "Return the labels of a Label Studio configuration in a folder, by model_index; empty if there is none."
    for path in sorted(folder.glob("*.xml")):
        with suppress(UserError, ValueError):
            for element in iterate_xml(path, "KeyPointLabels", "Labels"):
                labels = [
                    (int(e.get("model_index", k)), e.get("value", "")) for k, e in enumerate(element.iter("Label"))
                ]
                if labels:
                    return [name for _, name in sorted(labels)]
    return []


def read_cvat(rows: Rows, files: Sequence[Path]) -> LabelTable:
    """CVAT for images 1.1: skeletons, or points; counted from the pixel's edge of the picture as it is shown.

    Points of their own belong together by group_id, or by the box around them. A shape of several points is an object.
    """
    rows.kind, rows.origin, rows.upright, order = "CVAT for images", EDGE, True, []
    for element in iterate_xml(files[0], "label", "image", "track"):
        if element.tag == "track":
            raise UserError(f"{files[0]} is CVAT for video: export the task as 'CVAT for images 1.1'")
        if element.tag == "label":
            name, parent = element.findtext("name", ""), element.findtext("parent", "")
            order.append(name)
            if parent:
                rows.names[parent] = [*rows.names.get(parent, ()), name]
            edges = re.findall(BONES, element.findtext("svg", ""))
            rows.skeletons[name] = [(int(a) - 1, int(b) - 1) for a, b in edges]
        if element.tag == "image":
            _add_cvat(rows, element)
    return rows.table(order)


def _add_cvat(rows: Rows, image: Element) -> None:
    subset, name = image.get("subset", ""), image.attrib["name"]
    rows.place = f"image {name}"
    known = {"size": (image.get("width", 0), image.get("height", 0)), "group": image.get("task_id", "")}
    known["valid"] = subset.lower() in ("val", "valid", "validation")
    boxes, points = {}, []
    for number, box in enumerate(image.iter("box")):
        left, top, right, bottom = (float(box.attrib[k]) for k in ("xtl", "ytl", "xbr", "ybr"))
        middle = (left + right) / 2, (top + bottom) / 2
        turned = rotated_box(left, top, right - left, bottom - top, float(box.get("rotation", 0)), middle)
        boxes[box.get("group_id") or ("box", number)] = turned
    skeletons = image.findall("skeleton")
    for skeleton in skeletons:
        named = {}
        for point in skeleton.findall("points"):
            if point.get("outside") == "1":
                rows.left_out["points marked as outside"] += 1
            else:
                named[point.attrib["label"]] = [float(v) for v in point.attrib["points"].split(",")]
        box = boxes.get(skeleton.get("group_id")) or box_around(named.values(), boxes.values())
        rows.add(name, named, box, category=skeleton.attrib["label"], **known)
    for shape in image.findall("points"):
        pairs = [[float(v) for v in pair.split(",")] for pair in shape.attrib["points"].split(";")]
        if len(pairs) == 1:
            points.append((shape.attrib["label"], *pairs[0], shape.get("group_id")))
        else:
            rows.add(name, pairs, boxes.get(shape.get("group_id")), category=shape.attrib["label"], **known)
    for named, box, fault in group_points(points, boxes):
        rows.add(name, named, box, fault=fault, **known)
    rows.left_out["images without a point"] += not (skeletons or image.findall("points"))


def read_dlib(rows: Rows, files: Sequence[Path]) -> LabelTable:
    "dlib's imglab: boxes with parts, counted from the pixel's centre. A box covers whole pixels, its edges are theirs."
    rows.kind = "dlib imglab"
    for image in iterate_xml(files[0], "image"):
        if image.tag != "image":
            continue
        rows.place = f"image {image.attrib['file']}"
        size = image.get("width", 0), image.get("height", 0)
        for box in image.findall("box"):
            named = {part.attrib["name"]: (part.attrib["x"], part.attrib["y"]) for part in box.findall("part")}
            if box.get("ignore") == "1":
                rows.left_out["boxes to ignore"] += 1
                continue
            left, top, width, height = (float(box.attrib[k]) for k in ("left", "top", "width", "height"))
            edges = left, top, left + width, top + height
            rows.add(image.attrib["file"], named, edges, category=box.findtext("label", ""), size=size)
        rows.left_out["images without a box"] += image.find("box") is None
    return rows.table(rows.sorted_names())
