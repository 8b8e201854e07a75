"The flip map: found on drawn faces, whose true pairs are known; refused where there is none."

import json

import numpy as np
import pytest
import torch

from landmarks_fastai.data import flip
from landmarks_fastai.data.block import learn_facts
from landmarks_fastai.data.flip import NoFlipMap, average_flipped, learn_flip_map
from landmarks_fastai.data.items import labelled_images
from landmarks_fastai.settings import DataFacts, Settings
from landmarks_fastai.synthetic.sample import flip_indices_of_template, render_face
from tests.helpers import N_POINTS, QUICK, RUNS, check_refused, csv_lines, labels_of


@pytest.fixture(scope="module")
def faces():
    "Landmarks of 100 drawn faces, (100, 971, 2), pixels."
    rng = np.random.default_rng(0)
    return np.stack([render_face(rng, 971)[1] for _ in range(100)]).astype(float)


def noisy(shapes, share, seed=1):
    "Every coordinate off by `share` of the face's radius."
    radius = np.sqrt(((shapes - shapes.mean(1, keepdims=True)) ** 2).sum(-1).mean(1))[:, None, None]
    return shapes + np.random.default_rng(seed).normal(size=shapes.shape) * share * radius


def tilted(shapes, degrees, all_by=0.0, seed=2):
    angles = np.deg2rad(np.random.default_rng(seed).uniform(-degrees, degrees, len(shapes)) + all_by)
    turn = np.stack([np.cos(angles), -np.sin(angles), np.sin(angles), np.cos(angles)], 1).reshape(-1, 2, 2)
    centre = shapes.mean(1, keepdims=True)
    return (shapes - centre) @ turn.transpose(0, 2, 1) + centre


@pytest.mark.parametrize(
    "change",
    [
        lambda f: f,
        lambda f: f[:10],
        lambda f: noisy(f, 0.05),
        lambda f: tilted(f, 45),
        lambda f: tilted(f, 180),
        lambda f: tilted(f, 10, all_by=60),
        lambda f: noisy(tilted(f, 45), 0.05),
        lambda f: f * np.random.default_rng(3).uniform(0.2, 5, (100, 1, 1)) - 1000,
    ],
    ids=[
        "100 images", "10 images", "5% noise", "tilted to 45", "any tilt", "all tilted by 60", "tilted and 5% noise",
        "any size and place",
    ],
)  # fmt: skip
def test_every_one_of_971_pairs_is_found(faces, change):
    assert np.array_equal(learn_flip_map(change(faces)).flip_indices, flip_indices_of_template(971))


def test_one_percent_of_shifted_labels_changes_nothing(faces):
    spoiled = faces.copy()
    spoiled[7] = np.roll(spoiled[7], 100, axis=0)
    assert np.array_equal(learn_flip_map(spoiled).flip_indices, flip_indices_of_template(971))


def test_missing_points_leave_the_pairs_as_they_are(faces):
    missing = np.random.default_rng(0).random(faces.shape[:2]) < 0.3
    gaps = np.where(missing[..., None], np.nan, faces)
    assert (learn_flip_map(gaps).flip_indices == flip_indices_of_template(971)).mean() > 0.97


@pytest.mark.parametrize("n", [5, 20, 68, 300, 971])
@pytest.mark.parametrize("seed", range(3))
def test_a_set_of_points_without_symmetry_is_refused(n, seed):
    rng = np.random.default_rng([n, seed])
    shapes = rng.normal(size=(1, n, 2)) + rng.normal(size=(50, n, 2)) * 0.01
    with pytest.raises(NoFlipMap, match="miss their partners"):
        learn_flip_map(shapes)


def test_what_has_no_two_sides_is_refused():
    with pytest.raises(NoFlipMap, match="all points are equal"):
        learn_flip_map(np.ones((5, 6, 2)))
    for few in (1, 2, 4):
        with pytest.raises(NoFlipMap, match=f"{few} points are too few"):
            learn_flip_map(np.random.default_rng(0).normal(size=(5, few, 2)))
    with pytest.raises(NoFlipMap, match="its own mirror image"):  # a line of points, seen from its end
        learn_flip_map(np.stack([np.zeros(9), np.arange(9.0)], -1)[None])
    with pytest.raises(NoFlipMap, match="too many"):
        learn_flip_map(np.zeros((1, flip.MAX_POINTS + 1, 2)))


