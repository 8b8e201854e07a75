#!/usr/bin/env python
"""How fast a network trains on this machine, and how much of that the program's own share costs.

    python benchmarks/throughput.py                                   # resnet18, 128 px, batches of 32
    python benchmarks/throughput.py --arch resnext50_32x4d --cache

Three things, in images per second:

    ceiling   forward, backward and step on one batch that never changes, as this program would: its memory order, its
              optimiser, its settings of the machine
    learner   this program's `Learner` with all that a stage does: images read, fitted, augmented, weights averaged
    contest   a plain PyTorch loop in the usual way of the competition's notebooks: NCHW, no workers, transforms in the main process,
              `loss.item()` at every step, the same optimiser from PyTorch's defaults

Ceiling and Learner take turns in one process, some seconds each, so that a machine which slows down slows both; the
contest's loop has a process of its own. The median of the rounds is printed.

What profiling found, resnet18 at 128 px in batches of 32 on two cores, milliseconds of a step of 600:

    before                                          now
    items through fastai's pipelines    16         18    opening and fitting left out: 0.6 ms an image, 2.7% of a step
    opening and fitting 32 images       24          2    with --cache; 24 without
    AdamW, a loop over the weights      30          6    fused
    malloc giving memory back           50          0    `machine.keep_freed_memory`
    augmentation                        12         12    half of it the grid and `grid_sample`
    running average                      5          5
    a forked worker's start           2000          0    an epoch: every page of the parent is copied when it is next
                                                         written to; so on two cores there are no workers

A thread that prepares batches gained nothing: both cores are busy, and it takes turns with Python's own work.
`torch.compile` made resnext50's steps no faster on this CPU (14.3 images/s compiled, 15.8 not).
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path

from faces import open_as_stored, write_faces
from measure import ROOT, fresh, peak_mb, print_table

sys.path.insert(0, str(ROOT))


def make_learner(args, folder):
    from landmarks_fastai import landmark_dataloaders, landmark_learner
    from landmarks_fastai.synthetic.face_template import flip_indices_of_template
    from landmarks_fastai.training.callbacks.evaluation import Average
    from landmarks_fastai.utils.hardware import Machine

    machine = Machine(workers=args.workers, cache=args.cache, amp=args.amp, compile=args.compile)
    machine.prepare()
    n_points = 971
    flip_indices = tuple(flip_indices_of_template(n_points).tolist())  # any table costs the same
    dls = landmark_dataloaders(
        folder,
        batch_size=args.batch_size,
        size=args.size,
        valid_pct=1e-6,
        n_points=n_points,
        flip_indices=flip_indices,
        machine=machine,
    )
    learn = landmark_learner(dls, args.arch, "none", sched="none", machine=machine, path=folder)
    learn.add_cb(Average(learn.settings.ema))
    learn.remove_cb(learn.progress)
    return learn, machine


def time_ceiling(learn, batch, steps: int) -> float:
    "Images per second of bare steps with the Learner's network, loss and optimiser."
    images, points, _ = batch
    learn.model.train()
    start = time.perf_counter()
    for _ in range(steps):
        loss = learn.loss_func(learn.model(images), points)
        loss.backward()
        learn.opt.step()
        learn.opt.zero_grad()
    return steps * len(images) / (time.perf_counter() - start)


def ours(args, folder):
    from fastai.callback.core import Callback
    from fastai.torch_core import to_device

    learn, machine = make_learner(args, folder)
    import torch

    batch = [t.as_subclass(torch.Tensor) for t in learn.dls.train.one_batch()]
    found = {"ceiling": [], "learner": []}

    class Turns(Callback):
        order = -100

        def before_train(self):
            to_device(batch)
            if self.epoch:  # the first epoch warms up, and fills the cache
                found["ceiling"].append(time_ceiling(learn, batch, len(learn.dls.train)))
            self.start = time.perf_counter()

        def after_train(self):
            if self.epoch:
                images = len(learn.dls.train) * args.batch_size
                found["learner"].append(images / (time.perf_counter() - self.start))

        def before_validate(self):
            from fastai.callback.core import CancelValidException

            raise CancelValidException()

    with learn.no_logging():
        learn.fit(args.rounds + 1, cbs=Turns())
    print(json.dumps(found | {"workers": machine.decoders, "mb": peak_mb()}))


def contest(args, folder):
    import torch
    from torchvision import transforms

    from landmarks_fastai.data.labels import read_labels
    from landmarks_fastai.models.networks import build_model

    labels = read_labels(folder / "train" / "landmarks.csv")
    model = build_model(args.arch, "linear", labels.n_points, args.size).train()
    to_tensor = transforms.Compose(
        [
            transforms.Resize(args.size),
            transforms.CenterCrop(args.size),
            transforms.ToTensor(),
            transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ]
    )

    class Faces(torch.utils.data.Dataset):
        def __len__(self):
            return len(labels)

        def __getitem__(self, row):
            image = open_as_stored(folder / "train" / "images" / labels.name(row))
            scale = args.size / min(image.size)
            return to_tensor(image), torch.tensor(labels.points(row) * scale).reshape(-1)

    loader = torch.utils.data.DataLoader(Faces(), args.batch_size, shuffle=True, drop_last=True)
    optimiser = torch.optim.AdamW(model.parameters(), amsgrad=True, weight_decay=0.05)
    found = []
    for round_ in range(args.rounds + 1):
        start = time.perf_counter()
        total = 0.0
        for images, points in loader:
            loss = torch.nn.functional.mse_loss(model(images), points)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            total += loss.item()
        if round_:
            found.append(len(loader) * args.batch_size / (time.perf_counter() - start))
    print(json.dumps({"contest": found, "mb": peak_mb()}))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="resnet18", help="network (default: resnet18)")
    parser.add_argument("--batch-size", type=int, default=32, help="default: 32")
    parser.add_argument("--size", type=int, default=128, help="of the input, in pixels (default: 128)")
    parser.add_argument("-N", type=int, default=320, help="images of an epoch, which is a turn (default: 320)")
    parser.add_argument(
        "--rounds", type=int, default=3, help="turns that are timed, behind one that is not (default: 3)"
    )
    parser.add_argument("--pixels", type=int, default=0, help="side of the images (default: 74 to 494, half below 180)")
    parser.add_argument("--workers", type=int, help="default: what the program chooses")
    parser.add_argument("--cache", action="store_true", help="as train.py's")
    parser.add_argument("--compile", action="store_true", help="as train.py's")
    parser.add_argument("--amp", default="off", help="as train.py's (default: off)")
    parser.add_argument("--ways", default="ours,contest", help="ours, which is ceiling and Learner; contest")
    parser.add_argument("-d", help="folder with train/ to use (default: drawn faces, written anew)")
    parser.add_argument("--child", choices=("ours", "contest"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        warnings.simplefilter("ignore")
        return {"ours": ours, "contest": contest}[args.child](args, Path(args.d))
    words = [w for w in sys.argv[1:] if w not in ("-d", args.d)]
    with tempfile.TemporaryDirectory() as folder:
        if not args.d:
            write_faces(Path(folder), "train", args.N, pixels=args.pixels)
        found = {}
        for way in args.ways.split(","):
            found |= fresh(__file__, *words, "--child", way, "-d", args.d or folder)
    speeds = {k: statistics.median(found[k]) for k in ("ceiling", "learner", "contest") if k in found}
    print(
        f"{args.arch}, {args.size} px, batches of {args.batch_size}, {found.get('workers', 0)} workers{', cache' * args.cache}\n"
    )
    print_table(["way", "images/s", *(f"as a ratio to {k}" for k in speeds)],
                [[way, speed, *(speed / other for other in speeds.values())] for way, speed in speeds.items()])  # fmt: skip


if __name__ == "__main__":
    main()
