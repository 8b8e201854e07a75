"Pictures for the eye: landmarks on images, drawn so that a person can judge them."

import math
from io import BytesIO
from pathlib import Path

import numpy as np
import torch

from landmarks_fastai.geometry import unit_to_input
from landmarks_fastai.metrics import mean_squared_error, points_in_image
from landmarks_fastai.utils.files import atomic_write

TRUTH, PREDICTION = "#00ff66", "#ff1fd0"
PANEL = 3.2  # inches; at 120 dots an inch a 128 px input is shown three times enlarged


def plot_batch(
    batch,  # (images, points, maps) as `LandmarkDL` gives them
    picture,  # normalised images -> pixels to show
    max_n: int,
    out=None,  # predicted unit coordinates (batch, n, 2), or in a list; None draws the truth alone
):
    "Draw truth, or truth beside prediction, of the first `max_n` items; the figure is matplotlib's current one."
    from matplotlib import pyplot as plt

    images, points, maps = (t[:max_n].as_subclass(torch.Tensor) for t in batch)
    shown = picture(images)
    size = images.shape[-1]
    sides, titles = [(points, TRUTH)], ["truth"] * len(images)
    if out is not None:
        # `get_preds` gives it on the CPU
        predicted = (
            (out[0] if isinstance(out, (list, tuple)) else out)[:max_n].as_subclass(torch.Tensor).to(points.device)
        )
        sides.append((predicted, PREDICTION))
        scores = mean_squared_error(points_in_image(predicted, maps, size), points_in_image(points, maps, size))
        titles = [f"score {s:.4g}" for s in scores]
    axes = _grid(len(images), len(sides))
    for i in range(len(images)):
        for s, (unit, colour) in enumerate(sides):
            ax = axes[i][s]
            plot_points(ax, shown[i], unit_to_input(unit[i].cpu(), size).numpy(), colour)
            ax.set_title(titles[i] if s == len(sides) - 1 else "truth", fontsize=9)
    plt.tight_layout(pad=0.4)


def plot_losses(
    images: list,  # (h, w, 3) uint8, network inputs
    points: list,  # pairs of true and predicted points (n, 2), pixels of the input
    losses: list[float],
):
    "Truth and prediction on each input, its loss in the title; the figure is matplotlib's current one."
    from matplotlib import pyplot as plt

    for (ax,), image, (truth, predicted), loss in zip(_grid(len(images), 1), images, points, losses, strict=True):
        plot_points(ax, image, truth, TRUTH)
        plot_points(ax, image, predicted, PREDICTION)
        ax.set_title(f"loss {loss:.4g}", fontsize=9)
    plt.tight_layout(pad=0.4)


def _grid(n: int, sides: int) -> list:
    "Axes of n items, each with so many beside one another: a list of lists."
    from matplotlib import pyplot as plt

    columns = min(n, max(1, round(math.sqrt(2 * n / sides))))
    rows = math.ceil(n / columns)
    size = (PANEL * columns * sides, (PANEL + 0.3) * rows)
    _, axes = plt.subplots(rows, columns * sides, figsize=size, dpi=120, squeeze=False)
    for ax in axes.flat:
        ax.set_axis_off()
        ax.set(xticks=[], yticks=[])  # matplotlib lays out invisible ticks too: half of a figure's time
    return axes.reshape(-1, sides)[:n].tolist()


def plot_flip_map(
    shape,  # (n, 2), y down
    flip_indices,  # of the flip map
):
    "Each pair of points joined by a line; the points that are their own mirror image in another colour."
    from matplotlib import pyplot as plt
    from matplotlib.collections import LineCollection

    _, ax = plt.subplots(figsize=(6, 6), dpi=120)
    own = flip_indices == np.arange(len(flip_indices))
    left = np.flatnonzero(flip_indices > np.arange(len(flip_indices)))
    lines = np.stack([shape[left], shape[flip_indices[left]]], 1)
    ax.add_collection(LineCollection(lines, colors=plt.cm.hsv(np.linspace(0, 0.9, max(1, len(left)))), linewidths=0.6))
    size = 4 if len(shape) > 200 else 16
    ax.scatter(*shape[~own].T, s=size, c="black", linewidths=0)
    ax.scatter(*shape[own].T, s=3 * size, c="red", linewidths=0)
    ax.set_title(f"{len(left)} pairs joined, {own.sum()} points on the axis in red", fontsize=9)
    ax.set_aspect("equal")
    ax.invert_yaxis()
    ax.set_axis_off()


def plot_lr_find(
    rates,  # that were tried, of the body
    losses,  # smoothed training losses at them
    chosen: float,
):
    "The loss over the rate, and the rate that was chosen."
    from matplotlib import pyplot as plt

    _, ax = plt.subplots(figsize=(6, 4), dpi=120)
    ax.plot(rates, losses)
    ax.axvline(chosen, color=PREDICTION, label=f"chosen: {chosen:g}")
    ax.set(xscale="log", xlabel="learning rate of the body", ylabel="training loss")
    ax.legend()


def plot_points(
    ax,
    image,  # (h, w, 3) in 0..1
    points,  # (n, 2) pixels of that image
    colour: str,
):
    "One image with its points as dots small enough that 971 of them leave the face to be seen."
    height, width = image.shape[:2]
    ax.imshow(image, interpolation="nearest", extent=(-0.5, width - 0.5, height - 0.5, -0.5))
    area = 2.0 if len(points) > 200 else 12.0 if len(points) > 20 else 30.0
    ax.scatter(points[:, 0], points[:, 1], s=area, c=colour, linewidths=0)
    ax.set_xlim(-0.5, width - 0.5)
    ax.set_ylim(height - 0.5, -0.5)


def save_figure(path: Path):
    "Write matplotlib's current figure to `path` and close it."
    from matplotlib import pyplot as plt

    try:
        plt.savefig(picture := BytesIO(), format=path.suffix[1:])
    finally:
        plt.close()
    with atomic_write(path, "wb") as f:
        f.write(picture.getbuffer())
