"""The network: a torchvision or timm body by name, and a head.

A `LandmarkNetwork` is `nn.Sequential(body, head)`, as fastai's vision models: the body makes a vector of features of an
image, the head makes the points, (n_points, 2) unit coordinates (see geometry.py). After its training it may get a second
head on the same features, of the points' spread.
"""

import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from landmarks_fastai.errors import UserError
from landmarks_fastai.models.heads import SpreadHead, make_head, split_head
from landmarks_fastai.models.pooling import GRID, add_map

if TYPE_CHECKING:
    from timm.models import PretrainedCfg

METADATA = "_extra_state"  # PyTorch's key in a state dict for the result of `get_extra_state`
SPREAD = "spread."  # start of the keys of the spread's tensors


def build_model(
    arch: str,  # a torchvision or timm name; `timm:NAME` is timm's if both have it
    head: str,  # as in `make_head`
    n_points: int,
    size: int,  # of the square input, in pixels
    confidence: bool = False,  # whether it has a spread
) -> "LandmarkNetwork":
    "A network with random weights. Raises `UserError` for an unknown name, or a size that the network cannot take."
    body = make_body(arch, size)
    n_features = feature_count(body, arch, size)
    channels, head = split_head(head)
    if channels and add_map(body, channels, n_features, size):
        n_features += channels * GRID**2
    layers = make_head(head, n_features, n_points)
    spread = SpreadHead(n_features, n_points) if confidence else None
    return LandmarkNetwork(body, layers.append(nn.Unflatten(1, (n_points, 2))), spread)


class LandmarkNetwork(nn.Sequential):
    """Body and head, and the `spread` of the points if it was trained: see `PointsAndSpread`.

    `metadata`, a dict of JSON types from `checkpoint_metadata`, is saved with the state dict.
    """

    def __init__(self, body: nn.Module, head: nn.Module, spread: SpreadHead | None = None):
        super().__init__(body, head)
        self.spread = spread
        self.metadata: dict = {}
        self.register_load_state_dict_pre_hook(_without_extras)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        "(batch, 3, size, size) -> (batch, n_points, 2). The head computes in float32: bfloat16 is 1/8 px off at 128 px."
        return in_float32(self[1], self[0](images))

    def get_extra_state(self) -> dict:
        return self.metadata

    def set_extra_state(self, state: dict) -> None:
        "Ignore the metadata of weights that are loaded: they do not change the settings of the Learner."


def in_float32(head: nn.Module, features: torch.Tensor) -> torch.Tensor:
    "The output of a head, without autocast."
    # autocast is left only if it is on, so that torch.fx can trace the network
    if not any(map(torch.is_autocast_enabled, ("cpu", "cuda", "mps"))):
        return head(features)
    with torch.autocast(features.device.type, enabled=False):
        return head(features.float())


class PointsAndSpread(nn.Module):
    "A network with both outputs: the points of a `LandmarkNetwork` and their spread. Raises `ValueError` if it has none."

    def __init__(self, model: LandmarkNetwork):
        super().__init__()
        if model.spread is None:
            raise ValueError("the network has no spread: it was trained without --confidence")
        self.body, self.head, self.spread = model[0], model[1], model.spread

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(batch, 3, size, size) -> points (batch, n_points, 2) and spread (batch, n_points), both in unit coordinates.

        The spread is the radius that 68% of the errors lie within.
        """
        features = self.body(images)
        return in_float32(self.head, features), in_float32(self.spread, features)


def _without_extras(module, state_dict, prefix, *args):
    """Accept a state dict without metadata, as a resumed run has it.

    A network without a spread ignores the file's: a later stage learns its own.
    """
    state_dict.setdefault(prefix + METADATA, {})
    if module.spread is None:
        for k in [k for k in state_dict if k.startswith(prefix + SPREAD)]:
            del state_dict[k]


def make_body(arch: str, size: int) -> nn.Module:
    "A network without its classifier, with random weights. Raises `UserError`, as `build_model`."
    library, name = find_arch(arch)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # inception and googlenet warn about their initialisation
        try:
            return _torchvision_body(name, size) if library == "torchvision" else timm_model(name, size)
        except (ValueError, AssertionError, RuntimeError) as e:
            raise _wrong_size(name, size, e) from None


def find_arch(arch: str) -> tuple[str, str]:
    "The library (torchvision if both have the name) and the name in it. Raises `UserError` for an unknown name."
    name = arch.removeprefix("timm:")
    if name == arch and name in torchvision_names():
        return "torchvision", name
    import timm

    if timm.is_model(name):
        try:
            timm_config(name)
        except RuntimeError as e:  # an unknown tag behind the dot
            raise UserError(f"--arch {arch}: {e}") from None
        return "timm", name
    import difflib

    near = difflib.get_close_matches(name, sorted({*torchvision_names(), *timm.list_models()}), 3)
    hint = f"; near: {', '.join(near)}" if near else ""
    raise UserError(f"--arch {arch}: no such network in torchvision or timm{hint}")


def timm_config(name: str) -> "PretrainedCfg":
    "timm's `PretrainedCfg` of a network. Raises `RuntimeError` for an unknown tag."
    import timm

    config = timm.get_pretrained_cfg(name, allow_unregistered=False)
    assert config is not None  # None only with `allow_unregistered`
    return config


def torchvision_names() -> list[str]:
    from torchvision import models

    # classifiers only: the networks for detection, segmentation, video and optical flow are in submodules
    return models.list_models(module=models)


def _torchvision_body(name, size):
    from torchvision import models

    kwargs = {}
    if name in ("inception_v3", "googlenet"):  # they convert the normalisation themselves
        kwargs = {"aux_logits": False, "transform_input": True}
    if name.startswith("vit_"):
        kwargs = {"image_size": size}
    if name.startswith("maxvit"):
        kwargs = {"input_size": (size, size)}
    model = models.get_model(name, weights=None, **kwargs)
    if name.startswith("squeezenet"):  # its classifier is a convolution, before the pool
        model.classifier = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    else:  # the last linear layer, whatever its name
        classifier = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)][-1]
        model.set_submodule(classifier, nn.Identity())
    return model


def timm_model(name: str, size: int, pretrained: bool = False) -> nn.Module:
    "A timm network without its classifier. One with a fixed input size (transformers) is built for our size."
    import timm

    kwargs: dict[str, Any] = {"img_size": size} if timm_config(name).fixed_input_size else {}
    return timm.create_model(name, num_classes=0, pretrained=pretrained, **kwargs)


def _wrong_size(arch, size, error):
    why = (str(error).strip().splitlines() or [repr(error)])[0]
    return UserError(f"--arch {arch} cannot take an input of {size} px ({why}): choose another --size")


def feature_count(body: nn.Module, arch: str, size: int) -> int:
    "The number of features of a body, from one blank image. Raises `UserError` if they are not a vector."
    try:
        with torch.no_grad():
            features = body.eval()(torch.zeros(1, 3, size, size))
    except (RuntimeError, AssertionError, ValueError) as e:
        raise _wrong_size(arch, size, e) from None
    body.train()
    if not isinstance(features, torch.Tensor) or features.ndim != 2:
        raise UserError(f"--arch {arch} makes no vector of features and cannot be used: choose another network")
    return features.shape[1]
