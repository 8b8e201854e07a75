"All plots. matplotlib is imported when something is drawn: it takes half a second."

import math
import re
from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from landmarks_fastai.utils.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TRUTH, PREDICTION = "#00ff66", "#ff1fd0"
# readable on a light and on a dark page
COLOURS = ("#3b82f6", "#f59e0b", "#10b981", "#ef4444", "#a855f7", "#64748b", "#14b8a6", "#ec4899")
LEVELS = (0.5, 0.75, 0.9, 0.97, 1.0)  # quantiles of the landmarks' errors that `draw_landmarks` divides at
LEVEL_COLOURS = ("#5b8def", "#36b37e", "#d9a406", "#f2711c", "#e02424")
INK = "#010203"  # of text and axes; `svg` makes it the page's text colour
DOTS = 400  # of a scatter plot in a page: each takes 80 bytes
BINS = 8  # of the line of medians in it
PANEL = 3.2  # inches; at 120 dots per inch a 128 px input is enlarged three times


def plot_predictions(
    panels: Sequence[tuple[np.ndarray, np.ndarray | None, np.ndarray, str]],  # see below
) -> None:
    """Plot truth beside prediction of each image into a new figure.

    A panel is an image (height, width, 3), its true points (n_points, 2), the predicted ones, and a title; points are
    pixels of this image. Without true points, None in all panels, the predictions are plotted alone. A predicted point
    whose truth is missing, NaN, is hollow.
    """
    from matplotlib import pyplot as plt

    drawn = []
    for image, truth, predicted, title in panels:
        drawn += [(image, truth, TRUTH, "truth", None)] if truth is not None else []
        drawn.append((image, predicted, PREDICTION, title, None if truth is None else np.isnan(truth[:, 0])))
    n, together = len(panels), len(drawn) // len(panels)  # a row does not end between truth and prediction
    columns = min(n, max(1, round(math.sqrt(2 * n / together))))
    rows = math.ceil(n / columns)
    size = (PANEL * columns * together, (PANEL + 0.45) * rows)
    _, axes = plt.subplots(rows, columns * together, figsize=size, dpi=120, squeeze=False)
    for ax in axes.flat:
        ax.set_axis_off()
        ax.set(xticks=[], yticks=[])  # matplotlib lays out invisible ticks too: half of a figure's time
    for ax, (image, points, colour, title, hollow) in zip(axes.flat, drawn, strict=False):
        plot_points(ax, image, points, colour, hollow)
        ax.set_title(title, fontsize=9, parse_math=False)
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


def plot_points(
    ax: "Axes", image: np.ndarray, points: np.ndarray, colour: str, hollow: np.ndarray | None = None
) -> None:
    "Plot an image (height, width, 3), uint8 or in 0..1, with points (n_points, 2) in its pixels; 971 dots do not hide a face."
    height, width = image.shape[:2]
    ax.imshow(image, interpolation="nearest", extent=(-0.5, width - 0.5, height - 0.5, -0.5))
    area = 2.0 if len(points) > 200 else 12.0 if len(points) > 20 else 30.0
    hollow = np.zeros(len(points), bool) if hollow is None else hollow
    ax.scatter(*points[~hollow].T, s=area, c=colour, linewidths=0)
    ax.scatter(*points[hollow].T, s=area, facecolors="none", edgecolors=colour, linewidths=0.5)
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


def svg(
    draw: Callable[["Axes"], None],  # plots on the axes
    name: str,  # of the figure, of which the ids in the SVG are made
    size: tuple[float, float],  # inches
) -> str:
    "Return a figure as an `<svg>` element for a page: text and axes have the page's text colour, the background is clear."
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    inked = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
    style: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 10, "legend.frameon": False}
    style |= {"axes.spines.top": False, "axes.spines.right": False, "grid.alpha": 0.25, "grid.color": INK}
    with rc_context(style | dict.fromkeys(inked, INK)):
        figure = Figure(size, layout="constrained")
        draw(figure.subplots())
        figure.savefig(picture := BytesIO(), format="svg", transparent=True, metadata={"Date": None})
    text = picture.getvalue().decode()
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", text[text.index("<svg") :], flags=re.S)
    return text.replace(INK, "currentColor")


def draw_scores(
    ax: "Axes",
    curves: Sequence[tuple[str, np.ndarray, np.ndarray]],  # label, epochs, scores
) -> None:
    "Plot scores over epochs, on a logarithmic scale if they differ by more than a factor of 4."
    for k, (label, epochs, scores) in enumerate(curves):
        marker = "o" if len(scores) < 30 else ""
        ax.plot(epochs, scores, marker=marker, ms=3.5, lw=1.6, c=COLOURS[k % len(COLOURS)], label=label)
    _score_axis(ax, np.concatenate([scores for _, _, scores in curves]))
    from matplotlib.ticker import MaxNLocator

    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set(xlabel="epoch", ylabel="score")
    ax.grid(True, which="major")
    if len(curves) > 1:
        ax.legend(fontsize=9)


