"Batches made at once equal those of fastai's pipelines, to the last bit, and give way to a user's transform."

import shutil

import pytest
import torch
from fasttransform import ItemTransform

from landmarks_fastai.data.batch import has_own_tfms
from landmarks_fastai.data.block import landmark_dataloaders
from landmarks_fastai.settings import Settings
from landmarks_fastai.utils.hardware import Machine


class Unchanged(ItemTransform):
    "An item transform of a user, with which all items pass fastai's pipelines."

    calls = 0

    def encodes(self, item):
        Unchanged.calls += 1
        return item


def loaders(folder, cache=False, tfms=None, **changes):
    settings = Settings(size=48, batch_size=8).replace(**changes)
    return landmark_dataloaders(folder, settings, machine=Machine(workers=0, cache=cache), item_tfms=tfms)


def equal(a, b):
    return all(
        type(s) is type(t) and s.dtype == t.dtype and s.stride() == t.stride() and torch.equal(s, t)
        for x, y in zip(a, b, strict=True)
        for s, t in zip(x, y, strict=True)
    )


@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.parametrize("align", [0.0, 1.25])
def test_batches_equal_those_of_the_pipelines(drawn, tmp_path, cache, align):
    if cache:
        drawn = shutil.copytree(drawn, tmp_path / "data")  # others read `drawn` too
    slow, fast = loaders(drawn, tfms=[Unchanged()], align=align), loaders(drawn, cache, align=align)
    assert not has_own_tfms(slow.train) and has_own_tfms(fast.train) and has_own_tfms(fast.valid)
    for side in range(2):
        Unchanged.calls = 0
        expected = list(slow[side])
        assert Unchanged.calls == 8 * len(expected)
        for _ in range(2):  # while the cache is written, and from the cache
            found = list(fast[side])
            assert len(found) == len(expected) and equal(found, expected)
            assert slow[side].seen == fast[side].seen


def test_a_transform_that_is_added_later_is_called(drawn):
    dls = loaders(drawn)
    next(iter(dls.train))
    Unchanged.calls = 0
    dls.train.after_item.add(Unchanged())
    next(iter(dls.train))
    assert Unchanged.calls == 8


def test_a_function_in_place_of_one_of_the_loader_is_called(drawn):
    dl, made = loaders(drawn).train, []
    new = dl.new(create_batch=lambda items: made.append(len(items)) or dl.create_batch(items))
    assert len(next(iter(new))[0]) == 8 and made == [8]


def test_a_batch_that_lost_an_image_has_the_others(drawn, tmp_path, capsys):
    drawn = shutil.copytree(drawn, tmp_path / "data")
    slow, fast = loaders(drawn, tfms=[Unchanged()], mirror="none"), loaders(drawn, mirror="none")
    row = fast.train.get_idxs()[3]
    fast.train.items[int(row)].path.unlink()
    expected, found = list(slow.train), list(fast.train)
    assert len(found[0][0]) == 7 and equal(found, expected)
    assert capsys.readouterr().err.count("not found") == 2
