"All plots. matplotlib is imported when something is drawn: it takes half a second."

import math
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from landmarks_fastai.utils.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TRUTH, PREDICTION = "#00ff66", "#ff1fd0"
PANEL = 3.2  # inches; at 120 dots per inch a 128 px input is enlarged three times


def plot_predictions(
    panels: Sequence[tuple[np.ndarray, np.ndarray | None, np.ndarray, str]],  # see below
) -> None:
    """Plot truth beside prediction of each image into a new figure.

    A panel is an image (height, width, 3), its true points (n_points, 2), the predicted ones, and a title; points are
    pixels of this image. Without true points, None in all panels, the predictions are plotted alone.
    """
    from matplotlib import pyplot as plt

    drawn = []
    for image, truth, predicted, title in panels:
        drawn += [(image, truth, TRUTH, "truth")] if truth is not None else []
        drawn.append((image, predicted, PREDICTION, title))
    n, together = len(panels), len(drawn) // len(panels)  # a row does not end between truth and prediction
    columns = min(n, max(1, round(math.sqrt(2 * n / together))))
    rows = math.ceil(n / columns)
    size = (PANEL * columns * together, (PANEL + 0.3) * rows)
    _, axes = plt.subplots(rows, columns * together, figsize=size, dpi=120, squeeze=False)
    for ax in axes.flat:
        ax.set_axis_off()
        ax.set(xticks=[], yticks=[])  # matplotlib lays out invisible ticks too: half of a figure's time
    for ax, (image, points, colour, title) in zip(axes.flat, drawn, strict=False):
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


def plot_names(
    panels: Sequence[
        tuple[np.ndarray, np.ndarray, str]
    ],  # image (height, width, 3), points (n_points, 2) or NaN, title
    names: Sequence[str],
) -> None:
    "Plot images with their points and the names of those into a new figure; of more than 100 points every tenth name."
    from matplotlib import pyplot as plt

    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    _, axes = plt.subplots(rows, columns, figsize=(2 * PANEL * columns, 2 * PANEL * rows), dpi=120, squeeze=False)
    for ax in axes.flat:
        ax.set_axis_off()
    for ax, (image, points, title) in zip(axes.flat, panels, strict=False):
        plot_points(ax, image, points, TRUTH)
        ax.set_title(title, fontsize=8, parse_math=False)
        for k in range(0, len(names), 10 if len(names) > 100 else 1):
            if np.isfinite(points[k]).all():
                text = {"color": "white", "backgroundcolor": "#00000060", "fontsize": 6, "parse_math": False}
                ax.annotate(names[k], points[k], xytext=(3, 3), textcoords="offset points", **text)
    plt.tight_layout(pad=0.4)


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
