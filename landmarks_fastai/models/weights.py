"Load weights: from ImageNet, from a file, from a checkpoint."

import logging
import os
import re
import zipfile
from collections import OrderedDict
from pathlib import Path

import torch
from torch import nn

from landmarks_fastai.errors import UserError
from landmarks_fastai.models.networks import METADATA, find_arch, timm_config, timm_model, torchvision_names
from landmarks_fastai.settings import DataFacts

# Tensors that a file or the body may lack: the layer that reads the feature map, which only this program has, and counters of
# batch norms. And of a file: the classifier, by its names in torchvision and timm, auxiliary ones of inception and googlenet.
OPTIONAL = re.compile(r"(avgpool|global_pool)\.reduce\.|.*num_batches_tracked$")
CLASSIFIER = re.compile(r"(fc|classifier|heads?|head_dist|last_linear|AuxLogits|aux\d)\b")


def input_stats(arch: str) -> tuple[tuple, tuple]:
    "The per-channel mean and standard deviation, in 0..1, of the input that the ImageNet weights expect."
    library, name = find_arch(arch)
    if library == "timm":
        cfg = timm_config(name)
        return tuple(cfg.mean), tuple(cfg.std)
    from torchvision import models

    if not _has_imagenet(library, name):
        return DataFacts.mean, DataFacts.std
    transforms = models.get_model_weights(name)["IMAGENET1K_V1"].transforms()
    return tuple(transforms.mean), tuple(transforms.std)


def _has_imagenet(library, name) -> bool:
    if library == "timm":
        return bool(timm_config(name).has_weights)
    from torchvision import models

    return "IMAGENET1K_V1" in models.get_model_weights(name).__members__


def load_weights(
    model: nn.Sequential,  # as `build_model` makes it
    arch: str,
    weights: str,  # imagenet, none, or the path of a .safetensors or .pth file
    size: int,  # of the square input, in pixels
) -> None:
    """Load weights into the body; the head stays as it is.

    Raises `UserError` if the weights cannot be downloaded, or the file is missing, does not fit the body, or holds
    anything but tensors.
    """
    if weights == "none":
        return
    library, name = find_arch(arch)
    state = _download(library, name, size) if weights == "imagenet" else read_state_dict(weights)
    tensors = {k: v for k, v in state.items() if not k.endswith(METADATA)}
    source = f"the ImageNet weights of {name}" if weights == "imagenet" else weights
    _load_body(model[0], tensors, arch, source)


def _download(library, name, size):
    if not _has_imagenet(library, name):
        raise UserError(f"{library} has no ImageNet weights of {name}: give --weights FILE or --weights none")
    try:
        if library == "timm":
            # the hub retries for a minute, with two lines a try; one line below is enough
            logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
            print(f"fetching the ImageNet weights of {name}", flush=True)
            return timm_model(name, size, pretrained=True).state_dict()
        from torchvision import models

        return models.get_model(name, weights="IMAGENET1K_V1").state_dict()
    except Exception as e:  # the errors of urllib, requests and the hub have no narrower base in common
        why = f"{type(e).__name__}: {(str(e).strip().splitlines() or [''])[0][:100]}"
        raise UserError(
            f"the ImageNet weights of {name} could not be downloaded ({why}): "
            "give a file with --weights FILE, or train from random weights with --weights none"
        ) from None


def read_state_dict(path: str | os.PathLike) -> dict:
    """The state dict of a .safetensors or .pth file, plain or as fastai and others wrap it.

    It has tensors, and plain values of `get_extra_state`; nothing else is unpickled. Raises `UserError` for a file with
    anything else.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} not found, or no file: --weights takes imagenet, none or a .safetensors or .pth file")
    _check_zip(path)
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as e:
        raise UserError(f"{path} cannot be read: {e.strerror or e}") from None
    except Exception as e:  # torch and safetensors raise errors of many kinds
        refused = "weights_only" in str(e) or "Weights only" in str(e)
        why = "it holds more than tensors and may run code" if refused else "it is damaged or of another kind"
        raise UserError(f"{path} is not a file of tensors ({why}): nothing was loaded") from None
    for wrapper in ("model", "state_dict"):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not (isinstance(state, dict) and state) or not all(
        isinstance(k, str) and (isinstance(t, torch.Tensor) or k.endswith(METADATA)) for k, t in state.items()
    ):
        raise UserError(f"{path} is not a file of tensors (a plain state dict is needed): nothing was loaded")
    return state


def _check_zip(path: Path) -> None:
    "Refuse a zip that is larger unpacked than packed: 293 kB can become 300 MB. torch does not compress."
    try:
        with zipfile.ZipFile(path) as file:
            entries = file.infolist()
    except (OSError, ValueError, zipfile.BadZipFile):  # no zip, or one that torch.load refuses
        return
    packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
    if packed or sum(entry.file_size for entry in entries) > path.stat().st_size:
        raise UserError(f"{path} is not a file of tensors (it is compressed): nothing was loaded")


def _body_tensors(tensors: dict[str, torch.Tensor], expected: dict) -> tuple[str, dict[str, torch.Tensor]]:
    """Return the prefix of the body's tensors, and all tensors that have it, by the names behind it.

    Programs put `module.`, `_orig_mod.`, `model.`, `backbone.`, `encoder.` before the names, this one `0.`: it is the prefix
    with which the most tensors are the body's.
    """
    # torchvision's first densenet files call the layers norm.1, conv.1, …
    tensors = {re.sub(r"(\.denselayer\d+\.(?:norm|relu|conv))\.(\d\.)", r"\1\2", k): v for k, v in tensors.items()}
    first = next(iter(expected), "")
    prefixes = ["", *(k.removesuffix(first) for k in tensors if k.endswith(f".{first}"))]
    prefix = max(prefixes, key=lambda p: sum(p + name in tensors for name in expected))
    return prefix, {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _load_body(body, tensors, arch, source):
    "Load the tensors. Raises `UserError` if some are missing, or the body lacks one that is not the classifier's."
    from torchvision.models.vision_transformer import VisionTransformer, interpolate_embeddings

    expected, misfit = body.state_dict(), f"{source} does not fit --arch {arch}"
    n, (prefix, tensors) = len(tensors), _body_tensors(tensors, expected)
    if missing := [k for k in expected if k not in tensors and not OPTIONAL.match(k)]:
        import timm

        count = f"{len(missing)} of {len(expected)} tensors missing"
        both = arch in torchvision_names() and timm.is_model(arch)
        hint = f": if its names are timm's, try --arch timm:{arch}" if both else ""
        raise UserError(f"{misfit}: {count}, the first {missing[0]}{hint}")
    if isinstance(body, VisionTransformer):  # their position embedding is that of one input size
        tensors = interpolate_embeddings(body.image_size, body.patch_size, OrderedDict(tensors))
    for k, v in expected.items():
        if k in tensors and tensors[k].shape != v.shape:
            raise UserError(f"{misfit}: {k} is {tuple(tensors[k].shape)}, {tuple(v.shape)} expected")
    if extra := [k for k in tensors if k not in expected and not (CLASSIFIER.match(k) or OPTIONAL.match(k))]:
        raise UserError(f"{misfit}: it is of another network, {len(extra)} tensors are unknown, the first {extra[0]}")
    body.load_state_dict({k: tensors[k] for k in expected if k in tensors}, strict=False)
    if prefix:
        print(f"{source}: the body's tensors are those named {prefix}…, {len(tensors)} of {n}", flush=True)
