"What happens to each batch: its map is taken off, its random numbers are seeded."
# fastai sets attributes when it runs, `learn` among them
# pyright: reportAttributeAccessIssue=false

import numpy as np
from fastai.callback.core import Callback
from fastai.torch_core import set_seed


class CarryMaps(Callback):
    "Take the images' maps off the batch, so that the loss sees points alone and the metrics find `learn.maps`."

    order = -5  # before CastToTensor and everything that reads yb

    def before_batch(self):
        *points, self.learn.maps = self.yb  # without labels, at prediction, the maps are alone
        self.learn.yb = tuple(points)


class SeedEveryStep(Callback):
    """All that is random is a function of (seed, epoch, batch): a run that goes on needs no random states.

    The training loader is told its place; dropout, and whatever else a network draws, is seeded at each step.
    """

    def before_train(self):
        self.dls.train.epoch, self.dls.train.first = self.epoch, self.learn.first_batch

    def before_batch(self):
        if self.training:
            place = np.random.SeedSequence([self.learn.settings.seed, self.epoch, self.iter])
            set_seed(int(place.generate_state(1)[0]))
