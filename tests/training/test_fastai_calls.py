"fastai's public calls and stock callbacks on our Learner: each works, or says why it cannot."

import numpy as np
import pytest
import torch
from fastai.callback.fp16 import MixedPrecision  # noqa: F401 (it adds `to_fp16` to Learner)
from fastai.callback.hook import ActivationStats
from fastai.callback.mixup import CutMix, MixUp
from fastai.callback.progress import CSVLogger, ShowGraphCallback
from fastai.callback.tracker import EarlyStoppingCallback, ReduceLROnPlateau, SaveModelCallback
from fastai.callback.training import GradientClip
from fastai.data.transforms import get_image_files
from fastai.interpret import Interpretation
from fastai.learner import load_learner
from fastai.metrics import rmse
from matplotlib import pyplot as plt

from landmarks_fastai import landmark_dataloaders, landmark_learner
from landmarks_fastai.data.pictures import Picture
from landmarks_fastai.errors import UserError
from landmarks_fastai.metrics import AUC
from landmarks_fastai.utils.hardware import Machine
from tests.helpers import ARCH, N_POINTS

pytestmark = pytest.mark.train
SCORE = {"monitor": "score", "comp": np.less}


def learner(drawn, path, size=32, **changes):
    dls = landmark_dataloaders(drawn, size=size, batch_size=8, machine=Machine(workers=0), **changes)
    return landmark_learner(dls, ARCH, "none", path=path)


@pytest.fixture(scope="module")
def learn(drawn, tmp_path_factory):
    learn = learner(drawn, tmp_path_factory.mktemp("learn"))
    learn.logger = lambda row: None
    return learn


def interpretation(learn):
    return Interpretation.from_learner(learn)


def exported(learn, file):
    learn.export("x.pkl")
    return load_learner(learn.path / "x.pkl").predict(file)[0]


CALLS = {
    "summary": lambda learn, file: learn.summary(),
    "show_results": lambda learn, file: learn.show_results(max_n=2),
    "top_losses": lambda learn, file: interpretation(learn).top_losses(2),
    "plot_top_losses": lambda learn, file: interpretation(learn).plot_top_losses(2),
    "Interpretation.show_results": lambda learn, file: interpretation(learn).show_results([0, 1]),
    "get_preds": lambda learn, file: learn.get_preds(with_input=True, with_loss=True, with_decoded=True),
    "predict": lambda learn, file: learn.predict(file),
    "predict_points of an L": lambda learn, file: learn.predict_points(get_image_files(file.parent)),
    "lr_find twice": lambda learn, file: [learn.lr_find(num_it=8, show_plot=False) for _ in range(2)],
    "fine_tune": lambda learn, file: learn.fine_tune(1),
    "freeze and unfreeze": lambda learn, file: (learn.freeze(), learn.fit(1), learn.unfreeze()),
    "plot_sched": lambda learn, file: (learn.fit_one_cycle(1), learn.recorder.plot_sched(), learn.recorder.plot_loss()),
    "show_batch": lambda learn, file: learn.dls.show_batch(unique=True, max_n=2),
    "cpu": lambda learn, file: learn.dls.cpu(),
    "decode_batch": lambda learn, file: learn.dls.decode_batch(learn.dls.one_batch()),
    "export": exported,
} | {
    type(cb).__name__: lambda learn, file, cb=cb: learn.fit(1, cbs=cb)
    for cb in (
        ShowGraphCallback(), CSVLogger(), SaveModelCallback(**SCORE), EarlyStoppingCallback(**SCORE),
        ReduceLROnPlateau("valid_loss"), MixUp(), CutMix(), GradientClip(1.0), ActivationStats(),
    )
}  # fmt: skip


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_call(learn, pictures, call):
    call(learn, pictures[0])
    plt.close("all")
    assert not learn.lock.locked() and np.isfinite(learn.validate()[1])


def test_an_export_after_a_fit_is_without_the_optimiser(drawn, tmp_path, pictures):
    learn, sizes = learner(drawn, tmp_path), []
    for epochs in (0, 1):
        with learn.no_bar(), learn.no_logging():
            learn.fit(epochs)
        exported(learn, pictures[0])
        sizes.append((tmp_path / "x.pkl").stat().st_size)
    assert sizes[1] < 1.1 * sizes[0]


@pytest.mark.parametrize("metrics", [[], [rmse], [AUC((0, 1), 1e9)]], ids=["none", "rmse", "AUC"])
def test_any_metrics_leave_the_schedule_its_score(drawn, tmp_path, metrics):
    learn = learner(drawn, tmp_path)
    learn.metrics = metrics
    with learn.no_bar(), learn.no_logging():
        learn.fit(1)
        values = learn.validate()[1:]
    assert learn.plateau_lr.plateau.best == pytest.approx(learn.evaluation.score(), rel=1e-3)
    assert len(values) == len(metrics) and all(map(np.isfinite, values))
    if metrics and isinstance(metrics[0], AUC):
        assert values[0] == pytest.approx(1, abs=1e-3)  # of the delivered points


def test_a_callback_that_fails_leaves_no_lock(drawn, tmp_path, pictures):
    "fastai's lock would stay held, and every later call would hang."
    learn = learner(drawn, tmp_path)
    with pytest.raises((AssertionError, IndexError)):  # fastai fails to name its own bare assertion in `before_fit`
        learn.validate(cbs=SaveModelCallback("no such column"))
    assert not learn.lock.locked() and learn.predict_points(pictures[0]).shape == (1, N_POINTS, 2)


@pytest.mark.parametrize("changes,named", [({"size": 64}, "size"), ({"mirror": "none"}, "flip_indices")])
def test_load_refuses_a_checkpoint_of_another_input(drawn, tmp_path, changes, named):
    file = learner(drawn, tmp_path).save("saved")
    other = learner(drawn, tmp_path, **changes)
    before = [p.detach().clone() for p in other.model.parameters()]
    with pytest.raises(UserError, match=f"saved.pth has another {named} than this Learner"):
        other.load("saved")
    assert all(map(torch.equal, before, other.model.parameters()))
    other.load(file.with_suffix(""), check=False)  # the weights alone
    assert learner(drawn, tmp_path).load("saved") is not None


def test_one_way_in_for_pictures_of_all_kinds(drawn, tmp_path, pictures):
    learn = learner(drawn, tmp_path)
    pixels = np.asarray(Picture(pictures[0]).image())
    expected = learn.predict_points(pixels)
    opaque = np.dstack([pixels, np.full(pixels.shape[:2], 255, np.uint8)])
    for same in (pixels / np.float32(255), opaque, (pixels,), [pixels]):
        assert learn.predict_points(same) == pytest.approx(expected, abs=1e-4)
    assert learn.predict_points([]).shape == (0, N_POINTS, 2)
    with pytest.raises(UserError, match="uint8 or of floats from 0 to 1; float64 array"):
        learn.predict_points(pixels * 1.0)
