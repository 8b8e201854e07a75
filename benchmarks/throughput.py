#!/usr/bin/env python
"""Images per second of training on this machine.

python benchmarks/throughput.py                                   # resnet18, 128 px, batches of 32
python benchmarks/throughput.py --arch resnext50_32x4d --cache
python benchmarks/throughput.py --ways feed --pixels 450          # the DataLoader alone

ours    two figures. "bare": forward, backward and step on one batch that never changes, with this program's memory
        order, optimiser and settings of the machine. "learner": its `Learner` with all that a stage does: images read,
        fitted, augmented, weights averaged. They take turns in one process; medians are printed
feed    from files to batches on the CPU, without workers and batch transforms, by the CPU time of the process: whole
        images and what training reads (three quarters are aligned crops), from JPEGs and from `--cache`
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
import warnings
from itertools import product
from pathlib import Path

from faces import write_faces
from measure import ROOT, fresh, print_table

sys.path.insert(0, str(ROOT))
SECONDS = 1.0  # of a measurement of the DataLoader, at the least


def make_learner(args, folder):
    from landmarks_fastai import landmark_dataloaders, landmark_learner
    from landmarks_fastai.training.callbacks.evaluation import Average
    from landmarks_fastai.utils.hardware import Machine

    machine = Machine(workers=args.workers, cache=args.cache, amp=args.amp, compile=args.compile)
    machine.prepare()
    dls = landmark_dataloaders(folder, batch_size=args.batch_size, size=args.size, valid_pct=1e-6, machine=machine)
    learn = landmark_learner(dls, args.arch, "none", sched="none", machine=machine, path=folder)
    learn.add_cb(Average(learn.settings.ema))
    learn.remove_cb(learn.progress)
    return learn


def bare_steps(learn, batch, steps: int) -> float:
    "Images per second of bare steps with the Learner's network, loss and optimiser."
    images, points, _ = batch
    learn.model.train()
    start = time.perf_counter()
    for _ in range(steps):
        with learn.machine.autocast():
            loss = learn.loss_func(learn.model(images), points)
        loss.backward()
        learn.opt.step()
        learn.opt.zero_grad()
    return steps * len(images) / (time.perf_counter() - start)


def ours(args, folder) -> dict:
    import torch
    from fastai.callback.core import Callback, CancelValidException
    from fastai.torch_core import to_device

    learn = make_learner(args, folder)
    batch = to_device([t.as_subclass(torch.Tensor) for t in learn.dls.train.one_batch()])
    speeds: dict[str, list[float]] = {"bare": [], "learner": []}

    class Turns(Callback):
        order = -100

        def before_train(self):
            if self.epoch:  # the first epoch warms up, and fills the cache
                speeds["bare"].append(bare_steps(learn, batch, len(learn.dls.train)))
            self.start = time.perf_counter()

        def after_train(self):
            if self.epoch:
                images = len(learn.dls.train) * args.batch_size
                speeds["learner"].append(images / (time.perf_counter() - self.start))

    class NoValidation(Callback):
        order = 99

        def before_validate(self):
            raise CancelValidException()

    with learn.no_logging():
        learn.fit(args.rounds + 1, cbs=[Turns(), NoValidation()])
    return speeds


def feed(args, folder) -> dict:
    from landmarks_fastai import landmark_dataloaders
    from landmarks_fastai.utils.hardware import Machine

    speeds = {}
    for (name, align), cache in product((("whole images", {"align": 0.0}), ("crops", {})), (False, True)):
        machine, sizes = Machine(workers=0, cache=cache), {"batch_size": args.batch_size, "size": args.size}
        dl = landmark_dataloaders(folder, valid_pct=1e-6, mirror="none", machine=machine, **sizes, **align).train
        dl.after_batch.fs.clear()
        way = speeds.setdefault(f"{name}, {'--cache' if cache else 'JPEGs'}", [])
        for turn in range(args.rounds + 1):  # the first fills the cache
            start, images = time.process_time(), 0
            while (seconds := time.process_time() - start) < SECONDS:
                images += sum(len(batch[0]) for batch in dl)
            if turn:
                way.append(images / seconds)
    return speeds


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="resnet18", help="network (default: resnet18)")
    parser.add_argument("--batch-size", type=int, default=32, help="default: 32")
    parser.add_argument("--size", type=int, default=128, help="of the input, in pixels (default: 128)")
    parser.add_argument("-N", type=int, default=320, help="images of an epoch, which is a turn (default: 320)")
    parser.add_argument("--rounds", type=int, default=3, help="turns that are timed, after the first (default: 3)")
    parser.add_argument("--pixels", type=int, default=0, help="side of the images (default: 74 to 494, half below 180)")
    parser.add_argument("--workers", type=int, help="default: what the program chooses")
    parser.add_argument("--cache", action="store_true", help="as train.py's")
    parser.add_argument("--compile", action="store_true", help="as train.py's")
    parser.add_argument("--amp", default="off", help="as train.py's (default: off)")
    parser.add_argument("--ways", choices=("ours", "feed"), default="ours", help="default: ours")
    parser.add_argument("-d", help="folder with train/ to use (default: drawn faces, written anew)")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args()


def main():
    args = parse_args()
    if args.child:
        warnings.simplefilter("ignore")
        speeds = {"ours": ours, "feed": feed}[args.ways](args, Path(args.child))
        return print(json.dumps({way: statistics.median(values) for way, values in speeds.items()}))
    with tempfile.TemporaryDirectory() as folder:
        if not args.d:
            write_faces(Path(folder), "train", args.N, pixels=args.pixels)
        speeds = fresh(__file__, *sys.argv[1:], "--child", args.d or folder)
    first = next(iter(speeds))
    print(f"{args.arch + ', ' if args.ways == 'ours' else ''}{args.size} px, batches of {args.batch_size}\n")
    rows = [[way, speed, speed / speeds[first]] for way, speed in speeds.items()]
    print_table(["way", "images/s", f"as a ratio to {first}"], rows)


if __name__ == "__main__":
    main()
