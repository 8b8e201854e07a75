"""The Learner: fastai's, on any torchvision or timm body, with the competition's score as its metric."""
# fastai adds methods to Learner with `@patch`, and creates `SuggestionMethod` when it runs
# pyright: reportAttributeAccessIssue=false

import copy
import os
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from fastai.callback.schedule import SuggestionMethod
from fastai.callback.training import BnFreeze, GradientAccumulation
from fastai.data.core import DataLoaders
from fastai.data.transforms import Normalize, get_c
from fastai.interpret import plot_top_losses as fastai_plot_top_losses
from fastai.learner import ValueMetric, join_path_file
from fastai.torch_core import TensorImage, set_seed
from fastai.vision.core import TensorPoint
from fastcore.basics import listify
from fastcore.foundation import L
from PIL import Image

from landmarks_fastai import plots
from landmarks_fastai.data.align import alignment_of
from landmarks_fastai.data.block import mean_shape
from landmarks_fastai.data.pictures import Picture
from landmarks_fastai.errors import UserError
from landmarks_fastai.inference.predictor import Predictor
from landmarks_fastai.inference.scoring import plot_rows
from landmarks_fastai.inference.torch_network import TorchNetwork
from landmarks_fastai.models.heads import init_head
from landmarks_fastai.models.networks import METADATA, build_model
from landmarks_fastai.models.weights import input_stats, load_weights, read_state_dict
from landmarks_fastai.runs.checkpoint import checkpoint_metadata, read_checkpoint
from landmarks_fastai.settings import DataFacts, Settings, names_of
from landmarks_fastai.training import callbacks
from landmarks_fastai.training.components import body_and_head, body_lr, on_machine, optimiser, scheduler
from landmarks_fastai.training.losses import loss_function
from landmarks_fastai.utils.fastai_internals import ResumableLearner
from landmarks_fastai.utils.hardware import Machine

AnyLearner = TypeVar("AnyLearner", bound="LandmarkLearner")
NO_FLIP_MAP = "the landmarks have no flip map: no flip test can be made"


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
    # (batch, 6) of the current batch: each image's `PixelMap`, taken off the targets by `CarryMaps`
    maps: torch.Tensor | None

    def __init__(
        self,
        dls: DataLoaders,
        model: torch.nn.Module,
        settings: Settings,
        facts: DataFacts,
        machine: Machine,
        path: str | Path,
    ):
        self.settings, self.facts, self.machine = settings, facts, machine
        super().__init__(
            dls,
            model,
            loss_func=loss_function(settings),
            opt_func=optimiser(settings),  # pyright: ignore[reportArgumentType] (fastai annotates an instance)
            lr=settings.lr,
            wd=settings.wd,
            train_bn=False,
            splitter=body_and_head,
            cbs=[
                callbacks.CarryMaps(),
                callbacks.SeedEveryStep(),
                callbacks.Evaluation(),
                *on_machine(machine),
                *scheduler(settings),
            ],
            path=Path(path),
            model_dir=".",
        )
        self.metrics = [*self.columns(), ValueMetric(partial(body_lr, self), "lr")]
        self.create_opt()  # `validate` reads the learning rate, also before the first fit
        if settings.freeze:
            self.freeze()
            self.add_cb(BnFreeze())  # otherwise the frozen body's running means would change
        if settings.freeze_bn:
            self.add_cb(callbacks.FreezeBatchNorms())
        if settings.accumulate > 1:
            self.add_cb(GradientAccumulation(settings.accumulate * settings.batch_size))

    def columns(self) -> list[ValueMetric]:
        "The metrics of `Evaluation`: score and NME of both passes where there are two, then the score of the first."
        evaluation = self.evaluation
        columns = [
            ValueMetric(evaluation.score, "score"),
            ValueMetric(evaluation.nme, "nme_box_diag"),
        ]
        if alignment_of(self.settings, self.facts):
            columns.append(ValueMetric(evaluation.first_pass, "first_pass"))
        return columns

    def predictor(
        self,
        network: torch.nn.Module | None = None,  # None: the Learner's
        flip_test: bool | None = None,  # None: if there is a flip map
    ) -> Predictor:
        "A `Predictor` that predicts as predict.py does with a checkpoint of the network. Raises `UserError` without a flip map."
        if flip_test and not self.facts.flip_indices:
            raise UserError(NO_FLIP_MAP)
        machine = replace(self.machine, amp="off")  # half precision changes a score by 0.2%
        live = TorchNetwork(network or self.model, self.settings, self.facts, machine, "the Learner")
        return Predictor(live, machine=machine, batch_size=self.settings.batch_size, flip_test=flip_test)

    def load(self, file: str | Path, *args: Any, check: bool = True, **kwargs: Any) -> "LandmarkLearner":
        """As fastai's; raises `UserError` for a checkpoint whose input, network or facts of the data differ.

        fastai would load its weights, and `save` would store them with this Learner's settings. `check=False` leaves it out.
        """
        path = join_path_file(file, self.path / self.model_dir, ext=".pth")
        if check and os.path.exists(path) and read_state_dict(path).get(METADATA):
            checkpoint = read_checkpoint(path)
            values = {**checkpoint.settings.of("input", "network"), **checkpoint.facts.to_dict()}
            here = {**self.settings.of("input", "network"), **self.facts.to_dict()}
            differ = [k for k in values if k not in ("align_gain", "points_box") and values[k] != here[k]]
            if differ:
                raise UserError(
                    f"{path} has another {', '.join(differ)} than this Learner: create its DataLoaders with the settings "
                    "and facts of read_checkpoint(path), or load the weights alone with check=False"
                )
        with warnings.catch_warnings():  # `save` stores no optimizer
            warnings.filterwarnings("ignore", "Saved file doesn't contain an optimizer state")
            return super().load(file, *args, **kwargs)

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
        rates = super().lr_find(start_lr, end_lr, show_plot=False, suggest_funcs=funcs, **kwargs)
        # fastai records the rate of the last parameter group, the head's
        self.recorder.lrs = [lr / self.settings.head_lr_mult for lr in self.recorder.lrs]
        rates = type(rates)(*(lr / self.settings.head_lr_mult for lr in rates))
        if show_plot:
            self.recorder.plot_lr_find()
        return rates

    def tta(self, ds_idx: int = 1, dl: Any = None, **kwargs: Any) -> tuple:
        """Return predictions of the flip test and targets, (images, n_points, 2) in unit coordinates.

        fastai's `tta` averages predictions of randomly warped images, which is meaningless for points. Raises `UserError`
        if the landmarks have no flip map.
        """
        if not self.facts.flip_indices:
            raise UserError(NO_FLIP_MAP)
        return self.get_preds(ds_idx, dl, cbs=callbacks.FlipTest(self.facts.flip_indices), **kwargs)

    def predict_points(self, images: Any, flip_test: bool | None = None) -> np.ndarray:
        """Predict points (images, n_points, 2), float32, in pixels of the images as stored; by all passes.

        `images` is a path, a PIL image, an array (h, w, 3) uint8, or several of those. `flip_test` None: if there is a flip
        map. Raises `UserError` for a file that is not an image, and for `flip_test=True` without a flip map.
        """
        images = [images] if isinstance(images, (str, Path, Image.Image, np.ndarray)) else images
        pictures = (Picture(image, exif=False) for image in images)
        points = [prediction.points for prediction in self.predictor(flip_test=flip_test)(pictures)]
        return np.stack(points) if points else np.empty((0, self.facts.n_points, 2), np.float32)

    def show_results(
        self, ds_idx: int = 1, dl: Any = None, max_n: int = 9, shuffle: bool = True, **kwargs: Any
    ) -> None:
        "Plot images with their true points and those of `predict_points`, without the flip test unless `tta` is set."
        loader: Any = self.dls[ds_idx] if dl is None else dl
        rows = list(range(len(loader.items)))
        rows = (loader.shuffle_fn(rows) if shuffle else rows)[:max_n]
        flip_test = self.settings.tta and bool(self.facts.flip_indices)
        plot_rows(self.predictor(flip_test=flip_test), [loader.items[row] for row in rows])


