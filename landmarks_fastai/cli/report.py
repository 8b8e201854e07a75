"The page of a run: `python -m landmarks_fastai.report NAME`; of several, side by side."

from functools import partial
from pathlib import Path

from landmarks_fastai.cli import app, options
from landmarks_fastai.errors import UserError


def report_parser() -> options.Parser:
    "The flags of the report."
    parser = options.Parser(
        "Write runs/NAME/report.html, as every stage does: scores, the worst images, where and when the network errs.\n"
        "Of several runs: runs/report.html, with their scores side by side."
    )
    about = "the name of a run in the output folder, or the path of a checkpoint"
    parser.add_argument("names", nargs="+", metavar="NAME", help=about)
    parser.add_settings("data", ["data"], {"data": "the checkpoint's"})
    parser.add_machine(training=False)
    return parser


def main() -> None:
    args = report_parser().parse_args()

    from landmarks_fastai.inference.report import report_checkpoint, write_comparison
    from landmarks_fastai.runs.checkpoint import find_checkpoint

    checkpoints = [find_checkpoint(name, args.out) for name in args.names]
    if len(checkpoints) > 1:
        if args.data:
            raise UserError("-d is for the report of one run: run without it")
        path = Path(args.out, "report.html")
        write_comparison(path, checkpoints)
    else:
        machine = options.prepared_machine(options.typed_flags(args))
        path = report_checkpoint(checkpoints[0], args.data, machine)
    print(f"look at {path}")


command = partial(app.run_main, main)
