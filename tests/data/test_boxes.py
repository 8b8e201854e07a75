"Several objects in an image: each is seen through its box, in training and in prediction."

import numpy as np
import pandas as pd
import pytest
import torch

from landmarks_fastai.data.block import landmark_dataloaders
from landmarks_fastai.data.items import LabelledImages, labelled_images
from landmarks_fastai.data.split import divided_rows
from landmarks_fastai.errors import UserError
from landmarks_fastai.geometry import BOX_MARGIN
from landmarks_fastai.inference.predictor import Predictor
from landmarks_fastai.inference.scoring import plot_rows, score_rows
from landmarks_fastai.metrics import points_in_image
from landmarks_fastai.runs.checkpoint import read_checkpoint
from tests.helpers import QUICK, RUNS, csv_lines, labels_of, untrained

SMALL = {"size": 32, "batch_size": 4, "align": 0.0}


@pytest.fixture
def pairs(data):
    "A drawn set in which each image has two rows: its object, and the same points shrunk to a half."
    lines = csv_lines(labels_of(data))
    rows = [line.split("\t") for line in lines[1:]]
    halves = [[name, *(str(round(float(v) / 2)) for v in values)] for name, *values in rows]
    both = [row for pair in zip(rows, halves, strict=True) for row in pair]
    labels_of(data).write_text("\n".join([lines[0], *("\t".join(row) for row in both)]) + "\n")
    return data


def test_each_object_is_seen_through_its_box(pairs, capsys):
    dls = landmark_dataloaders(pairs, **SMALL)
    assert (
        "objects are cut from the points' boxes, 1.25 times" in capsys.readouterr().out and dls.settings.crop == "box"
    )
    images, points, maps = (torch.cat(list(parts)).as_subclass(torch.Tensor) for parts in zip(*dls.valid, strict=True))
    items = list(dls.valid.items)
    stored = points_in_image(points, maps, 32).numpy()
    assert stored == pytest.approx(np.stack([item.points for item in items]), abs=1e-3)
    middle = (points.amax(1) + points.amin(1)) / 2
    area = (points.amax(1) - points.amin(1)).prod(1)
    assert middle.abs().max() < 0.01 and area.numpy() == pytest.approx((2 / BOX_MARGIN) ** 2, rel=0.05)
    assert (images[0] - images[1]).abs().max() > 0.1  # of one image
    train, valid = divided_rows(dls.items, dls.settings)
    assert not {item.path for item in items} & {dls.items[int(row)].path for row in train} and len(valid) % 2 == 0


def test_boxes_of_the_source_are_used(pairs):
    items = labelled_images(pairs)
    boxes = np.full((len(items), 4), np.nan, np.float32)
    boxes[0] = (10, 20, 50, 100)
    items.labels.boxes = boxes
    assert items[0].box == (10, 20, 50, 100)
    low, high = items[1].points.min(0) + 0.5, items[1].points.max(0) + 0.5
    assert items[1].box == pytest.approx((*low, *high))


def test_one_object_an_image_is_seen_in_the_whole_image(drawn):
    dls = landmark_dataloaders(drawn, **SMALL)
    assert dls.settings.crop == "image" and landmark_dataloaders(drawn, crop="box", **SMALL).settings.crop == "box"


def test_points_on_a_line_have_a_box(drawn):
    frame = pd.DataFrame([["a.jpg", 5, 10, 15, 10, 25, 10]])
    left, top, right, bottom = labelled_images_of(frame)[0].box
    assert (left, right) == (5.5, 25.5) and bottom - top == pytest.approx(20 / 4)


def labelled_images_of(frame):
    from landmarks_fastai.data.labels import frame_labels

    return LabelledImages(frame_labels(frame), ".")


def test_scores_and_predictions_need_boxes(pairs, tmp_path):
    run = untrained(pairs, tmp_path / "out", size=32, align=0.0)
    checkpoint = read_checkpoint(run / "best.pth")
    assert checkpoint.settings.crop == "box"
    predictor, items = Predictor(run / "best.pth"), list(labelled_images(pairs))[:6]
    scores = score_rows(predictor, items)
    points = predictor(items[0].path, boxes=[items[0].box])[0].points  # the same two passes as in the scorer
    other = predictor(items[0].path, boxes=[items[1].box])[0].points
    assert scores.images == 6 and np.isfinite(points).all() and abs(points - other).max() > 1
    with pytest.raises(UserError, match="was trained on boxes: add --detect or --boxes"):
        predictor(items[0].path)
    plot_rows(predictor, items[:2])


@pytest.mark.train
def test_from_training_to_predictions(pairs, run_script):
    code, out, err = run_script(f"train.py {QUICK} -n two -d", pairs)
    assert (code, err) == (0, "") and "objects are cut" in out
    picture = next((pairs / "test" / "images").iterdir())
    code, _, err = run_script("predict.py -pm two", picture)
    assert code == 1 and err.count("\n") == 1 and "trained on boxes" in err
    (RUNS.parent / "boxes.csv").write_text(f"file,l,t,r,b\n{picture.name},5,5,60,60\n{picture.name},20,20,90,90\n")
    code, out, err = run_script("predict.py -pm two --boxes boxes.csv", picture)
    assert (code, err) == (0, "") and "2 objects" in out
    code, out, err = run_script("finetune.py -pm two -e 1 --workers 0 -n next")
    assert (code, err) == (0, "") and read_checkpoint(RUNS / "next/best.pth").settings.crop == "box"
