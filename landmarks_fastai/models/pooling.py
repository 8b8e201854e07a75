"What a body makes of its last feature map: its average, as ImageNet's classifiers read it, and the map itself, with fewer channels."

from contextlib import suppress

import torch
from torch import nn
from torch.nn import functional as F

POOLS = ("avgpool", "global_pool")  # torchvision's and timm's names of the pooling layer
GRID = 4  # of the map, whatever the size of the input: the last map of most networks at 128 px


class AverageAndMap(nn.Module):
    """(batch, n_in, h, w) -> (batch, n_in + channels * GRID * GRID): the average, then `channels` at each place of the map.

    The average alone has lost where a feature is, and the network must spend its channels on it.
    """

    def __init__(self, n_in: int, channels: int):
        super().__init__()
        self.reduce = nn.Sequential(nn.Conv2d(n_in, channels, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU())

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        places = F.adaptive_avg_pool2d(self.reduce(features), GRID)
        return torch.cat([features.mean((2, 3)), places.flatten(1)], 1)


def add_map(body: nn.Module, channels: int, n_features: int, size: int) -> bool:
    """Put an `AverageAndMap` in the place of a body's average pooling; return whether it has one to replace.

    Networks that have layers between the pooling and their features, or no pooling, stay as they are: AlexNet and VGG read
    their whole map already, vision transformers (`vit_*`) and torchvision's densenets do not end in a pooling layer.
    """
    name = next((n for n in POOLS if isinstance(getattr(body, n, None), nn.Module)), "")
    if not name:
        return False
    pool, training, added = getattr(body, name), body.training, False
    setattr(body, name, AverageAndMap(n_features, channels))
    # where the pooling gets something else than a map of these features, or layers behind it take another number of them
    with torch.no_grad(), suppress(RuntimeError, IndexError):
        added = body.eval()(torch.zeros(1, 3, size, size)).shape == (1, n_features + channels * GRID**2)
    if not added:
        setattr(body, name, pool)
    body.train(training)
    return added
