"""A Learner whose fit can start in the middle of an epoch, and the private names of fastai that this program uses.

Checked with fastai 2.8.10 and 2.8.12: `Learner._do_fit`, `_with_events`, `_do_epoch`; `DataLoader.fake_l`, `_device`. Elsewhere
are `_show_args` (`data/transforms.py`) and `_stateattrs` (`training/callbacks/schedules.py`), which fastai's subclasses set.
`tests/utils/test_fastai_internals.py` fails if a later version changes them.
"""

import copy
from typing import Any, TypeVar

from fastai.callback.core import CancelEpochException  # type: ignore[attr-defined] (fastai creates it at run time)
from fastai.data.load import DataLoader
from fastai.learner import Learner
from fastcore.xtras import ContextManagers

Loader = TypeVar("Loader", bound=DataLoader)


def worker_count(dl: DataLoader) -> int:
    "Return the number of worker processes; 0 within `one_batch`, where `dl.num_workers` does not change."
    return dl.fake_l.num_workers


def without_device(dl: Loader) -> Loader:
    "Copy a DataLoader for a worker process: it makes the same batches, and nothing in it opens a CUDA context."
    twin = copy.copy(dl)
    twin.__dict__.update(fake_l=None, after_batch=None, _device=None)
    return twin


class _AllOrNone(ContextManagers):
    "fastcore's, which does not leave the contexts that it has entered when a later one raises."

    def __enter__(self) -> None:
        try:
            super().__enter__()
        except BaseException:
            self.stack.close()
            raise


class ResumableLearner(Learner):
    """A Learner whose next fit starts at `begin`.

    fastai's `fit(start_epoch=)` runs the events of the skipped epochs, so that trackers count them, and cannot skip batches.
    """

    begin: tuple[int, int] = (0, 0)  # epoch, and batch in it, at which the next fit starts

    @property
    def first_batch(self) -> int:
        "The training batch at which the current epoch starts."
        return self.begin[1] if self.epoch == self.begin[0] else 0

    def validation_context(self, cbs: Any = None, inner: bool = False) -> ContextManagers:
        "As fastai's, whose lock stays held if a callback fails before the first batch: every later call would hang."
        return _AllOrNone(super().validation_context(cbs, inner).default)

    def _do_fit(self) -> None:
        model = self.model
        try:
            for epoch in range(self.begin[0], self.n_epoch):
                self.epoch = epoch
                self._with_events(self._do_epoch, "epoch", CancelEpochException)
        finally:
            self.begin, self.model = (0, 0), model  # a step that failed may have left it wrapped

    def all_batches(self) -> None:
        self.n_iter = len(self.dl)  # type: ignore[arg-type] (`dl` is set in an epoch)
        first = self.first_batch if self.training else 0
        if first < self.n_iter:
            for i, batch in enumerate(self.dl, first):  # type: ignore[arg-type]
                self.one_batch(i, batch)
