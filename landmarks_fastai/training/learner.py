"""The Learner: fastai's, on any torchvision or timm body, with the competition's score as its metric."""
# fastai adds methods to Learner with `@patch`, and creates `SuggestionMethod` when it runs
# pyright: reportAttributeAccessIssue=false

import copy
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import torch
from fastai.callback.schedule import SuggestionMethod
from fastai.callback.training import BnFreeze, GradientAccumulation
from fastai.data.core import DataLoaders
from fastai.data.transforms import Normalize, get_c
from fastai.interpret import plot_top_losses as fastai_plot_top_losses
from fastai.learner import Learner, ValueMetric
from fastai.torch_core import TensorImage, set_seed
from fastai.vision.core import TensorPoint
from fastcore.basics import listify
from fastcore.foundation import L

from landmarks_fastai import plots
from landmarks_fastai.data.align import alignment_of
from landmarks_fastai.data.block import points_and_maps
from landmarks_fastai.data.items import LabelledImages
from landmarks_fastai.data.loader import LandmarkDL
from landmarks_fastai.data.transforms import CroppedImage
from landmarks_fastai.errors import UserError
from landmarks_fastai.geometry import input_to_unit
from landmarks_fastai.metrics import stage_metrics
from landmarks_fastai.models.heads import init_head
from landmarks_fastai.models.networks import build_model
from landmarks_fastai.models.weights import input_stats, load_weights
from landmarks_fastai.runs.checkpoint import checkpoint_metadata
from landmarks_fastai.settings import DATA, Settings
from landmarks_fastai.training import callbacks
from landmarks_fastai.training.components import body_and_head, body_lr, on_machine, optimiser, scheduler
from landmarks_fastai.training.losses import loss_function
from landmarks_fastai.utils.fastai_internals import ResumableLearner
from landmarks_fastai.utils.hardware import Machine

AnyLearner = TypeVar("AnyLearner", bound=Learner)
NO_FLIP_MAP = "the landmarks have no flip map: no flip test can be made"
Rate = float | np.ndarray | slice  # a learning rate of the body, or (2,) those of body and head


