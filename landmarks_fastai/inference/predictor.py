"""Pictures -> points in their pixels: files, folders, PIL images, arrays and streams of frames.

Every prediction in this program is made here: both passes, the flip test and the mean of several networks, for the network
of a Learner, a checkpoint, or an ONNX file. `get_preds` of a Learner returns all predictions at once, which is too much
memory for 100,000 images of 971 points. The module needs neither torch nor fastai if the network is an ONNX file.
"""

import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from landmarks_fastai.data.align import alignment_of
from landmarks_fastai.data.flip import average_flipped
from landmarks_fastai.data.pictures import Picture, Source, as_box, find_pictures, is_video
from landmarks_fastai.errors import UserError
from landmarks_fastai.geometry import Box, PixelMap, box_map, unit_to_input
from landmarks_fastai.inference.detector import SIDE
from landmarks_fastai.inference.network import Network, UnitPoints
from landmarks_fastai.settings import OUT
from landmarks_fastai.utils.hardware import Machine
from landmarks_fastai.utils.parallel import threaded_map

LOADED_PIXELS = 8_000_000  # of decoded pictures in one batch: four frames of 1920 x 1080


@dataclass
class Prediction:
    "The points of one object; `np.asarray(prediction)` are the points."

    points: np.ndarray  # float32 (n_points, 2), pixels of the picture
    # float32 (n_points,), pixels of the picture: 68% of the errors are smaller; None: not trained
    confidence: np.ndarray | None = None
    box: Box | None = None  # that was detected or given
    score: float | None = None  # of the detector, 0 to 1
    track: int | None = None  # number of the object in a video
    aligned: bool = True  # False: the first pass made no plausible shape, and its points are used

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.points, dtype, copy=copy)


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
        "How many objects have the points of the first pass, because these made no plausible shape."
        return sum(not prediction.aligned for prediction in self.objects)


