"""`LandmarkDL`: fastai's `TfmdDL` with an order that (seed, epoch) decides, and workers that are started once."""

from collections.abc import Iterator

import numpy as np
import torch
from fastai.data.core import TfmdDL
from fastai.data.transforms import Normalize
from fastai.torch_core import set_seed, to_device
from torch.utils.data import DataLoader, get_worker_info

from landmarks_fastai import plots
from landmarks_fastai.data.augment import Augment
from landmarks_fastai.data.items import CropIndex
from landmarks_fastai.data.transforms import PointsToUnit
from landmarks_fastai.errors import UserError
from landmarks_fastai.settings import Settings
from landmarks_fastai.utils.fastai_internals import without_device, worker_count
from landmarks_fastai.utils.signals import leave_signals_to_parent, signals_blocked

WHOLE_EVERY = 4


class BatchMaker:
    """What makes batches of chosen rows, in this process or in a worker: the loader without its device.

    A worker that is spawned (Windows, macOS) gets it pickled. fastai sends the loader itself, whose `device` would have
    each worker open a CUDA context: 410 MB beside a 4 GB GPU.
    """

    def __init__(self, dl: "LandmarkDL"):
        self.dl = without_device(dl)
        self.dl.loader = None

    def __getitem__(self, rows: list[int]):
        """The batch of the rows, past all item transforms (None where every image is lost), and the rows that are in it.

        fastai would fill the places of skipped items up from the next batch: which rows a batch has must be a function
        of (epoch, batch), so that a stopped run goes on as it would have. Of a training batch's last image there are
        two: a batch norm takes no less.
        """
        found = [self.dl.do_item(row) for row in rows]
        items = [item for item in found if item is not None]
        for tfm in self.dl.after_item.fs:
            if isinstance(tfm, PointsToUnit):
                tfm.lost.end_batch(len(rows))
        if len(items) == 1 < len(rows) and self.dl.drop_last:
            items = items * 2
        seen = [int(row) for row, item in zip(rows, found, strict=True) if item is not None]
        return (self.dl.do_batch(items) if items else None), seen


def start_worker(number: int):
    "What fastai does at a worker's start, with signals left to the main process."
    leave_signals_to_parent()
    info = get_worker_info()
    set_seed(info.seed % 2**32)
    info.dataset.dl.wif()


class LandmarkDL(TfmdDL):
    """A `TfmdDL` whose order is a function of (seed, epoch), and which draws points so that they can be judged.

    An epoch may begin at a batch other than its first: where a run was stopped. `settings` are those of its DataBlock.
    """

    def __init__(self, dataset, settings: Settings | None = None, epoch: int = 0, **kwargs):
        self.settings, self.epoch, self.first, self.loader = settings or Settings(), epoch, 0, None
        self.crops: dict | None = None  # row -> map of its aligned crop, for a second pass
        self.seen: list[int] = []  # rows of the last pass whose image could be read
        super().__init__(dataset, **kwargs)

    def new(self, dataset=None, cls=None, **kwargs) -> "LandmarkDL":
        return super().new(dataset, cls, **{"settings": self.settings, "epoch": self.epoch} | kwargs)

    def __getstate__(self) -> dict:
        return self.__dict__ | {"loader": None}

    def before_iter(self):
        super().before_iter()
        for tfm in self.after_batch.fs:
            if isinstance(tfm, Augment):
                tfm.begin(self.epoch, self.first)

    def get_idxs(self) -> list[int]:
        """The rows of a pass. In a training batch with aligned crops every fourth image is whole: the first pass is trained too.

        Where `crops` is set, the rows are seen through these maps; None is the whole image.
        """
        rows = super().get_idxs()
        if self.crops is not None:
            return [CropIndex.of(i, self.crops[i]) if self.crops[i] else i for i in rows if i in self.crops]
        if self.shuffle and self.settings.shape:
            rows = [i if k % self.bs % WHOLE_EVERY == 0 else CropIndex.of(i) for k, i in enumerate(rows)]
        return rows[self.first * self.bs :]

    def shuffle_fn(self, idxs) -> list[int]:
        return np.random.default_rng([self.settings.seed, self.epoch]).permutation(np.asarray(idxs)).tolist()

    def __iter__(self) -> Iterator:
        "As fastai's. That one starts its workers anew at every pass: 2 s where they fork on two cores, 10 s where they spawn."
        self.randomize()
        self.before_iter()
        rows, self.seen = list(self.chunkify(self.get_idxs())), []
        for batch, seen in self.made(rows):
            if batch is None:
                continue
            self.seen += seen
            yield self.after_batch(to_device(tuple(batch), self.device))
        if rows and not self.seen:
            raise UserError(
                f"{self.items.labels.csv}: no image of {len(self.items)} rows can be read: is the folder still there?"
            )
        self.after_iter()

    def made(self, rows: list[list[int]]) -> Iterator:
        "The batches of the rows, made by the workers, which stay for the next pass, or by this process."
        if not worker_count(self):
            return map(BatchMaker(self).__getitem__, rows)
        tfms = [*self.after_item.fs, *self.before_batch.fs]
        if self.loader is None or self.tfms != tfms:  # workers have the transforms that they were started with
            self.loader = DataLoader(
                BatchMaker(self),
                sampler=(order := []),
                batch_size=None,
                num_workers=worker_count(self),
                collate_fn=_as_it_is,
                pin_memory=self.pin_memory,
                timeout=self.timeout,
                worker_init_fn=start_worker,
                persistent_workers=True,
                generator=torch.Generator(),  # torch's own seeds are then not drawn from: a step's random numbers are its own
            )
            self.order, self.tfms = order, tfms
        self.order[:] = rows
        with signals_blocked():  # the workers start here
            return iter(self.loader)

    def do_item(self, row):
        "As fastai's; without a row, the first that is not skipped: fastai learns from it what an item is."
        if row is not None:
            return super().do_item(row)
        return next(item for k in range(len(self.dataset)) if (item := super(LandmarkDL, self).do_item(k)) is not None)

    def show_batch(self, b=None, max_n: int = 9, ctxs=None, show: bool = True, **kwargs):
        "Draw the truth on each input."
        if not show:
            return super().show_batch(b, max_n, ctxs, show, **kwargs)
        plots.plot_batch(self.one_batch() if b is None else b, self.picture, max_n)

    def show_results(self, b, out, max_n: int = 9, ctxs=None, show: bool = True, **kwargs):
        "Draw truth beside prediction on each input, the score of the image in its title."
        if not show:
            return super().show_results(b, out, max_n, ctxs, show, **kwargs)
        plots.plot_batch(b, self.picture, max_n, out)

    def picture(self, images: torch.Tensor) -> np.ndarray:
        "Images of a batch (batch, 3, h, w) -> pixels to show (batch, h, w, 3) in 0..1."
        for normalize in (f for f in self.after_batch.fs if isinstance(f, Normalize)):
            images = images * normalize.std + normalize.mean
        return images.as_subclass(torch.Tensor).clamp(0, 1).permute(0, 2, 3, 1).cpu().numpy()


def _as_it_is(batch):
    return batch
