"""Pictures -> points in their pixels: files, folders, PIL images, arrays and streams of frames.

Every prediction in this program is made here: all passes, the flip test and the mean of several networks, for the network
of a Learner, a checkpoint, or an ONNX file. `get_preds` of a Learner returns all predictions at once, which is too much
memory for 100,000 images of 971 points. The module needs neither torch nor fastai if the network is an ONNX file.
"""

import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from landmarks_fastai.data.align import Alignment, alignment_of
from landmarks_fastai.data.pictures import Picture, Source, as_box, find_pictures
from landmarks_fastai.errors import UserError
from landmarks_fastai.geometry import Box, PixelMap, box_map, unit_to_input
from landmarks_fastai.inference.detector import SIDE
from landmarks_fastai.inference.network import Network, predict_flipped
from landmarks_fastai.inference.open_network import open_networks
from landmarks_fastai.settings import OUT
from landmarks_fastai.utils.hardware import Machine
from landmarks_fastai.utils.parallel import threaded_map

# Of the crop's side, in the third pass. Score of 544 photographs by both passes with the flip test, with a third over one crop, over two
# moved crops: 1.442, 1.420, 1.394 after three stages at 128 px; 1.716, 1.654, 1.595 after the first; 3.16, 2.86, 2.65 at 64 px.
# Moved by 0.01 or 0.03: 2.77, 2.68 instead of 2.67 at 64 px.
MOVED = 0.02
LOADED_PIXELS = 8_000_000  # of decoded pictures in one batch: four frames of 1920 x 1080


@dataclass
class Prediction:
    "The points of one object."

    points: np.ndarray  # float32 (n_points, 2), pixels of the picture
    # float32 (n_points,), pixels of the picture: 68% of the errors are smaller; None: not trained
    confidence: np.ndarray | None = None
    box: Box | None = None  # that was detected or given
    score: float | None = None  # of the detector, 0 to 1
    track: int | None = None  # number of the object in a video
    aligned: bool = True  # False: a pass made no plausible shape, and its points are used


@dataclass
class PictureResult:
    "What was found in one picture."

    picture: Picture = field(repr=False)
    size: tuple[int, int] = (0, 0)  # width and height
    objects: list[Prediction] = field(default_factory=list)
    rotated: bool = False  # whether the EXIF rotation of the file was applied
    frame: int | None = None  # of a video, from 0
    time: float | None = None  # of the frame, in seconds
    error: str = ""  # why the picture could not be used

    @property
    def source(self) -> str:
        "The path of the picture; empty if it was none."
        return self.picture.name

    @property
    def unaligned(self) -> int:
        "How many objects have the points of an earlier pass, because those made no plausible shape."
        return sum(not prediction.aligned for prediction in self.objects)


Output = tuple[np.ndarray, np.ndarray | None]  # points and spread of an object, as in `Prediction`


@dataclass
class _Object:
    "An object while it is predicted, by one network after the other."

    result: PictureResult
    prediction: Prediction
    to_input: PixelMap | None = None  # of the next pass; None: the whole picture
    output: Output | None = None  # of the last pass
    outputs: list[Output] = field(default_factory=list)  # of each network's last pass


