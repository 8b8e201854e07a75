"""Images per second through a DataLoader alone: files in, batches on the CPU out; no network.

    python benchmarks/throughput.py --ways feed

For JPEGs of 200 and of 1,000 px on the short side, at 0, 1 and 2 workers:

    whole, crops    this program's training loader, from JPEGs and from `--cache`: uint8 images of 128 px, points in unit
                    coordinates, maps; without the batch transforms, which run on the device. "whole" reads whole images,
                    "crops" what training reads, three quarters of them aligned crops
    v2, float       torchvision's ImageFolder, its images without points. The transforms that its documentation
                    recommends: ToImage, Resize(antialias=True), CenterCrop, ToDtype(float32), Normalize
    v2, uint8       the same without the last two, which then run on the device, as this program's do
    v2, PIL, float  the first, but Resize and CenterCrop on PIL images

The ways take turns, each in a process of its own with one thread; medians are printed. "A core" is by the CPU time of a
process without workers, which other processes on the machine change little; the other columns are by the clock.
"""

import argparse
import gc
import json
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Iterable
from itertools import product
from pathlib import Path

from faces import write_faces
from measure import ROOT, fresh, print_table

sys.path.insert(0, str(ROOT))

WORKERS = (0, 1, 2)
PIXELS = (200, 1000)
SECONDS = 1.0  # of a measurement, at the least


def rates(name: str, batches: Iterable, images: int, workers: int) -> dict[str, float]:
    """Images per second of whole passes; without workers those of a core too, by the CPU time of the process.

    The first pass is not counted: it starts the workers and fills the cache.
    """
    for _ in batches:
        pass
    start, cpu, passes = time.perf_counter(), time.process_time(), 0
    while (seconds := time.perf_counter() - start) < SECONDS:
        for _ in batches:
            pass
        passes += 1
    core = {} if workers else {f"{name} a core": passes * images / (time.process_time() - cpu)}
    return core | {f"{name} {workers}": passes * images / seconds}


def ours(folder: Path, batch_size: int, size: int) -> dict[str, float]:
    from landmarks_fastai import landmark_dataloaders
    from landmarks_fastai.utils.hardware import Machine

    found = {}
    settings = {"batch_size": batch_size, "size": size, "valid_pct": 1e-6, "mirror": "none"}
    for name, changes in (("whole", {"align": 0.0}), ("crops", {})):
        for cache, workers in product((False, True), WORKERS):
            machine = Machine(workers=workers, cache=cache)
            machine.prepare()
            dl = landmark_dataloaders(folder, **settings, **changes, machine=machine).train
            dl.after_batch.fs.clear()
            found |= rates(f"{name}, {'--cache' if cache else 'JPEGs'}", dl, len(dl) * batch_size, workers)
            dl.loader = None
            gc.collect()  # ends the workers
    return found


def torchvision(folder: Path, batch_size: int, size: int) -> dict[str, float]:
    import torch
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    fit = [v2.Resize(size, antialias=True), v2.CenterCrop(size)]
    to_float = [v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])]
    ways = {
        "v2, float": [v2.ToImage(), *fit, *to_float],
        "v2, uint8": [v2.ToImage(), *fit],
        "v2, PIL, float": [*fit, v2.ToImage(), *to_float],
    }
    found = {}
    for (name, transforms), workers in product(ways.items(), WORKERS):
        data = ImageFolder(folder / "train", v2.Compose(transforms))
        more = {"num_workers": workers, "persistent_workers": workers > 0}
        loader = torch.utils.data.DataLoader(data, batch_size, shuffle=True, drop_last=True, **more)
        found |= rates(name, loader, len(loader) * batch_size, workers)
        del loader
        gc.collect()  # ends the workers
    return found


def measured(sides: tuple[int, ...], n: int, rounds: int, batch_size: int, size: int) -> dict[int, dict[str, float]]:
    "Side of the JPEGs -> way and workers -> images per second, the median of the rounds."
    found: dict[int, dict[str, list[float]]] = {px: {} for px in sides}
    with tempfile.TemporaryDirectory() as folder:
        for px in sides:
            write_faces(Path(folder) / str(px), "train", n, pixels=px)
        for _ in range(rounds):
            for px in sides:
                for way in ("ours", "torchvision"):
                    words = ("--child", way, "-d", Path(folder) / str(px), "--batch-size", batch_size, "--size", size)
                    for key, value in fresh(__file__, *words, env={"OMP_NUM_THREADS": "1"}).items():
                        found[px].setdefault(key, []).append(value)
    return {px: {key: statistics.median(values) for key, values in each.items()} for px, each in found.items()}


def feed(pixels: int, n: int, rounds: int, batch_size: int, size: int) -> None:
    "Print images per second of each way, and their ratios. `pixels` is the short side of the JPEGs; 0: `PIXELS`."
    sides = (pixels,) if pixels else PIXELS
    found = measured(sides, n, rounds, batch_size, size)
    ways = [key.removesuffix(" a core") for key in found[sides[0]] if key.endswith(" a core")]
    columns = [(px, by) for px in sides for by in ("a core", *WORKERS)]
    header = [f"{px} px, {by if by == 'a core' else f'{by} workers'}" for px, by in columns]
    print(f"{size} px input, batches of {batch_size}; images/s\n")
    print_table(["way", *header], [[way, *(found[px][f"{way} {by}"] for px, by in columns)] for way in ways])
    pairs = [("whole, --cache", "whole, JPEGs"), ("crops, --cache", "crops, JPEGs")]
    pairs += [("whole, JPEGs", way) for way in ways if way.startswith("v2")]
    print()
    ratios = [
        [f"{a} to {b}", *(found[px][f"{a} {by}"] / found[px][f"{b} {by}"] for px, by in columns)] for a, b in pairs
    ]
    print_table(["ratio", *header], ratios)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--child", choices=("ours", "torchvision"), required=True)
    parser.add_argument("-d", type=Path, required=True)
    parser.add_argument("--batch-size", type=int, required=True)
    parser.add_argument("--size", type=int, required=True)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    print(json.dumps({"ours": ours, "torchvision": torchvision}[args.child](args.d, args.batch_size, args.size)))


if __name__ == "__main__":
    main()
