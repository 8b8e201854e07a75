#!/usr/bin/env python
"""Images per second of training on this machine.

    python benchmarks/throughput.py                                   # resnet18, 128 px, batches of 32
    python benchmarks/throughput.py --arch resnext50_32x4d --cache
    python benchmarks/throughput.py --ways feed                       # the DataLoader alone: feed.py

    ours        two figures. "bare": forward, backward and step on one batch that never changes, with this program's
                memory order, optimiser and settings of the machine. "learner": its `Learner` with all that a stage does:
                images read, fitted, augmented, weights averaged
    notebook    a PyTorch loop as in the competition's notebooks: NCHW, no workers, transforms in the main process,
                `loss.item()` at every step, PyTorch's AdamW

Bare steps and Learner take turns in one process; the notebook's loop has a process of its own. Medians are printed.
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
from feed import feed
from measure import ROOT, fresh, peak_mb, print_table

sys.path.insert(0, str(ROOT))
N_POINTS = 971


def make_learner(args, folder):
    from landmarks_fastai import landmark_dataloaders, landmark_learner
    from landmarks_fastai.synthetic.face_template import flip_indices_of_template
    from landmarks_fastai.training.callbacks.evaluation import Average
    from landmarks_fastai.utils.hardware import Machine

    machine = Machine(workers=args.workers, cache=args.cache, amp=args.amp, compile=args.compile)
    machine.prepare()
    dls = landmark_dataloaders(
        folder,
        batch_size=args.batch_size,
        size=args.size,
        valid_pct=1e-6,
        n_points=N_POINTS,
        flip_indices=tuple(flip_indices_of_template(N_POINTS).tolist()),  # any table costs the same
        machine=machine,
    )
    learn = landmark_learner(dls, args.arch, "none", sched="none", machine=machine, path=folder)
    learn.add_cb(Average(learn.settings.ema))
    learn.remove_cb(learn.progress)
    return learn, machine


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

    learn, machine = make_learner(args, folder)
    batch = to_device([t.as_subclass(torch.Tensor) for t in learn.dls.train.one_batch()])
    found: dict[str, list[float]] = {"bare": [], "learner": []}

    class Turns(Callback):
        order = -100

        def before_train(self):
            if self.epoch:  # the first epoch warms up, and fills the cache
                found["bare"].append(bare_steps(learn, batch, len(learn.dls.train)))
            self.start = time.perf_counter()

        def after_train(self):
            if self.epoch:
                images = len(learn.dls.train) * args.batch_size
                found["learner"].append(images / (time.perf_counter() - self.start))

        def before_validate(self):
            raise CancelValidException()

    with learn.no_logging():
        learn.fit(args.rounds + 1, cbs=Turns())
    return found | {"workers": machine.decoders, "mb": peak_mb()}


def notebook_loader(args, folder):
    import torch
    from torchvision import transforms

    from landmarks_fastai.data.labels import read_labels

    labels = read_labels(folder / "train" / "landmarks.csv")
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
            return to_tensor(image), torch.tensor(labels.points(row) * scale)

    return torch.utils.data.DataLoader(Faces(), args.batch_size, shuffle=True, drop_last=True)


def notebook(args, folder) -> dict:
    import torch

    from landmarks_fastai.models.networks import build_model

    model = build_model(args.arch, "linear", N_POINTS, args.size).train()
    loader = notebook_loader(args, folder)
    optimiser = torch.optim.AdamW(model.parameters(), amsgrad=True, weight_decay=0.05)
    found = []
    for _ in range(args.rounds + 1):
        start, total = time.perf_counter(), 0.0
        for images, points in loader:
            loss = torch.nn.functional.mse_loss(model(images), points)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            total += loss.item()
        found.append(len(loader) * args.batch_size / (time.perf_counter() - start))
    return {"notebook": found[1:], "mb": peak_mb()}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="resnet18", help="network (default: resnet18)")
    parser.add_argument("--batch-size", type=int, default=32, help="default: 32")
    parser.add_argument("--size", type=int, default=128, help="of the input, in pixels (default: 128)")
    parser.add_argument("-N", type=int, default=320, help="images of an epoch, which is a turn (default: 320)")
    parser.add_argument(
        "--rounds", type=int, default=3, help="turns that are timed, after one that is not (default: 3)"
    )
    parser.add_argument("--pixels", type=int, default=0, help="side of the images (default: 74 to 494, half below 180)")
    parser.add_argument("--workers", type=int, help="default: what the program chooses")
    parser.add_argument("--cache", action="store_true", help="as train.py's")
    parser.add_argument("--compile", action="store_true", help="as train.py's")
    parser.add_argument("--amp", default="off", help="as train.py's (default: off)")
    parser.add_argument(
        "--ways", default="ours,notebook", help="ours, notebook, or feed alone (default: ours,notebook)"
    )
    parser.add_argument("-d", help="folder with train/ to use (default: drawn faces, written anew)")
    parser.add_argument("--child", choices=("ours", "notebook"), help=argparse.SUPPRESS)
    return parser.parse_args()


def main():
    args = parse_args()
    if args.ways == "feed":
        return feed(args.pixels, args.N, args.rounds, args.batch_size, args.size)
    if args.child:
        warnings.simplefilter("ignore")
        return print(json.dumps({"ours": ours, "notebook": notebook}[args.child](args, Path(args.d))))
    words = [w for w in sys.argv[1:] if w not in ("-d", args.d)]
    with tempfile.TemporaryDirectory() as folder:
        if not args.d:
            write_faces(Path(folder), "train", args.N, pixels=args.pixels)
        found = {}
        for way in args.ways.split(","):
            found |= fresh(__file__, *words, "--child", way, "-d", args.d or folder)
    speeds = {k: statistics.median(found[k]) for k in ("bare", "learner", "notebook") if k in found}
    workers = f"{found.get('workers', 0)} workers{', cache' * args.cache}"
    print(f"{args.arch}, {args.size} px, batches of {args.batch_size}, {workers}\n")
    print_table(["way", "images/s", *(f"as a ratio to {k}" for k in speeds)],
                [[way, speed, *(speed / other for other in speeds.values())] for way, speed in speeds.items()])  # fmt: skip


if __name__ == "__main__":
    main()
