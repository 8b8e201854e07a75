"""A checkpoint as one ONNX file: uint8 pixels in, points in unit coordinates out.

Normalisation is inside. The pixels are made outside, by the code that training used; so are the second pass and the flip test.
"""

import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import landmarks_fastai
from landmarks_fastai.errors import UserError, import_optional
from landmarks_fastai.inference.onnx_network import FORMAT, METADATA, OnnxNetwork
from landmarks_fastai.inference.torch_network import TorchNetwork, open_checkpoint
from landmarks_fastai.runs.checkpoint import Checkpoint
from landmarks_fastai.runs.run import plain_name
from landmarks_fastai.settings import DataFacts, Settings
from landmarks_fastai.utils.files import atomic_path, reason

TOLERANCE = 0.01  # largest distance of a point from the checkpoint's, in pixels of the input
BATCHES = (1, 3)  # that are compared
MAX_BYTES = 2**31 - 1  # of a protobuf message


class ExportedNetwork(nn.Module):
    "The network of a checkpoint from uint8 pixels to unit coordinates."

    scale: torch.Tensor
    shift: torch.Tensor

    def __init__(
        self,
        model: nn.Module,  # images (batch, 3, size, size), normalised -> points, or (points, spread)
        facts: DataFacts,
    ):
        super().__init__()
        self.model = model
        mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (facts.mean, facts.std))
        self.register_buffer("scale", 1 / (255 * std))
        self.register_buffer("shift", -mean / std)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """uint8 (batch, size, size, 3) RGB -> points (batch, n_points, 2) in unit coordinates.

        With a spread it is (points, spread (batch, n_points)), both in unit coordinates.
        """
        return self.model(pixels.permute(0, 3, 1, 2).float() * self.scale + self.shift)


def export_checkpoint(checkpoint: Checkpoint, path: Path) -> None:
    """Write a checkpoint as one ONNX file, if its points are the checkpoint's on images of noise.

    Raises `UserError` if the network cannot be exported or its points differ, and if the file cannot be written.
    """
    check_packages()
    network = open_checkpoint(checkpoint)
    model = _onnx_model(ExportedNetwork(network.model, checkpoint.facts).eval(), checkpoint.settings)
    del model.metadata_props[:]
    model.metadata_props.add(key=METADATA, value=json.dumps(metadata_of(checkpoint)))
    if model.ByteSize() > MAX_BYTES:
        raise UserError(f"{path} would have {model.ByteSize() / 1e9:.1f} GB: one ONNX file has 2 GB at the most")
    with atomic_path(path) as temporary:
        temporary.write_bytes(model.SerializeToString())
        _compare(OnnxNetwork(temporary), network, path)


def metadata_of(checkpoint: Checkpoint) -> dict[str, Any]:
    "The metadata of a checkpoint's export, of JSON types."
    return {
        "format": FORMAT,
        "version": landmarks_fastai.__version__,
        "name": plain_name(checkpoint.name),
        "score": checkpoint.score,
        "settings": checkpoint.settings.to_dict(),
        "facts": checkpoint.facts.to_dict(),
    }


def _onnx_model(network: ExportedNetwork, settings: Settings) -> Any:
    "The network as an `onnx.ModelProto`. Raises `UserError` if PyTorch cannot export it."
    pixels = torch.zeros(2, settings.size, settings.size, 3, dtype=torch.uint8)
    outputs = ["points", "spread"] if settings.confidence else ["points"]
    with quiet():
        try:
            program = torch.onnx.export(
                network,
                (pixels,),
                dynamo=True,
                verbose=False,
                input_names=["pixels"],
                output_names=outputs,
                dynamic_shapes=({0: torch.export.Dim("batch")},),
            )
        except torch.onnx.errors.OnnxExporterError as e:
            raise UserError(f"{settings.arch} cannot be exported to ONNX ({reason(e)})") from None
    assert program is not None
    model = program.model_proto
    for part in (*model.graph.node, *model.graph.input, *model.graph.output, *model.graph.value_info):
        part.ClearField("metadata_props")  # the exporter's notes: stack traces with the paths of this machine
        part.ClearField("doc_string")
    return model


def _compare(exported: OnnxNetwork, network: TorchNetwork, path: Path) -> None:
    "Raise `UserError` unless an exported network gives the points and spreads of the original, in batches of two sizes."
    size = network.settings.size
    pixels = np.random.default_rng(0).integers(0, 256, (max(BATCHES), size, size, 3), dtype=np.uint8)
    expected = network(pixels)
    for n in BATCHES:
        try:
            output = exported(pixels[:n])
        except Exception as e:  # onnxruntime's errors share no narrower base
            what = f"{network.settings.arch} does not run as ONNX ({reason(e)})"
            raise UserError(f"{path} was not written: {what}") from None
        far = np.linalg.norm(output.points - expected.points[:n], axis=-1).max() * size / 2
        if output.spread is not None and expected.spread is not None:
            far = max(far, np.abs(output.spread - expected.spread[:n]).max() * size / 2)
        if not far <= TOLERANCE:  # NaN too
            what = f"in a batch of {n} its points are up to {far:.3g} px of the input off the checkpoint's"
            raise UserError(f"{path} was not written: {what}")


@contextmanager
def quiet() -> Iterator[None]:
    "Silence warnings and log messages of the libraries for ONNX about their own code."
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def check_packages() -> None:
    "Raise `UserError` if a package of the extra `export` is not installed, or torch is too old for it."
    if torch.__version__ < "2.7":  # its exporter fails with every onnxscript that runs with protobuf 7
        raise UserError(f"exporting needs torch 2.7 or later, {torch.__version__} is installed")
    for package in ("onnx", "onnxscript", "onnxruntime"):
        import_optional(package, "exporting")
