"""A body by name, a head, their weights.

`build_model` gives a `LandmarkNetwork`, `nn.Sequential(body, head)`, fastai's own layout: the body turns an image into a vector of
features, the head turns that into the points' unit coordinates, x0 y0 x1 y1 … (see geometry.py).
"""

import logging
import re
import warnings
import zipfile
from pathlib import Path
from zipfile import is_zipfile

import torch
from torch import nn

from landmarks_fastai.errors import UserError
from landmarks_fastai.geometry import input_to_unit, unit_to_input
from landmarks_fastai.settings import Settings

# What a file may hold beyond the body: the classifier, by the names that torchvision and timm give it, inception's and
# googlenet's helpers in training, and the counters of the norms.
CLASSIFIER = re.compile(r"(fc|classifier|heads?|head_dist|last_linear|AuxLogits|aux\d)\b|.*num_batches_tracked$")


def build_model(
    arch: str,  # a torchvision or timm name; `timm:NAME` takes timm's where both have it
    head: str,  # as `make_head` reads it
    n_points: int,
    size: int,  # of the square input, in pixels
    targets: str = "unit",  # what the last layer gives; the network gives unit coordinates either way
) -> "LandmarkNetwork":
    "The network with random weights. Raises `UserError` for an unknown name or a size that the network cannot take."
    body = make_body(arch, size)
    layers = make_head(head, feature_count(body, arch, size), n_points)
    if targets == "pixels":
        layers.append(PixelsToUnit(size))
    return LandmarkNetwork(body, layers.append(nn.Unflatten(1, (n_points, 2))))


METADATA = "_extra_state"  # PyTorch's key for what `get_extra_state` gives


class LandmarkNetwork(nn.Sequential):
    """Body and head. `metadata`, a dict of JSON kinds, travels in the state dict, and so in every file made of it.

    `checkpoint_metadata` in checkpoint.py makes it.
    """

    def __init__(self, *layers):
        super().__init__(*layers)
        self.metadata = {}
        self.register_load_state_dict_pre_hook(_without_metadata)

    def forward(self, images):
        """The head in float32 under autocast too: bfloat16 has 8 bits of mantissa, an eighth of a pixel at 128 px.

        Asked for before it is entered, so that torch.fx can follow the network where there is no autocast.
        """
        features = self[0](images)
        if not (torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")):
            return self[1](features)
        with torch.autocast(features.device.type, enabled=False):
            return self[1](features.float())

    def get_extra_state(self) -> dict:
        return self.metadata

    def set_extra_state(self, state):
        "Ignore it: what a Learner trains with is decided by who made it, not by the weights that it loads."


def _without_metadata(module, state_dict, prefix, *args):
    "Let tensors alone be loaded too: a resumed run's state, a checkpoint of an earlier version."
    state_dict.setdefault(prefix + METADATA, {})


def make_body(arch: str, size: int) -> nn.Module:
    "The network without its classifier, with random weights."
    library, name = find_arch(arch)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # inception and googlenet announce their own initialisation
        try:
            return (
                _torchvision_body(name, size) if library == "torchvision" else _timm_model(name, size, pretrained=False)
            )
        except (ValueError, AssertionError, RuntimeError) as e:
            raise _wrong_size(name, size, e) from None


def find_arch(arch: str) -> tuple[str, str]:
    "The library (torchvision where both have the name) and the name in it."
    name = arch.removeprefix("timm:")
    if name == arch and name in _torchvision_names():
        return "torchvision", name
    import timm

    if timm.is_model(name):
        try:
            timm.get_pretrained_cfg(name)
        except RuntimeError as e:  # a tag behind the dot that timm does not know
            raise UserError(f"--arch {arch}: {e}") from None
        return "timm", name
    import difflib

    near = difflib.get_close_matches(name, [*_torchvision_names(), *timm.list_models()], 3)
    raise UserError(
        f"--arch {arch}: no such network in torchvision or timm" + (f"; near: {', '.join(near)}" if near else "")
    )


def _torchvision_names():
    from torchvision import models

    # the classifiers only: detection, segmentation, video and optical flow live in the submodules
    return models.list_models(module=models)


def _torchvision_body(name, size):
    from torchvision import models

    kwargs = {}
    if name in ("inception_v3", "googlenet"):  # their ImageNet weights want another normalisation: done inside
        kwargs = {"aux_logits": False, "transform_input": True}
    if name.startswith("vit_"):
        kwargs = {"image_size": size}
    if name.startswith("maxvit"):
        kwargs = {"input_size": (size, size)}
    model = models.get_model(name, weights=None, **kwargs)
    if name.startswith("squeezenet"):  # its classifier is a 1x1 convolution before the pool
        model.classifier = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    else:  # the last linear layer, whatever its name; pool and norms before it stay as the network has them
        classifier = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)][-1]
        model.set_submodule(classifier, nn.Identity())
    return model


