"The interface of a trained network, whatever runs it: PyTorch or ONNX Runtime; and how one is opened."

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from landmarks_fastai.settings import OUT, DataFacts, Settings
from landmarks_fastai.utils.hardware import Machine

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


def open_network(name: str | Path, out: str | Path = OUT, machine: Machine = Machine()) -> Network:  # noqa: B008
    """Open what `-pm` means: an .onnx file, or a checkpoint by its path or its run's name in the output folder.

    Raises `UserError` for a file that does not exist or is of another kind.
    """
    if str(name).lower().endswith(".onnx"):
        from landmarks_fastai.inference.onnx_network import OnnxNetwork

        path = Path(name)
        of_run = Path(out, path.stem, path.name)  # where the export writes it
        is_name = path.name == str(name) and not path.exists()
        return OnnxNetwork(of_run if is_name and of_run.exists() else path)
    from landmarks_fastai.inference.torch_network import open_checkpoint
    from landmarks_fastai.runs.checkpoint import find_checkpoint

    return open_checkpoint(find_checkpoint(str(name), out), machine)
