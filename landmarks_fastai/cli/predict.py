"Predictions: `python predict.py -pm NAME` writes the submission, `… -pm NAME PATH` predicts any pictures."

import argparse
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from landmarks_fastai.cli import app, options
from landmarks_fastai.errors import UserError
from landmarks_fastai.runs.run import OVERLAY, PREDICTIONS, flags_of, run_folders
from landmarks_fastai.settings import ROUNDINGS
from landmarks_fastai.utils.distributed import this_process
from landmarks_fastai.utils.parallel import bar
from landmarks_fastai.utils.signals import stop_on_signal

if TYPE_CHECKING:
    from landmarks_fastai.geometry import Box
    from landmarks_fastai.inference.predictor import PictureResult, Predictor
    from landmarks_fastai.runs.run import Run


def predict_parser() -> options.Parser:
    "The flags of predict.py."
    parser = options.Parser(
        "Predict the points of pictures; without PATH, of the competition's test images, and write the submission.\n\n"
        "With PATH: writes runs/NAME/predictions.csv (or what --format says), in pixels of the picture as it is shown.\n"
        "Without: reads DIR/test/test_points.csv and DIR/test/images; writes runs/NAME/submit.csv (the submission),\n"
        "points.npy (every point of every image, in pixels of the image as stored) and points.json (its file names)."
    )
    about = "pictures, folders, patterns like 'a/**/*.jpg', videos; - reads a list of these from stdin"
    parser.add_argument("paths", nargs="*", metavar="PATH", help=about)
    about = "checkpoint: the name of a run in the output folder, or a path; an .onnx file; several are averaged"
    parser.add_checkpoint(about, action="append", required=True)
    group = parser.add_argument_group("pictures").add_argument
    group("--format", choices=PREDICTIONS, help="of the file of points (default: csv)")
    group("--overlay", action="store_true", help="write copies of the pictures with the points into runs/NAME/overlay")
    group("--confidence", action="store_true", dest="draw_confidence", help="draw each point's spread in them, too")
    group("--detect", action="store_true", help="find the faces in each picture first; several are possible")
    group("--smooth", action="store_true", help="videos: smooth the points over time (One Euro filter)")
    about = "CSV of file_name,left,top,right,bottom: the boxes of the objects' points, in pixel edges of the picture"
    group("--boxes", metavar="CSV", help=about)
    about = "folder with test/ (test_points.csv and images/), for the submission (default: the checkpoint's)"
    parser.add_argument(*flags_of("data"), type=os.path.abspath, metavar="DIR", help=about)
    parser.add_settings("prediction", ["batch_size"], {"batch_size": "the checkpoint's"})
    about = f"rounding of the submitted coordinates (default: {ROUNDINGS[0]})"
    parser.add_argument("--round", dest="rounding", choices=ROUNDINGS, help=about)
    about = (
        "flip test: average the points of image and mirror image, in a third pass too (default: on with flip indices)"
    )
    parser.add_argument("--tta", action=argparse.BooleanOptionalAction, dest="flip_test", help=about)
    parser.add_machine(training=False)
    return parser


def check_combinations(parser: options.Parser, args: argparse.Namespace) -> None:
    "Exit with 2 for flags that do not go together."
    flags = {"overlay": args.overlay, "detect": args.detect, "boxes": args.boxes, "smooth": args.smooth,
             "confidence": args.draw_confidence, "format": args.format}  # fmt: skip
    typed = [f"--{name}" + ("" if value is True else f" {value}") for name, value in flags.items() if value]
    if not args.paths and typed:
        parser.error(f"{typed[0].split()[0]} is for pictures: name them, as in: -pm NAME photo.jpg {typed[0]}")
    for flag, value in (("--round", args.rounding), ("-d", args.data)):
        if args.paths and value is not None:
            parser.error(f"{flag} is for the submission: run without it, or without PATH")
    if args.draw_confidence and not args.overlay:
        parser.error(
            "--confidence draws on the copies of --overlay: add it (the file of points has every spread anyway)"
        )
    if args.detect and args.boxes:
        parser.error("--detect finds boxes and --boxes has them: use one")


