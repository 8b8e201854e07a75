"""DataBlock and DataLoaders: rows of `landmarks.csv` become batches of normalised images and unit coordinates.

An item passes `ImageBlock` and `PointBlock` with one transform of our own, `PointsToInput`. fastai's `Resize` crops at
random in training and truncates sizes; here images.py fits an image by the one map of geometry.py, in training and
validation alike.
A batch is (images, points, maps): the maps carry the metric back to pixels of the images as stored.
"""

import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from fastai.data.block import DataBlock
from fastai.data.core import TfmdDL
from fastai.data.load import _loaders
from fastai.data.transforms import Normalize
from fastai.torch_core import TensorBase, to_device
from fastai.vision.core import PILImage, TensorImage, TensorPoint
from fastai.vision.data import ImageBlock, PointBlock
from fasttransform import ItemTransform
from PIL import Image

from landmarks_fastai import drawing
from landmarks_fastai.augment import Augment
from landmarks_fastai.check import append_listing
from landmarks_fastai.errors import MissingImage, UserError
from landmarks_fastai.geometry import PixelMap, input_to_unit, pixel_map
from landmarks_fastai.images import Inputs, image_size, open_cache
from landmarks_fastai.labels import Labels
from landmarks_fastai.machine import Machine
from landmarks_fastai.mirror import ROWS
from landmarks_fastai.settings import INPUT, Settings

UNMOUNTED = 4  # images in a row that are gone, in batches that lack most of theirs


class TensorMap(TensorBase):
    "A `PixelMap` as four numbers, so that it collates with the item it belongs to."


def where_of(labels: Labels, row: int) -> str:
    "How an error about a row's image begins."
    return f"{labels.csv} line {labels.line(row)}: "


class RowImage:
    "The image of a row of the labels as the network's input; its `to_input` is the map from pixels of the image as stored."

    def __init__(self, labels: Labels, folder: Path, inputs: Inputs):
        self.labels, self.folder, self.inputs = labels, folder, inputs
        self.for_types = True  # fastai looks at the first row to learn what an item is: its image may be gone

    def __call__(self, row: int) -> PILImage:
        path = self.folder / self.labels.name(row)
        try:
            image, to_input = self.inputs(row, path, where_of(self.labels, row))
        except UserError:
            if not self.for_types:
                raise
            image, to_input = Image.new("RGB", (self.inputs.size, self.inputs.size)), PixelMap(1.0, 1.0, 0.0, 0.0)
        image = PILImage.create(image)
        image.to_input = to_input
        return image


class RowPoints:
    "The landmarks of a row of the labels, in pixels of the image as stored."

    def __init__(self, labels: Labels):
        self.labels = labels

    def __call__(self, row: int) -> np.ndarray:
        return self.labels.points(row)


class PointsToInput(ItemTransform):
    "(fitted image, points as stored) -> the image, the points in the network's input, and the map that led there."

    order = 0  # before PointScaler (1) takes the input's size and ToTensor (5) the pixels

    def encodes(self, item):
        image, points = item
        # PointScaler measures from the picture's edge; the half pixel from edge to centre is added for it here.
        moved = TensorPoint(image.to_input.to_input(points) + 0.5)
        return image, moved, TensorMap(torch.tensor(image.to_input))


