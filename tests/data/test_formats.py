"""Labels as other tools write them: what comes out of each format, to the letter of its documents.

A case is the files that a tool writes, the source that a user passes, and the rows: file, points, box. Points are those
that are labelled, by name or by number, in pixels of the image as stored.
"""

import json
import time

import numpy as np
import pytest
from PIL import Image

from landmarks_fastai.data.labels import Labels
from landmarks_fastai.data.sources import read_source
from landmarks_fastai.data.stored_pixels import stored_points
from landmarks_fastai.errors import UserError

SIZE = 64, 48
A, B = {"nose": (10.25, 20.5), "tail": (30.0, 5.75)}, {"tail": (50.5, 40.0)}


def write_files(folder, files, images=("a.png",), size=SIZE, exif=None):
    for name in images:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        image, about = Image.new("RGB", size), Image.Exif()
        about[0x0112] = exif or 1
        image.save(folder / name, exif=about)
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        text = content if isinstance(content, (str, bytes)) else json.dumps(content)
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


def rows_of(labels: Labels):
    names = labels.point_names or range(labels.n_points)
    rows = []
    for row in range(len(labels)):
        points = zip(names, labels.points(row).round(3).tolist(), strict=True)
        rows.append((labels.name(row), {name: tuple(p) for name, p in points if not np.isnan(p).any()}))
    return rows


def edge(points, by=0.5):
    return {name: (x + by, y + by) for name, (x, y) in points.items()}


def keypoint(name, x, y, **more):
    value = {"x": 100 * x / SIZE[0], "y": 100 * y / SIZE[1], "width": 0.3, "keypointlabels": [name]}
    return {"type": "keypointlabels", "original_width": SIZE[0], "original_height": SIZE[1], "value": value} | more


def rectangle(left, top, right, bottom, **more):
    value = {
        "x": 100 * left / 64,
        "y": 100 * top / 48,
        "width": 100 * (right - left) / 64,
        "height": 100 * (bottom - top) / 48,
    }
    value |= {"rectanglelabels": ["dog"], "rotation": 0}
    return {"type": "rectanglelabels", "original_width": 64, "original_height": 48, "value": value} | more


def annotation(points, names=("nose", "tail"), visible=2, **more):
    keypoints = [v for name in names for v in ((*points[name], visible) if name in points else (0, 0, 0))]
    return {"id": 7, "image_id": 1, "category_id": 1, "iscrowd": 0, "keypoints": keypoints} | more


def coco(*annotations, file="a.png", keypoints=("nose", "tail"), **more):
    category = {"id": 1, "name": "dog", "keypoints": list(keypoints), "skeleton": [[1, 2]]}
    return {"images": [{"id": 1, "file_name": file}], "categories": [category], "annotations": list(annotations)} | more


def cvat(*shapes, labels="", image='name="a.png" width="64" height="48"'):
    return f'<annotations><meta><task><labels>{labels}</labels></task></meta><image id="0" {image}>{"".join(shapes)}</image></annotations>'


def cvat_points(points, **more):
    attributes = "".join(f' {k}="{v}"' for k, v in more.items())
    return "".join(f'<points label="{n}" points="{x},{y}"{attributes}></points>' for n, (x, y) in edge(points).items())


def labelme(*shapes, path="a.png"):
    return {"version": "5.5", "shapes": list(shapes), "imagePath": path, "imageHeight": 48, "imageWidth": 64}


def shapes(points, group=None):
    return [
        {"label": n, "points": [p], "group_id": group, "shape_type": "point"} for n, p in edge(points).items()
    ]  # fmt: skip


def via(points, **more):
    shape = [{"name": "point", "cx": x, "cy": y} for x, y in edge(points).values()]
    return [
        {"shape_attributes": s, "region_attributes": {"part": n} | more} for s, n in zip(shape, points, strict=True)
    ]


