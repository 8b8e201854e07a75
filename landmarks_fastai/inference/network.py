"The interface of a trained network, whatever runs it: PyTorch or ONNX Runtime."

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol

import numpy as np

from landmarks_fastai.data.flip import average_flipped
from landmarks_fastai.settings import DataFacts, Settings

MAX_STREAMS = 4  # batches that are in memory at a time


class UnitPoints(NamedTuple):
    "What a network makes of a batch of inputs, in unit coordinates: [-1, 1] from edge to edge of the input."

    points: np.ndarray  # float32 (batch, n_points, 2)
    spread: np.ndarray | None  # float32 (batch, n_points): radius that 68% of the errors lie within; None: not trained


class Network(Protocol):
    "A trained network. `TorchNetwork` and `OnnxNetwork` implement it."

    name: str  # of the run that trained it
    settings: Settings
    facts: DataFacts

    def __call__(self, pixels: np.ndarray) -> UnitPoints:
        "Predict the points of inputs, uint8 (batch, size, size, 3) RGB."
        ...

    def streams(self) -> AbstractContextManager[tuple[int, Callable[[], None]]]:
        "A context with the number of threads that should call the network side by side, and what each calls first."
        ...


def predict_flipped(network: Network, pixels: np.ndarray) -> UnitPoints:
    "Predict inputs, averaged with the predictions of their mirror images. The network needs a flip map."
    unit, mirrored, spread = network(pixels), network(pixels[:, :, ::-1]), None
    if unit.spread is not None and mirrored.spread is not None:
        spread = average_flipped(unit.spread, mirrored.spread, network.facts.flip_indices)
    return UnitPoints(average_flipped(unit.points, mirrored.points, network.facts.flip_indices), spread)
