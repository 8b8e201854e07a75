"""The Learner: fastai's, on any torchvision or timm body, with the competition's score as its metric."""

import copy
from functools import partial
from pathlib import Path

import numpy as np
import torch
from fastai.callback.channelslast import ChannelsLast
from fastai.callback.core import Callback
from fastai.callback.schedule import SuggestionMethod
from fastai.callback.training import BnFreeze, GradientAccumulation
from fastai.data.core import DataLoaders
from fastai.data.transforms import Normalize, get_c
from fastai.interpret import plot_top_losses as fastai_plot_top_losses
from fastai.learner import Learner, ValueMetric
from fastai.optimizer import OptimWrapper
from fastai.torch_core import TensorImage, params, set_seed
from fastai.vision.core import TensorPoint
from fastcore.basics import listify
from fastcore.foundation import L

from landmarks_fastai import plots
from landmarks_fastai.data.block import alignment_of
from landmarks_fastai.data.flip import predict_with_flip
from landmarks_fastai.data.images import image_size
from landmarks_fastai.data.items import LabelledImages
from landmarks_fastai.data.transforms import CroppedImage
from landmarks_fastai.errors import MissingImage, UserError
from landmarks_fastai.geometry import input_to_unit, pixel_map
from landmarks_fastai.metrics import points_in_image, stage_metrics
from landmarks_fastai.models.heads import init_head
from landmarks_fastai.models.networks import build_model
from landmarks_fastai.models.weights import input_stats, load_weights
from landmarks_fastai.runs.checkpoint import checkpoint_metadata
from landmarks_fastai.settings import DATA, Settings
from landmarks_fastai.training import callbacks
from landmarks_fastai.training.losses import loss_function
from landmarks_fastai.utils.fastai_internals import ResumableLearner
from landmarks_fastai.utils.hardware import Machine

MEAN_ROWS = 2000  # rows that the mean shape is taken of


def optimiser(settings: Settings) -> partial:
    """The `opt_func` of a Learner: PyTorch's own optimiser through fastai's `OptimWrapper`.

    fastai's Adam has no amsgrad. Through the wrapper every parameter decays, biases and
    norms too (fastai's `wd_bn_bias` has no effect there): that is what the entry's PyTorch loop did, and it is kept.
    """
    # fused: a step of resnext50's weights in 20 ms, not 54, on two cores
    kwargs = {"weight_decay": settings.wd, "fused": True}
    return {
        "adamw": partial(OptimWrapper, opt=partial(torch.optim.AdamW, amsgrad=True, **kwargs)),
        "adam": partial(OptimWrapper, opt=partial(torch.optim.Adam, amsgrad=True, **kwargs)),
        "sgd": partial(OptimWrapper, opt=partial(torch.optim.SGD, momentum=0.9, **kwargs)),
    }[settings.opt]


def scheduler(settings: Settings) -> list[Callback]:
    "The callbacks that change the rate between epochs. `onecycle` changes it at every step: fastai's own does that."
    if settings.sched == "plateau":
        return [callbacks.PlateauLR()]
    return [callbacks.StepLR(settings.step_size, settings.gamma)] if settings.sched == "step" else []


def body_and_head(model: torch.nn.Sequential) -> list:
    "The splitter: two parameter groups, so that the body can be frozen and the head has a rate of its own."
    return [params(model[0]), params(model[1])]


