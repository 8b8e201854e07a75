"Rows become batches: the same map in training and validation, an order that the random seed decides, pixels that are the file's."

import numpy as np
import pytest
import torch
from PIL import Image

from landmarks_fastai.data.block import landmark_dataloaders, mean_shape
from landmarks_fastai.data.items import labelled_images
from landmarks_fastai.data.split import split_rows
from landmarks_fastai.errors import UserError
from landmarks_fastai.geometry import unit_to_input
from landmarks_fastai.metrics import points_in_image
from landmarks_fastai.settings import FITS, Settings
from landmarks_fastai.utils import hardware
from landmarks_fastai.utils.hardware import Machine
from tests.helpers import N_POINTS, N_TRAIN, dot, write_labelled_images

SETTINGS = Settings(size=48, batch_size=8)


def loaders(folder, workers=0, **changes):
    items = labelled_images(folder)
    return items, landmark_dataloaders(items, SETTINGS, machine=Machine(workers=workers), **changes)


def every(dl):
    parts = list(zip(*dl, strict=True))
    return [torch.cat([t.as_subclass(torch.Tensor) for t in p]) for p in parts]


@pytest.mark.parametrize("fit", FITS)
def test_the_points_of_a_batch_go_back_to_those_of_the_file(drawn, fit):
    items, dls = loaders(drawn, fit=fit)
    images, points, maps = every(dls.valid)
    rows = split_rows(N_TRAIN, SETTINGS)[1]
    assert images.shape == (8, 3, 48, 48) and points.shape == (8, N_POINTS, 2) and len(rows) == 8
    stored = points_in_image(points, maps, 48)
    assert stored.numpy() == pytest.approx(np.stack([items[int(r)].points for r in rows]), abs=1e-3)


def test_training_and_validation_see_an_image_alike(drawn):
    "fastai's Resize would crop at random in training: here the same row gives the same pixels on either side."
    items, dls = loaders(drawn)
    both = [dl.after_item(tuple(tl.tfms(items[3]) for tl in dl.dataset.tls)) for dl in dls]
    assert all(torch.equal(*(t.as_subclass(torch.Tensor) for t in pair)) for pair in zip(*both, strict=True))


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("size", [64, 97])
def test_a_dot_is_where_the_target_says_through_the_whole_pipeline(tmp_path, fit, size):
    "ImageBlock, PointsToInput, PointScaler and Normalize together: half a pixel lost on the way would fail."
    rng, images, places = np.random.default_rng(0), [], []
    for w, h in [(120, 90), (90, 121), (64, 64), (201, 150), (77, 140)] * 2:
        places.append((w / 2 + rng.uniform(-0.2, 0.2) * min(w, h), h / 2 + rng.uniform(-0.2, 0.2) * min(w, h)))
        images.append(Image.fromarray(np.rint(250 * dot(w, h, *places[-1], 4.0)).astype(np.uint8)).convert("RGB"))
    write_labelled_images(tmp_path, images, places)
    _, dls = loaders(tmp_path, fit=fit, size=size, valid_pct=0.5, batch_size=5)
    images, points, _ = every(dls.valid)
    grey = images.mean(1).double()
    across, down = torch.arange(size).double(), torch.arange(size).double()[:, None]
    mass = grey.sum((1, 2))
    centres = torch.stack([(grey * across).sum((1, 2)) / mass, (grey * down).sum((1, 2)) / mass], 1)
    assert centres.numpy() == pytest.approx(unit_to_input(points[:, 0].double(), size).numpy(), abs=0.05)


def test_points_outside_the_crop_stay_valid_targets(tmp_path):
    write_labelled_images(tmp_path, [Image.new("RGB", (200, 100))] * 10, [(-40, k) for k in range(10)])
    _, dls = loaders(tmp_path)
    _, points, maps = every(dls.valid)
    assert points[:, :, 0].max() < -1.5
    assert points_in_image(points, maps, 48)[:, 0].numpy() == pytest.approx(np.array([[-40, 8], [-40, 9]]), abs=1e-3)


def test_split_is_the_last_fifth_or_as_many_at_random():
    train, valid = split_rows(2719, SETTINGS)
    assert len(train) == 2175 and train.tolist() == list(range(2175)) and valid[-1] == 2718
    for seed in (1, 2):
        train, valid = split_rows(100, SETTINGS.replace(valid_random=True, valid_pct=0.3, split_seed=seed))
        assert (
            sorted([*train, *valid]) == list(range(100)) and len(valid) == 30 and valid.tolist() != list(range(70, 100))
        )
        assert (split_rows(100, SETTINGS.replace(valid_random=True, valid_pct=0.3, split_seed=seed))[1] == valid).all()


def test_the_order_is_a_function_of_seed_and_epoch_and_a_short_batch_is_dropped(drawn):
    orders = {}
    for seed, epoch in [(0, 0), (0, 0), (0, 1), (1, 0)]:
        _, dls = loaders(drawn, seed=seed, batch_size=12)
        dls.train.epoch = epoch
        points = every(dls.train)[1]
        assert len(points) == 24  # of 32 rows
        key = tuple(points[:, 0, 0].tolist())
        assert orders.setdefault((seed, epoch), key) == key
    assert len(set(orders.values())) == 3


SLOW_METHODS = [pytest.param(method, marks=pytest.mark.slow) for method in ("spawn", "forkserver")]


@pytest.mark.parametrize("method", ["fork", *SLOW_METHODS])
def test_workers_give_the_same_batches_and_have_the_limit_on_images_of_the_main_process(drawn, monkeypatch, method):
    if method not in torch.multiprocessing.get_all_start_methods():
        pytest.skip(f"no {method} on this system")
    alone, before = every(loaders(drawn)[1].train), torch.multiprocessing.get_start_method()
    torch.multiprocessing.set_start_method(method, force=True)
    try:
        _, dls = loaders(drawn, workers=2 if method == "fork" else 1)  # the others import everything again
        together = every(dls.train)
        monkeypatch.setattr(hardware, "_max_pixels", 1000)
        with pytest.raises(UserError, match="--max-pixels allows 0.001 million"):
            list(dls.valid)
    finally:
        torch.multiprocessing.set_start_method(before, force=True)
    assert all(map(torch.equal, alone, together))


def test_mean_shape_is_the_mean_of_the_targets(drawn):
    items, dls = loaders(drawn, aug=0.0, mirror="none", align=0.0)
    points = every(dls.train)[1]
    # an image that is decoded at half its size is half a stored pixel off where its sides are odd
    assert mean_shape(dls.train.items, SETTINGS) == pytest.approx(points.mean(0).numpy(), abs=2e-3)