class _Job(NamedTuple):
    picture: Picture
    boxes: Sequence[Box] | None = None  # of its objects; None: find them, or take the whole picture
    crops: "list[PixelMap | None] | None" = None  # of its objects, for the last pass; None: make the first pass too


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
        """Open the networks. Raises `UserError` if one cannot be opened, or their numbers of points differ."""
        names = [models] if isinstance(models, (str, Path)) or callable(models) else list(models)
        self.networks = [n if callable(n) else open_network(n, out, machine) for n in names]
        self.batch_size, self.flip_test, self.detector = batch_size, flip_test, detector
        if batch_size < 1:
            raise UserError(f"batch_size is {batch_size}: 1 or more expected")
        counts = {network.facts.n_points: network.name for network in self.networks}
        if len(counts) > 1:
            found = ", ".join(f"{name} {n}" for n, name in counts.items())
            raise UserError(f"these networks predict different numbers of points ({found}): no mean can be taken")

    def __call__(self, source: "Source | Iterable[Source]", boxes: Sequence[Box] | None = None) -> Any:
        """Predict a picture: returns a `Prediction`; a list of them if there are boxes or a detector.

        A list of pictures gives a list of these, a folder or an iterator gives an iterator, in constant memory. `boxes` are
        those of the objects in one picture: their points' bounding boxes, in pixel edges. Videos in a folder are left
        out. Raises `UserError` for a picture that cannot be used.
        """
        if isinstance(source, (str, Path)) and os.path.isdir(source):
            pictures: Iterable[Source] = _pictures_of(source)
        elif isinstance(source, (str, Path, Image.Image, np.ndarray)):
            return next(self._points([source], boxes))
        else:
            pictures = source
        if boxes is not None:
            raise UserError(
                "boxes are those of one picture: give it alone, or call `stream` with a function of the picture"
            )
        return list(self._points(pictures)) if isinstance(source, (list, tuple)) else self._points(pictures)

    def _points(self, sources: Iterable[Source], boxes: Sequence[Box] | None = None) -> Iterator[Any]:
        several = boxes is not None or self.detector is not None
        for result in self.stream(sources, None if boxes is None else lambda picture: boxes):
            if result.error:
                raise UserError(result.error)
            yield result.objects if several else result.objects[0]

    def stream(
        self,
        pictures: "Iterable[Source | Picture]",
        boxes: "Callable[[Picture], Sequence[Box] | None] | None" = None,  # of a picture's objects; None: find them
        crops: "Iterable[PixelMap | None] | None" = None,  # of whole pictures whose first pass was made; None: no crop
    ) -> Iterator[PictureResult]:
        "Predict pictures one after the other, in constant memory. A picture that cannot be used gives a result with an error."
        if boxes or self.detector:
            for network in (n for n in self.networks if not n.facts.points_box):
                raise UserError(
                    f"{network.name} was trained by a version that did not store where the points lie in its inputs, so no "
                    "box can be cut for it: run finetune.py once, or predict whole pictures"
                )
        opened = (p if isinstance(p, Picture) else Picture(p) for p in pictures)
        if crops is None:
            jobs = (_Job(picture, boxes(picture) if boxes else None) for picture in opened)
        else:
            jobs = (_Job(picture, None, [crop]) for picture, crop in zip(opened, crops, strict=True))
        with self.networks[0].streams() as (threads, start):
            for results in threaded_map(self._predict, self._chunks(jobs), threads, start):
                yield from results

    def _chunks(self, jobs: Iterable[_Job]) -> Iterator[list[_Job]]:
        "Group pictures to batches, smaller ones if their pixels are in memory."
        chunk, pixels = [], 0
        for job in jobs:
            chunk.append(job)
            pixels += 0 if isinstance(job.picture.source, Path) else math.prod(job.picture.source.size)
            if len(chunk) == self.batch_size or pixels >= LOADED_PIXELS:
                yield chunk
                chunk, pixels = [], 0
        if chunk:
            yield chunk

    def _predict(self, chunk: list[_Job]) -> list[PictureResult]:
        "Predict a batch of pictures."
        results = [self._located(job) for job in chunk]
        crops = None if chunk[0].crops is None else {k: job.crops or [] for k, job in enumerate(chunk)}
        of_networks = [self._passes(network, results, crops) for network in self.networks]
        for k, result in enumerate(results):
            if result.error:
                result.objects = []
            for i, prediction in enumerate(result.objects):
                points = [points_of[k][i] for points_of in of_networks]
                prediction.points = np.stack([p.points for p in points]).mean(0)
                spreads = [p.spread for p in points if p.spread is not None]
                prediction.confidence = np.stack(spreads).mean(0) if spreads else None
        return results

    def _located(self, job: _Job) -> PictureResult:
        "The result of a picture with its objects' boxes; without boxes or a detector the whole picture is one object."
        picture, none = job.picture, np.empty((0, 2), np.float32)
        result = PictureResult(picture)
        try:
            if job.crops is None:
                result.size, result.rotated = picture.size_and_rotated()
            if job.boxes is not None:
                result.objects = [Prediction(none, box=_checked(box, picture)) for box in job.boxes]
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

    def _passes(
        self,
        network: Network,
        results: list[PictureResult],
        crops: "dict[int, list[PixelMap | None]] | None",  # result -> for each object; None: make the first pass
    ) -> "dict[int, list[_StoredPoints]]":
        "Return the points of each result's objects by one network, and mark the objects that have no aligned crop."
        settings, facts = network.settings, network.facts
        if crops is not None:
            return self._one_pass(network, results, crops)
        whole = {
            k: [box_map(p.box, facts.points_box, settings.size) if p.box else None for p in result.objects]
            for k, result in enumerate(results)
        }
        points_of = self._one_pass(network, results, whole)
        alignment = alignment_of(settings, facts)
        if alignment is None:
            return points_of
        crops = {k: alignment.maps(np.stack([p.points for p in points])) for k, points in points_of.items() if points}
        for k, maps in crops.items():
            for prediction, crop in zip(results[k].objects, maps, strict=True):
                prediction.aligned &= crop is not None
        second = self._one_pass(network, results, {k: [m for m in maps if m] for k, maps in crops.items()})
        for k, points in second.items():
            refined = iter(points)
            points_of[k] = [next(refined) if m else p for m, p in zip(crops[k], points_of[k], strict=True)]
        return points_of

    def _one_pass(
        self,
        network: Network,
        results: list[PictureResult],
        maps: "dict[int, list[PixelMap | None]]",  # result -> for each object the map of its input; None: whole picture
    ) -> "dict[int, list[_StoredPoints]]":
        "Return the points of each result's objects. A picture that can no longer be read gets an error."
        settings, inputs = network.settings, {}
        for k, of_objects in maps.items():
            try:
                if not results[k].error:
                    inputs[k] = results[k].picture.inputs(of_objects, settings.fit, settings.size)
            except UserError as e:
                results[k].error = e.line
        flat = list(chain.from_iterable(inputs.values()))
        points: list[_StoredPoints] = []
        for start in range(0, len(flat), self.batch_size):
            pixels, to_input = zip(*flat[start : start + self.batch_size], strict=True)
            unit = self._unit_points(network, np.stack(pixels))
            spreads = unit.spread if unit.spread is not None else [None] * len(pixels)
            points += map(_stored, unit.points, spreads, to_input, [settings.size] * len(pixels))
        stored = iter(points)
        return {k: [next(stored) for _ in of_objects] for k, of_objects in inputs.items()}

    def _unit_points(self, network: Network, pixels: np.ndarray) -> UnitPoints:
        "Predict inputs, with the flip test if the network has a flip map."
        unit, flip_indices = network(pixels), network.facts.flip_indices
        if not flip_indices or self.flip_test is False:
            return unit
        mirrored = network(pixels[:, :, ::-1])
        spread = None
        if unit.spread is not None and mirrored.spread is not None:
            spread = average_flipped(unit.spread, mirrored.spread, flip_indices)
        return UnitPoints(average_flipped(unit.points, mirrored.points, flip_indices), spread)


