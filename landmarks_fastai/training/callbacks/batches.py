"Callbacks for each batch: separate the maps from the points, seed the random numbers, make the flip test."
# fastai sets attributes when it runs, `learn` among them
# pyright: reportAttributeAccessIssue=false

from collections.abc import Sequence

import numpy as np
from fastai.callback.core import Callback
from fastai.torch_core import set_seed

from landmarks_fastai.data.flip import average_flipped
from landmarks_fastai.data.transforms import TensorMap


class CarryMaps(Callback):
    """Move the images' maps from the targets of a batch to `learn.maps`: the loss gets points only, metrics need both.

    Without labels there are maps only, and in a batch that `summary` or `Interpretation` makes there is nothing.
    """

    order = -5  # before CastToTensor and all else that reads yb

    def before_batch(self):
        self.learn.maps = None
        if self.yb and isinstance(self.yb[-1], TensorMap):
            *points, self.learn.maps = self.yb
            self.learn.yb = tuple(points)


class SeedEveryStep(Callback):
    """Make all random numbers a function of (seed, epoch, batch), so that a resumed run needs no random state.

    The training loader gets epoch and first batch; dropout is seeded at each step. Epochs are counted on from one fit of a
    Learner to the next, but for those of `lr_find`.
    """

    trained = earlier = 0  # number of the next epoch over all fits, and of the first one of this fit

    def before_fit(self):
        self.earlier = self.trained

    def before_train(self):
        self.dls.train.epoch, self.dls.train.first = self.earlier + self.epoch, self.learn.first_batch

    def before_batch(self):
        if self.training:
            rank = self.dl.share[0]  # rank 0 has the seed of a single process: SeedSequence pads with zeros
            place = np.random.SeedSequence([self.learn.settings.seed, self.dl.epoch, self.iter, rank])
            set_seed(int(place.generate_state(1)[0]))

    def after_train(self):
        if not hasattr(self.learn, "lr_finder"):
            self.trained = self.earlier + self.epoch + 1


class FlipTest(Callback):
    "Replace each prediction by the mean of the image's and its mirror image's."

    def __init__(self, flip_indices: Sequence[int]):
        self.flip_indices = flip_indices

    def after_pred(self):
        (images,) = self.xb
        self.learn.pred = average_flipped(self.pred, self.learn.model(images.flip(-1)), self.flip_indices)
