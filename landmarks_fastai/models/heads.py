"The layers between features and points."

import re

import torch
from torch import nn

from landmarks_fastai.errors import UserError
from landmarks_fastai.geometry import input_to_unit, unit_to_input


def make_head(
    head: str,  # comma-separated: a number is a linear layer of that width; relu; bn; dropP is dropout
    n_in: int,
    n_points: int,
) -> nn.Sequential:
    """The layers between features and points, closed by a linear layer to 2 * n_points.

    `linear` is that closing layer alone, the published entry's choice. Its two- and three-layer heads were like
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
    "After a last layer whose output is in pixels of the input, as the published entry's: its weights keep that meaning."

    def __init__(self, size: int):
        super().__init__()
        self.size = size

    def forward(self, pixels):
        return input_to_unit(pixels, self.size)


def init_head(model: nn.Sequential, shape):
    """Let the last layer begin at `shape`, (n_points, 2) unit coordinates: its bias is the shape, its weights a tenth.

    The published entry's random initialisation spends its first epochs finding the mean face, and each of a thousand outputs for itself.
    """
    last = [layer for layer in model[1].children() if isinstance(layer, nn.Linear)][-1]
    shape = torch.as_tensor(shape)
    for layer in model[1].children():
        if isinstance(layer, PixelsToUnit):
            shape = unit_to_input(shape, layer.size)
    with torch.no_grad():
        last.bias.copy_(shape.reshape(-1))
        last.weight.mul_(0.1)
