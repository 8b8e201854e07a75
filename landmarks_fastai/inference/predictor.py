"""Checkpoint + images -> points in pixels of the images as stored.

This is a loop of its own: a Learner needs training data, and `get_preds` returns all predictions at once, which is too
much memory for 100,000 images of 971 points.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, default_collate

from landmarks_fastai.competition import (
    TestPoints,
    read_test_points,
    round_points,
    submission_header,
    submission_line,
)
from landmarks_fastai.data.align import Alignment, report_unaligned
from landmarks_fastai.data.block import alignment_of
from landmarks_fastai.data.checks import check_images
from landmarks_fastai.data.flip import predict_with_flip
from landmarks_fastai.data.image_cache import Inputs
from landmarks_fastai.data.items import CropIndex
from landmarks_fastai.data.labels import data_folder
from landmarks_fastai.errors import BadData, UserError
from landmarks_fastai.metrics import points_in_image
from landmarks_fastai.runs.checkpoint import Checkpoint
from landmarks_fastai.runs.run import Run
from landmarks_fastai.settings import INPUT, Settings
from landmarks_fastai.utils.files import atomic_write
from landmarks_fastai.utils.hardware import Machine
from landmarks_fastai.utils.memory import batch_that_fits, check_shared_memory, check_worker_died, out_of_memory
from landmarks_fastai.utils.parallel import threaded_map
from landmarks_fastai.utils.signals import leave_signals_to_parent, signals_blocked

CHUNK = 64  # batches of a first pass before their second pass: workers idle between two passes


class FittedImages(Dataset):
    "Images as the network's input, uint8 (3, size, size), each with its map (6,)."

    def __init__(
        self,
        folder: Path,
        names: Sequence[str] | np.ndarray,  # of the files
        settings: Settings,
        where: Callable[[int], str] = lambda row: "",  # first words of an error message about a row
    ):
        self.folder, self.names, self.where = folder, np.array([os.fsencode(name) for name in names]), where
        self.inputs = Inputs(**settings.of(INPUT))

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, row: int) -> tuple[torch.Tensor, torch.Tensor]:
        "Return the row's input and map: of the whole image, or of the crop of a `CropIndex`."
        path = self.folder / os.fsdecode(self.names[row])
        if isinstance(row, CropIndex) and row.to_input:
            fitted, to_input = self.inputs.crop(row, path, row.to_input, self.where(row), cached=False)
        else:
            fitted, to_input = self.inputs(row, path, self.where(row))
        return torch.from_numpy(np.asarray(fitted).transpose(2, 0, 1).copy()), torch.tensor(to_input)


class LineOf:
    "The file and line of a row, for the error message of an image that cannot be read."

    def __init__(self, test_points: TestPoints):
        self.csv, self.lines = test_points.csv, test_points.lines

    def __call__(self, row: int) -> str:
        return f"{self.csv} line {self.lines[row]}: "


def predict_batches(
    checkpoint: Checkpoint,
    images: FittedImages,
    machine: Machine = Machine(),  # noqa: B008
    batch_size: int = 32,
    flip_indices: Sequence[int] = (),  # for the flip test; empty: none
) -> Iterator[np.ndarray]:
    """Yield float32 arrays (batch, n_points, 2), pixels of the images as stored, in the order of the images.

    Raises `UserError` for an image that cannot be read, and if the memory is too small for a batch.
    """
    settings, device = checkpoint.settings, machine.device
    check_shared_memory(machine, batch_size * 3 * settings.size**2)
    # torch's annotation of `to` lacks memory_format
    model = fuse_norms(checkpoint.model(), settings.size).to(device, memory_format=machine.memory_format)  # pyright: ignore[reportCallIssue]
    if machine.compile:
        model.compile()
    mean, std = (torch.tensor(v, device=device).view(1, 3, 1, 1) for v in (settings.mean, settings.std))

    def points_of(batch: Sequence[torch.Tensor]) -> np.ndarray:
        pixels, maps = batch
        inputs = (pixels.to(device, non_blocking=True).float() / 255 - mean) / std
        with torch.inference_mode(), machine.autocast():
            unit = predict_with_flip(model, inputs.contiguous(memory_format=machine.memory_format), flip_indices)
        return points_in_image(unit, maps, settings.size).float().cpu().numpy()

    def one_step(n: int) -> None:
        points_of(
            (torch.zeros(n, 3, settings.size, settings.size, dtype=torch.uint8), torch.eye(2, 3).flatten().expand(n, 6))
        )

    try:
        yield from batches_of_points(points_of, images, machine, batch_size, alignment_of(settings))
    except Exception as e:
        check_worker_died(e)
        if not out_of_memory(e):
            raise
        fits = batch_that_fits(e, one_step, batch_size)
        way = f"-b {fits} fits (tried here)" if fits else "no smaller one fits"
        raise UserError(f"-b {batch_size}: not enough memory for such a batch: {way}") from None


def batches_of_points(
    points_of: Callable[[Sequence[torch.Tensor]], np.ndarray],  # (inputs, maps) -> points (batch, n_points, 2)
    images: FittedImages,
    machine: Machine,
    batch_size: int,
    alignment: Alignment | None = None,
) -> Iterator[np.ndarray]:
    "Yield `points_of` each batch of the images, in order; with an alignment, of the aligned crops in a second pass."
    rows = [range(k, min(k + batch_size, len(images))) for k in range(0, len(images), batch_size)]
    use_loader = machine.workers or machine.device != "cpu" or machine.compile
    one_pass = (_with_loader if use_loader else _with_threads)(points_of, images, machine)
    if not alignment:
        yield from one_pass(rows)
        return
    unaligned = 0
    for k in range(0, len(rows), CHUNK):
        first = rows[k : k + CHUNK]
        maps = [alignment.maps(points) for points in one_pass(first)]
        unaligned += sum(found.count(None) for found in maps)
        yield from one_pass([list(map(CropIndex.of, *each)) for each in zip(first, maps, strict=True)])
    report_unaligned(unaligned, len(images))


Pass = Callable[[Sequence[Sequence[int]]], Iterator[np.ndarray]]  # the rows of each batch -> their points


def _with_threads(points_of: Callable, images: FittedImages, machine: Machine) -> Pass:
    return lambda rows: threaded_map(lambda batch: points_of(default_collate([images[row] for row in batch])), rows)


def _with_loader(points_of: Callable, images: FittedImages, machine: Machine) -> Pass:
    order: list[Any] = []  # the rows of each batch of a pass
    loader = DataLoader(
        images,
        batch_sampler=order,
        num_workers=machine.decoders,
        pin_memory=machine.pins,
        worker_init_fn=leave_signals_to_parent,
        persistent_workers=machine.decoders > 0,
    )

    def one_pass(rows: Sequence[Sequence[int]]) -> Iterator[np.ndarray]:
        order[:] = rows
        with signals_blocked():  # the workers start here
            return map(points_of, iter(loader))

    return one_pass


def fuse_norms(model: nn.Module, size: int) -> nn.Module:
    """Fold each batch norm into the convolution before it, if torch.fx can trace the network.

    The outputs before and after are compared; if they differ, the network is returned unchanged.
    """
    from torch.fx.experimental.optimization import fuse

    inputs = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    try:
        with torch.no_grad():
            fused = fuse(model)
            same = torch.allclose(fused(inputs), model(inputs), atol=1e-4)
    except Exception:  # a network that fx cannot trace may raise anything
        return model
    return fused if same else model


def predict_test(
    checkpoint: Checkpoint,
    data: str | Path,  # a folder in the competition's layout
    run: Run,  # submit.csv, points.npy and points.json are written to its folder
    rounding: str = "nearest",  # of the submission: nearest, floor or none
    machine: Machine = Machine(),  # noqa: B008
    batch_size: int = 32,
    flip_test: bool = False,  # no effect if the checkpoint has no flip map
    progress: Callable[[Iterable, int], Iterable] = lambda batches, total: batches,
) -> int:
    """Predict the test images, and write the submission and all points; returns the number of images.

    points.npy is float32 (images, n_points, 2), pixels of the images as stored; points.json lists the file names in
    the same order. All three files are written completely or not at all. Raises `UserError` without test_points.csv, and
    `BadData` with every bad image.
    """
    side = data_folder(data) / "test"
    if not os.path.isfile(side / "test_points.csv"):
        raise UserError(f"{side / 'test_points.csv'} not found: it says which points of which images to submit")
    test_points = read_test_points(side / "test_points.csv")
    n_points = checkpoint.settings.n_points
    test_points.check_range(n_points)
    found = check_images(test_points, side / "images")
    if len(found.rows):
        raise BadData(map(found.problem, found.rows.tolist()), len(found.rows))
    images = FittedImages(side / "images", test_points.names, checkpoint.settings, LineOf(test_points))
    flip_indices = checkpoint.settings.flip_indices if flip_test else ()
    batches = predict_batches(checkpoint, images, machine, batch_size, flip_indices)
    with (
        atomic_write(run.file("points.json")) as names,
        atomic_write(run.file("points.npy"), "wb") as points,
        atomic_write(run.file("submit.csv")) as submission,
    ):
        json.dump(test_points.names, names, ensure_ascii=False, indent=0)
        head = {"descr": "<f4", "fortran_order": False, "shape": (len(test_points), n_points, 2)}
        np.lib.format.write_array_header_1_0(points, head)
        submission.write(submission_header(test_points.indices.shape[1]))
        row = 0
        for batch in progress(batches, -(-len(test_points) // batch_size)):
            points.write(np.ascontiguousarray(batch).data)
            for each in batch:
                submission.write(
                    submission_line(test_points.names[row], round_points(each[test_points.indices[row]], rounding))
                )
                row += 1
    return row