SUBLABELS = "".join(f"<label><name>{n}</name><parent>dog</parent></label>" for n in ("nose", "tail"))
BOTH = [("a.png", A), ("a.png", B)]
NUMBERED = [("a.png", {0: (10.25, 20.5), 1: (30.0, 5.75)})]
WFLW = " ".join(str(v) for v in range(196))
DLC = "scorer,me,me,me,me\nbodyparts,nose,nose,tail,tail\ncoords,x,y,x,y\n"
CASES = {
    "COCO": ("c.json", {"c.json": coco(annotation(A), annotation(B, bbox=[1, 2, 3, 4]))}, BOTH),
    "COCO, hidden points are labelled": ("c.json", {"c.json": coco(annotation(A, visible=1))}, BOTH[:1]),
    "COCO, MMPose's without names": (
        "c.json", {"c.json": coco(annotation(A), categories=[{"id": 1, "name": "person"}])}, NUMBERED,
    ),
    "COCO, coordinates of a point that is not labelled": (
        "c.json", {"c.json": coco(annotation(A | {}, keypoints=[3, 3, 0, 50.5, 40, 2]))}, BOTH[1:],
    ),
    "COCO, Roboflow's first category": (
        "c.json", {"c.json": coco(annotation(A, category_id=5), annotation({}), categories=[
            {"id": 0, "name": "dogs"}, {"id": 5, "name": "dog", "keypoints": ["nose", "tail"]}])}, BOTH[:1],
    ),
    "YOLO": (
        ".", {"data.yaml": "train: ../images\nval: images\nkpt_shape: [2, 3]\nnames: [dog]\nkpt_names: {0: [nose, tail]}",
              "labels/a.txt": f"0 .5 .5 .5 .5 {10.75 / 64} {21 / 48} 2 {30.5 / 64} {6.25 / 48} 1\n\n"
                              f"0 .5 .5 .5 .5 0 0 0 {51 / 64} {40.5 / 48} 2\n"},
        [(f"images/{name}", points) for name, points in BOTH],
    ),
    "YOLO, two columns": (
        "d.yaml", {"d.yaml": "path: /home/me/dogs\ntrain: [list.txt]\nval: []\nkpt_shape: [2, 2]\nnames: {0: dog}",
                   "list.txt": "./images/a.png\n", "labels/a.txt": f"0 .5 .5 .5 .5 0 0 {51 / 64} {40.5 / 48}\n"},
        [("images/a.png", {1: (50.5, 40.0)})],
    ),
    "DeepLabCut": (".", {"labeled-data/v1/CollectedData_me.csv": DLC + "labeled-data\\v1\\a.png,10.25,20.5,30,5.75\n"
                         "labeled-data/v1/b.png,,,NaN,NaN\n"}, [("labeled-data/v1/a.png", A)]),
    "DeepLabCut, paths in three columns": (
        "d.csv", {"d.csv": "scorer,Unnamed: 1_level_0,,me,me,me,me\nbodyparts,,,nose,nose,tail,tail\ncoords,,,x,y,x,y\n"
                           "labeled-data,v1,a.png,10.25,20.5,30,5.75\n"}, [("labeled-data/v1/a.png", A)],
    ),
    "lightning-pose, without out-of-distribution frames": (".", {
        "CollectedData.csv": DLC + "labeled-data/v1/a.png,10.25,20.5,30,5.75\n", "CollectedData_new.csv": DLC + "a.png,1,2,3,4\n",
    }, [("labeled-data/v1/a.png", A)]),
    "DeepLabCut, several animals": (
        "d.csv", {"d.csv": "scorer,me,me,me,me,me,me\nindividuals,one,one,two,two,single,single\n"
                           "bodyparts,tail,tail,tail,tail,corner,corner\ncoords,x,y,x,y,x,y\n"
                           "labeled-data/v1/a.png,30,5.75,50.5,40,1,1\n"},
        [("labeled-data/v1/a.png", {"tail": A["tail"]}), ("labeled-data/v1/a.png", B)],
    ),
    ".pts": (".", {"a.pts": "version: 1\nn_points:  2\n{\n11.25 21.5\r\n31 6.75\n}\n"}, NUMBERED),
    ".pts, two objects": (".", {f"a_{k}.pts": "version: 1\nn_points: 1\n{\n2 3\n}" for k in (0, 1)}, [("a.png", {0: (1, 2)})] * 2),
    "Label Studio": (
        "s.json", {"s.json": [{"id": 1, "data": {"image": "/data/upload/1/1a2b3c4d-a.png"}, "annotations": [
            {"was_cancelled": True, "result": [keypoint("nose", 1, 1)]},
            {"created_at": "2026-01-02", "result": [
                rectangle(5, 5, 40, 30, id="r"), rectangle(45, 30, 60, 47, id="s"),
                *(keypoint(n, *p, parentID="r") for n, p in edge(A).items()), keypoint("tail", 51, 40.5)]},
            {"created_at": "2026-01-01", "result": [keypoint("nose", 1, 1)]}]}]}, BOTH,
    ),
    "Label Studio, JSON-MIN and local files": (
        "s.json", {"s.json": [{"image": "/data/local-files/?d=dogs%2Fa.png", "id": 1, "box": [], "kp": [
            keypoint(n, *p)["value"] | {"original_width": 64, "original_height": 48} for n, p in edge(A).items()]}]}, BOTH[:1],
    ),
    "Label Studio, JSON-MIN of two annotators": (
        "s.json", {"s.json": [{"image": "a.png", "id": 1, "annotation_id": k, "updated_at": f"2026-01-0{k}", "kp": [
            keypoint(n, *p)["value"] | {"original_width": 64, "original_height": 48} for n, p in edge(points).items()]}
            for k, points in ((3, A), (2, B))]}, BOTH[:1],
    ),
    "Label Studio, a task of two pictures": (
        "s.json", {"s.json": [{"id": k, "data": {"image": "a.png", "other": "b.png"}, "annotations": [{"result": [
            keypoint(n, *p, to_name=f"picture {k * n}") for n, p in edge(A).items()]}]}
            for k in (0, 1)]}, BOTH[:1],
    ),
    "CVAT, skeletons": (
        "annotations.xml", {"annotations.xml": cvat(
            f'<skeleton label="dog">{cvat_points(A, outside=0)}</skeleton>',
            f'<skeleton label="dog">{cvat_points(B, occluded=1)}<points label="nose" outside="1" points="1,1"/></skeleton>',
            labels=SUBLABELS)}, BOTH,
    ),
    "CVAT, points of a group": (
        "c.xml", {"c.xml": cvat(cvat_points(A, group_id=1), cvat_points(B, group_id=2))}, BOTH,
    ),
    "CVAT, points in boxes": (
        "c.xml", {"c.xml": cvat('<box label="dog" xtl="5" ytl="5" xbr="40" ybr="30"/><box label="dog" xtl="45" ytl="30" '
                                'xbr="60" ybr="47"/>', cvat_points(A), cvat_points(B))}, BOTH,
    ),
    "CVAT, one shape": ("c.xml", {"c.xml": cvat('<points label="dog" points="10.75,21;30.5,6.25"/>')}, NUMBERED),
    "CVAT, a project's subset": (
        "c.xml", {"c.xml": cvat(cvat_points(A), image='name="a.png" subset="Validation" width="64" height="48"')}, BOTH[:1],
    ),
    "labelme": (".", {"a.json": labelme(*shapes(A, 1), *shapes(B, 2), {"label": "x", "points": [[0, 0], [1, 1]],
                                        "group_id": 1, "shape_type": "line"}, path="..\\x\\a.png")}, BOTH),
    "dlib": (
        "d.xml", {"d.xml": "<?xml version='1.0' encoding='ISO-8859-1'?><?xml-stylesheet type='text/xsl' href='a.xsl'?><dataset>"
                           "<name>é</name><images><image file='a.png'><box top='2' left='1' width='9' height='8' ignore='1'/>"
                           "<box top='2' left='1' width='9' height='8'><part name='nose' x='10.25' y='20.5'/>"
                           "<part name='tail' x='30' y='5.75'/></box></image></images></dataset>".encode("latin-1")}, BOTH[:1],
    ),
    "WFLW": ("w.txt", {"w.txt": f"{WFLW} 1 2 3 4 0 0 0 0 0 0 a.png\n{WFLW} a.png\n"},
             [("a.png", {k: (2.0 * k, 2.0 * k + 1) for k in range(98)})] * 2),
    "VIA": (
        "v.json", {"v.json": {"_via_img_metadata": {"a.png1": {"filename": "a.png", "regions": [
            *via(A, object="1"), *via(B, object="2")]}}, "_via_attributes": {"region": {"part": {}}}}}, BOTH,
    ),
    "VIA, annotations alone, regions by number": (
        "v.json", {"v.json": {"a.png1": {"filename": "a.png", "regions": dict(enumerate(via(A)))}}}, BOTH[:1],
    ),
    "VIA, CSV": (
        "v.csv", {"v.csv": "filename,file_size,region_shape_attributes,region_attributes\n" + "".join(
            'a.png,1,"{}","{}"\n'.format(*(json.dumps(r[k]).replace('"', '""') for k in ("shape_attributes", "region_attributes")))
            for r in via(A))}, BOTH[:1],
    ),
    "CSV": ("p.csv", {"p.csv": "file_name,nose_x,nose_y,tail_x,tail_y\na.png,10.25,20.5,30,5.75\na.png,,,50.5,40\n"}, BOTH),
    "CSV, TABs, one at the end, old Macs' line ends": (
        "p.csv", {"p.csv": "\ufefffile\tnose.x\tnose.y\ttail.x\ttail.y\t\ra.png\t10.25\t20.5\t30\t5.75\t\r"}, BOTH[:1],
    ),
    "CSV, visible, group, box, pandas' index, names that are quoted": (
        "p.csv", {"p.csv": ',image,left,top,right,bottom,noseX,noseY,nose_v,tailX,tailY,tail_v,group\n'
                           '0,"""images\\a.png""",1,2,3,4,5,5,0,50.5,40,2,g\n'}, BOTH[1:],
    ),
    "CSV, visible with decimals": (
        "p.csv", {"p.csv": "file_name,nose_x,nose_y,nose_v,tail_x,tail_y,tail_v\na.png,1,1,0.00,50.5,40,1.00\n"}, BOTH[1:],
    ),
    "CSV, one point and the image's size": (
        "p.csv", {"p.csv": "file_name,x,y,width,height\na.png,50.5,40,64,48\n"}, [("a.png", {"": (50.5, 40.0)})],
    ),
    "CSV, x of all points, then y": (
        "p.csv", {"p.csv": "name;x_nose;x_tail;y_nose;y_tail\na.png;10.25;30;20.5;5.75\n"}, BOTH[:1],
    ),
    "CSV, likelihoods": ("p.csv", {"p.csv": "file_name,x0,y0,likelihood0,x1,y1,likelihood1\na.png,10.25,20.5,1,30,5.75,0\n"}, NUMBERED),
}  # fmt: skip


