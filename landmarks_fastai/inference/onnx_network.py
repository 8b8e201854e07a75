"""An exported network as a `Network`: it needs numpy and ONNX Runtime alone.

An export is one ONNX file. Its metadata entry `landmarks_fastai` is a JSON of the settings; the last entry, `sha256`, is
the digest of all bytes before it.
"""

import hashlib
import json
import math
import mmap
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from landmarks_fastai.errors import UserError
from landmarks_fastai.inference.network import MAX_STREAMS, UnitPoints
from landmarks_fastai.runs.run import is_plain_name
from landmarks_fastai.settings import Settings
from landmarks_fastai.utils.distributed import this_process
from landmarks_fastai.utils.files import reason
from landmarks_fastai.utils.hardware import available_cores

FORMAT = 1  # of the metadata
METADATA = "landmarks_fastai"  # its key
# A serialised `ModelProto` with the one metadata entry `sha256`, up to its 64 digits. Two protobuf messages behind each
# other are one message, so the entry is appended and read without a library for ONNX.
SEAL = b"\x72\x4a\x0a\x06sha256\x12\x40"
SEAL_SIZE = len(SEAL) + 64
HINT = "export the checkpoint again with python -m landmarks_fastai.export"


def metadata_text(metadata: dict[str, Any]) -> str:
    "The JSON of the metadata, without the word that `_check_file` looks for."
    return json.dumps({"format": FORMAT} | metadata).replace("location", "\\u006cocation")


def sealed(model: bytes) -> bytes:
    "The bytes of an ONNX file, with their digest as the last entry of its metadata."
    return model + SEAL + hashlib.sha256(model).hexdigest().encode()


class OnnxNetwork:
    """A network in an ONNX file that `landmarks_fastai.export` wrote.

    Raises `UserError` for a file that is missing, of another program, damaged or changed, that refers to other files, or
    whose metadata does not fit its inputs and outputs; and if onnxruntime is not installed.
    """

    def __init__(
        self,
        path: str | Path,
        threads: int | None = None,  # that compute at a time; None: one a core, shared with the processes of torchrun
    ):
        self.path = Path(path)
        self.digest = _check_file(self.path)
        self.cores = threads or max(1, available_cores() // this_process().local_count)
        self.session = _session(self.path, self.cores // min(MAX_STREAMS, self.cores))
        metadata = _read_metadata(self.path, self.session.get_modelmeta().custom_metadata_map.get(METADATA, ""))
        self.name: str = metadata["name"]
        self.settings: Settings = metadata["settings"]
        self.score: float | None = metadata["score"]  # of the checkpoint, on the validation rows
        self.flip_test_inside: bool = metadata["flip_test"]  # every prediction is one with the flip test
        self._check_graph()
        self.flip_indices = np.array(self.settings.flip_indices, np.intp)

    def __call__(self, pixels: np.ndarray, flip_test: bool = False) -> UnitPoints:
        unit = self._predict(pixels)
        if not flip_test or self.flip_test_inside:
            return unit
        mirrored = self._predict(pixels[:, :, ::-1])
        points = (unit.points + mirrored.points[:, self.flip_indices] * np.array([-1, 1], np.float32)) / 2
        if unit.spread is None or mirrored.spread is None:
            return UnitPoints(points, None)
        return UnitPoints(points, (unit.spread + mirrored.spread[:, self.flip_indices]) / 2)

    def _predict(self, pixels: np.ndarray) -> UnitPoints:
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
        n, size = self.settings.n_points, self.settings.size
        expected = {"pixels": ("tensor(uint8)", [size, size, 3]), "points": ("tensor(float)", [n, 2])}
        found = {v.name: (v.type, v.shape[1:]) for v in self.session.get_inputs() + self.session.get_outputs()}
        if self.settings.confidence:
            expected["spread"] = ("tensor(float)", [n])
        if found != expected:
            text = "; ".join(f"{name} {kind} {shape}" for name, (kind, shape) in found.items())
            raise UserError(
                f"{self.path}: its metadata says {n} points of {size} x {size} pixels, which its inputs and outputs are not "
                f"({text}): {HINT}"
            )


def _check_file(path: Path) -> str:
    """Return the file's SHA-256. ONNX Runtime opens it later.

    Raises `UserError` for a file that is not as `sealed` made it, or refers to other files.
    """
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            end = max(0, len(data) - SEAL_SIZE)
            seal = data[end:]
            if not seal.startswith(SEAL):
                raise UserError(f"{path} is no complete file of landmarks_fastai.export: {HINT}")
            # a tensor in another file has an entry with this key; weights have the same 8 bytes by a chance of 1e-11
            if data.find(b"location") >= 0:
                raise UserError(f"{path} refers to data in other files, which may be any of this machine: {HINT}")
            with memoryview(data) as view, view[:end] as body:
                digest = hashlib.sha256(body).hexdigest().encode()
    except FileNotFoundError:
        raise UserError(f"{path} not found") from None
    except OSError as e:
        raise UserError(f"{path} cannot be read ({reason(e)})") from None
    except ValueError:  # an empty file cannot be mapped
        raise UserError(f"{path} is empty: {HINT}") from None
    if not seal.endswith(digest):
        raise UserError(f"{path} is damaged, or was changed after its export (its SHA-256 differs): {HINT}")
    return digest.decode()


def _session(path: Path, threads: int) -> Any:
    try:
        import onnxruntime
    except ModuleNotFoundError:
        raise UserError(f"{path} needs onnxruntime: pip install onnxruntime") from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4  # errors are raised too
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # spinning takes the time of decoding
    try:
        return onnxruntime.InferenceSession(os.fspath(path), options, ["CPUExecutionProvider"], enable_fallback=0)
    except Exception as e:  # onnxruntime's errors share no narrower base
        raise UserError(f"{path} cannot be loaded by ONNX Runtime ({reason(e)}): {HINT}") from None


def _read_metadata(path: Path, text: str) -> dict[str, Any]:
    "The metadata, with the settings as `Settings`. Raises `UserError` for metadata of another version, or wrong ones."
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or "settings" not in found:
        raise UserError(f"{path} has no settings in its metadata: {HINT}")
    if found.get("format") != FORMAT:
        raise UserError(
            f"{path} was exported by another version of this program (format {found.get('format')}): {HINT}"
        )
    score = found.get("score")
    # predictions are written into a folder of this name
    right = isinstance(name := found.get("name"), str) and is_plain_name(name)
    right = right and isinstance(found.get("flip_test"), bool)
    if not right or not (score is None or (isinstance(score, (int, float)) and math.isfinite(score))):
        raise UserError(f"{path}: name, score or flip_test is missing in its metadata, or of a wrong kind: {HINT}")
    try:
        return found | {"settings": Settings.from_dict(found["settings"])}
    except UserError as e:
        raise UserError(f"{path}: {e}; {HINT}") from None
