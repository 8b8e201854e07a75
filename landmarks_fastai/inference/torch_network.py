"A checkpoint as a `Network`: PyTorch on the CPU or a GPU."

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from landmarks_fastai.data.flip import predict_spread_with_flip, predict_with_flip
from landmarks_fastai.errors import UserError
from landmarks_fastai.inference.network import MAX_STREAMS, UnitPoints
from landmarks_fastai.models.networks import PointsAndSpread
from landmarks_fastai.runs.checkpoint import Checkpoint
from landmarks_fastai.utils.hardware import Machine
from landmarks_fastai.utils.memory import out_of_memory


class TorchNetwork:
    """The network of a checkpoint. Raises `UserError` if the memory is too small for a batch."""

    def __init__(self, checkpoint: Checkpoint, machine: Machine = Machine()):  # noqa: B008
        self.name, self.settings, self.machine = checkpoint.name, checkpoint.settings, machine
        model = checkpoint.model()
        model = fuse_norms(PointsAndSpread(model) if self.settings.confidence else model, self.settings.size)
        # torch's annotation of `to` lacks memory_format
        self.model = model.to(machine.device, memory_format=machine.memory_format)  # pyright: ignore[reportCallIssue]
        if machine.compile:
            self.model.compile()
        stats = self.settings.mean, self.settings.std
        self.mean, self.std = (torch.tensor(v, device=machine.device).view(1, 3, 1, 1) for v in stats)

    def __call__(self, pixels: np.ndarray, flip_test: bool = False) -> UnitPoints:
        try:
            return self._predict(pixels, flip_test)
        except Exception as e:
            if not out_of_memory(e):
                raise
            raise UserError(f"-b {len(pixels)}: not enough memory for such a batch: try a smaller -b") from None

    def _predict(self, pixels: np.ndarray, flip_test: bool) -> UnitPoints:
        batch = torch.from_numpy(pixels)
        if self.machine.pins:
            batch = batch.pin_memory()
        batch = batch.to(self.machine.device, non_blocking=True).permute(0, 3, 1, 2)
        inputs = (batch.float() / 255 - self.mean) / self.std
        inputs = inputs.contiguous(memory_format=self.machine.memory_format)
        flip_indices = self.settings.flip_indices if flip_test else ()
        with torch.inference_mode(), self.machine.autocast():
            if not self.settings.confidence:
                return UnitPoints(_array(predict_with_flip(self.model, inputs, flip_indices)), None)
            return UnitPoints(*map(_array, predict_spread_with_flip(self.model, inputs, flip_indices)))

    @contextmanager
    def streams(self) -> Iterator[tuple[int, Callable[[], None]]]:
        """Yield the number of threads that predict batches side by side, and what each of them calls first.

        On a CPU they share torch's threads: two cores that compute one layer together wait for each other at its end, and
        both wait while an image is decoded. On a GPU they decode; a compiled network is called by one thread, as is any
        on MPS, where two threads crash (pytorch issue 197805).
        """
        if self.machine.compile or self.machine.device != "cpu":
            one = self.machine.compile or self.machine.device == "mps"
            yield 1 if one else max(1, self.machine.decoders), lambda: None
            return
        threads = torch.get_num_threads()
        streams = min(MAX_STREAMS, threads)
        try:
            yield streams, lambda: torch.set_num_threads(threads // streams)
        finally:
            torch.set_num_threads(threads)  # a part of the setting is global to the process


def _array(tensor: torch.Tensor) -> np.ndarray:
    return tensor.float().cpu().numpy()


def fuse_norms(model: nn.Module, size: int) -> nn.Module:
    """Fold each batch norm into the convolution before it, if torch.fx can trace the network.

    The outputs before and after are compared; if they differ, the network is returned unchanged.
    """
    from torch.fx.experimental.optimization import fuse

    inputs = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    try:
        with torch.no_grad():
            fused = fuse(model)
            torch.testing.assert_close(fused(inputs), model(inputs), rtol=1e-4, atol=1e-4)
    except Exception:  # a network that fx cannot trace may raise anything
        return model
    return fused
