#!/usr/bin/env python
"""How fast a folder of images is predicted, from checkpoint to finished submission.

    python benchmarks/predict.py                                    # resnext50_32x4d, 128 px, 600 images, batches of 32

    contest   as the competition's notebooks do: the network as it was loaded, NCHW, images fitted one by one in the main process,
              then a batch computed, all points kept in a list, the submission written at the end
    program   `predict.py` of this program, one look (`--no-tta`)

Both have the same random weights and images, each a fresh process; imports are not timed, building the network is. They
take turns; the better of each is printed, and the largest distance between their points, in pixels of the images as stored.
"""

import argparse
import json
import sys
import tempfile
import time
import warnings
from pathlib import Path

from faces import write_faces
from measure import ROOT, fresh, peak_mb, print_table

sys.path.insert(0, str(ROOT))


def write_weights(args, folder: Path):
    import torch

    from landmarks_fastai.models.networks import build_model
    from landmarks_fastai.runs.checkpoint import write_checkpoint
    from landmarks_fastai.runs.run import Run
    from landmarks_fastai.settings import Settings

    torch.manual_seed(0)
    settings = Settings(
        arch=args.arch, size=args.size, batch_size=args.batch_size, n_points=args.points, data=str(folder)
    )
    model = build_model(settings.arch, settings.head, settings.n_points, settings.size)
    # a network's own random norms make all images alike: a few batches of noise give them a spread
    model.train()
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(8, 3, args.size, args.size))
    write_checkpoint(Run(folder, "b"), model, settings, 0.0, 0.0, 0)


def contest(args, folder: Path):
    import numpy as np
    import torch
    import torchvision  # noqa: F401

    from landmarks_fastai.competition import read_test_points, round_points, submission_header, submission_line
    from landmarks_fastai.data.images import open_image
    from landmarks_fastai.geometry import fit_image, unit_to_input
    from landmarks_fastai.runs.checkpoint import read_checkpoint
    from landmarks_fastai.settings import INPUT

    start = time.perf_counter()
    checkpoint = read_checkpoint(folder / "b" / "best.pth")
    model, settings = checkpoint.model(), checkpoint.settings
    asked = read_test_points(folder / "test" / "test_points.csv")
    mean, std = torch.tensor(settings.mean).view(3, 1, 1), torch.tensor(settings.std).view(3, 1, 1)

    class Faces(torch.utils.data.Dataset):
        def __len__(self):
            return len(asked)

        def __getitem__(self, row):
            image = open_image(folder / "test" / "images" / asked.names[row])
            fitted, to_input = fit_image(image, **settings.of(INPUT))
            pixels = torch.from_numpy(np.asarray(fitted).transpose(2, 0, 1).copy()).float() / 255
            return (pixels - mean) / std, torch.tensor(to_input, dtype=torch.float64)

    points = []
    with torch.no_grad():
        for images, maps in torch.utils.data.DataLoader(Faces(), args.batch_size):
            found = unit_to_input(model(images).reshape(len(images), -1, 2).double(), settings.size)
            scale, shift = maps[:, None, :2], maps[:, None, 2:]
            points.append(((found - shift) / scale).numpy())
    points = np.concatenate(points)
    lines = [
        submission_line(name, round_points(each[which], "nearest"))
        for name, each, which in zip(asked.names, points, asked.indices, strict=True)
    ]
    (folder / "contest_submit.csv").write_text(submission_header(asked.indices.shape[1]) + "".join(lines))
    took = time.perf_counter() - start
    np.save(folder / "contest_points.npy", points.astype(np.float32))
    print(json.dumps({"seconds": took, "mb": peak_mb()}))


def program(args, folder: Path):
    import torchvision  # noqa: F401

    from landmarks_fastai.inference.predictor import predict_test
    from landmarks_fastai.runs.checkpoint import read_checkpoint
    from landmarks_fastai.runs.run import Run
    from landmarks_fastai.utils.hardware import Machine

    start = time.perf_counter()
    machine = Machine(workers=args.workers, compile=args.compile)
    machine.prepare()
    checkpoint = read_checkpoint(folder / "b" / "best.pth")
    predict_test(checkpoint, folder, Run(folder, "program"), machine=machine, batch_size=args.batch_size)
    print(json.dumps({"seconds": time.perf_counter() - start, "mb": peak_mb()}))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="resnext50_32x4d", help="network (default: resnext50_32x4d)")
    parser.add_argument("-N", type=int, default=600, help="images (default: 600)")
    parser.add_argument("--batch-size", type=int, default=32, help="default: 32")
    parser.add_argument("--size", type=int, default=128, help="of the input, in pixels (default: 128)")
    parser.add_argument("--points", type=int, default=971, help="default: 971")
    parser.add_argument("--pixels", type=int, default=0, help="side of the images (default: 74 to 494, half below 180)")
    parser.add_argument("--rounds", type=int, default=2, help="default: 2")
    parser.add_argument("--workers", type=int, help="default: what the program chooses")
    parser.add_argument("--compile", action="store_true", help="as predict.py's")
    parser.add_argument("--ways", default="contest,program", help="which to measure (default: both)")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        warnings.simplefilter("ignore")
        return {"contest": contest, "program": program}[args.child[0]](args, Path(args.child[1]))
    ways, found = args.ways.split(","), {}
    with tempfile.TemporaryDirectory() as folder:
        write_faces(Path(folder), "test", args.N, points=args.points, pixels=args.pixels)
        write_weights(args, Path(folder))
        for _ in range(args.rounds):
            for way in ways:
                found.setdefault(way, []).append(fresh(__file__, *sys.argv[1:], "--child", way, folder))
        far = distance(Path(folder)) if len(ways) == 2 else None
    seconds = {way: min(f["seconds"] for f in runs) for way, runs in found.items()}
    print(f"{args.arch}, {args.size} px, {args.N} images, batches of {args.batch_size}\n")
    print_table(["way", "images/s", f"as a ratio to {ways[0]}", "peak MB"],
                [[w, args.N / s, seconds[ways[0]] / s, max(f["mb"] for f in found[w])] for w, s in seconds.items()])  # fmt: skip
    if far is not None:
        print(f"\nlargest distance between the two ways' points: {far:.4f} px of the images as stored")


def distance(folder: Path) -> float:
    import numpy as np

    a, b = np.load(folder / "contest_points.npy"), np.load(folder / "program_points.npy")
    return float(np.linalg.norm(a - b, axis=-1).max())


if __name__ == "__main__":
    main()
