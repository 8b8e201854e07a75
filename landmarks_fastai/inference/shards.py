"""Predictions by several processes: each takes parts of the list and writes their results, the first joins them in order.

One process writes no parts. A part is a file, complete or absent, in the folder `predicted_parts` of the run. Its name is
a digest of all that its results depend on. So after a death the same command predicts only what is missing, in any number
of processes, and a part of other networks, pictures or flags is never joined.
"""

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from itertools import groupby, repeat
from pathlib import Path
from typing import IO, Any

import numpy as np

from landmarks_fastai.data.images import max_pixels
from landmarks_fastai.errors import UserError
from landmarks_fastai.inference.pictures import Picture, is_video
from landmarks_fastai.inference.predictor import PictureResult, Prediction, Predictor
from landmarks_fastai.runs.run import PARTS, Run
from landmarks_fastai.utils.distributed import (
    CommonProgress,
    is_first,
    next_number,
    on_first,
    process_ended,
    this_process,
)
from landmarks_fastai.utils.files import atomic_write, process_lock, reason
from landmarks_fastai.utils.signals import Stopped

FORMAT = 1  # of a part's file
SIZE = 1024  # pictures of a part: a process that dies loses so many, and at the end waits for no more
WAIT = 0.05  # seconds between two questions whether the others have finished
Progress = Callable[[Iterable, int], Iterable]


@contextmanager
def joined_parts(
    predictor: Predictor,
    run: Run,  # the parts are written to its folder, and removed when the block has ended without an error
    paths: Sequence[str],  # of all pictures and videos, the same in all processes
    predict: Callable[[range], Iterable[PictureResult]],  # of some rows of `paths`
    options: dict[str, Any],  # what else the results depend on, JSON types
    progress: Progress = lambda steps, total: steps,  # over the pictures of all processes
) -> Iterator[Iterator[PictureResult]]:
    """Predict all pictures, in this process or in those of torchrun. Yields an iterator of the results, in order.

    Of several processes the first has all results, when all parts are there; in the others the iterator is empty. Raises
    `UserError` if another prediction writes parts of this run, or if the processes do not see the same files; `Stopped`
    after a signal, or if another process has ended.
    """
    if not this_process().store:
        yield iter(progress(predict(range(len(paths))), len(paths)))
        return
    folder, key = run.folder / PARTS, _key(predictor, options)
    parts = cut_parts(paths, predictor.batch_size)
    with _first_holds(folder), _stop_message():
        names = on_first(lambda: [_part_name(key, paths[r.start : r.stop]) for r in parts])
        # a list of the folder: a network file system may remember for a minute that one file was absent
        found, first_key = on_first(lambda: (os.listdir(folder), key))
        _check_same(key == first_key, folder, paths)
        files = [folder / name for name in names]
        missing = [part for part in zip(parts, files, strict=True) if part[1].name not in found]
        if len(missing) < len(parts):
            print(f"{len(parts) - len(missing)} of {len(parts)} parts were predicted before", flush=True)
        with closing(_steps(predict, predictor, missing)) as steps:
            for _ in progress(steps, sum(len(rows) for rows, _ in missing)):
                pass
        yield _join(files, predictor) if is_first() else iter(())
        for file in files if is_first() else []:
            file.unlink(missing_ok=True)


def cut_parts(paths: Sequence[str], batch_size: int) -> list[range]:
    "Cut a list into parts of whole batches, so that these are the batches of one process. A video is a part."
    share = math.ceil(len(paths) / this_process().count)
    size = max(1, math.ceil(min(SIZE, share) / batch_size)) * batch_size
    parts, start = [], 0
    for video, group in groupby(paths, lambda path: is_video(Path(path))):
        stop, step = start + len(list(group)), 1 if video else size
        parts += [range(k, min(k + step, stop)) for k in range(start, stop, step)]
        start = stop
    return parts


def _key(predictor: Predictor, options: dict[str, Any]) -> str:
    networks = [network.digest for network in predictor.networks]
    return json.dumps([FORMAT, networks, predictor.flip_test, max_pixels(), options], sort_keys=True)


def _part_name(key: str, paths: Sequence[str]) -> str:
    "The digest of a part: of the key, and of path, size and time of each picture."
    digest = hashlib.sha256(key.encode())
    for path in paths:
        found = None
        with suppress(OSError, ValueError):
            found = os.stat(path)
        stamp = (found.st_size, found.st_mtime_ns) if found else ()
        digest.update(os.fsencode(path) + f"\0{stamp}\0".encode())
    return digest.hexdigest()