def _pictures_of(folder: str | Path) -> Iterator[Path]:
    "Yield the pictures of a folder. Raises `UserError` if there is none."
    found = False
    for path in find_pictures([str(folder)]):
        if not is_video(path):
            found = True
            yield path
    if not found:
        raise UserError(f"{folder} holds videos only: use predict_video, landmarks_fastai/inference/video.py")


class _StoredPoints(NamedTuple):
    points: np.ndarray  # float32 (n_points, 2), pixels of the picture
    spread: np.ndarray | None  # (n_points,), likewise


def _stored(unit: np.ndarray, spread: np.ndarray | None, to_input: PixelMap, size: int) -> _StoredPoints:
    points = to_input.to_image(unit_to_input(unit.astype(np.float64), size)).astype(np.float32)
    return _StoredPoints(points, None if spread is None else spread * (size / 2 / to_input.scale))


def _checked(box: Sequence[float], picture: Picture) -> Box:
    try:
        return as_box(box)
    except ValueError:
        found = ", ".join(f"{edge:g}" for edge in box)
        wanted = "left, top, right, bottom in pixels expected"
        raise UserError(f"{picture.name or 'the picture'}: box {found} is empty: {wanted}") from None


def open_network(name: str | Path, out: str | Path = OUT, machine: Machine = Machine()) -> Network:  # noqa: B008
    """Open what `-pm` means: an .onnx file, or a checkpoint by its path or its run's name in the output folder.

    Raises `UserError` for a file that does not exist or is of another kind, and for a checkpoint without torch.
    """
    if str(name).lower().endswith(".onnx"):
        from landmarks_fastai.inference.onnx_network import OnnxNetwork

        path = Path(name)
        of_run = Path(out, path.stem, path.name)  # where the export writes it
        is_name = path.name == str(name) and not path.exists()
        return OnnxNetwork(of_run if is_name and of_run.exists() else path)
    try:
        from landmarks_fastai.inference.torch_network import open_checkpoint
        from landmarks_fastai.runs.checkpoint import find_checkpoint
    except ModuleNotFoundError as e:
        if (e.name or "").startswith("landmarks_fastai"):
            raise
        raise UserError(
            f"{name}: a checkpoint needs {e.name}: pip install -r requirements.txt, or export it to ONNX where "
            f"that is installed (python -m landmarks_fastai.export) and give the .onnx file"
        ) from None
    return open_checkpoint(find_checkpoint(str(name), out), machine)
