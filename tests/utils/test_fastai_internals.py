"""The private names of fastai that `ResumableLearner` relies on, as they were read in fastai 2.8.10 and 2.8.12.

A test here that fails after an upgrade of fastai says which of them has changed.
"""

import inspect

import fastai
import pytest
import torch
from fastai.callback.core import Callback, CancelEpochException
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader as FastaiLoader
from fastai.learner import Learner
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from landmarks_fastai.training.state import capture_state, restore_state
from landmarks_fastai.utils.fastai_internals import ResumableLearner, without_device, worker_count
from tests.helpers import silent, small_learner

READ_IN = "2.8.12"


class Watch(Callback):
    "The epochs and training batches that a fit goes through, and the events between them."

    def __init__(self):
        self.batches, self.events = [], []

    def before_epoch(self):
        self.events.append(("before_epoch", self.epoch))

    def before_batch(self):
        if self.training:
            self.batches.append((self.epoch, self.iter))

    def after_cancel_epoch(self):
        self.events.append(("after_cancel_epoch", self.epoch))

    def after_epoch(self):
        self.events.append(("after_epoch", self.epoch))


@pytest.fixture
def learn():
    data = TensorDataset(torch.rand(6, 3), torch.rand(6, 2))
    dls = DataLoaders(DataLoader(data, 2), DataLoader(data, 2))
    return silent(ResumableLearner(dls, nn.Linear(3, 2), nn.MSELoss()))


@pytest.mark.train
def test_fit_starts_at_begin_and_the_next_fit_at_zero(learn):
    "`_do_fit` is what `fit` calls for its epochs; this Learner's begins at another."
    watch = Watch()
    learn.begin = (1, 3)  # behind the last of 3 batches of epoch 1
    learn.fit(3, cbs=watch)
    assert watch.batches == [(2, 0), (2, 1), (2, 2)]
    assert [e for name, e in watch.events if name == "before_epoch"] == [1, 2]
    watch = Watch()
    learn.fit(1, cbs=watch)
    assert watch.batches == [(0, 0), (0, 1), (0, 2)]


@pytest.mark.train
def test_failed_fit_resets_begin(learn):
    class Fail(Callback):
        def before_batch(self):
            raise ValueError("no")

    learn.begin = (1, 0)
    with pytest.raises(ValueError):
        learn.fit(2, cbs=Fail())
    assert learn.begin == (0, 0)


@pytest.mark.train
def test_with_events_runs_after_epoch_of_a_cancelled_epoch(learn):
    class Cancel(Callback):
        def before_train(self):
            raise CancelEpochException()

    watch = Watch()
    learn.fit(1, cbs=[watch, Cancel()])
    assert watch.events == [("before_epoch", 0), ("after_cancel_epoch", 0), ("after_epoch", 0)]


def test_worker_count_and_copy_without_device():
    dl = FastaiLoader([1.0, 2.0], bs=1, num_workers=3, device="cpu")
    assert worker_count(dl) == 3
    with dl.fake_l.no_multiproc():  # what `one_batch` does
        assert worker_count(dl) == 0
    twin = without_device(dl)
    assert twin.device is None and str(dl.device) == "cpu" and twin.do_batch([twin.do_item(1)]).tolist() == [2.0]


def test_private_names_of_fastai_are_unchanged():
    "Not the version is asserted, but what the override copies of it."
    loop = inspect.getsource(Learner._do_fit)
    assert "self.epoch=epoch" in loop.replace(" ", "") and "_with_events(self._do_epoch, 'epoch'" in loop, (
        f"fastai {fastai.__version__} runs its epochs otherwise than {READ_IN}: read Learner._do_fit again"
    )
    assert list(inspect.signature(Learner._with_events).parameters) == ["self", "f", "event_type", "ex", "final"]


@pytest.mark.train
def test_smoothed_loss_stays_on_the_cpu(drawn, tmp_path):
    "fastai keeps it there, and `torch.lerp` refuses mixed devices. The meta device stands in for a GPU."
    learn = small_learner(drawn, tmp_path)
    learn.fit(1)
    state = capture_state(learn)
    learn.model.to("meta")
    learn.create_opt()
    restore_state(learn, state)
    assert next(learn.model.parameters()).is_meta and learn.recorder.smooth_loss.val.device.type == "cpu"
