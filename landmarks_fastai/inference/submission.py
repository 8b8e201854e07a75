"The competition's test images -> a submission, and all points."

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path

from landmarks_fastai.competition import read_test_points, round_points, submission_header, submission_line
from landmarks_fastai.data.align import report_unaligned
from landmarks_fastai.data.checks import check_images
from landmarks_fastai.data.items import LabelledImages
from landmarks_fastai.data.labels import data_folder
from landmarks_fastai.errors import BadData, UserError
from landmarks_fastai.inference.predictor import Predictor
from landmarks_fastai.inference.writers import npy_file
from landmarks_fastai.runs.run import Run
from landmarks_fastai.utils.files import atomic_write


def predict_test(
    predictor: Predictor,
    data: str | Path,  # a folder in the competition's layout
    run: Run,  # submit.csv, points.npy and points.json are written to its folder
    rounding: str = "nearest",  # of the submission: nearest, floor or none
    progress: Callable[[Iterable, int], Iterable] = lambda results, total: results,
) -> int:
    """Predict the test images, and write the submission and all points; returns the number of images.

    points.npy is float32 (images, n_points, 2), pixels of the images as stored; points.json lists the file names in the
    same order. All three files are written completely or not at all. Raises `UserError` without test_points.csv, and
    `BadData` with every bad image.
    """
    images = data_folder(data) / "test" / "images"
    n_points = predictor.networks[0].facts.n_points
    csv = images.parent / "test_points.csv"
    if not os.path.isfile(csv):
        raise UserError(
            f"{csv} not found: it says which points of which images to submit; to predict pictures, name them"
        )
    test_points = read_test_points(csv)
    test_points.check_range(n_points)
    if faults := check_images(test_points, images):
        raise BadData((test_points.problem(row, faults[row]) for row in sorted(faults)), len(faults))
    pictures = (item.picture for item in LabelledImages(test_points, images))
    unaligned = 0
    with (
        atomic_write(run.folder / "points.json") as names,
        npy_file(run.folder / "points.npy", (n_points, 2)) as add_points,
        atomic_write(run.folder / "submit.csv") as submission,
    ):
        json.dump(test_points.names, names, ensure_ascii=False, indent=0)
        submission.write(submission_header(test_points.indices.shape[1]))
        for row, result in enumerate(progress(predictor.stream(pictures), len(test_points))):
            if result.error:  # the image has changed since it was checked
                raise UserError(result.error)
            unaligned += result.unaligned
            points = result.objects[0].points
            add_points(points)
            submitted = round_points(points[test_points.indices[row]], rounding)
            submission.write(submission_line(test_points.name(row), submitted))
    report_unaligned(unaligned, len(test_points))
    return len(test_points)