class Predictor:
    """Predict points with a trained network, or with the mean of several.

    Points are float32 (n_points, 2) in pixels of the picture: (0, 0) is the centre of its top-left pixel. Of a file it is
    the picture as viewers show it (EXIF rotation applied), of a PIL image or array the pixels that it has.

    >>> predictor = Predictor("runs/faces")
    >>> predictor("photo.jpg").points
    """

    def __init__(
        self,
        models: "str | Path | Network | Sequence[str | Path | Network]",  # a run's name or folder, a .pth or an .onnx file
        out: str | Path = OUT,  # output folder, of the runs' names
        *,
        machine: Machine = Machine(),  # noqa: B008
        batch_size: int = 32,
        flip_test: bool | None = None,  # None: where the network has a flip map
        detector: Callable[[Image.Image], Sequence[Any]] | None = None,  # picture -> detections (box, score)
    ):
        """Open the networks. Raises `UserError` if one cannot be opened, or they predict different points."""
        self.networks = open_networks(models, out, machine)
        self.batch_size, self.flip_test, self.detector = batch_size, flip_test, detector
        if batch_size < 1:
            raise UserError(f"batch_size is {batch_size}: 1 or more expected")
        if flip_test and (without := [n.name for n in self.networks if not n.facts.flip_indices]):
            raise UserError(f"{without[0]} has no flip map: no flip test can be made")

    def __call__(
        self, source: "Source | Picture | Iterable[Source | Picture]", boxes: Sequence[Box] | None = None
    ) -> Any:
        """Predict a picture: returns a `Prediction`; a list of them if there are boxes or a detector.

        A list of pictures gives a list of these, a folder or an iterator gives an iterator, in constant memory. `boxes` are
        those of the objects in one picture: their points' bounding boxes, in pixel edges. Videos in a folder are left
        out. Raises `UserError` for a picture that cannot be used.
        """
        if isinstance(source, Picture):
            source.boxes = source.boxes if boxes is None else boxes
            return next(self._points([source]))
        if isinstance(source, (str, Path)) and os.path.isdir(source):
            pictures: Iterable[Source | Picture] = find_pictures([str(source)], videos=False)
        elif isinstance(source, (str, Path, Image.Image, np.ndarray, bytes)) or not isinstance(source, Iterable):
            return next(self._points([Picture(source, boxes=boxes)]))
        else:
            pictures = source
        if boxes is not None:
            raise UserError(
                "boxes are those of one picture: give it alone, or call `stream` with pictures that have boxes"
            )
        return list(self._points(pictures)) if isinstance(source, (list, tuple)) else self._points(pictures)

    def _points(self, pictures: "Iterable[Source | Picture]") -> Iterator[Any]:
        for result in self.stream(pictures):
            if result.error:
                raise UserError(result.error)
            yield result.objects if self._has_boxes(result.picture) else result.objects[0]

    def _has_boxes(self, picture: Picture) -> bool:
        return picture.boxes is not None or self.detector is not None

    def stream(self, pictures: "Iterable[Source | Picture]") -> Iterator[PictureResult]:
        "Predict pictures one after the other, in constant memory. A picture that cannot be used gives a result with an error."
        opened = (p if isinstance(p, Picture) else Picture(p) for p in pictures)
        with self.networks[0].streams() as (threads, start):
            for results in threaded_map(self._predict, self._chunks(opened), threads, start):
                yield from results

    def _chunks(self, pictures: Iterable[Picture]) -> Iterator[list[Picture]]:
        "Group pictures to batches, smaller ones if their pixels are in memory."
        chunk, pixels = [], 0
        for picture in pictures:
            chunk.append(picture)
            pixels += 0 if isinstance(picture.source, Path) else math.prod(picture.source.size)
            if len(chunk) == self.batch_size or pixels >= LOADED_PIXELS:
                yield chunk
                chunk, pixels = [], 0
        if chunk:
            yield chunk

    def _predict(self, pictures: list[Picture]) -> list[PictureResult]:
        "Predict a batch of pictures."
        results = [self._located(picture) for picture in pictures]
        objects = [_Object(result, prediction) for result in results for prediction in result.objects]
        for network in self.networks:
            self._passes(network, objects)
            for obj in objects:
                if obj.output:
                    obj.outputs.append(obj.output)
        for obj in objects:
            if obj.outputs:
                obj.prediction.points, obj.prediction.confidence = _mean(obj.outputs)
        for result in results:
            if result.error:
                result.objects = []
        return results

    def _located(self, picture: Picture) -> PictureResult:
        "The result of a picture with its objects' boxes; without boxes or a detector the whole picture is one object."
        for network in self.networks:
            if network.settings.crop == "box" and not self._has_boxes(picture):
                hint = "add --detect or --boxes CSV (in Python: a detector, boxes)"
                raise UserError(f"{network.name} was trained on boxes: {hint}")
            if not network.facts.points_box and self._has_boxes(picture):
                why = "its points have no extent, so no box can be cut"
                raise UserError(f"{network.name}: {why}: predict whole pictures")
        result, none = PictureResult(picture), np.empty((0, 2), np.float32)
        try:
            result.size, result.rotated = picture.size_and_rotated()
            if picture.boxes is not None:
                result.objects = [Prediction(none, box=_checked(box, picture)) for box in picture.boxes]
            elif self.detector:
                reduced, factor = picture.reduced(SIDE)
                for box, score in self.detector(reduced):
                    left, top, right, bottom = (float(edge) * factor for edge in box)
                    result.objects.append(Prediction(none, box=(left, top, right, bottom), score=float(score)))
            else:
                result.objects = [Prediction(none)]
        except UserError as e:
            result.error = e.line
        return result

    def _passes(self, network: Network, objects: list[_Object]) -> None:
        """Predict objects by a network: as a whole, in aligned crops, and with the flip test in crops once more.

        The flip test is made in the first pass, whose mistakes cost most, and in the third; in the second it is not worth its time.
        """
        alignment = alignment_of(network.settings, network.facts)
        flip_test = bool(network.facts.flip_indices) and self.flip_test is not False
        for obj in objects:
            box = obj.prediction.box
            first_view = box_map(box, network.facts.points_box, network.settings.size) if box else None
            obj.to_input = obj.result.picture.crop or first_view
        new = [obj for obj in objects if not obj.result.picture.crop]
        self._one_pass(network, new, flip_test)
        if alignment:
            crops = _aligned(new, alignment) + [obj for obj in objects if obj.result.picture.crop]
            self._one_pass(network, crops, False)
            if flip_test:
                self._third_pass(network, _aligned(crops, alignment))

    def _third_pass(self, network: Network, objects: list[_Object]) -> None:
        "Predict objects as the mean over their crops moved to the lower right and to the upper left, with the flip test."
        moved, by = [], MOVED * network.settings.size
        for obj in objects:
            crop = obj.to_input
            assert crop  # `_aligned` has set it
            moved += [replace(obj, to_input=crop._replace(c=crop.c + d, f=crop.f + d)) for d in (by, -by)]
        self._one_pass(network, moved, True)
        for k, obj in enumerate(objects):
            obj.output = _mean([view.output for view in moved[2 * k : 2 * k + 2] if view.output])

    def _one_pass(self, network: Network, objects: list[_Object], flip_test: bool) -> None:
        "Predict objects as their maps show them. A picture that can no longer be read gets an error."
        inputs, fit, size = [], network.settings.fit, network.settings.size
        for _, group in groupby(objects, lambda obj: id(obj.result)):
            group = list(group)
            result = group[0].result
            try:
                if not result.error:
                    of_picture = result.picture.inputs([obj.to_input for obj in group], fit, size)
                    inputs += zip(group, of_picture, strict=True)
            except UserError as e:
                result.error = e.line
        for start in range(0, len(inputs), self.batch_size):
            batch = inputs[start : start + self.batch_size]
            pixels = np.stack([pixels for _, (pixels, _) in batch])
            unit = predict_flipped(network, pixels) if flip_test else network(pixels)
            for k, (obj, (_, to_input)) in enumerate(batch):
                points = to_input.to_image(unit_to_input(unit.points[k].astype(np.float64), size)).astype(np.float32)
                obj.output = points, None if unit.spread is None else unit.spread[k] * (size / 2 / to_input.scale)


def _aligned(objects: list[_Object], alignment: Alignment) -> list[_Object]:
    "Set the crops of objects by their points, mark those that have none, and return the others."
    objects = [obj for obj in objects if not obj.result.error]
    points = [obj.output[0] for obj in objects if obj.output]
    crops = alignment.maps(np.array(points)) if points else []
    for obj, crop in zip(objects, crops, strict=True):
        obj.to_input = crop
        obj.prediction.aligned &= crop is not None
    return [obj for obj in objects if obj.to_input]


def _mean(outputs: Sequence[Output]) -> Output:
    "The mean of several outputs for one object: of all points, and of the spreads that there are."
    spreads = [spread for _, spread in outputs if spread is not None]
    return np.mean([points for points, _ in outputs], 0), np.mean(spreads, 0) if spreads else None


def _checked(box: Sequence[float], picture: Picture) -> Box:
    if np.shape(box) != (4,):
        raise UserError(f"boxes is a list of (left, top, right, bottom); {box!r} found in it")
    try:
        return as_box(box)
    except ValueError:
        edges, hint = ", ".join(f"{edge:g}" for edge in box), "left, top, right, bottom in pixels expected"
        raise UserError(f"{picture.name or 'the picture'}: box {edges} is empty: {hint}") from None
