"A checkpoint as an ONNX file: `python -m landmarks_fastai.export NAME`."

import argparse
from pathlib import Path

from landmarks_fastai.cli import app
from landmarks_fastai.errors import UserError
from landmarks_fastai.settings import OUT
from landmarks_fastai.utils.files import reason


def export_parser() -> argparse.ArgumentParser:
    "The flags of the export."
    parser = argparse.ArgumentParser(
        description="Write a checkpoint as an ONNX file, which predict.py -pm FILE reads without PyTorch.",
        allow_abbrev=False,
    )
    parser.add_argument("checkpoint", metavar="NAME", help="the name of a run in the output folder, or a path")
    parser.add_argument("--out", default=OUT, metavar="DIR", help=f"output folder (default: {OUT})")
    parser.add_argument(
        "-o", dest="file", type=Path, metavar="FILE", help="file to write (default: runs/NAME/NAME.onnx)"
    )
    parser.add_argument(
        "--tta", action="store_true", help="flip test inside the network (default: off; predict.py makes it outside)"
    )
    about = "write FILE_int8.onnx too, calibrated on training images, and print the scores of both (default: off)"
    parser.add_argument("--int8", action="store_true", help=about)
    about = "folder that holds train/, for --int8 (default: the checkpoint's)"
    parser.add_argument("-d", "--data", default="", metavar="DIR", help=about)
    return parser


def main() -> None:
    parser = export_parser()
    args = parser.parse_args()
    if args.data and not args.int8:
        parser.error("-d is for --int8: run without it, or add --int8")
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
    export_checkpoint(checkpoint, file, args.tta)
    print(f"{file}: the checkpoint's points, to 0.01 px of the input", flush=True)
    if args.int8:
        from landmarks_fastai.inference.quantize import quantize

        small = file.with_name(f"{file.stem}_int8.onnx")
        before, after = quantize(checkpoint, file, small, args.data)
        print(
            f"{small}: score {after.score:.4g} at {after.speed:.3g} images/s, float32 {before.score:.4g} at "
            f"{before.speed:.3g} images/s ({after.rows} validation rows, predicted as predict.py does)"
        )


def command() -> None:
    "The command `landmarks-export`."
    app.run_main(main)