def _timm_model(name, size, pretrained):
    "Without a classifier. Networks built for one size (transformers) are told ours; their position tables follow."
    import timm

    kwargs = {"img_size": size} if timm.get_pretrained_cfg(name).fixed_input_size else {}
    return timm.create_model(name, num_classes=0, pretrained=pretrained, **kwargs)


def _wrong_size(arch, size, error):
    why = str(error).strip().splitlines()
    return UserError(
        f"--arch {arch} cannot take an input of {size} px ({why[0] if why else error!r}): choose another --size"
    )


def feature_count(body: nn.Module, arch: str, size: int) -> int:
    "How many features the body gives: found by running it on one blank image."
    was_training = body.training
    try:
        with torch.no_grad():
            features = body.eval()(torch.zeros(1, 3, size, size))
    except (RuntimeError, AssertionError, ValueError) as e:
        raise _wrong_size(arch, size, e) from None
    finally:
        body.train(was_training)
    if not isinstance(features, torch.Tensor) or features.ndim != 2:
        raise UserError(f"--arch {arch} gives no vector of features and cannot be used: choose another network")
    return features.shape[1]


def make_head(
    head: str,  # comma-separated: a number is a linear layer of that width; relu; bn; dropP is dropout
    n_in: int,
    n_points: int,
) -> nn.Sequential:
    """The layers between features and points, closed by a linear layer to 2 * n_points.

    `linear` is that closing layer alone, the seed's choice. Its two- and three-layer heads were like
    `512,relu,drop0.2` and `1024,bn,relu,drop0.5,512,bn,relu`.
    """
    layers = []
    for word in [] if head == "linear" else head.split(","):
        word = word.strip()
        drop = re.fullmatch(r"drop(0?\.\d+|0)", word)
        if re.fullmatch(r"[1-9]\d{0,5}", word):
            layers.append(nn.Linear(n_in, int(word)))
            n_in = int(word)
        elif drop:
            layers.append(nn.Dropout(float(drop[1])))
        elif word == "relu":
            layers.append(nn.ReLU())
        elif word == "bn":
            layers.append(nn.BatchNorm1d(n_in))
        else:
            raise UserError(f"--head {head}: {word!r} is none of linear, a width like 512, relu, bn, drop0.5")
    return nn.Sequential(*layers, nn.Linear(n_in, 2 * n_points))


class PixelsToUnit(nn.Module):
    "Behind a last layer that speaks in pixels of the input, as the seed's did: the weights see what they saw there."

    def __init__(self, size: int):
        super().__init__()
        self.size = size

    def forward(self, pixels):
        return input_to_unit(pixels, self.size)


def start_at(model: nn.Sequential, shape):
    """Let the last layer begin at `shape`, (n_points, 2) unit coordinates: its bias is the shape, its weights a tenth.

    The seed's random start spends its first epochs finding the mean face, and each of a thousand outputs for itself.
    """
    last = [layer for layer in model[1] if isinstance(layer, nn.Linear)][-1]
    shape = torch.as_tensor(shape)
    for layer in model[1]:
        if isinstance(layer, PixelsToUnit):
            shape = unit_to_input(shape, layer.size)
    with torch.no_grad():
        last.bias.copy_(shape.reshape(-1))
        last.weight.mul_(0.1)


def input_stats(arch: str) -> tuple[tuple, tuple]:
    "The per-channel mean and standard deviation, in 0..1, that the body's ImageNet weights expect."
    library, name = find_arch(arch)
    if library == "timm":
        import timm

        cfg = timm.get_pretrained_cfg(name)
        return tuple(cfg.mean), tuple(cfg.std)
    from torchvision import models

    if not _has_v1(name):
        return Settings.mean, Settings.std
    transforms = models.get_model_weights(name).IMAGENET1K_V1.transforms()
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
            import timm

            if not timm.get_pretrained_cfg(name).has_weights:
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
    pairs = state.items() if isinstance(state, dict) else ()
    if not pairs or not all(
        isinstance(k, str) and (isinstance(t, torch.Tensor) or k.endswith(METADATA)) for k, t in pairs
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
