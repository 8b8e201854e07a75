#!/usr/bin/env python
"""How fast image files become points, and how long a start takes.

    python benchmarks/predict.py                 # resnext50_32x4d, 128 px, 600 images, batches of 32

    loop      a plain PyTorch loop: the network as it was loaded, images fitted one by one, then a batch computed
    program   `Predictor` with the checkpoint
    onnx      `Predictor` with its export

All make one pass over the whole images and the flip test, with the same random weights, each in a fresh process; imports are
not timed, opening the network is. They take turns: images/s are of the best round, the ratio is the median of the rounds'
ratios. The distance is the largest of a point from the loop's, in pixels of the input. The start is from the call of
`Predictor` in a fresh process to the points of one picture.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path

from faces import write_faces
from measure import ROOT, fresh, peak_mb, print_table, write_network

sys.path.insert(0, str(ROOT))
FILES = {"program": "best.pth", "onnx": "b.onnx"}


def loop(args, folder: Path, files: list[Path]):
    "Points by a plain loop, (images, n_points, 2) pixels of the images as stored, and the seconds."
    import numpy as np
    import torch

    from landmarks_fastai.data.pictures import Picture
    from landmarks_fastai.geometry import fit_image, unit_to_input
    from landmarks_fastai.runs.checkpoint import read_checkpoint

    start = time.perf_counter()
    checkpoint = read_checkpoint(folder / "b" / "best.pth")
    model, facts = checkpoint.model(), checkpoint.facts
    mean, std = torch.tensor(facts.mean).view(3, 1, 1), torch.tensor(facts.std).view(3, 1, 1)

    class Faces(torch.utils.data.Dataset):
        def __len__(self):
            return len(files)

        def __getitem__(self, row):
            fitted, to_input = fit_image(Picture(files[row], exif=False).image(), checkpoint.settings.fit, args.size)
            pixels = torch.from_numpy(np.asarray(fitted).transpose(2, 0, 1).copy()).float() / 255
            return (pixels - mean) / std, torch.tensor(to_input, dtype=torch.float64)

    points, indices = [], list(facts.flip_indices)
    with torch.no_grad():
        for images, maps in torch.utils.data.DataLoader(Faces(), args.batch_size):
            mirrored = model(images.flip(-1))[:, indices] * torch.tensor([-1.0, 1.0])
            inputs = unit_to_input(((model(images) + mirrored) / 2).double(), args.size)
            points.append(((inputs - maps[:, None, [2, 5]]) / maps[:, None, [0, 4]]).numpy())
    return np.concatenate(points), time.perf_counter() - start


def predictor(args, file: Path, files: list[Path]):
    "Points by `Predictor`, (images, n_points, 2) pixels of the images as stored, and the seconds."
    import numpy as np

    from landmarks_fastai.inference.predictor import Predictor
    from landmarks_fastai.utils.hardware import Machine

    if file.suffix == ".pth":
        from landmarks_fastai.inference import torch_network  # noqa: F401
    else:
        import onnxruntime  # noqa: F401

    start, machine = time.perf_counter(), Machine()
    machine.prepare()
    points = np.stack([p.points for p in Predictor(file, machine=machine, batch_size=args.batch_size)(files)])
    return points, time.perf_counter() - start


def child(args):
    way, folder = args.child[0], Path(args.child[1])
    warnings.simplefilter("ignore")
    files = sorted((folder / "test" / "images").iterdir())
    if way.startswith("start "):
        from landmarks_fastai import Predictor

        start = time.perf_counter()
        Predictor(folder / "b" / FILES[way.split()[1]])(files[0])
        return print(json.dumps(time.perf_counter() - start))
    import numpy as np

    points, seconds = loop(args, folder, files) if way == "loop" else predictor(args, folder / "b" / FILES[way], files)
    np.save(folder / f"{way}.npy", points)
    print(json.dumps({"seconds": seconds, "mb": peak_mb()}))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="resnext50_32x4d", help="network (default: resnext50_32x4d)")
    parser.add_argument("-N", type=int, default=600, help="images (default: 600)")
    parser.add_argument("--batch-size", type=int, default=32, help="default: 32")
    parser.add_argument("--size", type=int, default=128, help="of the input, in pixels (default: 128)")
    parser.add_argument("--points", type=int, default=971, help="default: 971")
    parser.add_argument("--pixels", type=int, default=0, help="side of the images (default: 74 to 494, half below 180)")
    parser.add_argument("--rounds", type=int, default=3, help="default: 3")
    parser.add_argument("--ways", default="loop,program,onnx", help="which to measure (default: all)")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return child(args)
    ways, runs, starts = args.ways.split(","), {}, {}
    with tempfile.TemporaryDirectory() as folder:
        write_faces(Path(folder), "test", args.N, points=args.points, pixels=args.pixels)
        checkpoint = write_network(Path(folder), args.arch, args.size, args.points)
        if "onnx" in ways:
            from landmarks_fastai.inference.export import export_checkpoint

            export_checkpoint(checkpoint, Path(folder, "b", "b.onnx"))
        for _ in range(args.rounds):
            for way in ways:
                runs.setdefault(way, []).append(fresh(__file__, *sys.argv[1:], "--child", way, folder))
                if way != "loop":
                    starts.setdefault(way, []).append(fresh(__file__, "--child", f"start {way}", folder))
        far = {way: distance(args, Path(folder), ways[0], way) for way in ways}
    print(f"{args.arch}, {args.size} px, {args.N} images, batches of {args.batch_size}\n")
    rows = []
    for way, found in runs.items():
        ratio = statistics.median(a["seconds"] / b["seconds"] for a, b in zip(runs[ways[0]], found, strict=True))
        speed, mb = args.N / min(run["seconds"] for run in found), max(run["mb"] for run in found)
        rows.append([way, speed, ratio, mb, f"{far[way]:.4f}", min(starts[way]) if way in starts else ""])
    print_table(["way", "images/s", f"as a ratio to {ways[0]}", "peak MB", "distance, px", "start, s"], rows)


def distance(args, folder: Path, reference: str, way: str) -> float:
    "Largest distance of a point of one way from that of another, in pixels of the input."
    import numpy as np
    from PIL import Image

    a, b = np.load(folder / f"{reference}.npy"), np.load(folder / f"{way}.npy")
    sides = [min(Image.open(path).size) for path in sorted((folder / "test" / "images").iterdir())]
    return float((np.linalg.norm(a - b, axis=-1).max(-1) * args.size / sides).max())


if __name__ == "__main__":
    main()
