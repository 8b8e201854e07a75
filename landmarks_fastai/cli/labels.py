"What a source of labels holds, and the converter: `python -m landmarks_fastai.labels SOURCE`."

from functools import partial
from pathlib import Path

from landmarks_fastai.cli import app, options
from landmarks_fastai.errors import BadData, UserError

PICTURE = Path("labels.png")


def labels_parser() -> options.Parser:
    "The flags of the command."
    parser = options.Parser(
        "Print what a source of labels holds, and draw a few of its rows with the points' names into labels.png.\n"
        "docs/labels.md lists the formats."
    )
    parser.add_argument("source", metavar="SOURCE", help="a file or a folder of labels")
    parser.add_argument("--category", default=None, metavar="NAME", help=options.FIELDS["category"].metadata["about"])
    about = "write the labels: .csv is the plain CSV, .json is COCO keypoints; the file goes beside the images"
    parser.add_argument("--out", type=Path, metavar="FILE", help=about)
    return parser


def main() -> None:
    args = labels_parser().parse_args()
    if args.out and args.out.suffix.lower() not in (".csv", ".json"):
        raise UserError(f"--out {args.out}: a name that ends in .csv or .json expected")

    from landmarks_fastai.data.checks import check_images
    from landmarks_fastai.data.describe import describe, draw_rows, not_written, write_labels
    from landmarks_fastai.data.sources import read_source
    from landmarks_fastai.data.suspicions import suspicions

    labels, folder = read_source(Path(args.source), args.category or "")
    for line in describe(labels):
        print(line)
    for text in suspicions(labels):
        print(f"suspicion, training stops at it: {text}")
    faults = dict(sorted((labels.faults | check_images(labels, folder)).items()))
    for line in BadData((labels.problem(*fault) for fault in faults.items()), len(faults)).lines if faults else ():
        print(f"bad: {line}")
    rows = [row for row in range(len(labels)) if row not in faults]
    if not rows:
        raise UserError(f"{labels.csv}: every row is bad")
    draw_rows(labels, folder, rows, PICTURE)
    print(f"look at the points: {PICTURE}")
    if args.out:
        relative_to = write_labels(labels, folder, rows, args.out)
        print(f"{len(rows)} rows: {args.out}; its file names are relative to {relative_to}")
        if lost := not_written(labels, args.out):
            print(f"note: not in {args.out}: {', '.join(lost)}")


command = partial(app.run_main, main)
