"Predictions: `python predict.py -pm NAME` writes the submission, `… -pm NAME PATH` predicts any pictures."

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from landmarks_fastai.cli import app, arguments, resolve
from landmarks_fastai.errors import UserError
from landmarks_fastai.utils.distributed import this_process
from landmarks_fastai.utils.signals import stop_on_signal

if TYPE_CHECKING:
    from landmarks_fastai.data.pictures import Picture
    from landmarks_fastai.geometry import Box
    from landmarks_fastai.inference.predictor import PictureResult, Predictor
    from landmarks_fastai.runs.run import Run


def main() -> None:
    args = arguments.predict_arguments()
    if this_process().store:
        raise UserError("predict.py predicts in one process: run it without torchrun")

    from landmarks_fastai.inference.predictor import Predictor, open_network
    from landmarks_fastai.runs.claim import claim_output

    machine = resolve.machine(args)
    if machine.device != "cpu":
        for name in (name for name in args.pretrained_model if name.lower().endswith(".onnx")):
            print(f"note: {name} is computed on the CPU: --gpu is for checkpoints", file=sys.stderr)
    networks = [open_network(name, args.out, machine) for name in args.pretrained_model]
    for network in networks:
        resolve.check_prediction(args, network)
    settings = networks[0].settings
    detector = None
    if args.detect:
        from landmarks_fastai.inference.detector import FaceDetector

        detector = FaceDetector()
    predictor = Predictor(
        networks,
        machine=machine,
        batch_size=settings.batch_size if args.batch_size is None else args.batch_size,
        flip_test=args.flip_test,
        detector=detector,
    )
    name = "+".join(dict.fromkeys(network.name for network in networks))
    run = claim_output(args.out, name)
    if args.paths:
        predict_pictures(args, predictor, run)
    else:
        predict_submission(args, predictor, run)


def predict_submission(args: argparse.Namespace, predictor: "Predictor", run: "Run") -> None:
    "Predict the competition's test images."
    from landmarks_fastai.inference.submission import predict_test
    from landmarks_fastai.utils.parallel import bar

    data = predictor.networks[0].settings.data if args.data is None else args.data
    n = predict_test(predictor, data, run, args.rounding, bar)
    print(
        f"{n} images: {run.file('submit.csv')}; all points in {run.file('points.npy')}, their names in {run.file('points.json')}"
    )
    if args.rounding == "nearest":  # an error spread evenly over a pixel has a mean square of 1/12
        print("the submission has whole numbers, which adds about 0.08 to its score: --round none writes decimals")


def predict_pictures(args: argparse.Namespace, predictor: "Predictor", run: "Run") -> None:
    "Predict the pictures and videos of the command line. Exits with 1 at the end if one of them could not be used."
    from landmarks_fastai.data.align import report_unaligned
    from landmarks_fastai.data.pictures import find_pictures, is_video, read_boxes
    from landmarks_fastai.inference.writers import open_writer

    settings = predictor.networks[0].settings
    confidence = any(network.settings.confidence for network in predictor.networks)
    if args.draw_confidence and not confidence:
        raise UserError("--confidence: the checkpoint has no spread: train or finetune with --confidence")
    n_pictures = n_frames = n_objects = n_bad = n_rotated = n_unaligned = 0
    boxes = read_boxes(args.boxes) if args.boxes else None
    results = results_of(find_pictures(args.paths), boxes, args, predictor, run)
    with open_writer(args.format, run.folder, predictor.networks[0].facts.n_points, confidence) as (write, path):
        for result in results:
            write(result)
            of_video = result.frame is not None
            if result.error:
                print(f"error: {result.error}", file=sys.stderr, flush=True)
            elif not result.objects and not of_video:
                print(
                    f"note: {result.source}: no {'face' if args.detect else 'box'} found", file=sys.stderr, flush=True
                )
            n_pictures += not of_video and not is_video(Path(result.source))
            n_frames += of_video
            n_objects += len(result.objects)
            n_unaligned += result.unaligned
            n_bad += bool(result.error)
            n_rotated += result.rotated
    report_unaligned(n_unaligned, n_objects)
    counts = f"{n_pictures} pictures" + (f", {n_frames} frames of videos" if n_frames else "")
    counts += f", {n_objects} objects" if args.detect or args.boxes else ""
    print(f"{counts}: {path}" + (f"; with the points drawn: {run.folder / 'overlay'}" if args.overlay else ""))
    if n_rotated:
        print(f"the EXIF rotation of {n_rotated} pictures was applied: their points are of the picture as it is shown")
    if n_bad:
        raise UserError(f"{n_bad} of the files could not be used, or not to their end: see above")


def results_of(
    found: "Iterable[Path]",
    of_files: "dict[str, list[Box]] | None",
    args: argparse.Namespace,
    predictor: "Predictor",
    run: "Run",
) -> "Iterator[PictureResult]":
    """Yield the results of pictures and of frames, after their copy with the points is written.

    A video that is damaged gives a result with an error at its end.
    """
    from landmarks_fastai.data.pictures import Picture, is_video
    from landmarks_fastai.inference.predictor import PictureResult
    from landmarks_fastai.inference.writers import output_path

    def boxes(picture: "Picture") -> "Sequence[Box]":
        "The boxes of the path as it was typed or found, or else of the file's name."
        return of_files.get(picture.name) or of_files.get(Path(picture.name).name, []) if of_files else []

    for videos, paths in groupby(found, is_video):
        if not videos:
            for result in predictor.stream(paths, boxes if of_files else None):
                stop_on_signal.check()
                if args.overlay and result.objects:
                    write_overlay(result, run.folder / "overlay", args.draw_confidence)
                yield result
            continue
        from landmarks_fastai.inference.video import predict_video
        from landmarks_fastai.utils.parallel import bar

        for path in paths:
            # clip.mp4 stays clip.mp4, clip.mov becomes clip.mov.mp4
            suffix = path.suffix.removesuffix(".mp4") + ".mp4"
            copy = output_path(run.folder / "overlay", str(path), suffix) if args.overlay else None
            try:
                if of_files:
                    raise UserError(f"{path}: --boxes is for pictures; --detect finds the faces of a video")
                yield from predict_video(
                    predictor, path, copy, args.smooth, confidence=args.draw_confidence, progress=bar
                )
            except UserError as e:
                yield PictureResult(Picture(path), error=e.line)


def write_overlay(result: "PictureResult", folder: Path, confidence: bool) -> None:
    "Write a copy of the picture with its points, with the picture's path below the folder. Raises `UserError`."
    from landmarks_fastai.inference.overlay import draw_points
    from landmarks_fastai.inference.writers import output_path
    from landmarks_fastai.utils.files import atomic_write

    drawn = draw_points(result.picture.image(), result.objects, confidence)
    path = output_path(folder, result.source, Path(result.source).suffix + ".jpg")
    with atomic_write(path, "wb") as file:
        drawn.save(file, "JPEG", quality=92)


def command() -> None:
    "The command `landmarks-predict`."
    app.run_main(main)
