"All plots. matplotlib is imported when something is drawn: it takes half a second."

import math
from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from landmarks_fastai.geometry import unit_to_input
from landmarks_fastai.metrics import mean_squared_error, points_in_image
from landmarks_fastai.utils.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TRUTH, PREDICTION = "#00ff66", "#ff1fd0"
PANEL = 3.2  # inches; at 120 dots per inch a 128 px input is enlarged three times


def plot_batch(
    batch: Sequence[Tensor],  # images, points (batch, n_points, 2) in unit coordinates, maps: a batch of `LandmarkDL`
    to_pixels: Callable[[Tensor], np.ndarray],  # normalised images -> (batch, height, width, 3) in 0..1
    max_n: int,
    out: Tensor | Sequence[Tensor] | None = None,  # predictions like the points; None plots only the truth
) -> None:
    "Plot truth, or truth beside prediction, of the first `max_n` items into matplotlib's current figure."
    images, points, maps = (t[:max_n].as_subclass(Tensor) for t in batch)
    pixels, size = to_pixels(images), images.shape[-1]
    columns = [(points, TRUTH, ["truth"] * len(images))]
    if out is not None:
        predicted = out if isinstance(out, Tensor) else out[0]
        predicted = predicted[:max_n].as_subclass(Tensor).to(points.device)  # `get_preds` returns it on the CPU
        scores = mean_squared_error(points_in_image(predicted, maps, size), points_in_image(points, maps, size))
        columns.append((predicted, PREDICTION, [f"score {score:.4g}" for score in scores]))
    panels = []
    for i, image in enumerate(pixels):
        for unit, colour, titles in columns:
            panels.append((image, [(unit_to_input(unit[i].cpu(), size).numpy(), colour)], titles[i]))
    _plot_panels(panels, len(columns))


def plot_predictions(
    panels: Sequence[tuple[np.ndarray, np.ndarray | None, np.ndarray, str]],  # see below
) -> None:
    """Plot truth beside prediction of each image into matplotlib's current figure.

    A panel is an image (height, width, 3), its true points (n_points, 2) or None, the predicted ones, and a title; points
    are pixels of this image.
    """
    drawn, labelled = [], any(truth is not None for _, truth, _, _ in panels)
    for image, truth, predicted, title in panels:
        if labelled:
            drawn.append((image, [] if truth is None else [(truth, TRUTH)], "truth"))
        drawn.append((image, [(predicted, PREDICTION)], title))
    _plot_panels(drawn, 1 + labelled)


def plot_losses(
    images: Sequence[np.ndarray], points: Sequence[tuple[np.ndarray, np.ndarray]], losses: Sequence[float]
) -> None:
    """Plot truth and prediction on each input, with its loss as the title, into matplotlib's current figure.

    `images` (height, width, 3) uint8 are network inputs; `points`: true and predicted (n_points, 2), pixels of the input.
    """
    layers = ([(truth, TRUTH), (predicted, PREDICTION)] for truth, predicted in points)
    _plot_panels(list(zip(images, layers, (f"loss {loss:.4g}" for loss in losses), strict=True)), 1)


def _plot_panels(panels: "list[tuple[np.ndarray, list[tuple[np.ndarray, str]], str]]", together: int) -> None:
    "Plot (image, [(points, colour)], title) into a new figure; rows break only after a multiple of `together` panels."
    from matplotlib import pyplot as plt

    n = len(panels) // together
    columns = min(n, max(1, round(math.sqrt(2 * n / together))))
    rows = math.ceil(n / columns)
    size = (PANEL * columns * together, (PANEL + 0.3) * rows)
    _, axes = plt.subplots(rows, columns * together, figsize=size, dpi=120, squeeze=False)
    for ax in axes.flat:
        ax.set_axis_off()
        ax.set(xticks=[], yticks=[])  # matplotlib lays out invisible ticks too: half of a figure's time
    for ax, (image, layers, title) in zip(axes.flat, panels, strict=False):
        for points, colour in layers:
            plot_points(ax, image, points, colour)
        ax.set_title(title, fontsize=9)
    plt.tight_layout(pad=0.4)


def plot_flip_map(shape: np.ndarray, flip_indices: np.ndarray) -> None:
    "Plot a mean shape (n_points, 2), y down: pairs joined by a line, points that are their own mirror image in red."
    from matplotlib import pyplot as plt
    from matplotlib.collections import LineCollection

    _, ax = plt.subplots(figsize=(6, 6), dpi=120)
    indices = np.arange(len(flip_indices))
    on_axis, left = flip_indices == indices, np.flatnonzero(flip_indices > indices)
    lines = np.stack([shape[left], shape[flip_indices[left]]], 1)
    colours = plt.get_cmap("hsv")(np.linspace(0, 0.9, max(1, len(left))))
    ax.add_collection(LineCollection(list(lines), colors=colours, linewidths=0.6))
    size = 4 if len(shape) > 200 else 16
    ax.scatter(*shape[~on_axis].T, s=size, c="black", linewidths=0)
    ax.scatter(*shape[on_axis].T, s=3 * size, c="red", linewidths=0)
    ax.set_title(f"{len(left)} pairs joined, {on_axis.sum()} points on the axis in red", fontsize=9)
    ax.set_aspect("equal")
    ax.invert_yaxis()
    ax.set_axis_off()


def plot_lr_find(rates: np.ndarray, losses: np.ndarray, chosen: float) -> None:
    "Plot the smoothed training losses over the learning rates of the body, and mark the chosen rate."
    from matplotlib import pyplot as plt

    _, ax = plt.subplots(figsize=(6, 4), dpi=120)
    ax.plot(rates, losses)
    ax.axvline(chosen, color=PREDICTION, label=f"chosen: {chosen:g}")
    ax.set(xscale="log", xlabel="learning rate of the body", ylabel="training loss")
    ax.legend()


def plot_points(ax: "Axes", image: np.ndarray, points: np.ndarray, colour: str) -> None:
    "Plot an image (height, width, 3), uint8 or in 0..1, with points (n_points, 2) in its pixels; 971 dots do not hide a face."
    height, width = image.shape[:2]
    ax.imshow(image, interpolation="nearest", extent=(-0.5, width - 0.5, height - 0.5, -0.5))
    area = 2.0 if len(points) > 200 else 12.0 if len(points) > 20 else 30.0
    ax.scatter(points[:, 0], points[:, 1], s=area, c=colour, linewidths=0)
    ax.set_xlim(-0.5, width - 0.5)
    ax.set_ylim(height - 0.5, -0.5)


def save_figure(path: Path) -> None:
    "Write matplotlib's current figure to `path`, and close it. Raises `NotWritten` if there is no room."
    from matplotlib import pyplot as plt

    try:
        plt.savefig(picture := BytesIO(), format=path.suffix[1:])
    finally:
        plt.close()
    with atomic_write(path, "wb") as f:
        f.write(picture.getbuffer())
