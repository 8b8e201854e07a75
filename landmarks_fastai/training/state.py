"""The state of a stage, from which it can be resumed in the middle of an epoch: capture, write, read, restore.

state.safetensors holds tensors (weights, optimiser, running average, accumulated gradients) and, as JSON in its header,
all else. It needs no random state: order, augmentation and dropout are functions of (seed, epoch, batch).
"""

import json
import math
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from landmarks_fastai.errors import UserError
from landmarks_fastai.runs.run import Run
from landmarks_fastai.utils.distributed import this_process
from landmarks_fastai.utils.files import atomic_path, reason

# Attributes of callbacks that must survive a restart, by the callback's name in the Learner.
REMEMBERED = {
    "plateau_lr": ("plateau.best", "plateau.num_bad_epochs"),
    "early_stopping": ("best", "wait"),
    "save_best": ("best", "saved"),
    "gradient_accumulation": ("count",),
}


@dataclass(frozen=True)
class State:
    "A stage between two steps; `epoch` and `batch` of the metadata are those of the next step."

    metadata: dict
    tensors: dict[str, torch.Tensor]

    @property
    def place(self) -> tuple[int, int]:
        "(epoch, batch) of the next step; with another number of processes, at most a batch is seen again."
        processes = this_process().count
        return self.metadata["epoch"], self.metadata["batch"] * self.metadata["processes"] // processes


def capture_state(learn: Any) -> State:
    "The state of a Learner, after a step or between epochs. The tensors are not copied."
    smooth = learn.recorder.smooth_loss
    metadata = {
        "hypers": [{k: v for k, v in h.items() if isinstance(v, float)} for h in learn.opt.hypers],
        "pct_train": learn.pct_train,
        "train_iter": learn.train_iter,
        "smooth_count": smooth.count,
        "remembered": {
            name: {k: attrgetter(k)(getattr(learn, name)) for k in keys}
            for name, keys in REMEMBERED.items()
            if hasattr(learn, name)
        },
        "processes": this_process().count,
        "scaler": learn.scaler.state_dict() if hasattr(learn, "scaler") else {},
    }
    tensors = {f"model.{k}": t for k, t in _tensors_of(learn.model)}
    for k, values in learn.opt.opt.state_dict()["state"].items():
        tensors |= {f"opt.{k}.{name}": t for name, t in values.items() if isinstance(t, torch.Tensor)}
    for k, p in enumerate(_parameters(learn)):
        if p.grad is not None and getattr(getattr(learn, "gradient_accumulation", None), "count", 0):
            tensors[f"grad.{k}"] = p.grad
    if hasattr(learn, "average"):
        tensors |= {f"average.{k}": t for k, t in _tensors_of(learn.average.twin)}
    return State(metadata, tensors | {"smooth": torch.as_tensor(smooth.val)})


def _tensors_of(module):
    "The tensors of a state dict, without the metadata of a network."
    return [(k, t) for k, t in module.state_dict().items() if isinstance(t, torch.Tensor)]


def restore_state(learn: Any, state: State) -> None:
    "Undo `capture_state`. Called within a fit, when optimiser and callbacks exist."
    metadata, tensors = state.metadata, state.tensors
    learn.model.load_state_dict(_part(tensors, "model."))
    if hasattr(learn, "average"):
        learn.average.twin.load_state_dict(_part(tensors, "average."))
    parameters, optimiser = _parameters(learn), {}
    for name, t in _part(tensors, "opt.").items():
        k, name = name.split(".", 1)
        optimiser.setdefault(int(k), {})[name] = _like(t, parameters[int(k)])
    groups = learn.opt.opt.state_dict()["param_groups"]
    learn.opt.opt.load_state_dict({"state": optimiser, "param_groups": groups})
    for name in metadata["hypers"][0]:
        learn.opt.set_hyper(name, [h[name] for h in metadata["hypers"]])
    for k, t in _part(tensors, "grad.").items():
        parameters[int(k)].grad = _like(t, parameters[int(k)])
    learn.pct_train, learn.train_iter = metadata["pct_train"], metadata["train_iter"]
    smooth = learn.recorder.smooth_loss
    smooth.val, smooth.count = tensors["smooth"], metadata["smooth_count"]  # on the CPU, as fastai has it
    for name, values in metadata["remembered"].items():
        for k, value in values.items():
            *owner, attribute = f"{name}.{k}".split(".")
            setattr(attrgetter(".".join(owner))(learn), attribute, value)
    if metadata["scaler"] and hasattr(learn, "scaler"):  # --amp and --gpu may change
        learn.scaler.load_state_dict(metadata["scaler"])


def _parameters(learn) -> list:
    "The parameters in the order of the optimiser's state dict."
    return [p for group in learn.opt.opt.param_groups for p in group["params"]]


def _like(t, parameter):
    "The tensor in the memory format of its parameter, as fused optimisers need it."
    if t.shape != parameter.shape:
        return t
    return torch.empty_like(parameter, dtype=t.dtype, requires_grad=False).copy_(t)


def _part(tensors, prefix) -> dict:
    return {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}


def write_state(run: Run, state: State) -> None:
    "Write state.safetensors, through a temporary file. Raises `UserError` if the disk is full."
    run.write("state.safetensors", lambda path: _write_state(path, state))


def _write_state(path: Path, state: State) -> None:
    tensors, memory = {}, set()
    for k, t in state.tensors.items():
        t = t.detach().cpu().contiguous()
        at = t.untyped_storage().data_ptr()
        tensors[k] = t.clone() if at in memory else t  # safetensors refuses layers that share their weights
        memory.add(at)
    with atomic_path(path) as temporary:
        try:
            save_file(tensors, temporary, {"facts": json.dumps(state.metadata)})
        except SafetensorError as e:
            size = math.ceil(sum(t.nbytes for t in tensors.values()) / 1e6)
            hint = f"make room (it takes {size} MB, twice while it is written)"
            raise UserError(f"{path} cannot be written ({reason(e)}): {hint}") from None


def read_state(run: Run) -> State | None:
    "Read state.safetensors; None if there is none. Raises `UserError` for a file of another kind."
    path = run.folder / "state.safetensors"
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as f:
            metadata = json.loads((f.metadata() or {})["facts"])
            state = State(metadata, {k: f.get_tensor(k) for k in f.keys()})
        _check(state)
    except (OSError, SafetensorError, KeyError, ValueError, TypeError, AttributeError, RecursionError, UserError) as e:
        hint = "start over with --overwrite, and the same flags"
        raise UserError(f"{path} is not the state of a run ({reason(e)}): {hint}") from None
    return state


def _check(state: State):
    "Raise an error unless all values of the metadata are of the types that `restore_state` expects."
    metadata, remembered = state.metadata, state.metadata["remembered"]
    counts = [metadata[k] for k in ("epoch", "batch", "train_iter", "smooth_count", "processes")]
    values = [v for h in [*metadata["hypers"], *remembered.values()] for v in h.values()]
    if metadata["processes"] < 1:
        raise ValueError("it names no process")
    numbers = [*values, metadata["pct_train"], metadata["seconds"]]
    if not (
        all(type(n) is int and n >= 0 for n in counts)
        and all(isinstance(v, (int, float)) for v in numbers)
        and all(k in REMEMBERED[name] for name, attributes in remembered.items() for k in attributes)
        and isinstance(metadata["history"], str)
    ):
        raise ValueError("a value is missing or of a wrong kind")