class LandmarkLearner(ResumableLearner):
    """A fastai `Learner` of landmarks; `landmark_learner` creates it.

    Predictions, of `get_preds` too, are (images, n_points, 2) in unit coordinates, [-1, 1] from edge to edge of the
    network's input; decoded, as the first value of `predict`, in pixels of the network's input. `predict_points` returns
    pixels of the image as stored.

    Learning rates are those of the body; the head's is `settings.head_lr_mult` times as large. The head gets about a
    thousand features, none of them negative, and Adam moves each weight by the learning rate: a step can move all points
    by the learning rate times the sum of the features.
    """

    model: torch.nn.Module

    def __init__(
        self, dls: DataLoaders, model: torch.nn.Module, settings: Settings, machine: Machine, path: str | Path
    ):
        self.settings, self.machine = settings, machine
        super().__init__(
            dls,
            model,
            loss_func=loss_function(settings),
            opt_func=optimiser(settings),  # pyright: ignore[reportArgumentType] (fastai annotates an instance)
            lr=settings.lr,
            wd=settings.wd,
            train_bn=False,
            splitter=body_and_head,
            cbs=[callbacks.CarryMaps(), callbacks.SeedEveryStep(), *on_machine(machine), *scheduler(settings)],
            path=Path(path),
            model_dir=".",
        )
        self.metrics = [*stage_metrics(settings.size), ValueMetric(partial(body_lr, self), "lr")]
        self.create_opt()  # `validate` and `show_results` read the learning rate, also before the first fit
        if settings.freeze:
            self.freeze()
            self.add_cb(BnFreeze())  # otherwise the frozen body's running means would change
        if settings.accumulate > 1:
            self.add_cb(GradientAccumulation(settings.accumulate * settings.batch_size))

    def param_group_lrs(self, lr: Rate | None = None) -> np.ndarray:
        """Return the learning rates of body and head (2,) from the body's; None: the settings'. An array is returned as it is.

        The end of a `slice` is the body's: its start, meant for layers that should learn slower than the head, is ignored.
        """
        rate: float | np.ndarray | None = lr.stop if isinstance(lr, slice) else lr
        rate = self.settings.lr if rate is None else rate
        return rate * np.array([1.0, self.settings.head_lr_mult]) if np.ndim(rate) == 0 else np.asarray(rate)

    def fit(self, n_epoch: int, lr: Rate | None = None, **kwargs: Any) -> None:
        "As fastai's; a single learning rate is the body's."
        super().fit(n_epoch, self.param_group_lrs(lr), **kwargs)

    def fit_one_cycle(self, n_epoch: int, lr_max: Rate | None = None, **kwargs: Any) -> None:
        "As fastai's; a single learning rate is the body's."
        super().fit_one_cycle(n_epoch, self.param_group_lrs(lr_max), **kwargs)

    def fit_flat_cos(self, n_epoch: int, lr: Rate | None = None, **kwargs: Any) -> None:
        "As fastai's; a single learning rate is the body's."
        super().fit_flat_cos(n_epoch, self.param_group_lrs(lr), **kwargs)

    def fit_sgdr(self, n_cycles: int, cycle_len: int, lr_max: Rate | None = None, **kwargs: Any) -> None:
        "As fastai's; a single learning rate is the body's."
        super().fit_sgdr(n_cycles, cycle_len, self.param_group_lrs(lr_max), **kwargs)

    def save(self, file: str | Path, **kwargs: Any) -> Path:
        "As fastai's; the optimiser's numbers are saved as Python's own: numpy's would need a pickle that may run code."
        for group in cast(Any, self.opt).opt.param_groups if self.opt else []:
            group["lr"] = float(group["lr"])
            group |= {k: tuple(map(float, v)) for k, v in group.items() if k == "betas"}
        return super().save(file, **kwargs)

    def lr_find(
        self,
        start_lr: float = 1e-5,  # of the body
        end_lr: float = 0.1,
        show_plot: bool = True,
        suggest_funcs: Any = SuggestionMethod.Minimum,
        **kwargs: Any,
    ) -> Any:
        """As fastai's, with learning rates of the body; `recorder.lrs` likewise.

        `Minimum` is a tenth of the learning rate at which the loss was lowest. In a network that starts at the mean
        shape a hundred steps lower the loss by a tenth only, and fastai's default, `Valley`, suggests too much: 0.014 on
        2,175 photographs at 64 px, where `Minimum` suggests 0.005 and the best of a sweep is 0.002.
        """
        funcs = listify(suggest_funcs)
        found = super().lr_find(
            self.param_group_lrs(start_lr), self.param_group_lrs(end_lr), show_plot=False, suggest_funcs=funcs, **kwargs
        )
        self.recorder.lrs = [lr / self.settings.head_lr_mult for lr in self.recorder.lrs]
        found = type(found)(*(lr / self.settings.head_lr_mult for lr in found))
        if show_plot:
            self.recorder.plot_lr_find()
        return found

    def tta(self, ds_idx: int = 1, dl: Any = None, **kwargs: Any) -> tuple:
        """Return predictions of the flip test and targets, (images, n_points, 2) in unit coordinates.

        fastai's `tta` averages predictions of randomly warped images, which is meaningless for points. Raises `UserError`
        if the landmarks have no flip map.
        """
        if not self.settings.flip_indices:
            raise UserError(NO_FLIP_MAP)
        return self.get_preds(ds_idx, dl, cbs=callbacks.FlipTest(self.settings.flip_indices), **kwargs)

    def predict_points(self, images: Any, flip_test: bool | None = None) -> np.ndarray:
        """Predict points (images, n_points, 2), float32, in pixels of the images as stored; in two passes if `align` is on.

        `images` is a path, a PIL image, an array (h, w, 3) uint8, or a list of those. `flip_test` None: if there is a flip
        map. Raises `UserError` for a file that is not an image, and for `flip_test=True` without a flip map.
        """
        images = images if isinstance(images, list) else [images]
        points = self._points(images, flip_test)
        if alignment := alignment_of(self.settings):
            crops = [CroppedImage(i, m) if m else i for i, m in zip(images, alignment.maps(points), strict=True)]
            points = self._points(crops, flip_test)
        return points

    def _points(self, images: list, flip_test: bool | None) -> np.ndarray:
        flip = bool(self.settings.flip_indices) if flip_test is None else flip_test
        if flip and not self.settings.flip_indices:
            raise UserError(NO_FLIP_MAP)
        collect = callbacks.CollectPoints(self.settings.size)
        cbs = [collect, callbacks.FlipTest(self.settings.flip_indices)] if flip else [collect]
        self.get_preds(dl=self.dls.test_dl(images, num_workers=0), with_preds=False, cbs=cbs)
        return np.concatenate(collect.points)

    def show_results(
        self, ds_idx: int = 1, dl: Any = None, max_n: int = 9, shuffle: bool = True, **kwargs: Any
    ) -> None:
        "As fastai's; if `align` is on, it plots the second pass, on the aligned crops."
        alignment = alignment_of(self.settings)
        if alignment:
            dl = cast(LandmarkDL, (self.dls[ds_idx] if dl is None else dl).new(shuffle=False, drop_last=False))
            rows = dl.get_idxs()
            dl.crops = dict.fromkeys((dl.shuffle_fn(rows) if shuffle else rows)[:max_n])
            collect = callbacks.CollectPoints(self.settings.size)
            self.get_preds(dl=dl, with_preds=False, reorder=False, cbs=collect)
            dl.crops = dict(zip(dl.seen, alignment.maps(np.concatenate(collect.points)), strict=True))
        super().show_results(ds_idx, dl, max_n, shuffle, **kwargs)


