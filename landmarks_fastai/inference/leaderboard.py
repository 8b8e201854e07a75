"The leaderboard of a comparison: leaderboard.csv, leaderboard.md and leaderboard.html in its folder."

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from landmarks_fastai.errors import UserError
from landmarks_fastai.inference.report import write_comparison
from landmarks_fastai.runs.checkpoint import read_checkpoint
from landmarks_fastai.runs.run import read_plan, results_of
from landmarks_fastai.utils.files import atomic_write, write_text

CONFIDENCE = 0.95  # of the interval of a difference
TITLES = {"combination": "combination", "score": "score", "nme_box_diag": "NME (box_diag)", "parameters": "M weights",
          "train_images_s": "train images/s", "predict_images_s": "predict images/s", "minutes": "minutes",
          "memory_mb": "memory MB", "file_mb": "file MB"}  # fmt: skip
NAMED = "A combination is named by the values that differ from the first ones. "
NOTE = (
    "Score: mean and standard deviation over the seeds, on the validation rows, with the flip test only where --tta is on. "
    "Images a second: of training's batches; of the prediction from files to points, with the flip test where there is a flip "
    "map. Minutes: of all stages of a seed, from start to end. Memory: the most that the process used, with --gpu its tensors."
)
RULE = (
    "Better: the 95% confidence interval of the mean difference, each seed of one with the same seed of the other, is below 0. "
    "Each pair of combinations is tested by itself."
)


def leaderboard(folder: Path) -> pd.DataFrame:
    """The leaderboard of a comparison's folder so far, a row a combination, the best mean score first.

    Columns: `combination`, and the flags that differ; `score`, the mean over the seeds, `score_sd`, its standard deviation,
    `scores`, of each seed, nan without a result, `seeds`, the number of results; `failed`, the lines of runs that failed; `pruned`,
    in a search; means over the seeds of `nme_box_diag`, `parameters` (millions), `train_images_s`, `predict_images_s`, `minutes` (of
    all stages), `memory_mb`, `file_mb`.
    """
    rows = {}
    for run in read_plan(folder)["runs"]:
        row = rows.setdefault(run["label"], {"combination": run["label"], **run["values"], "results": [], "failed": []})
        results = results_of(folder, run["stages"])
        row["results"] += [results]
        row["failed"] += [f"seed {run['seed']}: {run['failed']}"] if run["failed"] and not results else []
    for row in rows.values():
        results = pd.DataFrame(row.pop("results"), columns=[*TITLES][1:], dtype=float)
        scores = results["score"]
        row |= {"score": 0.0, "score_sd": scores.std(), "seeds": scores.count(), **results.mean()}
        row |= {"scores": " ".join(map(str, scores)), "failed": "; ".join(row["failed"])}
    return pd.DataFrame([*rows.values()]).sort_values("score", kind="stable", ignore_index=True)


def is_better(a: Sequence[float], b: Sequence[float]) -> bool:
    """Return whether `a`, the scores of one combination, a seed each, is lower than `b` by more than the spread over the seeds.

    A seed means the same order of images in both, the same first weights where the network is the same, and with
    --valid-random the same validation rows, so each score is compared with that of the same seed: the 95% confidence interval of
    the mean difference is below 0 (paired t, by `scipy.stats`). A seed that one of them lacks (nan) is left out. Each pair is
    tested by itself: of forty pairs of equals, one is expected to count as better by chance.
    """
    from scipy.stats import ttest_1samp

    gaps = np.subtract(a, b)
    gaps = gaps[~np.isnan(gaps)]
    if len(gaps) < 2 or np.ptp(gaps) == 0:
        return len(gaps) > 1 and bool(gaps[0] < 0)
    return bool(ttest_1samp(gaps, 0).confidence_interval(CONFIDENCE).high < 0)


def differences(samples: Mapping[str, Sequence[float]]) -> list[str]:
    "Say of each name, the best mean score first, which of those after it are worse, by `is_better`, and which may not be."
    counts = {name: int(np.isfinite(scores).sum()) for name, scores in samples.items()}
    known = sorted((name for name in samples if counts[name] > 1), key=lambda name: float(np.nanmean(samples[name])))
    seeds, sentences = " or ".join(map(str, sorted({counts[name] for name in known}))), []
    for k, name in enumerate(known):
        worse = [other for other in known[k + 1 :] if is_better(samples[name], samples[other])]
        same = [other for other in known[k + 1 :] if other not in worse]
        sentences += [f"{name} is better than {_join(worse)}."] if worse else []
        sentences += [f"{name} and {_join(same)} cannot be told apart with {seeds} seeds."] if len(same) == 1 else []
        sentences += [f"{name} cannot be told apart from {_join(same)} with {seeds} seeds."] if len(same) > 1 else []
    return sentences


def _join(names: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def write_leaderboard(folder: Path) -> pd.DataFrame:
    "Write the three files, of the runs that are finished, and return the `leaderboard`. Raises `UserError` without a plan."
    plan, board = read_plan(folder), leaderboard(folder)
    with atomic_write(folder / "leaderboard.csv") as file:
        board.to_csv(file, index=False, lineterminator="\n")
    samples = {k: [*map(float, text.split())] for k, text in zip(board["combination"], board["scores"], strict=True)}
    said = [
        f"{flag}: {sentence}".removeprefix(": ")
        for flag, labels in plan["groups"].items()
        for sentence in differences({value: samples[label] for value, label in labels.items()})
    ] or [plan["best"] or "No two combinations have two seeds yet, which it takes to compare them: --seeds 3."]
    said += [f"Failed: {row['combination']}, {row['failed']}" for row in board.to_dict("records") if row["failed"]]
    note, rule = (NOTE, "") if plan["best"] else (NAMED + NOTE, RULE)  # a search has one seed
    rows = [["", *TITLES.values()], *([str(k), *_cells(row)] for k, row in enumerate(board.to_dict("records"), 1))]
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    table = "\n".join([lines[0], "| --- " * len(rows[0]) + "|", *lines[1:]])
    parts = [f"# {folder.name}", f"    {plan['command']}", table, note, rule, "\n".join(f"- {line}" for line in said)]
    write_text(folder / "leaderboard.md", "\n\n".join(filter(None, parts)) + "\n")
    first = {run["label"]: run["stages"] for run in reversed(plan["runs"])}  # the first seed of each
    checkpoints = []
    for stages in (first[label] for label in board["combination"] if results_of(folder, first[label])):
        with suppress(UserError):  # a damaged one
            checkpoints.append(read_checkpoint(folder / stages[-1] / "best.pth"))
    points = board.dropna(subset="score")[["minutes", "score", "score_sd"]].to_numpy(float)
    more = {"name": folder.name, "command": plan["command"], "rows": rows, "note": note, "rule": rule, "said": said}
    write_comparison(folder / "leaderboard.html", checkpoints, more | {"points": points})
    return board


def _cells(row: dict[str, Any]) -> list[str]:
    if not row["seeds"]:
        said = row.get("pruned") or ("failed" if row["failed"] else "not run yet")
        return [row["combination"], said, *[""] * (len(TITLES) - 2)]
    spread = f" ± {row['score_sd']:.2g} ({row['seeds']} seeds)" if row["seeds"] > 1 else ""
    return [row["combination"], f"{row['score']:.4g}{spread}", *(f"{row[name]:.4g}" for name in [*TITLES][2:])]