def _score_axis(ax: "Axes", values: np.ndarray) -> None:
    values = values[np.isfinite(values) & (values > 0)]
    if len(values) and values.max() > 4 * values.min():
        ax.set_yscale("log")
        ax.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
        ax.yaxis.set_minor_formatter(lambda y, _: f"{y:g}" if values.max() < 12 * values.min() else "")


def draw_tradeoff(ax: "Axes", points: np.ndarray) -> None:
    "Plot numbered points (n, 3): minutes, score, standard deviation of the score, NaN: not known."
    for k, (minutes, score, spread) in enumerate(points):
        colour = COLOURS[k % len(COLOURS)]
        ax.errorbar(minutes, score, None if np.isnan(spread) else spread, fmt="o", ms=4, capsize=3, c=colour)
        ax.annotate(str(k + 1), (minutes, score), xytext=(5, 4), textcoords="offset points")
    _score_axis(ax, points[:, 1])
    ax.set(xlabel="minutes", ylabel="score")
    ax.grid(True, which="major")


def draw_landmarks(ax: "Axes", shape: np.ndarray, errors: np.ndarray, named: Sequence[int]) -> None:
    """Plot the landmarks' errors (n_points,), NaN: none, on the mean shape (n_points, 2), y down.

    Five sizes and colours, with their largest error in the legend. The numbers of the `named` landmarks stand beside the
    shape, each joined to its point: neighbours would cover each other's.
    """
    limits = np.nanquantile(errors, LEVELS)
    small = 1.8 if len(shape) > 200 else 4.0
    for k, colour in enumerate(LEVEL_COLOURS):
        points = shape[(errors <= limits[k]) & (errors > (limits[k - 1] if k else -1.0))]
        label = f"\u2264 {limits[k]:.3g} px"
        ax.plot(*points.T, "o", ms=small * (1 + 0.35 * k), c=colour, mew=0, label=label)
    (left, top), (right, bottom) = shape.min(0), shape.max(0)
    heights = np.linspace(top, bottom, len(named))
    for landmark, y in zip(sorted(named, key=lambda k: shape[k, 1]), heights, strict=True):
        x = right + 0.12 * (right - left)
        ax.plot([shape[landmark, 0], x], [shape[landmark, 1], y], c=INK, lw=0.5, alpha=0.6)
        ax.text(x + 0.02 * (right - left), y, str(landmark), va="center", fontsize=9)
    ax.set_aspect("equal")
    ax.invert_yaxis()
    ax.set_axis_off()
    ax.legend(fontsize=9, loc="upper center", bbox_to_anchor=(0.5, 0.0), ncol=3, handletextpad=0.1, columnspacing=0.8)


def draw_cumulative(ax: "Axes", errors: np.ndarray, threshold: float) -> None:
    "Plot the share of images (y) whose error is at most x: nine tenths of them, and up to twice a threshold, which is marked."
    errors = np.sort(errors)
    end = max(2 * threshold, np.quantile(errors, 0.9))
    kept = np.unique(np.linspace(0, len(errors) - 1, min(len(errors), DOTS)).astype(int))
    x, y = np.r_[0, errors[kept], max(errors[-1], end)], np.r_[0, (kept + 1) / len(errors), 1]
    ax.step(x, 100 * y, where="post", c=COLOURS[0], lw=1.8)
    ax.axvline(threshold, c=COLOURS[3], lw=1.2, ls="--")
    ax.set(xlabel="NME (box_diag)", ylabel="% of the images", xlim=(0, end), ylim=(0, 101))
    ax.grid(True)


def draw_against(ax: "Axes", x: np.ndarray, y: np.ndarray, label: str) -> None:
    "Plot errors y over x, a dot an image, and the medians of bins of equally many images."
    order = np.argsort(x, kind="stable")
    dots = order[np.unique(np.linspace(0, len(x) - 1, min(len(x), DOTS)).astype(int))]
    ax.plot(x[dots], y[dots], "o", ms=2.5, mew=0, alpha=0.45, c=COLOURS[0])
    bins = np.array_split(order, min(BINS, max(1, len(x) // 5)))
    if len(bins) > 1:
        ax.plot([np.median(x[b]) for b in bins], [np.median(y[b]) for b in bins], "-o", ms=4, lw=1.8, c=COLOURS[1])
    ax.set(xlabel=label, ylabel="NME (box_diag)", ylim=(0, 1.05 * np.quantile(y, 0.99)))
    ax.grid(True)