class LandmarkLearner(ResumableLearner):
    """A fastai `Learner` of landmarks; `landmark_learner` makes it.

    Predictions, of `get_preds` too, are (images, n_points, 2) in unit coordinates, [-1, 1] from edge to edge of the
    network's input; decoded, as `predict`'s first value, in pixels of the network's input. `predict_points` gives pixels
    of the image as stored.

    A rate is the body's: the head learns at `settings.head_lr_mult` of it. What enters the head is a vector of some
    thousand features, none of them negative, and Adam moves every weight by the rate: all points of a face then jump by
    the rate times the sum of the features.
    """

    def __init__(
        self, dls: DataLoaders, model: torch.nn.Module, settings: Settings, machine: Machine, path: str | Path
    ):
        self.settings, self.machine = settings, machine
        super().__init__(
            dls,
            model,
            loss_func=loss_function(settings),
            opt_func=optimiser(settings),
            lr=settings.lr,
            wd=settings.wd,
            train_bn=False,
            splitter=body_and_head,
            cbs=[callbacks.CarryMaps(), callbacks.SeedEveryStep(), *on_machine(machine), *scheduler(settings)],
            path=Path(path),
            model_dir=".",
        )
        self.metrics = [*stage_metrics(settings.size), ValueMetric(partial(body_lr, self), "lr")]
        self.create_opt()  # so that `validate` and `show_results` find a rate before the first fit
        if settings.freeze:
            self.freeze()
            self.add_cb(BnFreeze())  # else the frozen body's running means would go on moving
        if settings.accumulate > 1:
            self.add_cb(GradientAccumulation(settings.accumulate * settings.batch_size))

    def param_group_lrs(self, lr: float | np.ndarray | None = None) -> np.ndarray:
        "The rates of body and head, of the body's; None: the settings'. Rates of several groups are left as they are."
        lr = self.settings.lr if lr is None else lr
        return lr * np.array([1.0, self.settings.head_lr_mult]) if np.ndim(lr) == 0 else lr

    def fit(self, n_epoch: int, lr: float | np.ndarray | None = None, **kwargs):
        "As fastai's; a rate that is one number is the body's."
        super().fit(n_epoch, self.param_group_lrs(lr), **kwargs)

    def fit_one_cycle(self, n_epoch: int, lr_max: float | np.ndarray | None = None, **kwargs):
        "As fastai's; a rate that is one number is the body's."
        super().fit_one_cycle(n_epoch, self.param_group_lrs(lr_max), **kwargs)

    def lr_find(
        self,
        start_lr: float = 1e-5,  # of the body
        end_lr: float = 0.1,
        show_plot: bool = True,
        suggest_funcs=SuggestionMethod.Minimum,
        **kwargs,
    ):
        """As fastai's, in rates of the body; `recorder.lrs` likewise.

        `Minimum` is a tenth of the rate at which the loss was lowest. Where a network starts at the mean shape, a
        hundred steps lower the loss by a tenth only, and `Valley`, fastai's default, ends where it is flat: at 0.014 on
        2,175 photographs at 64 px, where `Minimum` says 0.005 and the best of a sweep is 0.002.
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

    def tta(self, ds_idx: int = 1, dl=None, **kwargs) -> tuple:
        """Predictions and targets with the flip test: the mean of an image's and its mirror image's, unit coordinates.

        fastai's own averages predictions of images that were warped differently: for points that has no meaning. Raises
        `UserError` where the landmarks have no flip map.
        """
        if not self.settings.flip_indices:
            raise UserError("the landmarks have no flip map, the mirrored image cannot be scored")
        return self.get_preds(ds_idx, dl, cbs=FlipTest(self.settings.flip_indices), **kwargs)

    def predict_points(self, images, flip_test: bool | None = None) -> np.ndarray:
        """Points (images, n_points, 2), float32, in pixels of the images as stored; by two passes where `align` is on.

        `images` is a path, a PIL image, an array (h, w, 3) uint8, or a list of those; `flip_test` None: where there is a
        flip map. Raises `UserError` for a file that is no image.
        """
        images = images if isinstance(images, list) else [images]
        points = self._points(images, flip_test)
        if alignment := alignment_of(self.settings):
            crops = [CroppedImage(i, m) if m else i for i, m in zip(images, alignment.maps(points), strict=True)]
            points = self._points(crops, flip_test)
        return points

    def _points(self, images: list, flip_test: bool | None) -> np.ndarray:
        flip = bool(self.settings.flip_indices) if flip_test is None else flip_test
        collect = CollectPoints(self.settings.size)
        dl = self.dls.test_dl(images, num_workers=0)
        self.get_preds(
            dl=dl, with_preds=False, cbs=[collect, *([FlipTest(self.settings.flip_indices)] if flip else [])]
        )
        return np.concatenate(collect.points)

    def show_results(self, ds_idx: int = 1, dl=None, max_n: int = 9, **kwargs):
        "As fastai's; where `align` is on, the second pass is shown, on the aligned crops."
        alignment = alignment_of(self.settings)
        if alignment:
            dl = self.dls[ds_idx].new(shuffle=False, drop_last=False) if dl is None else dl
            dl.crops, collect = dict.fromkeys(dl.shuffle_fn(dl.get_idxs())[:max_n]), CollectPoints(self.settings.size)
            self.get_preds(dl=dl, with_preds=False, reorder=False, cbs=collect)
            dl.crops = dict(zip(dl.seen, alignment.maps(np.concatenate(collect.points)), strict=True))
        super().show_results(ds_idx, dl, max_n, **kwargs)


@fastai_plot_top_losses.dispatch
def plot_top_losses(x: TensorImage, y: TensorPoint, samples, outs, raws, losses, **kwargs):
    "What `Interpretation.plot_top_losses` draws: truth and prediction on each input, its loss in the title."
    images = [image.permute(1, 2, 0).numpy().astype(np.uint8) for image, *_ in samples]
    flip_indices = [(points, predicted) for (_, points, *_), (predicted, *_) in zip(samples, outs, strict=True)]
    plots.plot_losses(images, flip_indices, losses.tolist())


class FlipTest(Callback):
    "Predictions of a pass over images become the mean of the image's and its mirror image's."

    def __init__(self, flip_indices):
        self.flip_indices = flip_indices

    def after_pred(self):
        self.learn.pred = predict_with_flip(self.learn.model, *self.xb, self.flip_indices)


class CollectPoints(Callback):
    "Keep each batch's points, in pixels of the images as stored."

    order = 1  # behind FlipTest

    def __init__(self, size: int):
        self.size, self.points = size, []

    def after_pred(self):
        self.points.append(points_in_image(self.pred, self.learn.maps, self.size).numpy().astype(np.float32))


def landmark_learner(
    dls: DataLoaders,  # as `landmark_dataloaders` or the block of `landmark_block` make them
    arch: str | None = None,  # any torchvision or timm name; None: the settings'
    weights: str | None = "imagenet",  # none, or a .safetensors or .pth file; None: the weights are loaded later
    *,
    machine: Machine = Machine(),  # noqa: B008
    path: str | Path = ".",  # folder that `learn.save` and `learn.load` work in
    **changes,  # fields of `Settings` by name that the DataLoaders do not decide: head="512,relu", lr=1e-3, sched="none", …
) -> LandmarkLearner:
    """A `LandmarkLearner`: AdamW with weight decay 0.05, the plateau schedule, the competition's score as metric.

    The last layer starts at the training rows' mean shape (`init_head="random"` for the opposite). Raises `UserError` for a
    network that does not exist or cannot take the input, and for weights that cannot be had or do not fit.

    >>> learn = landmark_learner(dls, "resnext50_32x4d")
    >>> learn.fit(10, 3e-4)
    """
    if fixed := sorted(changes.keys() & set(DATA)):
        raise UserError(f"{', '.join(fixed)}: decided by the DataLoaders, change it there")
    settings = dls.settings.replace(n_points=get_c(dls) // 2, **changes | ({"arch": arch} if arch else {}))
    if settings.accumulate > len(dls.train):
        raise UserError(
            f"--accumulate {settings.accumulate}: an epoch has {len(dls.train)} batches, no step would ever be made: lower it"
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
    model.metadata = checkpoint_metadata(settings)
    return LandmarkLearner(dls, model, settings, machine, path)


def normalize(dls: DataLoaders, mean: tuple, std: tuple):
    "Normalize the batches as the body expects, as fastai's `vision_learner` does, in place of what did so before."
    for dl in dls.loaders:
        dl.after_batch.fs = L(f for f in dl.after_batch.fs if not isinstance(f, Normalize))
        dl.after_batch.add(Normalize.from_stats(mean, std, cuda=False))
        dl.device = dl.device  # moves the statistics there


def body_lr(learn: Learner) -> float | None:
    "The body's present rate; None where an exported Learner has no optimiser."
    return learn.opt.hypers[0]["lr"] if learn.opt else None


def on_machine(machine: Machine) -> list[Callback]:
    "The callbacks that fit training to the machine."
    cbs = [ChannelsLast()] if machine.channels_last else []
    if machine.precision != "off":
        cbs.append(callbacks.Amp(machine.precision, machine.device))
    return [*cbs, callbacks.Compile()] if machine.compile else cbs


def mean_shape(images: LabelledImages, settings: Settings, at_most: int = MEAN_ROWS) -> np.ndarray:
    """The images' mean landmarks, (n_points, 2) unit coordinates of the input.

    Taken from at most 2,000, evenly spaced: a mean of more moves by less than a hundredth of a face. Only the images'
    headers are read.
    """
    total, n = np.zeros((images.labels.n_points, 2)), 0
    for item in images.sample(at_most):
        try:
            width, height = image_size(item.path, item.where)
        except MissingImage:  # it will be missed again, and told, when it is trained on
            continue
        n += 1
        to_input = pixel_map(width, height, settings.fit, settings.size)
        total += input_to_unit(to_input.to_input(item.points.astype(np.float64)), settings.size)
    return total / max(1, n)


def check_batch(model: torch.nn.Module, settings: Settings):
    "Refuse a batch of one image where a norm then has a single value to take its variance of."
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


def load_best(learn: Learner, path: Path) -> Learner:
    "`learn.load`: fastai adds the .pth itself, and reads tensors only."
    return learn.load(Path(path).resolve().with_suffix(""), with_opt=False)