@fastai_plot_top_losses.dispatch
def plot_top_losses(
    x: TensorImage, y: TensorPoint, samples: Any, outs: Any, raws: Any, losses: torch.Tensor, **kwargs: Any
) -> None:
    "The plot of `Interpretation.plot_top_losses`: true and predicted points on each input, the loss as its title."
    images = [image.permute(1, 2, 0).numpy().astype(np.uint8) for image, *_ in samples]
    pairs = [(points, predicted) for (_, points, *_), (predicted, *_) in zip(samples, outs, strict=True)]
    plots.plot_losses(images, pairs, losses.tolist())


def landmark_learner(
    dls: DataLoaders,  # of `landmark_dataloaders`, or of a block of `landmark_block`
    arch: str | None = None,  # any torchvision or timm name; None: the settings'
    weights: str | None = "imagenet",  # none, or a .safetensors or .pth file; None: the weights are loaded later
    *,
    machine: Machine = Machine(),  # noqa: B008
    path: str | Path = ".",  # folder of `learn.save` and `learn.load`
    **changes: Any,  # fields of `Settings` by name, except those of the DataLoaders: head="512,relu", lr=1e-3, sched="none", …
) -> LandmarkLearner:
    """Create a `LandmarkLearner`: AdamW with weight decay 0.05, the plateau schedule, the competition's score as metric.

    The last layer is initialised at the mean shape of the training rows; with `init_head="random"`, at random. Raises
    `UserError` for an unknown network or one that cannot take the input, and for weights that cannot be loaded.

    >>> learn = landmark_learner(dls, "resnext50_32x4d")
    >>> learn.fit(10, 3e-4)
    """
    if fixed := sorted(changes.keys() & set(DATA)):
        raise UserError(f"{', '.join(fixed)}: decided by the DataLoaders, change it there")
    settings = dls.settings.replace(n_points=get_c(dls) // 2, **changes | ({"arch": arch} if arch else {}))
    if settings.accumulate > len(dls.train):
        raise UserError(
            f"--accumulate {settings.accumulate}: an epoch has {len(dls.train)} batches, and needs a step at least: lower it"
        )
    mean, std = input_stats(settings.arch)
    settings = settings.replace(mean=mean, std=std)
    normalize(dls, mean, std)
    set_seed(settings.seed, reproducible=machine.device == "cpu")
    model = build_model(settings.arch, settings.head, settings.n_points, settings.size, settings.targets)
    check_batch(model, settings)
    if weights is not None:
        load_weights(model, settings.arch, weights, settings.size)
        if settings.init_head == "mean":
            init_head(model, mean_shape(dls.train.items, settings))
    model.metadata = checkpoint_metadata(settings.replace(confidence=False))  # it has no spread: a stage's end adds one
    return LandmarkLearner(dls, model, settings, machine, path)


def normalize(dls: DataLoaders, mean: tuple, std: tuple) -> None:
    "Normalize the batches as the body expects, like fastai's `vision_learner`, in place of an earlier `Normalize`."
    for dl in dls.loaders:
        dl.after_batch.fs = L(f for f in dl.after_batch.fs if not isinstance(f, Normalize))
        dl.after_batch.add(Normalize.from_stats(mean, std, cuda=False))
        dl.device = dl.device  # moves the statistics there


def mean_shape(images: LabelledImages, settings: Settings) -> np.ndarray:
    """Return the mean landmarks of the images, (n_points, 2) in unit coordinates of the input.

    Of at most 2,000 images: with more the mean changes by less than a hundredth of a face.
    """
    total, n = np.zeros((images.labels.n_points, 2)), 0
    for points, to_input in points_and_maps(images, settings):
        n += 1
        total += input_to_unit(to_input.to_input(points.astype(np.float64)), settings.size)
    return total / max(1, n)


def check_batch(model: torch.nn.Module, settings: Settings) -> None:
    "Raise `UserError` for a batch size of 1 if the network has norms that need more than one value."
    if settings.batch_size > 1:
        return
    twin = copy.deepcopy(model).train()
    try:
        with torch.no_grad():
            twin(torch.zeros(1, 3, settings.size, settings.size))
    except ValueError as e:
        raise UserError(
            f"-b 1: {settings.arch} has norms that need two images at least ({e}): use -b 2 or more"
        ) from None


def load_best(learn: AnyLearner, path: str | Path) -> AnyLearner:
    "Load a .pth with `learn.load`, which adds the suffix itself and reads tensors only; returns the Learner."
    learn.load(Path(path).resolve().with_suffix(""), with_opt=False)
    return learn
