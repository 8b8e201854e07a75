"The examples of docs/python.md run, and fastai's own calls give what the page says, in the pixels that it says."

import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.data.transforms import get_c
from fastai.interpret import Interpretation
from fastai.vision.core import PILImage, TensorPoint
from fasttransform import ItemTransform, Transform
from matplotlib import pyplot as plt
from PIL import Image

from landmarks_fastai import Predictor, landmark_block, landmark_dataloaders, landmark_learner
from landmarks_fastai.errors import BadData, UserError
from landmarks_fastai.geometry import input_to_unit, pixel_map, unit_to_input
from landmarks_fastai.metrics import points_in_image
from landmarks_fastai.utils.hardware import Machine
from tests.helpers import ARCH, N_POINTS, ROOT

PAGE, PREDICT = ((ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("python.md", "predict.md"))


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    "Without fastai's bars, and no figure left open."
    monkeypatch.setattr("fastai.callback.progress.ProgressCallback.before_fit", lambda self: None)
    yield
    plt.close("all")


def learner(dls, tmp_path, **changes):
    learn = landmark_learner(dls, ARCH, "none", path=tmp_path, **changes)
    learn.remove_cb(learn.progress)
    learn.logger = lambda values: None
    return learn


@pytest.fixture
def learn(drawn, tmp_path):
    dls = landmark_dataloaders(drawn, size=32, batch_size=8, machine=Machine(workers=0))
    return learner(dls, tmp_path)


@pytest.mark.slow
def test_the_examples_of_the_page_run(drawn, tmp_path, monkeypatch):
    shutil.copytree(drawn, tmp_path / "faces")
    shutil.copy(next((drawn / "test" / "images").iterdir()), tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    names = {}
    for code in re.findall(r"```python\n(.*?)```", PAGE, re.S):
        exec(compile(code, "docs/python.md", "exec"), names)
    assert names["points"].shape == (N_POINTS, 2) and names["predictions"].shape == (8, N_POINTS, 2)
    assert Path("faces_64.pth").stat().st_size > 1e6


def test_the_examples_of_the_page_of_predictions_run(quick_run, drawn, tmp_path, monkeypatch):
    shutil.copytree(quick_run, tmp_path / "runs" / "faces")
    shutil.copytree(drawn / "test" / "images", tmp_path / "photos")
    shutil.copy(next((drawn / "test" / "images").iterdir()), tmp_path / "photo.jpg")
    (tmp_path / "photo.txt").write_text("no picture")
    write_clip(tmp_path / "clip.mp4", Image.open(tmp_path / "photo.jpg"), 7)
    monkeypatch.chdir(tmp_path)
    names = {}
    for code in re.findall(r"```python\n(.*?)```", PREDICT, re.S):
        exec(compile(code, "docs/predict.md", "exec"), names)
    assert names["points"].shape == (N_POINTS, 2) and names["face"].score > 0.6
    assert "photo.txt cannot be read as an image" in names["result"].error
    assert names["frame"].frame == 6 and [face.track for face in names["frame"].objects] == [1]
    assert Path("copy.mp4").stat().st_size > 1e3


def write_clip(path, image, n):
    "Write a video that shows one image in `n` frames of 320 x 240 px."
    av = pytest.importorskip("av")
    shown = Image.new("RGB", (320, 240))
    shown.paste(image, (20, 10))
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 320, 240, "yuv420p"
        for _ in range(n):
            container.mux(stream.encode(av.VideoFrame.from_image(shown)))
        container.mux(stream.encode(None))


class Counted(Transform):
    "How often it was called, and what it saw."

    def __init__(self):
        super().__init__()
        self.seen = []

    def encodes(self, image: PILImage):
        self.seen.append(image.size)
        return image


class Darken(ItemTransform):
    def encodes(self, item):
        image, *rest = item
        return PILImage.create(image.point(lambda v: 0)), *rest


@pytest.mark.train
@pytest.mark.parametrize("where", ["item_tfms", "after_item"])
def test_a_transform_that_a_user_adds_is_called_for_every_item(drawn, tmp_path, where):
    counted = Counted()
    dls = landmark_dataloaders(
        drawn, size=32, batch_size=8, machine=Machine(workers=0), item_tfms=[counted] if where == "item_tfms" else None
    )
    if where == "after_item":
        dls.train.after_item.add(counted)
    counted.seen.clear()
    learner(dls, tmp_path).fit(1)
    train, valid = 32, 8 if where == "item_tfms" else 0
    assert counted.seen == [(32, 32)] * (train + valid)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_transform_changes_what_the_network_sees_in_a_worker_too(drawn, workers):
    dls = landmark_dataloaders(drawn, size=32, batch_size=8, aug=0.0, mirror="none", machine=Machine(workers=workers))
    assert next(iter(dls.train))[0].max() > 0.5
    dls.train.after_item.add(Darken())  # after a first pass: workers that were started without it are replaced
    assert next(iter(dls.train))[0].max() == 0
    assert next(iter(dls.valid))[0].max() > 0.5


@pytest.mark.train
def test_the_block_is_a_datablock_to_build_on(drawn, tmp_path, capsys):
    counted = Counted()
    block = landmark_block(size=32, batch_size=8, item_tfms=[counted])
    dls = block.dataloaders(drawn, num_workers=0)
    assert type(block).__name__ == "DataBlock" and get_c(dls) == 2 * N_POINTS and dls.n_inp == 1
    learn = learner(dls, tmp_path)
    assert learn.facts.n_points == N_POINTS and learn.settings.size == 32
    learn.fit(1)
    assert counted.seen and np.isfinite(learn.validate()[1])
    block.summary(drawn, bs=2)
    assert "PointsToUnit" in capsys.readouterr().out


def test_the_block_leaves_bad_rows_out_where_it_is_told_to(data):
    next(p for p in sorted((data / "train" / "images").iterdir())).unlink()
    with pytest.raises(BadData, match="not found"):
        landmark_block(size=32, batch_size=8).dataloaders(data)
    dls = landmark_block(size=32, batch_size=8, on_bad="skip").dataloaders(data, num_workers=0)
    assert len(dls.train_ds) + len(dls.valid_ds) == 39


def test_a_dataframe_gives_the_batches_of_its_folder(drawn, data):
    table = pd.read_csv(data / "train" / "landmarks.csv", sep="\t")
    machine = Machine(workers=0)
    one = landmark_dataloaders(drawn, size=32, batch_size=8, machine=machine)
    other = landmark_dataloaders(table, image_folder=data / "train" / "images", size=32, batch_size=8, machine=machine)
    for a, b in zip(one.train, other.train, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    (data / "train" / "images" / table.iloc[3, 0]).unlink()
    with pytest.raises(BadData, match="DataFrame row 3: image .* not found"):
        landmark_dataloaders(table, image_folder=data / "train" / "images", size=32, batch_size=8)
    table.iloc[5, 7] = float("nan")
    skipped = landmark_dataloaders(
        table, image_folder=data / "train" / "images", size=32, batch_size=8, on_bad="skip", machine=machine
    )
    assert len(skipped.train_ds) == 30
    with pytest.raises(UserError, match="a column of file names"):
        landmark_dataloaders(table.iloc[:, :2])


def test_predictions_are_in_the_pixels_that_the_page_says(drawn, tmp_path):
    # at 64 px no file is decoded at a part of its size, so a path and an image give the same pixels
    dls = landmark_dataloaders(drawn, size=64, batch_size=8, align=0.0, machine=Machine(workers=0))
    learn = learner(dls, tmp_path)
    file = sorted((drawn / "test" / "images").iterdir())[0]
    decoded, raw, again = learn.predict(str(file))
    assert isinstance(decoded, TensorPoint) and torch.equal(raw, again)
    assert torch.allclose(decoded.as_subclass(torch.Tensor), unit_to_input(raw, 64), atol=1e-4)
    to_input = pixel_map(*Image.open(file).size, "crop", 64)
    stored = learn.predict_points(file, flip_test=False)[0]
    assert to_input.to_input(stored) == pytest.approx(decoded.numpy(), abs=1e-2)
    # a path, an image, an array and a list of them are the same picture
    image = Image.open(file).convert("RGB")
    for same in (file, image, np.asarray(image), [str(file)]):
        assert learn.predict_points(same, flip_test=False)[0] == pytest.approx(stored, abs=1e-3)


def test_get_preds_of_files_and_the_flip_test(learn, drawn):
    files = sorted((drawn / "test" / "images").iterdir())
    predictions, targets = learn.get_preds(dl=learn.dls.test_dl(files))
    assert predictions.shape == (6, N_POINTS, 2) and targets is None
    for file, each in zip(files[:2], predictions, strict=False):
        assert torch.allclose(learn.predict(file)[1], each, atol=1e-5)
    # targets are the labels: in pixels of the images as stored they are the CSV's
    predictions, targets = learn.tta()
    maps = learn.dls.valid.one_batch()[2]
    stored = points_in_image(targets, maps, 32)
    truth = np.stack([learn.dls.valid.items[k].points for k in range(8)])
    assert stored.numpy() == pytest.approx(truth, abs=1e-3)
    # the flip test: the mirrored images' predictions are the mirror image of these
    images = learn.dls.valid.one_batch()[0].as_subclass(torch.Tensor)
    learn.model.eval()
    with torch.no_grad():
        mirrored = learn.model(images.flip(-1))[:, list(learn.facts.flip_indices)] * torch.tensor([-1.0, 1.0])
        assert torch.allclose(predictions, (learn.model(images) + mirrored) / 2, atol=1e-5)
    learn.facts = learn.facts.replace(flip_indices=())
    with pytest.raises(UserError, match="no flip map"):
        learn.tta()


def test_a_file_that_is_no_image_is_named(learn, tmp_path):
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(UserError, match="notes.txt cannot be read as an image"):
        learn.predict_points(tmp_path / "notes.txt")


def test_the_largest_losses_are_those_of_the_worst_images(learn, data, tmp_path):
    lines = (data / "train" / "landmarks.csv").read_text().splitlines()
    name, *numbers = lines[1 + 35].split("\t")
    lines[1 + 35] = "\t".join([name, *(str(float(v) + 60) for v in numbers)])  # shifted labels, in the validation part
    (data / "train" / "landmarks.csv").write_text("\n".join(lines) + "\n")
    dls = landmark_dataloaders(data, size=32, batch_size=8, machine=Machine(workers=0))
    shifted = learner(dls, tmp_path)
    found = Interpretation.from_learner(shifted)
    assert found.losses.shape == (8,) and int(found.top_losses(1)[1][0]) == 3
    assert float(found.losses.mean()) == pytest.approx(shifted.validate()[0], rel=1e-4)
    found.plot_top_losses(2)
    assert plt.gcf().axes[1].get_title() == f"loss {float(found.losses.max()):.4g}"


def test_an_exported_learner_predicts_where_there_is_no_data(learn, data, drawn, tmp_path):
    from fastai.learner import load_learner

    moved = learner(landmark_dataloaders(data, size=32, batch_size=8, machine=Machine(workers=0, cache=True)), tmp_path)
    file = sorted((drawn / "test" / "images").iterdir())[0]
    expected = moved.predict_points(file)
    moved.export("x.pkl")
    shutil.rmtree(data)
    loaded = load_learner(tmp_path / "x.pkl")
    assert loaded.predict_points(file) == pytest.approx(expected, abs=1e-3)


@pytest.mark.train
def test_what_save_writes_after_a_fit_is_a_checkpoint(learn, drawn, tmp_path):
    file = sorted((drawn / "test" / "images").iterdir())[0]
    for fit in (learn.fit, learn.fit_one_cycle):
        fit(1, 1e-3)
        found = Predictor(learn.save(f"{tmp_path}/saved"))(file)
        assert found.points == pytest.approx(learn.predict_points(file)[0], abs=0.01)


def test_settings_that_the_dataloaders_decide_are_refused_later(learn):
    with pytest.raises(UserError, match="size: decided by the DataLoaders"):
        landmark_learner(learn.dls, ARCH, "none", size=64)
    with pytest.raises(UserError, match="unknown setting: sise"):
        landmark_dataloaders("faces", sise=64)


def test_points_to_unit_takes_items_without_points(learn):
    item = learn.dls.valid.items[0]
    to_unit = next(t for t in learn.dls.valid.after_item.fs if type(t).__name__ == "PointsToUnit")
    image = learn.dls.valid_ds.tls[0].tfms(item)
    alone, with_points = to_unit((image,)), to_unit((image, TensorPoint(torch.tensor(item.points))))
    assert torch.equal(alone[1], with_points[2])
    expected = input_to_unit(image.to_input.to_input(item.points.astype(float)), 32)
    assert with_points[1].numpy() == pytest.approx(expected, abs=1e-5)
