"Batch norms that keep the mean and variance that were loaded."
# fastai sets attributes when it runs, `learn` among them
# pyright: reportAttributeAccessIssue=false

from fastai.callback.core import Callback
from fastai.callback.training import bn_types


class FreezeBatchNorms(Callback):
    """Normalize training batches by the running means and variances, which stay as they are; weights and biases are trained.

    fastai's `BnFreeze` does so for the norms of a frozen body only. Detectors that start from a trained body do it too
    (mmdetection's `norm_eval`): the statistics of a small batch are noisy, here more so, since it mixes images and crops.
    """

    def before_train(self) -> None:
        for module in self.learn.model.modules():
            if isinstance(module, bn_types):
                module.eval()
