"Write drawn faces with exact landmarks in the competition's layout: `python -m landmarks_fastai.synthetic DIR`."

import argparse
import functools
import hashlib
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from landmarks_fastai.errors import UserError
from landmarks_fastai.synthetic.face_template import flip_indices_of_template
from landmarks_fastai.synthetic.faces import render_face
from landmarks_fastai.utils.hardware import available_cores
from landmarks_fastai.utils.parallel import bar
from landmarks_fastai.utils.signals import leave_signals_to_parent, signals_blocked

__all__ = ["render_face", "main", "make_sample", "flip_indices_of_template"]

FORMAT = 1  # to be raised when the same arguments give other bytes
SIDES = ("train", "test")
Progress = Callable[[Iterable, int], Iterable]


def _render_one(job: tuple[int, int], folder: str, n_points: int, n_asked: int, seed: int) -> tuple[str, str]:
    "Write the image (side, index); return its row of landmarks.csv and its row of test_points.csv."
    side, index = job
    rng = np.random.default_rng([seed, side, index])
    image, points = render_face(rng, n_points)
    name = hashlib.md5(f"{seed}/{side}/{index}".encode(), usedforsecurity=False).hexdigest() + ".jpg"
    image.save(Path(folder, SIDES[side], "images", name), quality=int(rng.integers(72, 96)))
    indices = rng.permutation(n_points)[:n_asked].tolist()
    return "\t".join([name, *map(str, np.rint(points).astype(int).ravel().tolist())]), f"{name}\t{indices}"


def _write_lines(path: Path, *lines: str) -> None:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")


def _write_sample(folder: Path, recipe: dict[str, int], processes: int, progress: Progress) -> None:
    "Write all files of a sample into an existing folder."
    n_train = recipe["n_train"]
    jobs = [(0, index) for index in range(n_train)] + [(1, index) for index in range(recipe["n_test"])]
    for side in SIDES:
        (folder / side / "images").mkdir(parents=True)
    numbers = {key: recipe[key] for key in ("n_points", "n_asked", "seed")}
    render, processes = functools.partial(_render_one, folder=str(folder), **numbers), min(processes, len(jobs) // 8)
    with ExitStack() as stack:
        run = map
        if processes > 1:  # spawned: forking a process that runs threads (torch, a notebook) can hang
            spawn = multiprocessing.get_context("spawn")
            pool = ProcessPoolExecutor(processes, mp_context=spawn, initializer=leave_signals_to_parent)
            stack.callback(pool.shutdown, cancel_futures=True)
            run = functools.partial(pool.map, chunksize=8)
        with signals_blocked():  # the workers start here
            drawn = run(render, jobs)
        rows = list(progress(drawn, len(jobs)))
    labels, test_points = zip(*rows, strict=True)
    header = "\t".join(["file_name", *(f"Point_M{i}_{axis}" for i in range(recipe["n_points"]) for axis in "XY")])
    _write_lines(folder / "train" / "landmarks.csv", header, *labels[:n_train])
    _write_lines(folder / "test" / "landmarks.csv", header, *labels[n_train:])
    _write_lines(folder / "test" / "test_points.csv", "file_name\tpoint_index_list", *test_points[n_train:])
    _write_lines(folder / "sample.json", json.dumps(recipe, indent=1))
    folder.chmod(0o755)  # `mkdtemp` created it for this user only


def _is_complete(folder: Path, recipe: dict[str, int]) -> bool:
    "Return whether the folder holds this sample already. Raises `UserError` if it holds something else."
    if not os.path.lexists(folder):
        return False
    if not folder.is_dir():
        raise UserError(f"{folder} is a file, not a folder; choose another name")
    try:
        stored = json.loads((folder / "sample.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        if any(folder.iterdir()):
            raise UserError(f"{folder} is not empty and holds no sample; choose another folder or empty it") from None
        return False
    if stored == recipe:
        return True
    keys = [key for key in recipe if not isinstance(stored, dict) or stored.get(key) != recipe[key]]
    raise UserError(f"{folder} holds a sample drawn with another {', '.join(keys)}; choose another folder or remove it")


def make_sample(
    folder: str | os.PathLike[str],
    n_train: int = 1200,
    n_test: int = 100,
    n_points: int = 971,
    seed: int = 0,
    n_asked: int = 30,  # point indices in each row of test_points.csv
    processes: int | None = None,  # None: one a core
    progress: Progress = bar,
) -> Path:
    """Write drawn faces in the competition's layout, with the true points of the test images, and return the folder.

    Coordinates in the files are pixels of the image as stored, rounded to integers (pixel centres). The same numbers
    give the same bytes, whatever `processes`. A folder that holds this sample already is not changed. Raises `UserError`
    for a folder that holds something else or cannot be written, and for numbers that are too small.
    """
    folder = Path(folder)
    numbers = {"n_train": n_train, "n_test": n_test, "n_points": n_points, "n_asked": n_asked, "seed": seed}
    recipe = {"format": FORMAT} | {key: int(number) for key, number in numbers.items()}
    for key in numbers:
        if recipe[key] < (least := 0 if key in ("n_test", "seed") else 1):
            raise UserError(f"{key} must be at least {least}, not {recipe[key]}")
    try:
        if _is_complete(folder, recipe):
            return folder
        folder.parent.mkdir(parents=True, exist_ok=True)
        # written under another name, so that an interrupted run leaves nothing
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            _write_sample(temporary, recipe, available_cores() if processes is None else processes, progress)
            try:
                temporary.replace(folder)
            except OSError:  # unless another process has finished the same sample
                if not _is_complete(folder, recipe):
                    raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as e:
        raise UserError(f"cannot write {folder}: {e.strerror or e}") from e
    return folder


def main(argv: list[str] | None = None) -> int:
    "Run the command `python -m landmarks_fastai.synthetic`; return the exit code."
    parser = argparse.ArgumentParser(
        prog="python -m landmarks_fastai.synthetic",
        description="Draw faces with exact landmarks, in the layout of Kaggle's Thousand Facial Landmarks.",
        epilog="DIR gets train/images, train/landmarks.csv, test/images, test/test_points.csv and, to score a"
        " submission, test/landmarks.csv. The same numbers give the same files; a complete sample is not drawn again.",
    )
    parser.add_argument("folder", metavar="DIR", help="output folder; absent, empty, or with the same sample in it")
    add = functools.partial(parser.add_argument, type=int, metavar="N")
    add("--train", dest="n_train", default=1200, help="training images (default %(default)s)")
    add("--test", dest="n_test", default=100, help="test images (default %(default)s)")
    add("--points", dest="n_points", default=971, help="landmarks of each face (default %(default)s)")
    add("--seed", default=0, help="random seed (default %(default)s)")
    args = vars(parser.parse_args(argv))
    try:
        folder = make_sample(**args)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    print("{n_train} train and {n_test} test faces with {n_points} landmarks each are in ".format(**args) + str(folder))
    return 0