@pytest.mark.parametrize("kind", CASES)
def test_rows_of_a_format(tmp_path, capsys, kind):
    source, files, expected = CASES[kind]
    images = sorted({name for name, _ in expected})
    labels, folder = read_source(write_files(tmp_path, files, images) / source)
    assert rows_of(labels) == expected and not labels.faults
    assert all((folder / name).is_file() for name in images)
    (said, *_), n = capsys.readouterr().out.splitlines(), len(expected)
    assert f": {n} rows, {len(images)} images, {labels.n_points} points" in said
    assert labels.n_points >= 98 or all(place for place in labels.places) and len(set(labels.places)) >= 1


def test_what_a_source_says_besides_points(tmp_path, capsys):
    "Boxes, groups, validation rows, flip map, skeleton; what no row is made of is counted."
    crowd = annotation(A, iscrowd=1)
    other = coco(annotation(A, bbox=[1, 2, 3, 4]), crowd, annotation({}), annotation(B, image_id=9))
    labels, _ = read_source(write_files(tmp_path / "c", {"c.json": other}) / "c.json")
    assert labels.boxes.tolist() == [[1, 2, 4, 6]] and labels.skeleton == ((0, 1),)
    said = capsys.readouterr().out
    assert "1 crowds, 1 annotations without a keypoint, 1 annotations of an image that is not listed" in said
    yaml = "train: train/images\nval: valid/images\nkpt_shape: [2, 3]\nflip_idx: [1, 0]\nnames: [dog]"
    line = "0 .5 .5 .25 .5 .1 .1 2 .2 .2 2\n"
    files = {"data.yaml": yaml, "train/labels/a.txt": line, "valid/labels/b.txt": line}
    labels, _ = read_source(write_files(tmp_path / "y", files, ["train/images/a.png", "valid/images/b.png"]))
    assert labels.valid.tolist() == [False, True] and labels.flip_indices == (1, 0)
    assert labels.boxes[0].tolist() == [24, 12, 40, 36]
    files = {f"{s}/_annotations.coco.json": coco(annotation(A)) for s in ("train", "valid", "test")}
    labels, _ = read_source(write_files(tmp_path / "r", files, ["train/a.png", "valid/a.png", "test/a.png"]))
    assert rows_of(labels) == [("train/a.png", A), ("valid/a.png", A)] and labels.valid.tolist() == [False, True]
    files = {f"labeled-data/{v}/CollectedData_me.csv": DLC + f"labeled-data/{v}/a.png,1,2,3,4\n" for v in "vw"}
    labels, _ = read_source(write_files(tmp_path / "d", files, ["labeled-data/v/a.png", "labeled-data/w/a.png"]))
    assert labels.groups == ["v", "w"]
    turned = cvat('<box label="dog" xtl="10" ytl="20" xbr="30" ybr="30" rotation="90"/>', cvat_points(A))
    labels, _ = read_source(write_files(tmp_path / "b", {"c.xml": turned}) / "c.xml")
    assert labels.boxes[0].round(3).tolist() == [15, 15, 25, 35]


