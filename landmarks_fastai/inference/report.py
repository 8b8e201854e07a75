"The page of a run, runs/NAME/report.html: what it scores, where it errs, and how to make it again; and a page of several runs."

import base64
import io
from collections.abc import Sequence
from contextlib import suppress
from functools import reduce
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np
import pandas as pd
from markupsafe import Markup
from PIL import Image

from landmarks_fastai import plots
from landmarks_fastai.data.items import LabelledImage, labelled_images
from landmarks_fastai.data.split import divided_rows
from landmarks_fastai.errors import UserError
from landmarks_fastai.geometry import square_map
from landmarks_fastai.inference.predictor import Predictor
from landmarks_fastai.inference.row_errors import RowErrors, circumstances
from landmarks_fastai.inference.scoring import Scores, predict_rows, score_rows
from landmarks_fastai.inference.torch_network import open_checkpoint
from landmarks_fastai.metrics import THRESHOLD, image_score
from landmarks_fastai.runs.checkpoint import Checkpoint
from landmarks_fastai.runs.run import Record, Run, read_record
from landmarks_fastai.utils.files import write_text
from landmarks_fastai.utils.hardware import Machine

PICTURES = (6, 3, 3)  # worst, around the median, best
SIDE = 320  # of a picture, in pixels
MARGIN = 1.25  # side of a picture, as a multiple of that of the box of all its points
FIGURE = (3.6, 2.7)  # inches
POINTS, LINES = 1000, 150  # drawn in a picture, at the most; more lines hide the face
WORST = 10  # landmarks in the table
SAMPLE = 1000  # images whose pixels are looked at for brightness and sharpness: 2 to 10 ms each
AGAINST = {"size": "size of the object, px", "tilt": "tilt, degrees", "brightness": "brightness, 0 to 255",
           "sharpness": "sharpness, %", "spread": "spread / size of the object"}  # fmt: skip


class Stage(NamedTuple):
    "What a run's folder says about its stage."

    run: Run
    record: Record  # without a script if there is none
    history: pd.DataFrame  # history.csv; empty if there is none

    @property
    def scores(self) -> np.ndarray:
        "The score of each epoch; NaN: not finite."
        values = self.history.get("score", pd.Series(dtype=float))
        return np.asarray(pd.to_numeric(values, errors="coerce"), float)

    @property
    def best(self) -> float:
        "The score of the stage's checkpoint: of the best epoch, or of the loaded model if that is better."
        return float(np.fmin.reduce([*self.scores, *(self.record.loaded or [np.inf])[:1]]))

    @property
    def seconds(self) -> int:
        "The time of its epochs."
        times = self.history["time"] if "time" in self.history else []
        return sum(reduce(lambda total, part: 60 * total + int(part), str(time).split(":"), 0) for time in times)


def stages_of(folder: Path) -> list[Stage]:
    "The stages that led to a run, the first one first, as far as their folders are still there."
    stages: list[Stage] = []
    while folder.is_dir() and folder not in {stage.run.folder for stage in stages}:
        try:
            history = pd.read_csv(folder / "history.csv", dtype={"time": str})
        except (OSError, ValueError):
            history = pd.DataFrame()
        run, record = Run(folder.parent, folder.name), None
        with suppress(UserError):
            record = read_record(run)
        if record is None and history.empty:  # the folder of a checkpoint that is not of a run
            break
        stages.insert(0, Stage(run, record or Record(""), history))
        if record and record.checkpoint:
            folder = Path(record.checkpoint).parent
    return stages


