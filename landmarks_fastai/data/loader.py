"""`LandmarkDL`: fastai's `TfmdDL` with an order that depends on (seed, epoch) only, and persistent workers."""

import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from fastai.data.core import TfmdDL
from fastai.data.load import SkipItemException
from fastai.torch_core import set_seed, to_device
from fastcore.imports import noop
from torch.utils.data import DataLoader, Dataset, get_worker_info

from landmarks_fastai.data.align import alignment_of
from landmarks_fastai.data.augment import BatchAugmentation
from landmarks_fastai.data.checks import append_listing
from landmarks_fastai.data.items import LabelledImage
from landmarks_fastai.errors import MissingImage, UserError
from landmarks_fastai.settings import DataFacts, Settings
from landmarks_fastai.utils.fastai_internals import without_device, worker_count
from landmarks_fastai.utils.hardware import max_pixels, set_max_pixels
from landmarks_fastai.utils.signals import leave_signals_to_parent, signals_blocked

UNMOUNTED = 4  # unreadable images in a row of batches, each with more than half unreadable: the run stops


class BatchMaker(Dataset):
    """Make the batches of lists of rows, in this process or in a worker, with a loader that has no device.

    A spawned worker (Windows) gets it pickled. fastai pickles the loader itself, whose `device` makes each worker
    open a CUDA context: 410 MB of a 4 GB GPU.
    """

    def __init__(self, dl: "LandmarkDL"):
        self.dl = without_device(dl)
        self.dl.loader = None
        self.max_pixels = max_pixels()

    def __getitem__(self, rows: list[int]) -> tuple[Any, list[int], dict[int, str]]:
        """Return the batch of the rows (None if no image can be read), the rows that are in it, and those that are lost.

        fastai fills the places of skipped items from the next batch. Here the rows of a batch depend on (epoch, batch)
        only, so that a resumed run continues with the same batches. If a training batch has one image left, it is
        repeated: batch norm needs two.
        """
        self.dl.lost = {}
        made = [self.dl.do_item(row, self.dl.is_aligned(k)) for k, row in enumerate(rows)]
        items = [item for item in made if item is not None]
        if self.dl.drop_last and self.dl.share[1] > 1:  # all processes count the same number of images
            items = (items * len(rows))[: len(rows)]
        elif len(items) == 1 < len(rows) and self.dl.drop_last:
            items = items * 2
        seen = [int(row) for row, item in zip(rows, made, strict=True) if item is not None]
        return (self.dl.do_batch(items) if items else None), seen, self.dl.lost


def start_worker(number: int) -> None:
    "Set up a worker as fastai does, with the limit of the main process on images, and leave signals to that process."
    leave_signals_to_parent()
    info = get_worker_info()
    assert info is not None
    set_seed(info.seed % 2**32)
    maker = cast(BatchMaker, info.dataset)
    set_max_pixels(maker.max_pixels)
    maker.dl.wif()


