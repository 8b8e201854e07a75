"The face detector: its decoding on outputs made by hand, and drawn faces in larger pictures."

import sys

import numpy as np
import pytest
from PIL import Image

from landmarks_fastai.errors import UserError
from landmarks_fastai.inference.detector import SIDE, STRIDES, FaceDetector, decode, keep_best, overlaps
from landmarks_fastai.synthetic.faces import render_face


@pytest.fixture(scope="module")
def detector():
    pytest.importorskip("onnxruntime")
    return FaceDetector()


def scene(size, places, scale=1.0):
    "A picture with a drawn face at each place (left, top), and the boxes of their points (faces, 4) in pixel edges."
    picture, boxes = Image.new("RGB", size, (90, 120, 150)), []
    for k, place in enumerate(places):
        face, points = render_face(np.random.default_rng(k), 68)
        points = (points + 0.5) * scale + place  # pixel edges
        boxes.append([*points.min(0), *points.max(0)])
        picture.paste(face.resize([round(side * scale) for side in face.size]), place)
    return picture, np.array(boxes)


def outputs(**cells):
    "Outputs of the network that find nothing, but for `stride_8={cell: (class, object, x, y, log width, log height)}`."
    made = []
    for column in (slice(0, 1), slice(1, 2), slice(2, 6)):
        for stride in STRIDES:
            array = np.zeros((1, (SIDE // stride) ** 2, 6), np.float32)
            for cell, values in cells.get(f"stride_{stride}", {}).items():
                array[0, cell] = values
            made.append(array[..., column])
    return made[:3], made[3:6], made[6:]


def test_a_cell_says_where_its_box_is():
    across = SIDE // 16
    found = outputs(
        stride_16={2 * across + 3: (0.81, 1.0, 0.5, 0.25, np.log(4), np.log(2))},
        stride_32={0: (0.5, 0.5, 0, 0, 0, 0)},
    )
    boxes, scores = decode(*found, 0.6)
    # the centre is 3.5 and 2.25 cells of 16 px from the corner, the sides are 4 and 2 cells
    assert boxes.tolist() == [pytest.approx([56 - 32, 36 - 16, 56 + 32, 36 + 16])] and scores == pytest.approx([0.9])
    assert len(decode(*found, 0.4)[0]) == 2
    assert decode(*outputs(), 0.4)[0].shape == (0, 4)


def test_of_boxes_that_overlap_the_best_is_kept():
    boxes = np.array([[0, 0, 10, 10], [1, 0, 11, 10], [0, 8, 10, 18], [50, 50, 60, 60]], float)
    assert keep_best(boxes, np.array([0.7, 0.9, 0.8, 0.65])) == [1, 2, 3]
    assert overlaps(boxes[:1], boxes)[0] == pytest.approx([1, 90 / 110, 20 / 180, 0])


@pytest.mark.parametrize("scale", [1.0, 5.0])  # 1200 x 900 px and 6000 x 4500
def test_drawn_faces_are_found_at_their_places(detector, scale):
    places = [(60, 40), (700, 80), (120, 560), (860, 600)]
    picture, boxes = scene(
        [round(side * scale) for side in (1200, 900)], [tuple(round(v * scale) for v in p) for p in places], scale
    )
    found = detector(picture)
    assert len(found) == 4 and [d.score for d in found] == sorted((d.score for d in found), reverse=True)
    overlap = overlaps(boxes, np.array([d.box for d in found]))
    assert sorted(overlap.argmax(1)) == [0, 1, 2, 3] and (overlap.max(1) > 0.6).all()
    assert detector(picture, least_score=0.99) == []


@pytest.mark.parametrize("size", [(1, 1), (20_000, 3), (3, 20_000), (640, 640)])
def test_pictures_without_a_face_have_none(detector, size):
    assert detector(Image.new("RGB", size, (128, 128, 128))) == []


def test_without_onnxruntime_it_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match="pip install onnxruntime"):
        FaceDetector()
