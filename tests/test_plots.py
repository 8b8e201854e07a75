"The pixels of plots: dots at the points, truth beside prediction."

import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt

from landmarks_fastai.data.block import landmark_dataloaders
from landmarks_fastai.plots import PREDICTION, TRUTH, plot_points, plot_predictions, save_figure
from landmarks_fastai.training.learner import landmark_learner
from landmarks_fastai.utils.hardware import Machine
from tests.helpers import ARCH


def rgb(colour):
    return np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])


def like(pixels, colour, far=60):
    return np.abs(pixels[..., :3].astype(int) - rgb(colour)).sum(-1) < far


def rendered(figure):
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())


@pytest.mark.parametrize("point", [(0, 0), (20, 41), (63, 63)])
def test_dot_is_drawn_at_its_pixel_centre(point):
    figure = plt.figure(figsize=(4, 4), dpi=160)
    ax = figure.add_axes((0, 0, 1, 1))
    ax.set_axis_off()
    image = np.zeros((64, 64, 3))
    image[point[1], point[0]] = 1  # one white pixel, the dot within it
    plot_points(ax, image, np.array([point]), PREDICTION)
    pixels = rendered(figure)
    plt.close(figure)
    v, u = np.nonzero(like(pixels, PREDICTION))
    assert (np.array([u.mean(), v.mean()]) + 0.5) / 10 - 0.5 == pytest.approx(np.array(point), abs=0.15)


@pytest.fixture
def learn(drawn, tmp_path):
    machine = Machine(workers=0)
    dls = landmark_dataloaders(drawn, size=64, batch_size=8, machine=machine)
    return landmark_learner(dls, ARCH, "none", init_head="random", machine=machine, path=tmp_path)


def test_show_results_plots_truth_and_prediction_with_the_score(learn, tmp_path):
    learn.show_results(max_n=2)
    figure = plt.gcf()
    titles = [ax.get_title() for ax in figure.axes]
    assert titles[0] == titles[2] == "truth" and all(t.startswith("score ") for t in (titles[1], titles[3]))
    pixels = rendered(figure)
    for k, ax in enumerate(figure.axes):
        box = ax.get_window_extent()
        panel = pixels[pixels.shape[0] - int(box.y1) : pixels.shape[0] - int(box.y0), int(box.x0) : int(box.x1)]
        own, other = ((TRUTH, PREDICTION), (PREDICTION, TRUTH))[k % 2]
        assert like(panel, own).sum() > 3 * like(panel, other).sum() + 100
    save_figure(tmp_path / "r.png")
    assert (tmp_path / "r.png").stat().st_size > 10_000


def test_title_shows_the_score_of_the_image(learn):
    learn.show_results(max_n=8, shuffle=False)
    titles = [ax.get_title() for ax in plt.gcf().axes if ax.get_title().startswith("score")]
    shown = [float(title.split()[1]) for title in titles]
    plt.close()
    assert np.mean(shown) == pytest.approx(learn.validate()[1], rel=1e-3)
    assert [title.split("\n")[1] for title in titles] == [item.path.name for item in learn.dls.valid.items]


def test_show_batch_plots_the_stored_pixels(learn):
    learn.dls.valid.show_batch(max_n=1)
    figure = plt.gcf()
    shown = figure.axes[0].images[0].get_array()
    plt.close(figure)
    assert shown.dtype == np.uint8 and shown.std() > 0.05 * 255
    from landmarks_fastai.geometry import fit_image

    expected = np.asarray(fit_image(learn.dls.valid.items[0].picture.image(), "crop", 64)[0])
    assert np.abs(shown.astype(int) - expected).max() <= 1
    assert torch.is_tensor(learn.dls.valid.one_batch()[0])


def test_a_prediction_without_truth_is_hollow():
    image, points = np.zeros((64, 64, 3)), np.array([[20.0, 20.0], [40.0, 40.0]])
    plot_predictions([(image, np.array([[20.0, 20.0], [np.nan, np.nan]]), points, "score 1 (1 of 2)")])
    truth, predicted = plt.gcf().axes[:2]
    filled, hollow = predicted.collections
    assert filled.get_offsets().tolist() == [[20, 20]] and hollow.get_offsets().tolist() == [[40, 40]]
    assert len(hollow.get_facecolors()) == 0 and len(filled.get_facecolors()) == 1
    assert like(rendered(plt.gcf()), TRUTH).any() and predicted.get_title() == "score 1 (1 of 2)"
    plt.close()
