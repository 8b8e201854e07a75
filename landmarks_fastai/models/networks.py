"""A body by name, a head, their weights.

`build_model` gives a `LandmarkNetwork`, `nn.Sequential(body, head)`, fastai's own layout: the body turns an image into a vector of
features, the head turns that into the points' unit coordinates, x0 y0 x1 y1 … (see geometry.py).
"""

import warnings

import torch
from torch import nn

from landmarks_fastai.errors import UserError
from landmarks_fastai.models.heads import PixelsToUnit, make_head


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
            timm_config(name)
        except RuntimeError as e:  # a tag behind the dot that timm does not know
            raise UserError(f"--arch {arch}: {e}") from None
        return "timm", name
    import difflib

    near = difflib.get_close_matches(name, [*_torchvision_names(), *timm.list_models()], 3)
    raise UserError(
        f"--arch {arch}: no such network in torchvision or timm" + (f"; near: {', '.join(near)}" if near else "")
    )


def timm_config(name: str):
    "timm's `PretrainedCfg` of a network. Raises `RuntimeError` for an unknown tag."
    import timm

    config = timm.get_pretrained_cfg(name, allow_unregistered=False)
    assert config is not None  # None only with `allow_unregistered`
    return config


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

    kwargs = {"img_size": size} if timm_config(name).fixed_input_size else {}
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
