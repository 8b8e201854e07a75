"fastai's methods on our Learner: other fits, several fits, the flip test, results of a loader that is used again."

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from matplotlib import pyplot as plt

from landmarks_fastai.data.block import landmark_dataloaders
from landmarks_fastai.errors import UserError
from landmarks_fastai.training.learner import landmark_learner
from landmarks_fastai.utils.hardware import Machine
from tests.helpers import ARCH


def learner(data, tmp_path, **changes):
    machine = Machine(workers=0)
    dls = landmark_dataloaders(data, size=32, batch_size=8, machine=machine, **changes)
    learn = landmark_learner(dls, ARCH, "none", sched="none", machine=machine, path=tmp_path)
    learn.remove_cb(learn.progress)
    learn.logger = lambda row: None
    return learn


class Record(Callback):
    "The learning rates and the images of each step."

    def __init__(self):
        self.rates, self.sums = [], []

    def after_step(self):
        self.rates.append([group["lr"] for group in self.opt.hypers])
        self.sums.append(float(self.x.sum()))


def test_every_fit_of_fastai_gives_the_head_its_smaller_rate(drawn, tmp_path):
    learn = learner(drawn, tmp_path)
    fits = {
        "fit": lambda cb: learn.fit(1, 1e-3, cbs=cb),
        "a slice": lambda cb: learn.fit(1, slice(1e-3), cbs=cb),
        "one cycle": lambda cb: learn.fit_one_cycle(1, slice(1e-5, 1e-3), cbs=cb),
        "flat and cosine": lambda cb: learn.fit_flat_cos(1, 1e-3, cbs=cb),
        "warm restarts": lambda cb: learn.fit_sgdr(1, 1, 1e-3, cbs=cb),
        "fine_tune": lambda cb: learn.fine_tune(1, 1e-3, cbs=cb),
    }
    for name, fit in fits.items():
        fit(record := Record())
        body, head = np.array(record.rates).T
        assert head == pytest.approx(body * learn.settings.head_lr_mult, rel=1e-6), name
        assert max(body) == pytest.approx(1e-3, rel=0.3), name


def test_a_second_fit_sees_other_batches_and_lr_find_counts_as_none(drawn, tmp_path):
    def sums(*first):
        learn, record = learner(drawn, tmp_path), Record()
        for step in first:
            step(learn)
        learn.fit(1, cbs=record)
        return record.sums

    once = sums()
    assert sums() == once
    assert not set(sums(lambda learn: learn.fit(1))) & set(once)
    fourth = sums(lambda learn: learn.fit(3))
    assert sums(lambda learn: learn.fit(3, start_epoch=2)) == fourth
    assert sums(lambda learn: learn.validate()) == once
    assert sums(lambda learn: learn.lr_find(show_plot=False)) == once


def test_flip_test_computes_the_network_twice(drawn, tmp_path):
    learn, calls = learner(drawn, tmp_path), []
    learn.model.register_forward_hook(lambda *_: calls.append(1))
    batches = len(learn.dls.valid)
    flipped, _ = learn.tta()
    assert len(calls) == 2 * batches
    plain, _ = learn.get_preds()
    assert torch.equal(flipped, plain) is False and flipped.shape == plain.shape


def test_flip_test_without_a_flip_map_is_refused(drawn, tmp_path):
    learn, files = learner(drawn, tmp_path, mirror="none"), sorted((drawn / "test/images").iterdir())
    assert len(learn.predict_points(files)) == len(files)
    for call in (learn.tta, lambda: learn.predict_points(files, flip_test=True)):
        with pytest.raises(UserError, match="no flip map"):
            call()


def test_show_results_leaves_the_loader_as_it_is(drawn, tmp_path):
    learn = learner(drawn, tmp_path)
    assert learn.settings.align
    before = learn.validate()
    learn.show_results(dl=learn.dls.valid, max_n=2)
    learn.show_results(dl=learn.dls.valid, max_n=2, shuffle=False)
    plt.close("all")
    assert list(learn.validate()) == list(before)
