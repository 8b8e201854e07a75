"The heads: the layers between the features of the body and the points, and those to their spread."

import re

import numpy.typing as npt
import torch
from torch import nn

from landmarks_fastai.errors import UserError


def split_head(head: str) -> tuple[int, str]:
    "Return the channels of the feature map that a head reads, 0 without one, and its layers: of `map64,512,relu` 64 and `512,relu`."
    if not (word := re.match(r"map([1-9]\d{0,3})(,|$)", head)):
        return 0, head
    return int(word[1]), head[word.end() :] or "linear"


def make_head(
    head: str,  # comma-separated: a number is a linear layer of that width; relu; bn; dropP is dropout
    n_in: int,  # features of the body
    n_points: int,
) -> nn.Sequential:
    """A head that ends with a linear layer to 2 * n_points. Raises `UserError` for an unknown layer.

    `linear`, the published entry's choice, is that layer alone; `map64` before the layers is for `split_head`. The entry also tried two
    and three layers, like `512,relu,drop0.2` and `1024,bn,relu,drop0.5,512,bn,relu`.
    """
    layers = []
    for word in [] if head == "linear" else head.split(","):
        word = word.strip()
        if re.fullmatch(r"[1-9]\d{0,5}", word):
            layers.append(nn.Linear(n_in, int(word)))
            n_in = int(word)
        elif drop := re.fullmatch(r"drop(0?\.\d+|0)", word):
            layers.append(nn.Dropout(float(drop[1])))
        elif word == "relu":
            layers.append(nn.ReLU())
        elif word == "bn":
            layers.append(nn.BatchNorm1d(n_in))
        else:
            raise UserError(
                f"--head {head}: {word!r} is not one of linear, a width like 512, relu, bn, drop0.5; map64 stands first"
            )
    return nn.Sequential(*layers, nn.Linear(n_in, 2 * n_points))


def init_head(model: nn.Sequential, shape: npt.ArrayLike | torch.Tensor) -> None:
    """Initialise the last layer at a shape, (n_points, 2) unit coordinates: the bias is the shape, weights are a tenth.

    A random initialisation spends the first epochs on finding the mean face.
    """
    shape = torch.as_tensor(shape)
    last = [layer for layer in model[1].children() if isinstance(layer, nn.Linear)][-1]
    with torch.no_grad():
        last.bias.copy_(shape.reshape(-1))
        last.weight.mul_(0.1)


class SpreadHead(nn.Module):
    "The second head: features of the body (batch, n_in) -> spread of the points (batch, n_points) in unit coordinates."

    def __init__(self, n_in: int, n_points: int):
        super().__init__()
        self.image = nn.Linear(n_in, 1, bias=False)  # the logarithm of a factor for the image
        self.landmarks = nn.Parameter(torch.zeros(n_points))  # the same for each landmark

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        # from a millionth of the input's side to all of it, whatever the image
        return (self.image(features) + self.landmarks).clamp(-13.0, 0.7).exp()
