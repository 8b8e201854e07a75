"Faces keep their numbers from frame to frame; between two detections their boxes move in straight lines."

from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

from landmarks_fastai.inference.detector import Detection, FaceDetector
from landmarks_fastai.inference.tracking import PATIENCE, track_faces
from landmarks_fastai.synthetic.faces import render_face


class Frame(NamedTuple):
    image: Image.Image


class Script:
    "A detector that finds in the k-th frame what a list says; frames are told apart by their size."

    def __init__(self, frames):
        self.found = [[Detection(tuple(map(float, box)), score) for box, score in boxes] for boxes in frames]
        self.searched = []

    def __call__(self, image):
        self.searched.append(image.width - 1)
        return self.found[image.width - 1]

    def track(self, every):
        frames = [Frame(Image.new("RGB", (k + 1, 1))) for k in range(len(self.found))]
        tracked = list(track_faces(frames, self, every))
        assert [frame for frame, _ in tracked] == frames
        return [{face.track: face.box for face in faces} for _, faces in tracked]


def at(left, top=0.0, side=100.0):
    return (left, top, left + side, top + side)


def test_between_two_detections_boxes_move_in_straight_lines():
    script = Script([[(at(10 * k), 0.9), (at(1000 - 10 * k), 0.8)] for k in range(21)])
    found = script.track(5)
    for k, faces in enumerate(found):
        assert faces == {1: pytest.approx(at(10 * k)), 2: pytest.approx(at(1000 - 10 * k))}
    assert set(script.searched[5:]) == {9, 14, 19, 20}  # all of the first five: the faces begin there


@pytest.mark.parametrize("every", [1, 5])
def test_a_face_that_comes_and_goes_is_found_in_exactly_its_frames(every):
    script = Script([[(at(0), 0.9)] + [(at(500 + k), 0.9)] * (7 <= k < 13) for k in range(23)])
    assert [sorted(faces) for faces in script.track(every)] == [[1, 2] if 7 <= k < 13 else [1] for k in range(23)]


def test_a_number_survives_frames_without_a_detection_but_not_for_ever():
    gone = [[]] * (PATIENCE - 1)
    numbers = [sorted(faces) for faces in Script([[(at(0), 0.9)], *gone, [(at(5), 0.9)]]).track(1)]
    assert numbers == [[1], *gone, [1]]
    numbers = [sorted(faces) for faces in Script([[(at(0), 0.9)], *gone, [], [], [(at(5), 0.9)]]).track(1)]
    assert numbers[-1] == [2]


def test_faces_that_pass_each_other_keep_their_numbers():
    script = Script([[(at(8 * k), 0.9), (at(400 - 8 * k, 60), 0.9)] for k in range(50)])
    for k, faces in enumerate(script.track(1)):
        assert faces == {1: at(8 * k), 2: at(400 - 8 * k, 60)}


def test_a_cut_starts_new_numbers_at_its_frame():
    script = Script([[(at(0), 0.9)]] * 12 + [[(at(600), 0.9)]] * 8)
    assert [min(faces) for faces in script.track(5)] == [1] * 12 + [2] * 8


def test_drawn_faces_in_frames():
    pytest.importorskip("onnxruntime")
    faces = [render_face(np.random.default_rng(k), 68) for k in (2, 3)]
    frames, middles = [], []
    for k in range(12):
        frame = Image.new("RGB", (640, 480), (90, 120, 150))
        places = [(20 + 6 * k, 40), (380 - 4 * k, 200)]
        for (image, _), place in zip(faces, places, strict=True):
            frame.paste(image, place)
        frames.append(Frame(frame))
        middles.append([(p.min(0) + p.max(0)) / 2 + place for (_, p), place in zip(faces, places, strict=True)])
    for every in (1, 5):
        tracked = [{f.track: f.box for f in found} for _, found in track_faces(frames, FaceDetector(), every)]
        assert all(sorted(found) == [1, 2] for found in tracked)
        first = [np.reshape(tracked[0][track], (2, 2)).mean(0) for track in (1, 2)]
        order = np.argmin(np.linalg.norm(np.array(first)[:, None] - np.array(middles[0])[None], axis=-1), axis=1)
        for found, middle in zip(tracked, middles, strict=True):
            for track, face in zip((1, 2), order, strict=True):
                assert np.reshape(found[track], (2, 2)).mean(0) == pytest.approx(middle[face], abs=20)