def write_report(
    path: Path,  # of the page
    checkpoint: Checkpoint,
    predictor: Predictor,  # of the checkpoint
    errors: RowErrors,  # of the validation images
    scores: Scores,  # of the same pass
) -> None:
    "Write the page of a run. Raises `UserError` for a record or an image that cannot be read."
    stages, facts = stages_of(checkpoint.path.parent), checkpoint.facts
    nmes = errors.table.nme.dropna().to_numpy()
    by_landmark, counts = errors.landmark_errors, errors.landmarks[1].astype(int)
    ranked = np.argsort(-by_landmark)[: min(WORST, np.count_nonzero(counts))].tolist()  # NaN is last
    figures = {"scores": _scores_figure(stages)} if any(len(stage.scores) for stage in stages) else {}
    if facts.shape:
        shape = np.array(facts.shape).reshape(-1, 2)
        figures["landmarks"] = _figure(plots.draw_landmarks, "landmarks", (3.6, 4.2), shape, by_landmark, ranked)
    if len(nmes):
        figures["cumulative"] = _figure(plots.draw_cumulative, "cumulative", FIGURE, nmes, THRESHOLD)
    names = [f"{k} {name}" for k, name in enumerate(facts.point_names)] or range(facts.n_points)
    groups = {}
    for title, places in zip(("worst", "middle", "best"), errors.chosen(*PICTURES), strict=True):
        items = [errors.items[place] for place in places]
        groups[title] = [draw_item(item, result.objects[0].points) for item, result in predict_rows(predictor, items)]
    write_page(
        path,
        "report.html",
        kind="run",
        name=checkpoint.name, checkpoint=checkpoint, stages=stages, scores=scores, figures=figures, against=_against(errors, checkpoint),
        flip_test=bool(facts.flip_indices) and not checkpoint.settings.tta, n_points=int(counts.sum()),
        complete=counts.sum() == len(errors.table) * facts.n_points, n_nmes=len(nmes), threshold=THRESHOLD,
        auc=np.clip(1 - nmes / THRESHOLD, 0, None).mean() if len(nmes) else np.nan,
        failures=(nmes > THRESHOLD).mean() if len(nmes) else np.nan,
        landmarks=[(names[k], by_landmark[k], counts[k]) for k in ranked], groups=groups,
    )  # fmt: skip


def report_checkpoint(checkpoint: Checkpoint, data: str | None, machine: Machine) -> Path:
    """Predict the validation images of a checkpoint and write the page beside it; returns its path.

    `data` is the source of labels if it is not where the stage had it. Raises `UserError` if it does not fit.
    """
    settings = checkpoint.settings.replace(valid="")  # the checkpoint knows the sides of the rows
    facts = checkpoint.facts
    source = settings.data if data is None else data
    images = labelled_images(source, on_bad="skip", **checkpoint.settings.rows).fitted(facts, checkpoint.path)
    images.labels.earlier = checkpoint.sides
    items = images[divided_rows(images, settings.replace(all_rows=False))[1]]
    predictor = Predictor(open_checkpoint(checkpoint, machine), machine=machine, batch_size=settings.batch_size)
    errors = RowErrors(items, facts)
    scores = score_rows(predictor, [items[k] for k in range(len(items))], collect=errors.add)
    path = checkpoint.path.with_name("report.html")
    write_report(path, checkpoint, predictor, errors, scores)
    return path


def write_comparison(path: Path, checkpoints: Sequence[Checkpoint], board: dict[str, Any] | None = None) -> None:
    "Write a page of several runs: a table, and the scores of their epochs; of a comparison its leaderboard first."
    runs = [stages_of(checkpoint.path.parent) for checkpoint in checkpoints]
    scores = [np.array([score for stage in stages for score in stage.scores]) for stages in runs]
    curves = [(str(k), np.arange(len(values)), values) for k, values in enumerate(scores, 1)]
    figure = _figure(plots.draw_scores, "scores", (6.4, 4.0), curves) if curves else ""
    if board:
        board["figure"] = _figure(plots.draw_tradeoff, "tradeoff", (6.4, 4.0), board["points"])
    write_page(
        path,
        "report.html",
        kind="runs",
        name=board["name"] if board else ", ".join(c.name for c in checkpoints),
        board=board,
        runs=list(zip(checkpoints, runs, strict=True)),
        figure=figure,
    )


def write_page(path: Path, template: str, **values: Any) -> None:
    "Write a page of a template beside this file."
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("landmarks_fastai.inference", "."), autoescape=True, trim_blocks=True,
        lstrip_blocks=True, undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    environment.filters["g"] = lambda value, digits=4: (
        "–" if value is None or not np.isfinite(value) else f"{value:.{digits}g}"
    )
    write_text(path, environment.get_template(template).render(**values))


