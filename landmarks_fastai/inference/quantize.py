"""An exported network with weights and activations of 8 bits: static quantisation by ONNX Runtime.

It is calibrated on what the network sees of training images, in both passes, and scored on validation rows beside the
network that it was made of.
"""

import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from landmarks_fastai.data.items import LabelledImage, LabelledImages
from landmarks_fastai.data.labels import data_folder, open_labels
from landmarks_fastai.data.split import split_rows
from landmarks_fastai.errors import UserError
from landmarks_fastai.inference.export import metadata_of, quiet, written_model
from landmarks_fastai.inference.onnx_network import OnnxNetwork
from landmarks_fastai.inference.pictures import Picture
from landmarks_fastai.inference.predictor import PictureResult, Predictor
from landmarks_fastai.runs.checkpoint import Checkpoint

CALIBRATION, SCORED = 128, 1000  # images, evenly spaced in their part of the rows


class Scored(NamedTuple):
    "The competition's score on validation rows, and how many images were predicted in a second."

    score: float
    speed: float
    rows: int


def quantize(checkpoint: Checkpoint, exported: Path, path: Path, data: str = "") -> tuple[Scored, Scored]:
    """Write the int8 network of an exported checkpoint; returns the scores of the exported network and of the int8 one.

    `data` is a folder in the competition's layout; empty: the checkpoint's. Raises `UserError` without its labelled images.
    """
    import onnx

    network = _Recorder(exported)
    train, valid = _rows(checkpoint, data)
    for _ in _predictions(network, train):
        pass
    with tempfile.TemporaryDirectory() as folder, quiet():
        _quantize_static(exported, Path(folder) / "int8.onnx", network.seen)
        model = onnx.load(Path(folder) / "int8.onnx")
    metadata = metadata_of(checkpoint, network.flip_test_inside)
    before = _scored(OnnxNetwork(exported), valid)
    with written_model(model, path, metadata | {"score": None}) as quantized:
        after = _scored(quantized, valid)
    with written_model(model, path, metadata | {"score": after.score}):
        return before, after


class _Recorder(OnnxNetwork):
    "A network that remembers its inputs."

    def __init__(self, path: Path):
        super().__init__(path)
        self.seen: list[np.ndarray] = []

    def _predict(self, pixels: np.ndarray) -> Any:
        self.seen.append(pixels)
        return super()._predict(pixels)


def _rows(checkpoint: Checkpoint, data: str) -> tuple[list[LabelledImage], list[LabelledImage]]:
    "Labelled images of the training rows and of the validation rows."
    settings = checkpoint.settings
    train = data_folder(data or settings.data) / "train"
    if not (train / "landmarks.csv").is_file():
        raise UserError(f"{train / 'landmarks.csv'} not found: --int8 is calibrated on training images, give -d DIR")
    labels = open_labels(train / "landmarks.csv")
    if labels.n_points != settings.n_points:
        raise UserError(
            f"{labels.csv} has {labels.n_points} points, the checkpoint {settings.n_points}: give its data with -d"
        )
    images = LabelledImages(labels, train / "images")
    parts = split_rows(len(images), settings, list(labels.faults))
    return list(images[parts[0]].sample(CALIBRATION)), list(images[parts[1]].sample(SCORED))


def _predictions(network: OnnxNetwork, items: Iterable[LabelledImage]) -> Iterator[PictureResult]:
    return Predictor(network).stream(Picture(item.path, exif=False, where=item.where) for item in items)


def _scored(network: OnnxNetwork, items: list[LabelledImage]) -> Scored:
    "Score a network with both passes and the flip test; images that cannot be read are left out."
    start, errors = time.perf_counter(), []
    for item, result in zip(items, _predictions(network, items), strict=True):
        if not result.error:
            errors.append(np.square(result.objects[0].points - item.points).mean())
    if not errors:
        raise UserError("--int8: no validation image can be read: give -d DIR with the images of landmarks.csv")
    return Scored(float(np.mean(errors)), len(items) / (time.perf_counter() - start), len(errors))


def _quantize_static(source: Path, target: Path, batches: list[np.ndarray]) -> None:
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

    class Batches(CalibrationDataReader):
        def __init__(self):
            self.rest = iter(batches)

        def get_next(self) -> Any:
            batch = next(self.rest, None)
            return None if batch is None else {"pixels": np.ascontiguousarray(batch)}

    # 7 bits a weight: without VNNI, sums of two products of 8 bits overflow 16 (onnxruntime's page on quantization)
    quantize_static(
        source, target, Batches(), per_channel=True, reduce_range=True,
        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
    )  # fmt: skip
