"Names of points come out of a checkpoint, in the files of predictions; COCO's is read by the program itself."

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from landmarks_fastai.data.items import labelled_images
from landmarks_fastai.data.pictures import Picture
from landmarks_fastai.data.sources import read_source
from landmarks_fastai.errors import UserError
from landmarks_fastai.inference.predictor import PictureResult, Prediction
from landmarks_fastai.inference.writers import open_writer
from landmarks_fastai.settings import DataFacts
from tests.data.test_formats import cvat, write_files

FACTS = DataFacts(n_points=3, point_names=("nose", "left eye", "right, eye"), skeleton=(0, 1, 0, 2), category="dog")
POINTS = np.array([[10.25, 20.5], [30, 41.125], [0, 7]], np.float32)


def written(kind, folder, facts=FACTS):
    result = PictureResult(Picture("a.png"), (60, 50), [Prediction(POINTS, confidence=np.ones(3, np.float32))])
    with open_writer(kind, folder, facts, True) as (write, path):
        write(result)
    return path


def test_columns_have_the_names_of_the_points(tmp_path):
    header, row = written("csv", tmp_path).read_text().splitlines()
    assert header.startswith('file_name,frame,object,nose_x,nose_y,left eye_x,left eye_y,"right, eye_x"')
    assert header.endswith('nose_s,left eye_s,"right, eye_s"') and row.startswith("a.png,,0,10.250,20.500,")
    assert written("csv", tmp_path, DataFacts(n_points=3)).read_text().startswith("file_name,frame,object,x0,y0,x1")


def test_coco_is_read_again(tmp_path):
    Image.new("RGB", (60, 50)).save(tmp_path / "a.png")
    path = written("coco", tmp_path)
    written_file = json.loads(path.read_text())
    (category,), (entry,), (image,) = (written_file[k] for k in ("categories", "annotations", "images"))
    # what CVAT's importer (datumaro/plugins/coco_format/extractor.py) refuses a file without
    assert {"id", "name", "keypoints", "skeleton"} <= set(category) and {"id", "width", "height", "file_name"} <= set(
        image
    )
    assert {"id", "image_id", "category_id", "iscrowd", "keypoints", "segmentation", "bbox"} <= set(entry)
    assert (
        category["name"] == "dog"
        and category["keypoints"] == list(FACTS.point_names)
        and category["skeleton"] == [[1, 2], [1, 3]]
    )
    images = labelled_images(path)
    assert images[0].points == pytest.approx(POINTS) and images[0].path == tmp_path / "a.png"
    assert (
        images.labels.category == "dog"
        and images.labels.point_names == FACTS.point_names
        and list(images.labels.skeleton) == [(0, 1), (0, 2)]
    )


@pytest.mark.parametrize("kind,origin", [("coco", 0), ("cvat", 0.5)])
def test_box_of_the_points_is_in_pixel_edges(tmp_path, kind, origin):
    (entry,) = json.loads(written(kind, tmp_path).read_text())["annotations"]
    assert entry["bbox"] == [0.5, 7.5, 30, 34.125] and entry["keypoints"][:2] == [10.25 + origin, 20.5 + origin]


def test_points_that_cvat_imports_and_exports_come_back(tmp_path):
    "CVAT takes the numbers of COCO keypoints as they are, into a skeleton that counts from the pixel's edge."
    content = json.loads(written("cvat", tmp_path).read_text())
    keypoints = np.reshape(content["annotations"][0]["keypoints"], (-1, 3))
    shapes = "".join(
        f'<points label="{name}" points="{x},{y}"/>'
        for name, (x, y, _) in zip(FACTS.point_names, keypoints, strict=True)
    )
    files = {"annotations.xml": cvat(f'<skeleton label="dog">{shapes}</skeleton>')}
    labels, _ = read_source(write_files(tmp_path, files) / "annotations.xml")
    assert labels.points(0).tolist() == POINTS.tolist() and labels.point_names == FACTS.point_names


@pytest.mark.parametrize(
    "names, written_names",
    [
        (["rest/a.jpg", "rest/b c.jpg"], ["a.jpg", "b c.jpg"]),
        (["/x/rest/a.jpg", "/x/more/y/a.jpg"], ["rest/a.jpg", "more/y/a.jpg"]),
        (["a.jpg", "more/a.jpg"], ["a.jpg", "more/a.jpg"]),
        (["/x/a.jpg", "more/a.jpg"], ["/x/a.jpg", "more/a.jpg"]),
        ([], []),
    ],
)
def test_coco_has_no_folder_that_all_pictures_are_in(tmp_path, names, written_names):
    with open_writer("coco", tmp_path, FACTS, False) as (write, path):
        for name in names:
            write(PictureResult(Picture(Path(name)), (60, 50), [Prediction(POINTS)]))
    assert [image["file_name"] for image in json.loads(path.read_text())["images"]] == written_names


def test_facts_are_checked():
    for wrong in (
        {"point_names": ("a",)},
        {"skeleton": (0,)},
        {"skeleton": (0, 3)},
        {"point_names": (1, 2, 3)},
        {"category": 1},
    ):
        with pytest.raises(UserError):
            FACTS.replace(**wrong)
