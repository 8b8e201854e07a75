"Follow faces from frame to frame: boxes in every frame, and numbers that stay with a face."

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from landmarks_fastai.geometry import Box
from landmarks_fastai.inference.detector import FaceDetector, overlaps

# Frames from one detection to the next: a detection in every frame costs half of the time that real time leaves. A face
# that swings by its own width to each side, once a second, is at most 0.2 widths off the straight line between two.
EVERY = 5
WEAK = 0.3  # score that continues a track; a new one needs the detector's least score (the idea of ByteTrack, 2022)
SAME = 0.1  # intersection over union of a face's boxes in two detections: it may move by 0.8 widths between them
PATIENCE = 15  # frames without a detection that a track's number survives


class Face(NamedTuple):
    "A face in a frame."

    box: Box  # pixel edges of the frame
    score: float  # the detector's, 0 to 1
    track: int  # 1, 2, …


Detector = Callable[[Image.Image], Sequence[tuple[Box, float]]]  # RGB picture -> boxes and scores


def track_faces(
    frames: Iterable[Any],  # of a video, in order, with an `image`, RGB
    detector: Detector,
    every: int = EVERY,  # frames from one detection to the next
) -> Iterator[tuple[Any, list[Face]]]:
    "Yield each frame with its faces; at most `every` frames are read ahead."
    tracker, frames = Tracker(detector), iter(frames)
    for chunk in iter(lambda: list(islice(frames, every)), []):
        yield from zip(chunk, tracker([frame.image for frame in chunk]), strict=True)


class Tracker:
    "Finds the faces of successive frames, and numbers them."

    def __init__(self, detector: Detector):
        self.search, self.least_score = detector, 0.0
        if isinstance(detector, FaceDetector):
            self.search, self.least_score = partial(detector, least_score=WEAK), detector.least_score
        self.before: list[Face] = []  # in the last frame
        self.seen: dict[int, tuple[int, Box]] = {}  # track -> frame and box of its last detection
        self.frame = 0  # frames so far
        self.started = 0  # tracks so far

    def __call__(self, images: list[Image.Image]) -> list[list[Face]]:
        """Return the faces of the next frames.

        If the last of them shows the same faces as the frame before the first, their boxes move in straight lines in
        between. If a face comes or goes, at a cut for example, every frame is searched.
        """
        last = self.search(images[-1])
        faces = self._match(last)
        if {face.track for face in faces} == {face.track for face in self.before}:
            between = interpolate(self.before, faces, len(images))
            self._remember(faces, len(images))
            return [*between, faces]
        all_faces = []
        for image in images:
            all_faces.append(self._match(last if image is images[-1] else self.search(image)))
            self._remember(all_faces[-1], 1)
        return all_faces

    def _match(self, detections: Sequence[tuple[Box, float]]) -> list[Face]:
        "Number detections: known faces by the overlap with their last box, the largest overlap first; then new faces."
        tracks: dict[int, int] = {}  # of the detections with a number
        numbers = list(self.seen)
        boxes = np.array([box for _, box in self.seen.values()]).reshape(-1, 4)
        overlap = overlaps(np.array([box for box, _ in detections]).reshape(-1, 4), boxes)
        for place in np.argsort(-overlap, axis=None, kind="stable").tolist():
            row, column = divmod(place, len(numbers))
            if overlap[row, column] >= SAME and row not in tracks and numbers[column] not in tracks.values():
                tracks[row] = numbers[column]
        new = [k for k, (_, score) in enumerate(detections) if k not in tracks and score >= self.least_score]
        tracks |= {k: self.started + n for n, k in enumerate(new, 1)}
        return [Face(*detections[k], tracks[k]) for k in sorted(tracks)]

    def _remember(self, faces: list[Face], frames: int) -> None:
        self.before = faces
        self.frame += frames
        self.started = max([self.started, *(face.track for face in faces)])
        self.seen |= {face.track: (self.frame, face.box) for face in faces}
        self.seen = {track: seen for track, seen in self.seen.items() if self.frame - seen[0] <= PATIENCE}


def interpolate(before: list[Face], after: list[Face], steps: int) -> list[list[Face]]:
    "Return the faces of the `steps - 1` frames between two with the same tracks; boxes and scores change linearly."
    start, frames = {face.track: face for face in before}, []
    for share in np.arange(1, steps) / steps:
        frames.append([])
        for face in after:
            values = np.array([[*end.box, end.score] for end in (start[face.track], face)])
            *box, score = (values[0] + share * (values[1] - values[0])).tolist()
            frames[-1].append(Face((box[0], box[1], box[2], box[3]), score, face.track))
    return frames
