"""Make a set of drawn faces with exact landmarks in the competition's layout: `python -m landmarks_fastai.synthetic DIR`."""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from landmarks_fastai.errors import UserError
from landmarks_fastai.synthetic.face_template import flip_indices_of_template
from landmarks_fastai.synthetic.faces import render_face

__all__ = ["render_face", "main", "make_sample", "flip_indices_of_template"]

FORMAT = 1  # raise it when the same arguments begin to give other bytes
SIDES = ("train", "test")


def _name(seed: int, side: int, index: int) -> str:
    """A file name like the competition's: 32 hex digits."""
    return hashlib.md5(f"{seed}/{side}/{index}".encode(), usedforsecurity=False).hexdigest() + ".jpg"


def _render_one(job: tuple[int, int], folder: str, n_points: int, n_asked: int, seed: int) -> tuple[str, str]:
    """Write the picture (side, index); return its row of landmarks.csv and of test_points.csv."""
    side, index = job
    rng = np.random.default_rng([seed, side, index])
    image, points = render_face(rng, n_points)
    name = _name(seed, side, index)
    image.save(Path(folder, SIDES[side], "images", name), quality=int(rng.integers(72, 96)))
    asked = rng.permutation(n_points)[:n_asked].tolist()
    row = "\t".join([name, *map(str, np.rint(points).astype(int).ravel().tolist())])
    return row, f"{name}\t{asked}"


@contextmanager
def _mapper(processes: int) -> Iterator[Callable]:
    """`map`, in this process or in a pool."""
    if processes <= 1:
        yield map
        return
    # spawn, because forking a process that already runs threads (torch, a notebook) can hang
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield functools.partial(pool.map, chunksize=8)


def _write_rows(path: Path, header: list[str], rows: list[str]) -> None:
    path.write_text("\n".join(["\t".join(header), *rows]) + "\n", encoding="utf-8", newline="\n")


def _fill(folder: Path, recipe: dict, processes: int, progress: Callable[[int, int], object] | None) -> None:
    """Draw the whole set into an existing folder."""
    counts = (recipe["n_train"], recipe["n_test"])
    jobs = [(side, index) for side in (0, 1) for index in range(counts[side])]
    for side in SIDES:
        (folder / side / "images").mkdir(parents=True)
    draw = functools.partial(_render_one, folder=str(folder), **{k: recipe[k] for k in ("n_points", "n_asked", "seed")})
    rows = []
    with _mapper(min(processes, len(jobs) // 8)) as run:
        for row in run(draw, jobs):
            rows.append(row)
            if progress:
                progress(len(rows), len(jobs))
    header = ["file_name", *(f"Point_M{i}_{axis}" for i in range(recipe["n_points"]) for axis in "XY")]
    _write_rows(folder / "train" / "landmarks.csv", header, [row for row, _ in rows[: counts[0]]])
    _write_rows(folder / "test" / "landmarks.csv", header, [row for row, _ in rows[counts[0] :]])
    asked = [asked for _, asked in rows[counts[0] :]]
    _write_rows(folder / "test" / "test_points.csv", ["file_name", "point_index_list"], asked)
    (folder / "sample.json").write_text(json.dumps(recipe, indent=1) + "\n", encoding="utf-8", newline="\n")


def _is_done(folder: Path, recipe: dict) -> bool:
    """Whether folder already holds this very set; UserError if it holds something else."""
    if not os.path.lexists(folder):
        return False
    if not folder.is_dir():
        raise UserError(f"{folder} is a file, not a folder; give another name")
    try:
        made = json.loads((folder / "sample.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        if any(folder.iterdir()):
            raise UserError(f"{folder} is not empty and is no drawn sample; give another folder or empty it") from None
        return False
    if made == recipe:
        return True
    keys = [k for k in recipe if not isinstance(made, dict) or made.get(k) != recipe[k]]
    raise UserError(f"{folder} holds a sample drawn with another {', '.join(keys)}; give another folder or remove it")


def _check(recipe: dict) -> None:
    for key, least in (("n_train", 1), ("n_test", 0), ("n_points", 1), ("n_asked", 1), ("seed", 0)):
        if recipe[key] < least:
            raise UserError(f"{key} must be at least {least}, not {recipe[key]}")


def make_sample(
    folder: str | os.PathLike,
    n_train: int = 1200,
    n_test: int = 100,
    n_points: int = 971,
    seed: int = 0,
    n_asked: int = 30,
    processes: int | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> Path:
    """Write drawn faces in the competition's layout into folder and return it; the test side's truth is written as well.

    Coordinates in the files are pixels of the image as stored, rounded to integers (pixel centres). The same numbers
    give the same bytes, whatever `processes` (default: one a core). A folder that already holds this set is kept.
    """
    folder = Path(folder)
    recipe = {
        "format": FORMAT,
        "n_train": int(n_train),
        "n_test": int(n_test),
        "n_points": int(n_points),
        "n_asked": int(n_asked),
        "seed": int(seed),
    }
    _check(recipe)
    try:
        if _is_done(folder, recipe):
            return folder
        folder.parent.mkdir(parents=True, exist_ok=True)
        # filled beside its place and renamed, so that a broken run leaves no half of a set
        half = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            _fill(half, recipe, os.cpu_count() or 1 if processes is None else processes, progress)
            half.chmod(0o755)
            try:
                half.replace(folder)
            except OSError:  # another process that drew the same set was first
                if not _is_done(folder, recipe):
                    raise
        finally:
            shutil.rmtree(half, ignore_errors=True)
    except OSError as e:
        raise UserError(f"cannot write {folder}: {e.strerror or e}") from e
    return folder


def main(argv: list[str] | None = None) -> int:
    """The command `python -m landmarks_fastai.synthetic`; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m landmarks_fastai.synthetic",
        description="Draw faces with exact landmarks, in the layout of Kaggle's Thousand Facial Landmarks.",
        epilog="DIR gets train/images, train/landmarks.csv, test/images, test/test_points.csv and, to score a"
        " submission, test/landmarks.csv. The same numbers give the same files; a finished set is not drawn again.",
    )
    parser.add_argument("folder", metavar="DIR", help="folder to make; it must be absent, empty or this very set")
    for flag, dest, default, text in (
        ("--train", "n_train", 1200, "pictures to train on"),
        ("--test", "n_test", 100, "pictures to predict"),
        ("--points", "n_points", 971, "landmarks in each face"),
        ("--seed", "seed", 0, "another seed, other faces"),
    ):
        parser.add_argument(flag, dest=dest, type=int, default=default, metavar="N", help=f"{text} (default {default})")
    args = vars(parser.parse_args(argv))
    try:
        folder = make_sample(**args)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    print("{n_train} train and {n_test} test faces with {n_points} landmarks each are in ".format(**args) + str(folder))
    return 0


if __name__ == "__main__":
    sys.exit(main())
