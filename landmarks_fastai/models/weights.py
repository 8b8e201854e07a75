"Weights for a network: ImageNet's, a file's, a checkpoint's."

import logging
import re
import zipfile
from pathlib import Path
from zipfile import is_zipfile

import torch
from torch import nn

from landmarks_fastai.errors import UserError
from landmarks_fastai.models.networks import METADATA, _timm_model, _torchvision_names, find_arch, timm_config
from landmarks_fastai.settings import Settings

# What a file may hold beyond the body: the classifier, by the names that torchvision and timm give it, inception's and
# googlenet's helpers in training, and the counters of the norms.
CLASSIFIER = re.compile(r"(fc|classifier|heads?|head_dist|last_linear|AuxLogits|aux\d)\b|.*num_batches_tracked$")


def input_stats(arch: str) -> tuple[tuple, tuple]:
    "The per-channel mean and standard deviation, in 0..1, that the body's ImageNet weights expect."
    library, name = find_arch(arch)
    if library == "timm":
        cfg = timm_config(name)
        return tuple(cfg.mean), tuple(cfg.std)
    from torchvision import models

    if not _has_v1(name):
        return Settings.mean, Settings.std
    transforms = models.get_model_weights(name)["IMAGENET1K_V1"].transforms()
    return tuple(transforms.mean), tuple(transforms.std)


def _has_v1(name):
    from torchvision import models

    return "IMAGENET1K_V1" in models.get_model_weights(name).__members__


def load_weights(
    model: nn.Sequential,  # as `build_model` made it
    arch: str,
    weights: str,  # imagenet, none, or the path of a .safetensors or .pth file
    size: int,  # of the square input, in pixels
):
    """Put weights into the body; the head keeps its random start.

    Raises `UserError` where ImageNet's cannot be downloaded, or a file is missing, holds anything but tensors,
    or does not fit the body. It never goes on without the weights that were asked for.
    """
    if weights == "none":
        return
    library, name = find_arch(arch)
    tensors = _download(library, name, size) if weights == "imagenet" else read_tensors(weights)
    source = f"the ImageNet weights of {name}" if weights == "imagenet" else weights
    _put(model[0], _body_tensors(tensors), arch, source)


def _download(library, name, size):
    try:
        if library == "timm":
            if not timm_config(name).has_weights:
                raise UserError(f"timm has no ImageNet weights of {name}: give --weights FILE or --weights none")
            # the hub tries for a minute and writes two lines a try: what went wrong is said once, below
            logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
            print(f"fetching the ImageNet weights of {name}", flush=True)
            return _timm_model(name, size, pretrained=True).state_dict()
        from torchvision import models

        if not _has_v1(name):
            raise UserError(f"torchvision has no ImageNet weights of {name}: give --weights FILE or --weights none")
        return models.get_model(name, weights="IMAGENET1K_V1").state_dict()
    except UserError:
        raise
    except Exception as e:  # urllib's, requests' and the hub's own errors share no narrower base
        why = str(e).strip().splitlines()
        raise UserError(
            f"the ImageNet weights of {name} could not be downloaded ({type(e).__name__}: {why[0][:100] if why else ''}): "
            "give a file with --weights FILE, or train from random weights with --weights none"
        ) from None


def read_tensors(path) -> dict[str, torch.Tensor]:
    "The tensors of a .safetensors or .pth file, as --weights names it; as `read_state_dict`."
    return {k: t for k, t in read_state_dict(path).items() if not k.endswith(METADATA)}


def read_state_dict(
    path,
    wrapper: str = "state_dict",  # key that the file may have it under: others' training programs, or fastai's "model"
    mmap: bool = False,  # read what is used of a .pth, when it is used
) -> dict:
    """The state dict of a .safetensors or .pth file: tensors, and plain values of modules' `get_extra_state`.

    Nothing else is ever unpickled: a file with more raises `UserError`.
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
            # torch maps a file by its name as UTF-8, which a name is not where the locale is C and it is not ASCII
            mmap = mmap and is_zipfile(path) and str(path) == str(path).encode(errors="replace").decode()
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except OSError as e:
        raise UserError(f"{path} cannot be read: {e.strerror or e}") from None
    except Exception as e:  # UnpicklingError, zip and header errors: torch and safetensors raise many kinds
        refused = "weights_only" in str(e) or "Weights only" in str(e)
        why = "it holds more than tensors and may run code" if refused else "it is damaged or of another kind"
        raise UserError(f"{path} is no file of tensors ({why}): nothing was loaded") from None
    if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
        state = state[wrapper]
    if not (isinstance(state, dict) and state) or not all(
        isinstance(k, str) and (isinstance(t, torch.Tensor) or k.endswith(METADATA)) for k, t in state.items()
    ):
        raise UserError(f"{path} is no file of tensors (a plain state dict is needed): nothing was loaded")
    return state


def _check_zip(path: Path):
    "Refuse a zip that unfolds to more than its own size: 293 kB can make 300 MB. torch writes stored entries only."
    try:
        with zipfile.ZipFile(path) as file:
            entries = file.infolist()
    except (OSError, ValueError, zipfile.BadZipFile):  # no zip, or what torch.load refuses
        return
    packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
    if packed or sum(entry.file_size for entry in entries) > path.stat().st_size:
        raise UserError(
            f"{path} is no file of tensors (it is compressed, and torch writes none such): nothing was loaded"
        )


def _body_tensors(tensors):
    "Undo the wrappings that files come in: `module.` of parallel training, and this program's own body and head."
    tensors = {k.removeprefix("module."): v for k, v in tensors.items()}
    if all(k.startswith(("0.", "1.")) for k in tensors):
        tensors = {k[2:]: v for k, v in tensors.items() if k.startswith("0.")}
    # torchvision's first densenet files call the layers norm.1, conv.1, …
    return {re.sub(r"(\.denselayer\d+\.(?:norm|relu|conv))\.(\d\.)", r"\1\2", k): v for k, v in tensors.items()}


def _put(body, tensors, arch, source):
    "Load what the body has a place for; what the file has beyond that must be the classifier alone."
    own = body.state_dict()
    missing = [k for k in own if k not in tensors and not k.endswith("num_batches_tracked")]
    if missing:
        hint = _other_library(arch, tensors)
        raise UserError(
            f"{source} does not fit --arch {arch}: {len(missing)} of {len(own)} tensors missing, the first {missing[0]}{hint}"
        )
    for k, v in own.items():
        if k in tensors and tensors[k].shape != v.shape:
            raise UserError(
                f"{source} does not fit --arch {arch}: {k} is {tuple(tensors[k].shape)}, {tuple(v.shape)} expected"
            )
    extra = [k for k in tensors if k not in own and not CLASSIFIER.match(k)]
    if extra:
        raise UserError(
            f"{source} does not fit --arch {arch}: it is of another network, "
            f"{len(extra)} tensors have no place, the first {extra[0]}"
        )
    body.load_state_dict({k: tensors[k] for k in own if k in tensors}, strict=False)


def _other_library(arch, tensors):
    "A hint where the file's names are those of the other library's network of that name."
    import timm

    name = arch.removeprefix("timm:")
    if name == arch and timm.is_model(name) and name in _torchvision_names():
        if set(timm.create_model(name, num_classes=0).state_dict()) <= set(tensors):
            return f": its names are timm's, try --arch timm:{name}"
    return ""