class LandmarkDL(TfmdDL):
    """A `TfmdDL` whose order is a function of (seed, epoch), and which draws points so that they can be judged.

    An epoch may begin at a batch other than its first: where a run was stopped.

    A process that is spawned, not forked (Windows, macOS), gets its loader pickled. fastai's own transforms do not
    pickle (`PointBlock` wraps a function in a closure), so what is sent is the recipe, and the loader is made anew.
    """

    def __init__(self, dataset, seed: int = 0, epoch: int = 0, recipe: tuple = (), side: int = 0, **kwargs):
        self.seed, self.epoch, self.first, self.recipe, self.side = seed, epoch, 0, recipe, side
        super().__init__(dataset, **kwargs)

    def new(self, dataset=None, cls=None, **kwargs):
        own = {k: getattr(self, k) for k in ("seed", "epoch", "recipe", "side")}
        return super().new(dataset, cls, **own | kwargs)

    def __reduce__(self):
        batches = {"bs": self.bs, "drop_last": self.drop_last}
        return _loader_again, (self.recipe, self.side, batches, self._DataLoader__idxs)

    def before_iter(self):
        super().before_iter()
        for tfm in self.after_batch.fs:
            if isinstance(tfm, Augment):
                tfm.begin(self.epoch, self.first)

    def __iter__(self):
        "As fastai's, but that a pinned batch is copied to the GPU while that computes: fastai's waits for the copy."
        self.randomize()
        self.before_iter()
        self._DataLoader__idxs = self.get_idxs()
        misses = Misses(self.recipe[1] if self.recipe else None)
        for *batch, size, missed in _loaders[self.fake_l.num_workers == 0](self.fake_l):
            misses.count(size, missed, bool(batch))
            if not batch:
                continue
            yield self.after_batch(to_device(tuple(batch), self.device, non_blocking=self.pin_memory))
        misses.end()
        self.after_iter()

    def create_batches(self, samples):
        """The batches that fastai would collate of its items, each made at once.

        An item's way through fastai's pipelines takes 0.5 ms, of 19 that resnet18 trains on it: `after_item`'s transforms
        say what a batch is, a test holds this to them.
        """
        for chosen in self.chunkify(samples):
            rows, missed = [self.items[i] for i in chosen], []
            yield *self.whole_batch(rows, missed), len(rows), missed

    def whole_batch(self, rows, missed=None):
        """(images uint8 (batch, 3, size, size), points in unit coordinates, maps) of rows of the labels.

        Without those whose images are gone, or, with `--on-bad skip`, cannot be decoded: (row, why) goes to `missed`.
        Nothing where none is left. Of a training batch's last image there are two: a batch norm takes no less.
        """
        get_image, get_points = (tl.tfms.fs[0] for tl in self.dataset.tls)
        images, rows = self._images(get_image, rows, missed)
        if not images:
            return ()
        if missed and len(images) == 1 and self.drop_last:
            images, rows = images * 2, rows * 2
        maps = torch.tensor([image.to_input for image in images])
        pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
        points = torch.from_numpy(np.stack([get_points(row) for row in rows]))
        points = input_to_unit(PixelMap.of_batch(maps).to_input(points), pixels.shape[1])
        return TensorImage(pixels.permute(0, 3, 1, 2)), TensorPoint(points), TensorMap(maps)

    def _images(self, get_image, rows, missed):
        found = {}
        for place, row in enumerate(rows):
            try:
                found[place] = get_image(row)
            except UserError as e:
                if missed is None or not self._may_miss(e):
                    raise
                missed.append((int(row), e.line))
        return list(found.values()), [rows[place] for place in found]

    def _may_miss(self, error) -> bool:
        "Whether the run goes on without an image."
        skip = self.recipe and self.recipe[0].on_bad == "skip"
        return bool(self.recipe) and (skip or isinstance(error, MissingImage))

    def get_idxs(self):
        return super().get_idxs()[self.first * self.bs :]

    def shuffle_fn(self, idxs):
        return np.random.default_rng([self.seed, self.epoch]).permutation(np.asarray(idxs)).tolist()

    def show_batch(self, b=None, max_n=9, ctxs=None, show=True, **kwargs):
        "Draw the truth on each input."
        drawing.draw_batch(self.one_batch() if b is None else b, self._picture, max_n)

    def show_results(self, b, out, max_n=9, ctxs=None, show=True, **kwargs):
        "Draw truth beside prediction on each input, the contest's score of the image in its title."
        drawing.draw_batch(b, self._picture, max_n, out)

    def _picture(self, images):
        "Normalised images (batch, 3, h, w) -> pixels to show (batch, h, w, 3) in 0..1."
        normalise = next(f for f in self.after_batch.fs if isinstance(f, Normalize))
        return (images * normalise.std + normalise.mean).clamp(0, 1).permute(0, 2, 3, 1).cpu().numpy()


class Misses:
    "The rows that a pass over the images goes on without: each is told once a run, and listed."

    def __init__(self, labels: Labels | None):
        self.labels, self.in_a_row, self.nothing = labels, 0, True

    def count(self, size: int, missed, left: bool):
        "Raises `UserError` where most images of a batch, or of some small ones, are gone: a folder is, not an image."
        self.in_a_row = self.in_a_row + len(missed) if 2 * len(missed) > size else 0
        if self.in_a_row >= UNMOUNTED:
            raise UserError(f"{missed[0][1]}; so are {len(missed)} of a batch of {size}: is the folder still there?")
        self.nothing &= not left
        for row, why in missed:
            if row not in self.labels.lost:
                self.labels.lost.add(row)
                self.tell(row, why)

    def end(self):
        if self.nothing and self.in_a_row:
            raise UserError(
                f"{self.labels.csv}: no image of its rows to validate on is left: is the folder still there?"
            )

    def tell(self, row, why):
        print(f"warning: {why}: the run goes on without it", file=sys.stderr, flush=True)
        if self.labels.listing:
            with suppress(OSError):  # a full disk must not end a run over a list
                append_listing(
                    self.labels.listing, self.labels.problem(row, why.removeprefix(where_of(self.labels, row)))
                )


