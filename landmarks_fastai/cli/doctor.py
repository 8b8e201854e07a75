"What is wrong in the labels: `python -m landmarks_fastai.doctor SOURCE`."

import os
from argparse import Namespace
from functools import partial
from pathlib import Path

from landmarks_fastai.cli import app, options
from landmarks_fastai.cli.train import weights_of
from landmarks_fastai.errors import UserError
from landmarks_fastai.utils.files import write_text

SHOWN = 10  # rows that are printed


def doctor_parser() -> options.Parser:
    "The flags of the command."
    parser = options.Parser(
        "Find labels that do not fit: by the shape of their points, and by networks that have not seen the row.\n\n"
        "Without --folds or -pm it looks at the points and files alone, which takes seconds, and does not find points that are\n"
        "shifted as a whole, too large or small, or another object's.",
        "Writes into runs/NAME: doctor.html (the worst rows, with pictures), doctor.csv (the ranking: row, reason, landmarks) and\n"
        "exclude.txt, which train.py and finetune.py take with --exclude. Nothing is dropped without it.",
    )
    parser.add_argument("source", metavar="SOURCE", help="a file or a folder of labels, as -d of train.py")
    parser.add_argument("--category", metavar="NAME", help=options.FIELDS["category"].metadata["about"])
    count = options.number(int, 2, 20, "number from 2 to 20")
    parser.add_argument(
        "--folds", type=count, metavar="N", help="train N small networks, each on the rows without a N-th of them"
    )
    about = "a trained run, for the rows that it was not trained on; may be given several times"
    parser.add_checkpoint(about, action="append")
    about = "train N seeds with and N without the training rows of exclude.txt, and compare; results of -n are taken where they are"
    parser.add_argument("--prove", type=count, metavar="N", help=about)
    parser.add_argument("-n", "--name", default="doctor", help="name of the folder of the results (default: doctor)")
    parser.add_argument("--overwrite", action="store_true", help="replace results of that name")
    group = parser.add_argument_group("networks of --folds and --prove").add_argument
    group("--arch", default="resnet18", metavar="NAME", help="network (default: resnet18)")
    about = "weights of the body: imagenet, none, or a .safetensors or .pth file (default: imagenet)"
    group("--weights", type=weights_of, default="imagenet", metavar="W", help=about)
    group("--size", type=int, default=64, metavar="N", help="side of the input, in pixels (default: 64)")
    parser.add_machine(training=False)
    return parser


def main() -> None:
    args = doctor_parser().parse_args()
    folder = Path(args.out, args.name)
    if not args.prove or args.overwrite or not (folder / "exclude.txt").exists():
        diagnose(args, folder)
    if args.prove:
        prove(args, folder)


def diagnose(args: Namespace, folder: Path) -> None:
    "Write the files of the doctor into the folder, and print the first rows. Raises `UserError` where it has some."
    if (folder / "doctor.csv").exists() and not args.overwrite:
        raise UserError(
            f"{folder} has results, and exclude.txt may have been edited: choose another -n, or add --overwrite"
        )

    import numpy as np

    from landmarks_fastai.data.file_check import describe_files, image_facts
    from landmarks_fastai.data.items import labelled_images
    from landmarks_fastai.inference.doctor import Diagnosis, write_diagnosis
    from landmarks_fastai.runs.checkpoint import find_checkpoint
    from landmarks_fastai.settings import Settings

    machine = options.prepared_machine(options.typed_flags(args))
    source = os.path.abspath(args.source)
    images = labelled_images(source, on_bad="skip", category=args.category or "")
    images = images[np.setdiff1d(np.arange(len(images)), images.left_out)]
    facts = image_facts(images)
    lines = list(describe_files(images, facts))
    print("\n".join(lines), flush=True)
    checkpoints = [find_checkpoint(name, args.out) for name in args.pretrained_model or ()]
    if checkpoints:
        images = images.fitted(checkpoints[0].facts, checkpoints[0].path)
    if args.folds:
        from landmarks_fastai.training.folds import train_folds

        chosen = {"arch": args.arch, "size": args.size, "data": source, "category": args.category or ""}
        settings = Settings(**chosen, on_bad="skip", epochs=1, sched="onecycle", confidence=True)
        checkpoints += train_folds(images, args.folds, settings, args.weights, machine, folder.resolve())
    table = write_diagnosis(Diagnosis(images, checkpoints, machine, facts), folder, args.source, lines)
    for line in table.head(SHOWN).itertuples():
        print(
            f"{line.rank}. {line.file_name}{f' object {line.object}' if line.object else ''} ({line.where}): {line.reason}"
        )
    print(
        f"look at {folder / 'doctor.html'}; edit {folder / 'exclude.txt'}, then train with --exclude {folder / 'exclude.txt'}"
    )


def prove(args: Namespace, folder: Path) -> None:
    """Compare trainings with and without the training rows of exclude.txt, and print their leaderboard.

    The validation rows are the same in both: only so can the scores be compared. Raises `UserError` if no training row is named.
    """
    from landmarks_fastai.cli.compare import compare
    from landmarks_fastai.data.items import excluded_rows, labelled_images, row_keys
    from landmarks_fastai.data.split import divided_rows
    from landmarks_fastai.settings import Settings

    source, named = os.path.abspath(args.source), folder / "exclude.txt"
    images = labelled_images(source, on_bad="skip", category=args.category or "")
    training = set(divided_rows(images, Settings())[0].tolist())
    rows = [row for row in excluded_rows(named, images.labels).tolist() if row in training]
    if not rows:
        raise UserError(f"{named} names no training row: there is nothing to prove")
    keys = row_keys(images.labels)
    lists = [folder / "exclude_nothing.txt", folder / "exclude_training.txt"]
    for path, listed in zip(lists, ([], rows), strict=True):
        write_text(path, "".join(f"{keys[row]}\n" for row in listed))
    chosen = {"arch": args.arch, "weights": args.weights, "size": args.size, "on_bad": "skip"}
    chosen |= {"category": args.category} if args.category else {}
    name = f"{args.name}_prove"
    compare(name, data=source, exclude=[str(path) for path in lists], seeds=args.prove, out=args.out, **chosen)
    board = Path(args.out, name, "leaderboard")
    print(f"\n{board.with_suffix('.md').read_text(encoding='utf-8')}\nlook at {board.with_suffix('.html')}")


command = partial(app.run_main, main)