def test_pts_of_a_missing_picture_is_not_another_object(tmp_path, capsys):
    "Of photo_1.jpg, where photo.jpg has a file of its own."
    pts = "version: 1\nn_points: 1\n{\n2 3\n}"
    labels, _ = read_source(write_files(tmp_path, {"a.pts": pts, "a_1.pts": pts}))
    assert len(labels) == 1 and "1 rows whose image was not found, as a_1.jpg" in capsys.readouterr().out


def test_further_points_of_coco_wholebody_are_counted(tmp_path, capsys):
    content = coco(annotation(A, face_kpts=[1, 2, 2] * 68, lefthand_kpts=[0] * 63))
    read_source(write_files(tmp_path, {"c.json": content}) / "c.json")
    assert "2 points; left out: 1 lists of face_kpts\n" in capsys.readouterr().out


def test_the_configuration_of_label_studio_sorts_the_points(tmp_path):
    kind, content, _ = CASES["Label Studio"]
    listed = '<Label value="nose" model_index="1"/><Label value="tail" model_index="0"/>'
    config = f'<View><KeyPointLabels name="k" toName="i">{listed}</KeyPointLabels></View>'
    for files, names in ((content, ("nose", "tail")), (content | {"config.xml": config}, ("tail", "nose"))):
        assert read_source(write_files(tmp_path, files, ["a.png"]) / kind)[0].point_names == names