def main() -> None:
    parser = predict_parser()
    args = parser.parse_args()
    check_combinations(parser, args)
    if this_process().store:
        raise UserError("predict.py runs in one process: run it without torchrun")

    from landmarks_fastai.inference.open_network import open_network
    from landmarks_fastai.inference.predictor import Predictor
    from landmarks_fastai.runs.claim import claim_output

    exports = [name for name in args.pretrained_model if name.lower().endswith(".onnx")]
    if exports and (args.amp != "off" or args.compile):
        hint = "ONNX Runtime computes as the file says; run without them"
        raise UserError(f"--amp and --compile are for checkpoints: {hint}")
    machine = options.prepared_machine(vars(args))
    for name in exports if machine.device != "cpu" else ():
        print(f"note: {name} is computed on the CPU: --gpu is for checkpoints", file=sys.stderr)
    networks = [open_network(name, args.out, machine) for name in args.pretrained_model]
    for network in networks:
        if args.flip_test and not network.facts.flip_indices:
            why = "none was found, or --mirror none"
            raise UserError(f"--tta: the checkpoint has no flip map ({why}): run without --tta")
    detector = None
    if args.detect:
        from landmarks_fastai.inference.detector import FaceDetector

        detector = FaceDetector()
    batch_size = networks[0].settings.batch_size if args.batch_size is None else args.batch_size
    predictor = Predictor(networks, machine=machine, batch_size=batch_size, flip_test=args.flip_test, detector=detector)
    run = claim_output(args.out, "+".join(dict.fromkeys(network.name for network in networks)))
    (predict_pictures if args.paths else predict_submission)(args, predictor, run)


def predict_submission(args: argparse.Namespace, predictor: "Predictor", run: "Run") -> None:
    "Predict the competition's test images."
    from landmarks_fastai.inference.submission import predict_test

    data, rounding = args.data or predictor.networks[0].settings.data, args.rounding or ROUNDINGS[0]
    n = predict_test(predictor, data, run, rounding, bar)
    submission, points, names = (run.folder / name for name in ("submit.csv", "points.npy", "points.json"))
    print(f"{n} images: {submission}; all points in {points}, their names in {names}")
    if rounding == "nearest":  # an error spread evenly over a pixel has a mean square of 1/12
        print("the submission has whole numbers, which adds about 0.08 to its score: --round none writes decimals")


def predict_pictures(args: argparse.Namespace, predictor: "Predictor", run: "Run") -> None:
    "Predict the pictures and videos of the command line. Exits with 1 at the end if one of them could not be used."
    from landmarks_fastai.data.align import report_unaligned
    from landmarks_fastai.data.pictures import find_pictures, is_video, read_boxes
    from landmarks_fastai.inference.writers import open_writer

    confidence = any(network.settings.confidence for network in predictor.networks)
    if args.draw_confidence and not confidence:
        raise UserError("--confidence: the checkpoint has no spread: train or finetune with --confidence")
    boxes = read_boxes(args.boxes) if args.boxes else None
    paths = find_pictures(args.paths, left_out=[run.folder, *run_folders(args.out)])
    n: Counter[str] = Counter()
    used: set[str] = set()
    facts = predictor.networks[0].facts
    with open_writer(args.format or "csv", run.folder, facts, confidence) as (write, path):
        for result in predicted(paths, boxes, args, predictor, run):
            write(result)
            print_problems(result, "face" if args.detect else "box")
            used |= {result.source, Path(result.source).name}
            n["frames"] += result.frame is not None
            n["pictures"] += result.frame is None and not is_video(result.source)
            n["objects"] += len(result.objects)
            n["unaligned"] += result.unaligned
            n["bad"] += bool(result.error)
            n["rotated"] += result.rotated
    report_unaligned(n["unaligned"], n["objects"])
    if boxes and (unused := boxes.keys() - used):
        note = f"{len(unused)} file names are not among the pictures, as {min(unused)}"
        print(f"note: {args.boxes}: {note}", file=sys.stderr)
    counts = f"{n['pictures']} pictures" + (f", {n['frames']} frames of videos" if n["frames"] else "")
    counts += f", {n['objects']} objects" if args.detect or args.boxes else ""
    print(f"{counts}: {path}" + (f"; with the points drawn: {run.folder / OVERLAY}" if args.overlay else ""))
    if n["rotated"]:
        note = "their points are of the picture as it is shown"
        print(f"the EXIF rotation of {n['rotated']} pictures was applied: {note}")
    if n["bad"]:
        raise UserError(f"{n['bad']} of the files could not be used, or not to their end: see above")


