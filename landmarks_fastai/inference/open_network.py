"Open a trained network by its name: a checkpoint or an export."

from pathlib import Path

from landmarks_fastai.inference.network import Network
from landmarks_fastai.settings import OUT
from landmarks_fastai.utils.hardware import Machine


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