@contextmanager
def _first_holds(folder: Path) -> Iterator[None]:
    "The first process makes the folder and locks it; at the end it removes the folder unless there are parts in it."
    if not is_first():
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"{folder} cannot be made ({reason(e)}): choose another --out") from None
    try:
        with process_lock(folder / "lock") as held:
            if not held:
                raise UserError(f"{folder}: another predict.py is writing parts of this run: let it end")
            for leftover in folder.glob("*.tmp"):  # of a process that was killed
                leftover.unlink(missing_ok=True)
            yield
    finally:
        for each in (folder, folder.parent):
            with suppress(OSError):  # something is in it
                each.rmdir()


def _check_same(same_key: bool, folder: Path, paths: Sequence[str]) -> None:
    "Raise `UserError` if this process has another network than the first, or does not see its folders."
    if not same_key:
        raise UserError(
            "the networks or flags are not those of the first process: a checkpoint may have changed while it was opened, "
            "or --out is not shared: run the same command again, on each machine"
        )
    if not is_first() and not (folder / "lock").exists():
        raise UserError(f"{folder} of the first process is not on this machine: --out must be a shared folder")
    if paths and not os.path.lexists(paths[0]):
        raise UserError(f"{paths[0]} of the first process is not on this machine: pictures must be in a shared folder")


@contextmanager
def _stop_message() -> Iterator[None]:
    "Say that parts are saved, if the prediction is stopped or another process has ended."
    text = "finished parts are saved; the same command predicts the others"
    try:
        yield
    except KeyboardInterrupt as e:
        raise Stopped(text, getattr(e, "code", 130)) from None
    except RuntimeError as e:
        if not process_ended(e):
            raise
        raise Stopped(f"another process of the run has ended; {text}", 1) from None


def _steps(
    predict: Callable[[range], Iterable[PictureResult]],
    predictor: Predictor,
    missing: list[tuple[range, Path]],  # rows and files of parts
) -> Generator[None, None, None]:
    "Predict parts until none is left and all processes have finished; yield once for each result of any of them."
    common = CommonProgress()
    while (k := next_number("part")) < len(missing):
        rows, file = missing[k]
        predictor.unaligned = 0
        with atomic_write(file, "wb") as f:
            for result in predict(rows):
                _write_result(f, result)
                yield from repeat(None, common.update(1))
            f.write(json.dumps({"unaligned": predictor.unaligned}).encode())
    while not common.finished:
        yield from repeat(None, common.update(0, finished=True))
        time.sleep(WAIT)


def _join(files: list[Path], predictor: Predictor) -> Iterator[PictureResult]:
    "Yield the results of all parts; `predictor.unaligned` is that of all."
    predictor.unaligned = 0
    for file in files:
        try:
            with open(file, "rb") as f:
                while "unaligned" not in (head := json.loads(f.readline())):
                    yield _read_result(f, head, predictor.networks[0].settings.n_points)
                predictor.unaligned += head["unaligned"]
        except (OSError, ValueError, TypeError) as e:
            raise UserError(f"{file} cannot be read ({reason(e)}): delete it and run the same command again") from None


def _write_result(f: IO[bytes], result: PictureResult) -> None:
    "A line of JSON, in which an array is its dtype; then the points of each object and their spread, as bytes."
    f.write(json.dumps(vars(result), default=_describe).encode() + b"\n")
    for array in (array for each in result.objects for array in (each.points, each.confidence)):
        if array is not None:
            f.write(np.ascontiguousarray(array).data)


def _describe(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.dtype.str
    return value.name if isinstance(value, Picture) else vars(value)


def _read_result(f: IO[bytes], head: dict[str, Any], n_points: int) -> PictureResult:
    def read(dtype: str | None, *shape: int) -> Any:
        if dtype is None:
            return None
        return np.frombuffer(f.read(np.dtype(dtype).itemsize * math.prod(shape)), dtype).reshape(shape)

    head["picture"], head["size"] = Picture(head["picture"]), tuple(head["size"])
    for each in head["objects"]:
        each["points"], each["confidence"] = read(each["points"], n_points, 2), read(each["confidence"], n_points)
        each["box"] = each["box"] and tuple(each["box"])
    head["objects"] = [Prediction(**each) for each in head["objects"]]
    return PictureResult(**head)
