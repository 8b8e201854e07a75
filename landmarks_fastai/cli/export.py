"A checkpoint as an ONNX file: `python -m landmarks_fastai.export NAME`."

from functools import partial
from pathlib import Path

from landmarks_fastai.cli import app, options
from landmarks_fastai.errors import UserError
from landmarks_fastai.settings import OUT
from landmarks_fastai.utils.files import reason


def export_parser() -> options.Parser:
    "The flags of the export."
    parser = options.Parser("Write a checkpoint as an ONNX file, which predict.py -pm FILE reads without PyTorch.")
    parser.add_argument("checkpoint", metavar="NAME", help="the name of a run in the output folder, or a path")
    parser.add_argument("--out", default=OUT, metavar="DIR", help=f"output folder (default: {OUT})")
    about = "file to write (default: runs/NAME/NAME.onnx)"
    parser.add_argument("-o", dest="file", type=Path, metavar="FILE", help=about)
    return parser


def main() -> None:
    args = export_parser().parse_args()
    if args.file and args.file.suffix != ".onnx":
        raise UserError(f"-o {args.file}: a name that ends in .onnx expected")

    from landmarks_fastai.inference.export import export_checkpoint
    from landmarks_fastai.runs.checkpoint import find_checkpoint

    checkpoint = find_checkpoint(args.checkpoint, args.out)
    file = args.file or checkpoint.path.with_name(f"{checkpoint.name}.onnx")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"-o {file}: its folder cannot be made ({reason(e)}): choose another") from None
    export_checkpoint(checkpoint, file)
    print(f"{file}: the checkpoint's points, to 0.01 px of the input")


command = partial(app.run_main, main)
