"What is wrong in the labels: `python -m landmarks_fastai.doctor SOURCE`."

import os
from functools import partial
from pathlib import Path

from landmarks_fastai.cli import app, options
from landmarks_fastai.cli.train import weights_of
from landmarks_fastai.errors import UserError

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
    parser.add_argument("-n", "--name", default="doctor", help="name of the folder of the results (default: doctor)")
    parser.add_argument("--overwrite", action="store_true", help="replace results of that name")
    group = parser.add_argument_group("networks of --folds").add_argument
    group("--arch", default="resnet18", metavar="NAME", help="network (default: resnet18)")
    about = "weights of the body: imagenet, none, or a .safetensors or .pth file (default: imagenet)"
    group("--weights", type=weights_of, default="imagenet", metavar="W", help=about)
    group("--size", type=int, default=64, metavar="N", help="side of the input, in pixels (default: 64)")
    parser.add_machine(training=False)
    return parser


def main() -> None:
    args = doctor_parser().parse_args()
    folder = Path(args.out, args.name)
    if (folder / "doctor.csv").exists() and not args.overwrite:
        raise UserError(
            f"{folder} has results, and exclude.txt may have been edited: choose another -n, or add --overwrite"
        )

    from landmarks_fastai.data.file_check import describe_files, image_facts
    from landmarks_fastai.data.items import labelled_images
    from landmarks_fastai.inference.doctor import Diagnosis, write_diagnosis
    from landmarks_fastai.runs.checkpoint import find_checkpoint
    from landmarks_fastai.settings import Settings

    machine = options.prepared_machine(options.typed_flags(args))
    source = os.path.abspath(args.source)
    images = labelled_images(source, on_bad="skip", category=args.category or "")
    images = images[[row for row in range(len(images)) if row not in set(images.left_out.tolist())]]
    facts = image_facts(images)
    lines = list(describe_files(images, facts))
    print("\n".join(lines), flush=True)
    checkpoints = [find_checkpoint(name, args.out) for name in args.pretrained_model or ()]
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


command = partial(app.run_main, main)