@fastai_plot_top_losses.dispatch
def plot_top_losses(
    x: TensorImage, y: TensorPoint, samples: Any, outs: Any, raws: Any, losses: torch.Tensor, **kwargs: Any
) -> None:
    "The plot of `Interpretation.plot_top_losses`: the true points of each input beside the predicted ones, titled by the loss."
    panels = []
    for (image, truth, *_), (predicted, *_), loss in zip(samples, outs, losses.tolist(), strict=True):
        pixels = image.permute(1, 2, 0).numpy().astype(np.uint8)
        panels.append((pixels, truth.numpy(), predicted.numpy(), f"loss {loss:.4g}"))
    plots.plot_predictions(panels)


def landmark_learner(
    dls: DataLoaders,  # of `landmark_dataloaders`, or of a block of `landmark_block`
    arch: str | Callable | None = None,  # a torchvision or timm name, or a function of that name; None: the settings'
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
    if fixed := sorted(changes.keys() & set(names_of("data", "split", "input"))):
        raise UserError(f"{', '.join(fixed)}: decided by the DataLoaders, change it there")
    if callable(arch):
        arch = ("timm:" if arch.__module__.startswith("timm.") else "") + arch.__name__
    if not isinstance(dls, DataLoaders):
        raise UserError(f"dls is a {type(dls).__name__}: DataLoaders expected, of `landmark_dataloaders`")
    settings = dls.settings.replace(**changes | ({"arch": arch} if arch else {}))
    if settings.accumulate > len(dls.train):
        raise UserError(
            f"--accumulate {settings.accumulate}: an epoch has {len(dls.train)} batches, and needs a step at least: lower it"
        )
    mean, std = input_stats(settings.arch)
    facts = dls.facts.replace(n_points=get_c(dls) // 2, mean=mean, std=std)
    normalize(dls, mean, std)
    set_seed(settings.seed, reproducible=machine.device == "cpu")
    model = build_model(settings.arch, settings.head, facts.n_points, settings.size)
    check_batch(model, settings)
    if weights is not None:
        load_weights(model, settings.arch, weights, settings.size)
        if settings.init_head == "mean":
            init_head(model, mean_shape(dls.train.items, settings, facts.shape))
    model.metadata = checkpoint_metadata(settings.replace(confidence=False), facts)  # the end of a stage adds a spread
    return LandmarkLearner(dls, model, settings, facts, machine, path)


def normalize(dls: DataLoaders, mean: tuple, std: tuple) -> None:
    "Normalize the batches as the body expects, like fastai's `vision_learner`, in place of an earlier `Normalize`."
    for dl in dls.loaders:
        dl.after_batch.fs = L(f for f in dl.after_batch.fs if not isinstance(f, Normalize))
        dl.after_batch.add(Normalize.from_stats(mean, std, cuda=False))
        dl.device = dl.device  # moves the statistics there


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
    learn.load(Path(path).resolve().with_suffix(""), with_opt=False, check=False)
    return learn
