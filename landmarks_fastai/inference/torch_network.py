"A `Network` of PyTorch, on the CPU or a GPU."

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from landmarks_fastai.errors import UserError
from landmarks_fastai.inference.network import MAX_STREAMS, UnitPoints
from landmarks_fastai.models.networks import PointsAndSpread
from landmarks_fastai.runs.checkpoint import Checkpoint
from landmarks_fastai.settings import DataFacts, Settings
from landmarks_fastai.utils.hardware import Machine
from landmarks_fastai.utils.memory import out_of_memory


class TorchNetwork:
    """A network of PyTorch, such as that of a Learner; `open_checkpoint` makes one of a checkpoint.

    Raises `UserError` if the memory is too small for a batch.
    """

    def __init__(
        self,
        model: nn.Module,  # images (batch, 3, size, size), normalised -> points, or (points, spread); moved to the device
        settings: Settings,
        facts: DataFacts,
        machine: Machine = Machine(),  # noqa: B008
        name: str = "",
    ):
        self.name, self.settings, self.facts, self.machine = name, settings, facts, machine
        # torch's annotation of `to` lacks memory_format
        self.model = model.to(machine.device, memory_format=machine.memory_format)  # pyright: ignore[reportCallIssue]
        self.mean, self.std = (torch.tensor(v, device=machine.device).view(1, 3, 1, 1) for v in (facts.mean, facts.std))

    def __call__(self, pixels: np.ndarray) -> UnitPoints:
        self.model.eval()
        batch = torch.from_numpy(np.ascontiguousarray(pixels))
        try:
            if self.machine.pins:
                batch = batch.pin_memory()
            batch = batch.to(self.machine.device, non_blocking=True).permute(0, 3, 1, 2)
            inputs = (batch.float() / 255 - self.mean) / self.std
            inputs = inputs.contiguous(memory_format=self.machine.memory_format)
            with torch.inference_mode(), self.machine.autocast():
                output = self.model(inputs)
        except Exception as e:
            if not out_of_memory(e):
                raise
            raise UserError(f"-b {len(pixels)}: not enough memory for such a batch: try a smaller -b") from None
        points, spread = output if isinstance(output, tuple) else (output, None)
        return UnitPoints(_array(points), None if spread is None else _array(spread))

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


def open_checkpoint(checkpoint: Checkpoint, machine: Machine = Machine()) -> TorchNetwork:  # noqa: B008
    "The network of a checkpoint, with its norms fused, and compiled if the machine says so."
    model, settings = checkpoint.model(), checkpoint.settings
    model = fuse_norms(PointsAndSpread(model) if settings.confidence else model, settings.size)
    if machine.compile:
        model.compile()
    return TorchNetwork(model, settings, checkpoint.facts, machine, checkpoint.name)


def _array(tensor: torch.Tensor) -> np.ndarray:
    return tensor.float().cpu().numpy()


def fuse_norms(model: nn.Module, size: int) -> nn.Module:
    """Fold each batch norm into the convolution before it, if torch.fx can trace the network.

    On one core a forward pass is 4% (resnext50_32x4d) to 8% (resnet18) faster, torch 2.14, 128 px.
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
