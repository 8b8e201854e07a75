"Open trained networks by their names: checkpoints and exports."

from collections.abc import Iterable, Sequence
from pathlib import Path

from landmarks_fastai.errors import UserError
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


def open_networks(
    models: str | Path | Network | Sequence[str | Path | Network], out: str | Path, machine: Machine
) -> list[Network]:
    "Open one or several networks. Raises `UserError` for one that cannot be opened, and if they predict different points."
    if not (isinstance(models, (Iterable, Path)) or callable(models)):
        raise UserError(f"a network is a run's name or folder, a .pth or an .onnx file; {models!r} found")
    names = [models] if isinstance(models, (str, Path)) or callable(models) else list(models)
    networks = [n if callable(n) else open_network(n, out, machine) for n in names]
    if not networks:
        raise UserError("no network: a run's name or folder, a .pth or an .onnx file expected")
    if len({n.facts.point_names for n in networks} - {()}) > 1:
        raise UserError("the points of these networks have other names, or another order: no mean can be taken")
    counts = {network.facts.n_points: network.name for network in networks}
    if len(counts) > 1:
        numbers = ", ".join(f"{name} {n}" for n, name in counts.items())
        raise UserError(f"these networks predict different numbers of points ({numbers}): no mean can be taken")
    return networks
