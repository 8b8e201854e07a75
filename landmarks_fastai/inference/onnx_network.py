"""An exported network as a `Network`: it needs numpy and ONNX Runtime alone.

An export is one ONNX file. Its metadata entry `landmarks_fastai` is a JSON of the settings.
"""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from landmarks_fastai.errors import UserError, import_optional
from landmarks_fastai.inference.network import MAX_STREAMS, UnitPoints
from landmarks_fastai.runs.run import is_plain_name
from landmarks_fastai.settings import DataFacts, Settings
from landmarks_fastai.utils.distributed import this_process
from landmarks_fastai.utils.files import reason
from landmarks_fastai.utils.hardware import available_cores

FORMAT = 3  # of the metadata
METADATA = "landmarks_fastai"  # its key
# Session options. The file is passed as bytes, and weights that it keeps in other files are looked up in this folder, which
# does not exist: ONNX Runtime opens no other file, whatever the graph names. It refuses absolute paths and `..` by itself.
NO_OTHER_FILES = {
    "session.model_external_initializers_file_folder_path": os.devnull,
    "session.load_model_format": "ONNX",  # not its own format, which has rules of its own for such weights
}
HINT = "export the checkpoint again with python -m landmarks_fastai.export"


class OnnxNetwork:
    """A network in an ONNX file that `landmarks_fastai.export` wrote.

    Raises `UserError` for a file that is missing, damaged, of another program, or keeps weights in other files, and for
    one whose metadata does not fit its inputs and outputs; and if onnxruntime is not installed.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.cores = max(1, available_cores() // this_process().local_count)  # shared with the processes of torchrun
        self.session = _session(self.path, self.cores // min(MAX_STREAMS, self.cores))
        metadata = _read_metadata(self.path, self.session.get_modelmeta().custom_metadata_map.get(METADATA, ""))
        self.name: str = metadata["name"]
        self.settings: Settings = metadata["settings"]
        self.facts: DataFacts = metadata["facts"]
        self._check_graph()

    def __call__(self, pixels: np.ndarray) -> UnitPoints:
        points, *spread = self.session.run(None, {"pixels": np.ascontiguousarray(pixels)})
        return UnitPoints(points, spread[0] if spread else None)

    @contextmanager
    def streams(self) -> Iterator[tuple[int, Callable[[], None]]]:
        """Yield the number of threads that predict batches side by side, and what each of them calls first: nothing.

        Two cores that compute one layer together wait for each other at its end, and both wait while an image is decoded.
        """
        yield min(MAX_STREAMS, self.cores), lambda: None

    def _check_graph(self) -> None:
        "Raise `UserError` unless the inputs and outputs are what the metadata says."
        n, size = self.facts.n_points, self.settings.size
        expected = {"pixels": ("tensor(uint8)", [size, size, 3]), "points": ("tensor(float)", [n, 2])}
        actual = {v.name: (v.type, v.shape[1:]) for v in self.session.get_inputs() + self.session.get_outputs()}
        if self.settings.confidence:
            expected["spread"] = ("tensor(float)", [n])
        if actual != expected:
            text = "; ".join(f"{name} {kind} {shape}" for name, (kind, shape) in actual.items())
            raise UserError(
                f"{self.path}: its metadata says {n} points of {size} x {size} pixels, which its inputs and outputs are not "
                f"({text}): {HINT}"
            )


def _session(path: Path, threads: int) -> Any:
    "Load the file. Raises `UserError` if it cannot be read or loaded, and without onnxruntime."
    onnxruntime = import_optional("onnxruntime", str(path))
    try:
        model = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path} not found") from None
    except OSError as e:
        raise UserError(f"{path} cannot be read ({reason(e)})") from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4  # errors are raised too
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # spinning takes the time of decoding
    for entry in NO_OTHER_FILES.items():
        options.add_session_config_entry(*entry)
    try:
        return onnxruntime.InferenceSession(model, options, ["CPUExecutionProvider"], enable_fallback=0)
    except Exception as e:  # onnxruntime's errors share no narrower base
        raise UserError(f"{path} cannot be loaded by ONNX Runtime ({reason(e)}): {HINT}") from None


def _read_metadata(path: Path, text: str) -> dict[str, Any]:
    "The metadata, with settings and facts as values. Raises `UserError` for metadata of another version, or wrong ones."
    try:
        metadata = json.loads(text)
    except (ValueError, RecursionError):
        metadata = None
    if not isinstance(metadata, dict) or "settings" not in metadata:
        raise UserError(f"{path} was not written by landmarks_fastai.export (no settings in its metadata): {HINT}")
    if metadata.get("format") != FORMAT:
        raise UserError(
            f"{path} was exported by another version of this program (format {metadata.get('format')}): {HINT}"
        )
    # predictions are written into a folder of this name
    if not isinstance(name := metadata.get("name"), str) or not is_plain_name(name):
        raise UserError(f"{path}: the name in its metadata is missing, or no folder's name: {HINT}")
    try:
        settings, facts = Settings.from_dict(metadata["settings"]), DataFacts.from_dict(metadata.get("facts"))
    except UserError as e:
        raise UserError(f"{path}: {e}; {HINT}") from None
    return metadata | {"settings": settings, "facts": facts}
