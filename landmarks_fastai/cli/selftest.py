"Check this machine: `python -m landmarks_fastai.selftest --gpu` prints a table that can be pasted into an issue."

import argparse
import logging
import platform
import shutil
import subprocess
import tempfile
import time
import warnings
from pathlib import Path

import landmarks_fastai
from landmarks_fastai.cli import app
from landmarks_fastai.errors import UserError, one_line
from landmarks_fastai.utils.hardware import find_gpu, why_no_gpu


def selftest_parser() -> argparse.ArgumentParser:
    "The flags of the self-test."
    parser = argparse.ArgumentParser(
        prog="python -m landmarks_fastai.selftest",
        description="Check that training and prediction work on this machine, on drawn faces in a temporary folder.\n"
        "Prints a table to paste into an issue; exits with 1 if a check has failed.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    about = "check the GPU (CUDA, or Apple's MPS), with resnext50_32x4d (default: the CPU, with a small network)"
    parser.add_argument("--gpu", action="store_true", help=about)
    return parser


def main() -> None:
    args = selftest_parser().parse_args()
    import torch

    device = find_gpu() if args.gpu else "cpu"
    if device is None:
        raise UserError(f"--gpu: {why_no_gpu()}: install the torch that fits the GPU, or run without --gpu")
    # nothing between the rows of the table
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)

    from landmarks_fastai.cli.selftest_checks import CHECKS, SMALL, Setup, run_check
    from landmarks_fastai.synthetic.sample import make_sample

    failed = 0
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        arch, size, batch_size, n_points = ("resnext50_32x4d", 128, 32, 971) if args.gpu else (SMALL, 32, 8, 68)
        print("| check | result | s | figures |\n| --- | --- | --- | --- |")
        versions = f"landmarks_fastai {landmarks_fastai.__version__}, torch {torch.__version__}, Python {platform.python_version()}"
        print(f"| versions | | | {versions}, {platform.platform()} |")
        print(f"| device | | | {device_name(device)} |")
        print(f"| network | | | {arch}, {size} px, batches of {batch_size}, {n_points} points |", flush=True)
        data = make_sample(Path(folder, "faces"), 3 * batch_size, 1, n_points, processes=None if args.gpu else 1)
        setup = Setup(device, data, arch, size, batch_size)
        for name, check in CHECKS.items():
            started = time.perf_counter()
            result, figures = run_check(check, setup)
            failed += result == "FAILED"
            text = one_line(figures).replace("|", "\\|")
            print(f"| {name} | {result} | {time.perf_counter() - started:.0f} | {text} |", flush=True)
    if failed:
        raise UserError(f"{failed} of {len(CHECKS)} checks failed: please open an issue with this table")


def device_name(device: str) -> str:
    "The device in words: its name, memory and driver."
    import torch

    if device == "cpu":
        return f"cpu, {torch.get_num_threads()} threads"
    if device == "mps":
        return f"mps, {_output('sysctl', '-n', 'machdep.cpu.brand_string')}"
    card = torch.cuda.get_device_properties(0)
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0")
    versions = f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}, driver {driver}"
    return (
        f"cuda, {card.name}, {card.total_memory / 1e9:.1f} GB, compute capability {card.major}.{card.minor}, {versions}"
    )


def _output(*command):
    "The first line that a command prints."
    if not shutil.which(command[0]):
        return "unknown"
    return (subprocess.run(command, capture_output=True, text=True).stdout.splitlines() or ["unknown"])[0]


def command() -> None:
    app.run_main(main)