def print_problems(result: "PictureResult", kind: str) -> None:
    "Print what is wrong with a result; `kind` is what gives the boxes of objects, a face or a box."
    width, height = result.size
    boxes = [prediction.box for prediction in result.objects if prediction.box]
    if any(right <= 0 or bottom <= 0 or left >= width or top >= height for left, top, right, bottom in boxes):
        print(f"note: {result.source}: a box lies outside of the picture", file=sys.stderr, flush=True)
    if result.error:
        print(f"error: {result.error}", file=sys.stderr, flush=True)
    elif not result.objects and result.frame is None:
        print(f"note: {result.source}: no {kind} found", file=sys.stderr, flush=True)


def predicted(
    paths: "Iterable[Path]",
    boxes: "dict[str, list[Box]] | None",  # file name, or path as it was typed or found -> boxes
    args: argparse.Namespace,
    predictor: "Predictor",
    run: "Run",
) -> "Iterator[PictureResult]":
    "Yield the results of pictures and of videos' frames, after their copy with the points is written."
    from landmarks_fastai.data.pictures import Picture, is_video
    from landmarks_fastai.inference.overlay import draw_points
    from landmarks_fastai.inference.writers import OutputNames
    from landmarks_fastai.utils.files import atomic_write

    copies = OutputNames(run.folder / OVERLAY)
    for videos, group in groupby(paths, is_video):
        if videos:
            for path in group:
                # clip.mp4 stays clip.mp4, clip.mov becomes clip.mov.mp4
                copy = copies(str(path), path.suffix.removesuffix(".mp4") + ".mp4") if args.overlay else None
                yield from predicted_video(path, copy, args, predictor)
            continue
        pictures = (Picture(p, boxes=(boxes.get(str(p)) or boxes.get(p.name, [])) if boxes else None) for p in group)
        for result in predictor.stream(pictures):
            stop_on_signal.check()
            if args.overlay and result.objects:
                drawn = draw_points(result.picture.image(), result.objects, args.draw_confidence)
                with atomic_write(copies(result.source, Path(result.source).suffix + ".jpg"), "wb") as file:
                    drawn.save(file, "JPEG", quality=92)
            yield result


def predicted_video(
    path: Path,
    copy: Path | None,  # the file that is written with the points drawn
    args: argparse.Namespace,
    predictor: "Predictor",
) -> "Iterator[PictureResult]":
    "Yield the results of a video's frames; of a damaged video, one with an error at its end."
    from landmarks_fastai.data.pictures import Picture
    from landmarks_fastai.inference.predictor import PictureResult
    from landmarks_fastai.inference.video import predict_video

    try:
        if args.boxes:
            raise UserError(f"{path}: --boxes is for pictures; --detect finds the faces of a video")
        yield from predict_video(predictor, path, copy, args.smooth, args.draw_confidence, bar)
    except UserError as e:
        yield PictureResult(Picture(path), error=e.line)


command = partial(app.run_main, main)
