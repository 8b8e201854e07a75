"The competition's test images -> a submission, and all points."

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from landmarks_fastai.competition import read_test_points, round_points, submission_header, submission_line
from landmarks_fastai.data.align import report_unaligned
from landmarks_fastai.data.checks import check_images
from landmarks_fastai.data.labels import data_folder
from landmarks_fastai.errors import BadData, UserError
from landmarks_fastai.inference.pictures import Picture
from landmarks_fastai.inference.predictor import Predictor
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

    points.npy is float32 (images, n_points, 2), pixels of the images as stored; points.json lists the file names in
    the same order. All three files are written completely or not at all. Raises `UserError` without test_points.csv, and
    `BadData` with every bad image.
    """
    side = data_folder(data) / "test"
    if not os.path.isfile(side / "test_points.csv"):
        raise UserError(f"{side / 'test_points.csv'} not found: it says which points of which images to submit")
    test_points = read_test_points(side / "test_points.csv")
    n_points = predictor.networks[0].settings.n_points
    test_points.check_range(n_points)
    found = check_images(test_points, side / "images")
    if len(found.rows):
        raise BadData(map(found.problem, found.rows.tolist()), len(found.rows))
    pictures = (
        Picture(side / "images" / name, exif=False, where=f"{test_points.csv} line {line}: ")
        for name, line in zip(test_points.names, test_points.lines.tolist(), strict=True)
    )
    with (
        atomic_write(run.file("points.json")) as names,
        atomic_write(run.file("points.npy"), "wb") as points,
        atomic_write(run.file("submit.csv")) as submission,
    ):
        json.dump(test_points.names, names, ensure_ascii=False, indent=0)
        head = {"descr": "<f4", "fortran_order": False, "shape": (len(test_points), n_points, 2)}
        np.lib.format.write_array_header_1_0(points, head)
        submission.write(submission_header(test_points.indices.shape[1]))
        for row, result in enumerate(progress(predictor.stream(pictures), len(test_points))):
            if result.error:  # the image has changed since it was checked
                raise UserError(result.error)
            each = np.ascontiguousarray(result.objects[0].points)
            points.write(each.data)
            name, indices = test_points.names[row], test_points.indices[row]
            submission.write(submission_line(name, round_points(each[indices], rounding)))
    report_unaligned(predictor.unaligned, len(test_points))
    return len(test_points)