def test_several_categories_are_named_and_chosen(tmp_path):
    categories = [{"id": k, "name": n, "keypoints": ["nose", "tail"]} for k, n in ((1, "dog"), (2, "cat"))]
    source = {"c.json": coco(annotation(A), annotation(B, category_id=2), categories=categories)}
    path = write_files(tmp_path, source) / "c.json"
    with pytest.raises(
        UserError, match=r"several categories: dog \(1 rows\), cat \(1 rows\): choose one with --category"
    ):
        read_source(path)
    assert rows_of(read_source(path, "cat")[0]) == BOTH[1:]
    with pytest.raises(UserError, match="--category cow: .* has points of dog"):
        read_source(path, "cow")


# Corner of the stored image that a viewer shows at the top left: (0, 0) of the picture as shown.
CORNERS = {1: (0, 0), 2: (63, 0), 3: (63, 47), 4: (0, 47), 5: (0, 0), 6: (0, 47), 7: (63, 47), 8: (63, 0)}


@pytest.mark.parametrize("value", CORNERS)
def test_points_of_a_picture_as_shown_are_turned_back(tmp_path, value):
    "Pixel by pixel what Pillow's own rotation does, for a tool that shows pictures upright, and for COCO's swapped size."
    from PIL import ImageOps

    numbers = np.arange(64 * 48 * 3, dtype=np.uint32).reshape(48, 64, 3).astype(np.uint8)
    image, about = Image.fromarray(numbers), Image.Exif()
    about[0x0112] = value
    image.save(tmp_path / "a.png", exif=about)
    shown = np.asarray(ImageOps.exif_transpose(Image.open(tmp_path / "a.png")))
    height, width = shown.shape[:2]
    points = {"nose": (3, 5), "tail": (20, 30)}
    shape = labelme(*shapes(points)) | {"imageWidth": width, "imageHeight": height}
    corner = {"label": "dog", "points": [[0, 0], [8, 4]], "shape_type": "rectangle", "group_id": None}
    (tmp_path / "a.json").write_text(json.dumps(shape | {"shapes": [*shape["shapes"], corner]}))
    labels, _ = read_source(tmp_path / "a.json")
    for (x, y), (u, v) in zip(points.values(), labels.points(0).astype(int), strict=True):
        assert (shown[y, x] == numbers[v, u]).all()
    left, top, right, bottom = labels.boxes[0]
    assert (right - left, bottom - top) == ((4, 8) if value > 4 else (8, 4))
    assert (left <= CORNERS[value][0] + 0.5 <= right) and (top <= CORNERS[value][1] + 0.5 <= bottom)
    if value > 4:
        sized = coco(annotation(points), images=[{"id": 1, "file_name": "a.png", "width": 48, "height": 64}])
        (tmp_path / "c.json").write_text(json.dumps(sized))
        assert (read_source(tmp_path / "c.json")[0].points(0) == labels.points(0)).all()
    (tmp_path / "c.json").write_text(json.dumps(coco(annotation(points))))
    assert rows_of(read_source(tmp_path / "c.json")[0]) == [("a.png", points)]
    assert (stored_points(np.zeros((1, 2)), None, SIZE, 1) == 0).all()