class LandmarkDL(TfmdDL):
    """A `TfmdDL` whose order depends on (seed, epoch) only.

    `settings` and `facts` are those of its DataBlock. The next epoch starts at batch `first`: not 0 in a resumed run.

    `share` is (rank, number of processes). A training batch is this process's part of one that is so many times as large;
    of other rows each is in one process. Copies made by `new` have all rows.
    """

    share = (0, 1)

    def __init__(
        self,
        dataset: Any,
        settings: Settings | None = None,
        facts: DataFacts | None = None,
        epoch: int = 0,
        **kwargs: Any,
    ):
        self.settings, self.facts = settings or Settings(), facts or DataFacts()
        self.epoch, self.first = epoch, 0
        self.loader: DataLoader | None = None
        self.lost: dict[int, str] = {}  # rows of the batch whose image cannot be used -> why
        self.lost_in_a_row = 0  # in the last batches
        self.told: set[int] = set()  # rows that a warning was printed for
        self.seen: list[int] = []  # rows of the last pass whose image could be read
        self.has_crops = alignment_of(self.settings, self.facts) is not None
        super().__init__(dataset, **kwargs)

    def new(self, dataset: Any = None, cls: type | None = None, **kwargs: Any) -> "LandmarkDL":
        return super().new(
            dataset, cls, **{"settings": self.settings, "facts": self.facts, "epoch": self.epoch} | kwargs
        )

    def __getstate__(self) -> dict:
        return self.__dict__ | {"loader": None}

    def before_iter(self) -> None:
        super().before_iter()
        for tfm in self.after_batch.fs:
            if isinstance(tfm, BatchAugmentation):
                tfm.begin(self.epoch, self.first, self.share)

    def get_idxs(self) -> list[int]:
        "Return this process's rows of a pass."
        rows, (rank, processes) = cast("list[int]", super().get_idxs()), self.share
        if not self.drop_last:
            return rows[rank::processes][self.first * self.bs :]
        starts = range(self.first * self.bs * processes + rank * self.bs, len(rows), self.bs * processes)
        return [row for k in starts[: len(self) - self.first] for row in rows[k : k + self.bs]]

    def __len__(self) -> int:
        rank, processes = self.share
        if self.n is None or self.bs is None:
            return super().__len__()
        if self.drop_last:
            return self.n * self.passes // (self.bs * processes)
        return -(-len(range(rank, self.n, processes)) * self.passes // self.bs)

    @property
    def passes(self) -> int:
        "Passes over the rows in an epoch."
        return self.settings.repeats if self.shuffle else 1

    def shuffle_fn(self, idxs: Iterable[int]) -> list[int]:
        rng, rows = np.random.default_rng([self.settings.seed, self.epoch]), np.asarray(idxs)
        return np.concatenate([rng.permutation(rows) for _ in range(self.passes)]).tolist()

    def __iter__(self) -> Iterator:
        "As fastai's, which starts new workers for every pass: on two cores 2 s if they are forked, 10 s if they are spawned."
        self.randomize()
        self.before_iter()
        self.seen, all_lost = [], False
        for batch, seen, lost in self.made(cast("Iterable[list[int]]", self.chunkify(self.get_idxs()))):
            self.report_lost(lost, len(seen) + len(lost))
            all_lost = not self.seen and batch is None
            if batch is None:
                if self.drop_last and self.share[1] > 1:  # the others wait for this process's step
                    raise UserError(f"{self.items.labels.csv}: no image of a batch of {self.bs} can be read")
                continue
            self.seen += seen
            yield self.after_batch(to_device(tuple(batch), self.device))
        if all_lost:
            raise UserError(
                f"{self.items.labels.csv}: no image of {len(self.items)} rows can be read: is the folder still there?"
            )
        self.after_iter()

    def report_lost(self, lost: dict[int, str], size: int) -> None:
        """Print a warning for each image of a batch of `size` that became unreadable, once, and add it to the listing.

        Raises `UserError` if consecutive batches lose most of their images: then the folder is gone, not an image.
        """
        self.lost_in_a_row = self.lost_in_a_row + len(lost) if 2 * len(lost) > size else 0
        if self.lost_in_a_row >= UNMOUNTED:
            missing = f"{len(lost)} of {size} images of the batch are missing"
            raise UserError(f"{next(iter(lost.values()))}; {missing}: is the folder still there?")
        for row in sorted(lost.keys() - self.told):
            self.told.add(row)
            item: LabelledImage = self.items[row]
            with suppress(OSError):  # a full disk must not stop the run here
                if item.images.listing and not append_listing(item.images.listing, item.problem(lost[row])):
                    continue
            print(f"warning: {lost[row]}: the run goes on without it", file=sys.stderr, flush=True)

    def made(self, rows: Iterable[list[int]]) -> Iterator:
        """Make the batches of the rows, in workers that are kept for the next pass, or in this process.

        Of `show_batch(unique=True)` the rows never end.
        """
        if not worker_count(self):
            return map(BatchMaker(self).__getitem__, rows)
        tfms = [*self.after_item.fs, *self.before_batch.fs]
        if self.loader is None or self.tfms != tfms:  # a worker keeps the transforms that it was started with
            self.loader = DataLoader(
                BatchMaker(self),
                sampler=(order := cast("list[list[int]]", [])),
                batch_size=None,
                num_workers=worker_count(self),
                collate_fn=noop,
                pin_memory=self.pin_memory,
                timeout=self.timeout,
                worker_init_fn=start_worker,
                persistent_workers=True,
                generator=torch.Generator(),  # leaves torch's global random state, which is seeded for each step, as it is
            )
            self.order, self.tfms = order, tfms
        self.order[:] = rows
        with signals_blocked():  # the workers start here
            return iter(self.loader)

    def is_aligned(self, place: int) -> bool:
        "Whether the image at this place of a batch is an aligned crop. The whole ones of a training batch train the first pass."
        if not (self.shuffle and self.has_crops):
            return False
        return not (self.share[0] * self.bs + place) * self.settings.whole_pct % 1 < self.settings.whole_pct

    def do_item(self, row: int | None, aligned: bool = False) -> Any:
        """As fastai's; for None, which fastai passes to find the types of an item, the first item that is not skipped.

        A labelled image that cannot be used is skipped and added to `lost`, if it is missing or `on_bad` is "skip".
        """
        if row is None:
            return next(item for k in range(len(self.dataset)) if (item := self.do_item(k)) is not None)
        try:
            return self.after_item(self.create_item(row, aligned))
        except SkipItemException:
            return None
        except UserError as e:
            item = self.dataset.items[row]
            skipped = self.settings.on_bad == "skip" or isinstance(e, MissingImage)
            if not (skipped and isinstance(item, LabelledImage)):
                raise
            self.lost[row] = e.line
            return None

    def create_item(self, row: int, aligned: bool = False) -> Any:
        "As fastai's; if it is `aligned`, the item's aligned crop passes through the same pipelines."
        if not aligned:
            return self.dataset[row]
        item = replace(self.dataset.items[row], aligned=True)
        return tuple(tfms(item) for tfms in self.dataset.tls.attrgot("tfms"))