def test_a_match_that_is_not_its_own_inverse_is_refused(monkeypatch, faces):
    monkeypatch.setattr("scipy.optimize.linear_sum_assignment", lambda cost: (None, np.roll(np.arange(len(cost)), 1)))
    with pytest.raises(NoFlipMap, match="its own inverse"):
        learn_flip_map(faces[:5])


def test_few_points_that_do_have_two_sides():
    "Nose, eyes, corners of the mouth."
    face = np.array([[0, 0], [-2, -3], [2, -3], [-1.5, 3], [1.5, 3.0]])
    shapes = face + np.random.default_rng(0).normal(size=(30, 5, 2)) * 0.1
    assert learn_flip_map(shapes).flip_indices.tolist() == [0, 2, 1, 4, 3]


def test_flip_indices_that_exchange_no_points_are_believed_only_if_none_are_learned(drawn, capsys):
    "0, 1, 2, … is a filler of many data.yaml; a map of an earlier stage is kept, whatever it is."
    images, none = labelled_images(drawn), tuple(range(N_POINTS))
    images.labels.flip_indices, template = none, tuple(flip_indices_of_template(N_POINTS).tolist())
    assert learn_facts(images, Settings(size=32)).flip_indices == template
    assert learn_facts(images, Settings(size=32), DataFacts(N_POINTS, flip_indices=none)).flip_indices == none
    capsys.readouterr()
    images.labels.stored = images.labels.stored[:, :2]
    images.labels.checksums, images.labels.flip_indices = None, (0, 1)
    assert learn_facts(images, Settings(size=32)).flip_indices == (0, 1)
    assert "no flip map, that of the source is used, which exchanges no points: 2 points are" in capsys.readouterr().out


class Reader(torch.nn.Module):
    "A network that finds nothing but where the light is: both points at its centre, the second one pixel's width right."

    def forward(self, images):
        across = torch.linspace(-1, 1, images.shape[-1])
        light = images.sum((1, 2)) / images.sum((1, 2, 3), keepdim=False)[:, None]
        x = (light * across).sum(1)
        return torch.stack([x, torch.zeros_like(x), x + 0.1, torch.zeros_like(x)], 1).reshape(-1, 2, 2)


def test_flip_test_averages_image_and_mirror_image():
    images = torch.zeros(2, 3, 4, 5)
    images[0, :, 1, 0], images[1, :, 2, 3] = 1, 2
    once = Reader()(images)
    assert once[:, :, 0].numpy() == pytest.approx(np.array([[-1, -0.9], [0.5, 0.6]]))
    # the mirrored look says the points are at 1 and 1.1; named and placed back: -1.1 and -1
    twice = average_flipped(once, Reader()(images.flip(-1)), (1, 0))
    assert twice[:, :, 0].numpy() == pytest.approx(np.array([[-1.05, -0.95], [0.45, 0.55]]))


def test_a_run_leaves_its_map_and_a_later_stage_keeps_or_drops_it(run_script, finished_run):
    flip_indices = (finished_run("m") / "mirror.json").read_bytes()
    assert json.loads(flip_indices) == flip_indices_of_template(N_POINTS).tolist()
    assert run_script("finetune.py -e 1 --workers 0 -n m2 -pm m")[0] == 0
    assert (RUNS / "m2/mirror.json").read_bytes() == flip_indices
    code, out, _ = run_script("finetune.py -e 1 --workers 0 --mirror none -n m3 -pm m")
    assert code == 0 and "with the flip test" not in out and not (RUNS / "m3/mirror.json").exists()
    check_refused(run_script("predict.py --tta --workers 0 -pm m3"), "--tta", "no flip map")


@pytest.mark.train
def test_landmarks_without_symmetry_train_without_mirroring(run_script, data):
    header, *rows = csv_lines(labels_of(data))
    shape = np.random.default_rng(0).integers(20, 90, 136)
    rows = [row.split("\t")[0] + "".join(f"\t{v}" for v in shape + k % 5) for k, row in enumerate(rows)]
    labels_of(data).write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    code, out, err = run_script(f"train.py {QUICK} -n r -d", data)
    assert (code, err) == (0, "") and "no flip map, images are not mirrored: mirrored points miss" in out
    assert not list(RUNS.glob("r/mirror*"))
    assert run_script("predict.py --workers 0 -pm r")[0] == 0