LONG = "file_name,landmark,x,y\n" + "".join(f"{a}.png,{k},{k},2\n" for a in "abcd" for k in range(5 - (a == "c")))
BILLION = '<?xml version="1.0"?><!DOCTYPE x [<!ENTITY a "ha"><!ENTITY b "&a;&a;">]><annotations>&b;</annotations>'
DAMAGED = {
    "no JSON": ("c.json", b'{"images": [', "is damaged, or not JSON .*line 1 column"),
    "JSON of something else": ("c.json", b'{"a": 1}', "is not JSON of COCO keypoints, Label Studio"),
    "nested JSON": ("c.json", b"[" * 100_000, "is damaged, or not JSON"),
    "COCO without image": ("c.json", json.dumps(coco({"id": 17})).encode(), "annotation 17: damaged, or not as COCO keypoints"),
    "COCO of a wrong kind": ("c.json", json.dumps(coco(annotation(A, keypoints=3))).encode(), "annotation 7: damaged"),
    "COCO without points": ("c.json", json.dumps(coco()).encode(), "no object with points in it"),
    "entities": ("c.xml", BILLION.encode(), "declares XML entities"),
    "half an XML": ("c.xml", b"<annotations><image name='a'>", "is damaged, or not XML .*line 1, column"),
    "nested XML": ("c.xml", b"<annotations>" + b"<a>" * 200, "nested more than 100 deep"),
    "XML of something else": ("c.xml", b"<annotation/>", "is not XML of CVAT for images or dlib"),
    "CVAT for video": ("c.xml", b"<annotations><track id='0'/></annotations>", "export the task as 'CVAT for images 1.1'"),
    "no YAML": ("d.yaml", b"a: [\n", "d.yaml line 2 is damaged, or not YAML"),
    "YAML that runs": ("d.yaml", b"kpt_shape: !!python/object/apply:os.mkdir [owned]", "is damaged, or not YAML"),
    "YOLO of boxes": ("d.yaml", b"train: images\nnames: [dog]", "has no kpt_shape"),
    "YOLO elsewhere": ("d.yaml", b"train: ../../elsewhere\nkpt_shape: [2, 3]", "elsewhere not found in its folder"),
    "CSV without names of points": ("p.csv", b"file,a,b\na.png,1,2\n", "line 1 names no points"),
    "CSV without rows": ("p.csv", b"file,x,y\n", "no rows"),
    "CSV of a column twice": ("p.csv", b"file,x0,y0,x0\n", "column 'x0' stands twice"),
    "CSV with a box's corner and size": (
        "p.csv", b"file,x,y,w,h,x_re,y_re\n", "columns x, y, w, h are a box, not a point: name its edges left, top",
    ),
    "CSV with a box's corner and size, other names": (
        "p.csv", b"file,bbox_x,bbox_y,bbox_w,bbox_h,nose_x,nose_y\n", "columns bbox_x, bbox_y, bbox_w, bbox_h are a box",
    ),
    "CSV with a box's least x and y, and size": (
        "p.csv", b"file,x_min,y_min,width,height,nose_x,nose_y\n", "columns x_min, y_min, width, height are a box",
    ),
    "CSV of UTF-16": ("p.csv", "file,x,y".encode("utf-16"), "not UTF-8"),
    "CSV with a long line": ("p.csv", b"file,x,y\na.png,1,2\na.png,1,2,3,4,5\n", "cannot be read .*line 3"),
    "CSV with an open quote": ("p.csv", b'file,x,y\n"a\n.png",1,2\n"a.png,1,2\na.png,1,2\n', "line 4 cannot be read"),
    "CSV with a space after a quote": ("p.csv", b'file,x,y\na.png,1,2\n"a.png" ,1,2\n', "line 3 cannot be read"),
    "CSV with a huge field": ("p.csv", b"file,x,y\na.png,1,2\n" + b"a" * 200_000 + b",1,2\n", "line 3 cannot be read"),
    "DeepLabCut without coords": ("d.csv", b"scorer,me,me\nbodyparts,a,a\n", "not as DeepLabCut"),
    "TABs without a header": ("p.csv", b"7f.png" + b"\t7" * 1942 + b"\n", "line 1 names no points"),
    "commas without a header, names last": ("p.csv", b"7," * 1942 + b"7f.png\n", "line 1 names no points"),
    "TABs without a header, names last": ("p.csv", b"7\t" * 1942 + b"7f.png\n", "line 1 names no points"),
    "a line a landmark": ("p.csv", LONG.encode(), "one line per object expected.*one line per landmark .column 'landmark'"),
    "a picture": ("b.png", b"x", "is a picture: -d must be labels"),
    "a network": ("b.pth", b"PK", "is a network: -pm NAME"),
    "a workbook": ("b.xlsx", b"PK", "export the sheet as CSV"),
    "an archive": ("labels.zip", b"PK", "unpack it"),
    "SLEAP's": ("labels.slp", b"x", "sio convert"),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_file_is_one_line_with_the_place(tmp_path, kind):
    name, content, message = DAMAGED[kind]
    write_files(tmp_path, {name: content})
    with pytest.raises(UserError, match=message) as e:
        read_source(tmp_path / name)
    assert "\n" not in str(e.value) and str(tmp_path / name) in str(e.value) and not (tmp_path / "owned").exists()


NUMBERS = {
    "nan": "nan, a number between -32767 and 32767", "inf": "inf, a number between", "1e9": "1e9, a number between",
    "40000": "40000, a number between", "x": "'x', a number expected",
}  # fmt: skip


@pytest.mark.parametrize("number", NUMBERS)
def test_number_that_is_not_a_coordinate_is_told_by_row(tmp_path, number):
    "In a text, in JSON, in XML; the other rows are read."
    pts = "version: 1\nn_points: 2\n{{\n11.25 21.5\n31 {}\n}}\n"
    csv = "file_name,nose_x,nose_y\na.png,1,2\na.png,3,{}\n"
    box = "<box top='1' left='1' width='2' height='2'><part name='nose' x='1' y='{}'/></box>"
    part = f"<dataset><images><image file='a.png'>{box}</image></images></dataset>"
    for name, text in (("a.pts", pts), ("p.csv", csv), ("d.xml", part)):
        write_files(tmp_path, {name: text.format(number)})
        if number == "nan" and name != "d.xml":
            continue  # a missing point, or half of one
        labels, _ = read_source(tmp_path / name)
        (fault,) = labels.faults.values()
        assert f"y is {NUMBERS[number]}" in fault and max(labels.faults) == len(labels) - 1


def test_decimal_commas_are_told(tmp_path):
    labels, _ = read_source(write_files(tmp_path, {"p.csv": "file;x;y\na.png;3;79,25\n"}) / "p.csv")
    assert "'79,25', a number with a decimal point expected" in labels.faults[0]


@pytest.mark.parametrize(
    "texts",
    [["cat", "cat", "dog"], ["cat", "dog", "cow", "cat"], [0, 1, 2, 0, 1, 0, 0, 1], [0.5, 0.25, 0.75, 0.125, 1, 2]],
)
def test_objects_of_one_point_may_have_a_class_or_a_number(tmp_path, texts):
    "`texts` of images with two objects, or with 3, 2, 1 and 2."
    files = "aaabbcdd" if len(texts) == 8 else [f for f in "abcdef" for _ in range(2)]
    rows = "".join(f"{f}.png,{texts[k % len(texts)]},{k},3\n" for k, f in enumerate(files))
    path = write_files(tmp_path, {"p.csv": "file_name,kind,x,y\n" + rows}, [f"{f}.png" for f in "abcdef"]) / "p.csv"
    assert len(read_source(path)[0]) == len(files)


def test_objects_that_cannot_be_told_apart_are_told_by_row(tmp_path):
    path = write_files(tmp_path, {"a.json": labelme(*shapes(A), *shapes(B))}) / "a.json"
    labels, _ = read_source(path)
    assert "point 'tail' is labelled twice in one object" in labels.faults[0]


def test_point_outside_of_its_box_is_told(tmp_path):
    "Among several boxes; to the only one it belongs, and beside boxes without points no point needs one."
    corners = {"dog": [[5, 5], [40, 30]], "cat": [[45, 30], [60, 40]]}
    boxes = [
        {"label": n, "points": p, "group_id": None, "shape_type": "rectangle"} for n, p in corners.items()
    ]  # fmt: skip
    for shown, points, fault in (
        (boxes, A | {"ear": (44, 35)}, "point 'ear' lies in none of 2 boxes: give each object its own group"),
        (boxes[:1], A | {"ear": (44, 35)}, ""),
        (boxes, {"ear": (44, 35), "tail": (1, 1)}, ""),
    ):
        write_files(tmp_path, {"a.json": labelme(*shapes(points), *shown)})
        labels, _ = read_source(tmp_path / "a.json")
        assert fault in "".join(labels.faults.values()) and len(labels) == 1 + bool(labels.faults) == 1 + bool(fault)


def test_large_file_takes_bounded_memory_and_time(tmp_path):
    "A CSV of 20 MB is parsed in blocks."
    header = "file_name," + ",".join(f"p{k}_{a}" for k in range(200) for a in "xy")
    line = "a.png," + ",".join(str(100 + k % 50) for k in range(400))
    write_files(tmp_path, {"p.csv": "\n".join([header, *[line] * 10_000])})
    began = time.monotonic()
    labels, _ = read_source(tmp_path / "p.csv")
    assert len(labels) == 10_000 and time.monotonic() - began < 60


def test_a_size_that_is_not_beside_the_point_is_the_pictures(tmp_path):
    Image.new("RGB", (64, 48)).save(tmp_path / "a.png")
    (tmp_path / "p.csv").write_text("file,width,height,x,y,x2,y2\na.png,64,48,1,2,3,4\n")
    labels, _ = read_source(tmp_path / "p.csv")
    assert labels.stored.tolist() == [[[1, 2], [3, 4]]]