def _figure(draw: Any, name: str, size: tuple[float, float], *values: Any) -> Markup:
    return Markup(plots.svg(lambda ax: draw(ax, *values), name, size))


def _scores_figure(stages: Sequence[Stage]) -> Markup:
    "A curve a stage, over the epochs of all; a later one begins with the loaded model."
    curves, end = [], 0
    for k, stage in enumerate(stages, 1):
        loaded = stage.record.loaded[:1] if end and stage.record.loaded else []
        scores = np.array([*loaded, *stage.scores], float)
        curves.append((str(k), np.arange(end - len(loaded), end + len(stage.scores)), scores))
        end += len(stage.scores)
    return _figure(plots.draw_scores, "scores", FIGURE, curves)


def _against(errors: RowErrors, checkpoint: Checkpoint) -> list[tuple[str, int, Markup]]:
    "Figures of the error over what may cause it: name, number of images, figure."
    table = errors.table.dropna(subset="nme")
    table = table.iloc[:: max(1, -(-len(table) // SAMPLE))].copy()
    settings, causes = checkpoint.settings, []
    for place in table.index:
        try:
            causes.append(circumstances(errors.items[place], checkpoint.facts, settings.size, settings.fit))
        except UserError:  # the image has vanished
            causes.append({})
    table = table.join(pd.DataFrame(causes, table.index, [name for name in AGAINST if name != "spread"]))
    table["spread"] /= table["size"]
    figures = []
    for name, label in AGAINST.items():
        rows = table.dropna(subset=name)
        if len(rows) > 1:
            x, y = rows[name].to_numpy(), rows.nme.to_numpy()
            figures.append((name, len(rows), _figure(plots.draw_against, name, FIGURE, x, y, label)))
    return figures


def draw_item(item: LabelledImage, points: np.ndarray, joined: Sequence[int] = ()) -> dict[str, Any]:
    """Return what the page's macro `photo` shows of an image: its label, and points (n, 2) to compare it with; NaN: not known.

    Lines join the two of `joined` landmarks; without them those of every few.
    """
    labels, truth = item.images.labels, item.points
    both = np.concatenate([truth, np.where(np.isfinite(points), points, np.nan)]).astype(float)
    view = square_map(both, MARGIN, SIDE, 4.0 * MARGIN)
    ((pixels, to_input),) = item.picture.inputs([view], "pad", SIDE)
    Image.fromarray(pixels).save(jpeg := io.BytesIO(), "JPEG", quality=80)
    ends = [to_input.to_input(xy.astype(float)) + 0.5 for xy in (truth, points)]
    labelled, known = (~np.isnan(xy[:, 0]) for xy in ends)
    drawn = np.arange(len(truth)) % -(-len(truth) // POINTS) == 0
    rows = np.array(joined) if len(joined) else np.flatnonzero(drawn & labelled & known)
    pairs = np.hstack([xy[rows[:: max(1, -(-len(rows) // LINES))]] for xy in ends])
    lines = "".join(f"M{a:.1f} {b:.1f}L{c:.1f} {d:.1f}" for a, b, c, d in pairs)
    return {
        "image": base64.b64encode(jpeg.getvalue()).decode(), "side": SIDE, "name": labels.name(item.row),
        "where": labels.where(item.row), "group": labels.groups[item.row] if labels.groups is not None else "",
        "score": image_score(points, truth), "labelled": int((~np.isnan(truth[:, 0])).sum()), "total": len(truth), "lines": lines,
        "truth": _dots(ends[0][drawn & labelled]), "predicted": _dots(ends[1][drawn & labelled & known]),
        "unlabelled": _dots(ends[1][drawn & ~labelled & known]),
        "width": 2.2 if len(truth) > 200 else 4 if len(truth) > 20 else 6,
    }  # fmt: skip


def _dots(points: np.ndarray) -> str:
    "The path of round dots: lines without length."
    return "".join(f"M{x:.1f} {y:.1f}h0" for x, y in points)