def _loader_again(recipe, side, batches, idxs):
    "In a spawned worker: the loader that `recipe` made, in the order that the main process drew."
    dl = make_dataloaders(*recipe)[side].new(**batches, num_workers=0)
    dl._DataLoader__idxs = idxs
    return dl


def split_rows(n: int, settings: Settings, left_out=()) -> tuple[np.ndarray, np.ndarray]:
    """Rows to train on and to validate on: the last `valid_pct` of the file, as the seed's, or as many at random.

    With `all_rows` the same rows are validated on, and trained on as well. Rows that are left out are taken out of the
    split of all: one that becomes bad between two stages moves no other from one side to the other.
    """
    n_train = int(n * (1 - settings.valid_pct) + 1e-9)
    rows = np.arange(n)
    if settings.valid_random:
        rows = np.random.default_rng(settings.split_seed).permutation(n)
    train, valid = rows[:n_train], rows[n_train:]
    train = np.arange(n) if settings.all_rows else train
    return np.setdiff1d(train, left_out), np.setdiff1d(valid, left_out)


def rows_of(labels: Labels, settings: Settings) -> tuple[np.ndarray, np.ndarray]:
    "`split_rows` of the labels. Raises `UserError` where a side has none."
    train, valid = split_rows(len(labels), settings, labels.left_out)
    n = f"{labels.csv}: {len(labels)} rows" + (f", {len(labels.left_out)} of them bad," if len(labels.left_out) else "")
    if not len(train):
        raise UserError(f"{n} leave none to train on: lower --valid-pct or add rows")
    if not len(valid):
        raise UserError(f"{n} leave none to validate on: mend them or raise --valid-pct")
    return train, valid


def some_shapes(settings: Settings, labels: Labels, at_most: int = ROWS) -> np.ndarray:
    "Landmarks (rows, n_points, 2) of training rows, evenly spaced, in pixels of the images as stored."
    rows, _ = rows_of(labels, settings)
    return np.stack([labels.points(row) for row in rows[:: max(1, -(-len(rows) // at_most))]])


def mean_shape(settings: Settings, labels: Labels, folder: Path, at_most: int = ROWS) -> np.ndarray:
    """The training rows' mean landmarks, (n_points, 2) unit coordinates of the input.

    Taken from at most 2,000 rows, evenly spaced: a mean of more moves by less than a hundredth of a face. Only the
    images' headers are read, so black borders count as image here: it is where training starts, not where it ends.
    """
    rows, _ = rows_of(labels, settings)
    rows = rows[:: max(1, -(-len(rows) // at_most))]
    total, n = np.zeros((labels.n_points, 2)), 0
    for row in rows:
        try:
            width, height = image_size(folder / labels.name(row), where_of(labels, row))
        except MissingImage:  # it will be missed again, and told, when it is trained on
            continue
        n += 1
        to_input = pixel_map(width, height, settings.fit, settings.size)
        total += input_to_unit(to_input.to_input(labels.points(row).astype(np.float64)), settings.size)
    return total / max(1, n)


def make_dataloaders(
    settings: Settings,
    labels: Labels,
    folder: Path,  # of the images
    machine: Machine = Machine(),  # noqa: B008
):
    """Training and validation `DataLoaders` of the labels' rows.

    Raises `UserError` where the rows are too few for a batch: a short last training batch is dropped.
    """
    train, valid = rows_of(labels, settings)
    if len(train) < settings.batch_size:
        raise UserError(
            f"{labels.csv}: {len(train)} training rows make no batch of {settings.batch_size}: use -b {len(train)}"
        )
    changes = []
    if settings.aug or settings.pairs:
        changes = [Augment(settings.aug, settings.pairs or None, settings.seed)]
    cache = None
    if machine.cache:
        cache = open_cache(folder, len(labels), **settings.of(INPUT), key={"labels": labels.key})
    inputs = Inputs(**settings.of(INPUT), cache=cache)
    block = DataBlock(
        blocks=(ImageBlock, PointBlock),
        dl_type=LandmarkDL,
        get_items=lambda labels: range(len(labels)),
        get_x=(get_image := RowImage(labels, folder, inputs)),
        get_y=RowPoints(labels),
        splitter=lambda rows: (train.tolist(), valid.tolist()),
        item_tfms=PointsToInput(),
        batch_tfms=[*changes, Normalize.from_stats(settings.mean, settings.std, cuda=False)],
    )
    dls = block.dataloaders(
        labels,
        bs=settings.batch_size,
        seed=settings.seed,
        recipe=(settings, labels, folder, machine),
        dl_kwargs=[{"side": 0}, {"side": 1}],
        num_workers=machine.decoders,
        device=torch.device(machine.device),
        pin_memory=machine.pins,
    )
    get_image.for_types = False
    return dls
