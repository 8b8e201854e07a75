"fastai's methods on our Learner: other fits, several fits, the flip test, results of a loader that is used again."

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.callback.core import Callback
from fastai.interpret import Interpretation
from matplotlib import pyplot as plt
from torch import nn

from landmarks_fastai.data.align import alignment_of
from landmarks_fastai.data.block import landmark_dataloaders, mean_shape
from landmarks_fastai.errors import UserError
from landmarks_fastai.metrics import AUC, FailureRate
from landmarks_fastai.training.learner import landmark_learner
from landmarks_fastai.utils.hardware import Machine
from tests.helpers import ARCH, N_POINTS, frame_with_gaps, labels_of, silent, small_learner


class Record(Callback):
    "The learning rates and the images of each step."

    def __init__(self):
        self.rates, self.sums = [], []

    def after_step(self):
        self.rates.append([group["lr"] for group in self.opt.hypers])
        self.sums.append(float(self.x.sum()))


@pytest.mark.train
def test_every_fit_of_fastai_gives_the_head_its_smaller_rate(drawn, tmp_path):
    learn = small_learner(drawn, tmp_path, lr=1e-3, head_lr_mult=0.25)
    fits = {
        "the default rate": lambda cb: learn.fit(1, cbs=cb),
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
        assert head == pytest.approx(body / 4, rel=1e-6), name
        assert max(body) == pytest.approx(1e-3, rel=0.3), name


@pytest.mark.train
def test_a_second_fit_sees_other_batches_and_lr_find_counts_as_none(drawn, tmp_path):
    def sums(*first):
        learn, record = small_learner(drawn, tmp_path), Record()
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
    learn, calls = small_learner(drawn, tmp_path), []
    learn.model.register_forward_hook(lambda *_: calls.append(1))
    batches = len(learn.dls.valid)
    flipped, _ = learn.tta()
    assert len(calls) == 2 * batches
    plain, _ = learn.get_preds()
    assert torch.equal(flipped, plain) is False and flipped.shape == plain.shape


def test_flip_test_without_a_flip_map_is_refused(drawn, tmp_path):
    learn, files = small_learner(drawn, tmp_path, mirror="none"), sorted((drawn / "test/images").iterdir())
    assert len(learn.predict_points(files)) == len(files)
    for call in (learn.tta, lambda: learn.predict_points(files, flip_test=True)):
        with pytest.raises(UserError, match="no flip map"):
            call()


def test_show_results_leaves_the_loader_as_it_is(drawn, tmp_path):
    learn = small_learner(drawn, tmp_path, align=1.05)
    before = learn.validate()
    learn.show_results(dl=learn.dls.valid, max_n=2)
    learn.show_results(dl=learn.dls.valid, max_n=2, shuffle=False)
    plt.close("all")
    assert list(learn.validate()) == list(before)


@pytest.mark.train
@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_a_learner_trains_scores_and_draws_where_no_row_is_complete(drawn, tmp_path, capsys):
    table = frame_with_gaps(drawn)
    dls = landmark_dataloaders(
        table, image_folder=drawn / "train/images", machine=Machine(workers=0), size=32, batch_size=8, arch=ARCH, seed=1
    )
    assert alignment_of(dls.settings, dls.facts) and dls.facts.flip_indices
    missing = np.isnan(table.iloc[:, 1::2].to_numpy(float))
    for row, points in zip(dls.train.get_idxs(), dls.train.one_batch()[1].isnan().any(-1), strict=False):
        of_row = missing[row]
        assert points.tolist() in (of_row.tolist(), of_row[list(dls.facts.flip_indices)].tolist())
    learn = silent(landmark_learner(dls, weights="none", machine=Machine(workers=0), path=tmp_path, sched="plateau"))
    start = [m for m in learn.model[1] if isinstance(m, nn.Linear)][-1].bias.detach().reshape(-1, 2)
    complete = pd.read_csv(labels_of(drawn), sep="\t")
    others = landmark_dataloaders(
        complete, image_folder=drawn / "train/images", machine=Machine(workers=0), size=32, batch_size=8
    )
    assert np.abs(start.numpy() - mean_shape(others.train.items, others.settings)).max() < 0.12
    learn.metrics = [*learn.metrics, AUC(), FailureRate()]
    learn.fit(2, 1e-3)
    assert all(p.isfinite().all() for p in learn.model.parameters())
    assert np.isfinite(np.array(learn.recorder.values, float)).all()
    valid = learn.dls.valid.items
    points, truth = (
        learn.predict_points([item.path for item in valid], flip_test=False),
        [item.points for item in valid],
    )
    assert learn.validate()[1] == pytest.approx(np.nanmean((points - truth) ** 2), rel=1e-3)
    labelled = int((~missing[32:]).sum())
    assert valid.counted == f" ({labelled} of {8 * N_POINTS} points)"
    learn.dls.train.show_batch(max_n=2)
    learn.show_results(max_n=1, shuffle=False)
    assert f" ({(~missing[32]).sum()} of {N_POINTS})" in plt.gcf().axes[1].get_title()
    losses = Interpretation.from_learner(learn)
    assert losses.losses.isfinite().all()
    losses.plot_top_losses(2)
    plt.close("all")
