"""A Learner whose fit may begin in the middle of an epoch. All private names of fastai that this program touches are here.

Read in fastai 2.8.12: `Learner._do_fit`, `_with_events`, `_end_cleanup`; `DataLoader.fake_l`, `_device`.
`tests/test_resumable.py` fails where a later version changes what is relied on.
"""

import copy

from fastai.callback.core import CancelEpochException
from fastai.data.load import DataLoader
from fastai.learner import Learner


def worker_count(dl: DataLoader) -> int:
    "The worker processes of a DataLoader; none within its `one_batch`. `dl.num_workers` is another number."
    return dl.fake_l.num_workers


def without_device(dl: DataLoader) -> DataLoader:
    "A copy that makes batches as the original does, for a worker process: nothing in it opens a CUDA context."
    twin = copy.copy(dl)
    twin.__dict__.update(fake_l=None, after_batch=None, _device=None)
    return twin


class ResumableLearner(Learner):
    """fastai's own `fit(start_epoch=)` goes through the events of the epochs that it skips, and every tracker counts them;
    and it knows no batch.
    """

    begin = (0, 0)  # epoch, and its batch, that the next fit begins at

    @property
    def first_batch(self) -> int:
        "Of this epoch's training."
        return self.begin[1] if self.epoch == self.begin[0] else 0

    def _do_fit(self):
        try:
            for epoch in range(self.begin[0], self.n_epoch):
                self.epoch = epoch
                self._with_events(self._do_epoch, "epoch", CancelEpochException)
        finally:
            self.begin = (0, 0)  # a later fit starts at its beginning

    def all_batches(self):
        self.n_iter = len(self.dl)
        first = self.first_batch if self.training else 0
        if first < self.n_iter:
            for i, batch in enumerate(self.dl, first):
                self.one_batch(i, batch)

    def release_batch(self):
        "Let go of the last batch, its predictions and its graph: after an error fastai keeps them."
        self._end_cleanup()
        self.loss_grad = None
