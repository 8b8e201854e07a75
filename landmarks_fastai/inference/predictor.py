"""Pictures -> points in their pixels: files, folders, PIL images, arrays and streams of frames.

This is a loop of its own: a Learner needs training data, and `get_preds` returns all predictions at once, which is too
much memory for 100,000 images of 971 points. It needs neither torch nor fastai if the network is an ONNX file.
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
from landmarks_fastai.errors import UserError
from landmarks_fastai.geometry import Box, PixelMap, box_map, unit_to_input
from landmarks_fastai.inference.detector import SIDE
from landmarks_fastai.inference.network import Network
from landmarks_fastai.inference.pictures import Picture, Source, as_box, find_pictures, is_video
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
        self.unaligned = 0  # objects whose first pass made no plausible shape
        counts = {network.settings.n_points: network.name for network in self.networks}
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
    ) -> Iterator[PictureResult]:
        "Predict pictures one after the other, in constant memory. A picture that cannot be used gives a result with an error."
        if boxes or self.detector:
            for network in (n for n in self.networks if not n.settings.points_box):
                raise UserError(
                    f"{network.name} was trained by a version that did not store where the points lie in its inputs, so no "
                    "box can be cut for it: run finetune.py once, or predict whole pictures"
                )
        opened = (p if isinstance(p, Picture) else Picture(p) for p in pictures)
        chunks = self._chunks((picture, boxes(picture) if boxes else None) for picture in opened)
        with self.networks[0].streams() as (threads, start):
            for results, unaligned in threaded_map(self._predict, chunks, threads, start):
                self.unaligned += unaligned
                yield from results

    def _chunks(self, pictures: Iterable[tuple[Picture, Any]]) -> Iterator[list[tuple[Picture, Any]]]:
        "Group pictures to batches, smaller ones if their pixels are in memory."
        chunk, pixels = [], 0
        for picture, boxes in pictures:
            chunk.append((picture, boxes))
            pixels += 0 if isinstance(picture.source, Path) else math.prod(picture.source.size)
            if len(chunk) == self.batch_size or pixels >= LOADED_PIXELS:
                yield chunk
                chunk, pixels = [], 0
        if chunk:
            yield chunk

    def _predict(self, chunk: list[tuple[Picture, Sequence[Box] | None]]) -> tuple[list[PictureResult], int]:
        "Predict a batch of pictures; returns the results, and how many objects have no aligned crop."
        results = [self._located(*each) for each in chunk]
        every, unaligned = [], set()
        for network in self.networks:
            found, without_crop = self._two_passes(network, results)
            every.append(found)
            unaligned |= without_crop
        for k, result in enumerate(results):
            if result.error:
                result.objects = []
                continue
            for i, each in enumerate(result.objects):
                of_networks = [found[k][i] for found in every]
                each.points = np.stack([p.points for p in of_networks]).mean(0)
                spreads = [p.spread for p in of_networks if p.spread is not None]
                each.confidence = np.stack(spreads).mean(0) if spreads else None
        return results, len(unaligned)

    def _located(self, picture: Picture, boxes: Sequence[Box] | None) -> PictureResult:
        "The result of a picture with its objects' boxes; without boxes or a detector the whole picture is one object."
        result, none = PictureResult(picture), np.empty((0, 2), np.float32)
        try:
            result.size, result.rotated = picture.size_and_rotated()
            if boxes is not None:
                result.objects = [Prediction(none, box=_checked(box, picture)) for box in boxes]
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

    def _two_passes(
        self, network: Network, results: list[PictureResult]
    ) -> "tuple[dict[int, list[_StoredPoints]], set[tuple[int, int]]]":
        "Return the points of each result's objects by one network, and which (result, object) have no aligned crop."
        settings = network.settings
        first = {
            k: [box_map(each.box, settings.points_box, settings.size) if each.box else None for each in result.objects]
            for k, result in enumerate(results)
        }
        found, unaligned = self._one_pass(network, results, first), set()
        if alignment := alignment_of(settings):
            crops = {k: alignment.maps(np.stack([p.points for p in points])) for k, points in found.items() if points}
            unaligned = {(k, i) for k, maps in crops.items() for i, m in enumerate(maps) if m is None}
            second = self._one_pass(network, results, {k: [m for m in maps if m] for k, maps in crops.items()})
            for k, points in second.items():
                refined = iter(points)
                found[k] = [next(refined) if m else p for m, p in zip(crops[k], found[k], strict=True)]
        return found, unaligned

    def _one_pass(
        self,
        network: Network,
        results: list[PictureResult],
        maps: dict[int, list[PixelMap | None]],  # result -> for each object the map of its input; None: whole picture
    ) -> "dict[int, list[_StoredPoints]]":
        "Return the points of each result's objects. A picture that can no longer be read gets an error."
        settings, inputs = network.settings, {}
        for k, wanted in maps.items():
            try:
                if not results[k].error:
                    inputs[k] = results[k].picture.inputs(wanted, settings.fit, settings.size)
            except UserError as e:
                results[k].error = e.line
        flat = list(chain.from_iterable(inputs.values()))
        points: list[_StoredPoints] = []
        for start in range(0, len(flat), self.batch_size):
            pixels, to_input = zip(*flat[start : start + self.batch_size], strict=True)
            flip = bool(settings.flip_indices) and self.flip_test is not False
            unit = network(np.stack(pixels), flip)
            points += map(_stored, unit.points, unit.spread if unit.spread is not None else [None] * len(pixels),
                          to_input, [settings.size] * len(pixels))  # fmt: skip
        stored = iter(points)
        return {k: [next(stored) for _ in each] for k, each in inputs.items()}


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
        from landmarks_fastai.inference.torch_network import TorchNetwork
        from landmarks_fastai.runs.checkpoint import find_checkpoint
    except ModuleNotFoundError as e:
        if (e.name or "").startswith("landmarks_fastai"):
            raise
        raise UserError(
            f"{name}: a checkpoint needs {e.name}: pip install -r requirements.txt, or export it to ONNX where "
            f"that is installed (python -m landmarks_fastai.export) and give the .onnx file"
        ) from None
    return TorchNetwork(find_checkpoint(str(name), out), machine)
