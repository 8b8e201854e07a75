#!/usr/bin/env python
"""What a training step keeps in memory, worked out without a GPU: weights, gradients, optimiser, average, activations.

    python benchmarks/budget.py                       # resnext50_32x4d, 128 px, batches of 32, 971 points
    python benchmarks/budget.py --size 224

The tensors that autograd saves for the backward pass are counted in a real forward pass (each storage once), in float32 and
under autocast. What a GPU needs beyond them is not counted: CUDA's own context, cuDNN's workspace, the allocator's gaps,
and the gradients of activations, of which the largest is printed twice (one that is read, one that is written).
"""

import argparse
import sys
import warnings

from measure import ROOT, print_table

sys.path.insert(0, str(ROOT))


def saved_bytes(model, images, autocast: bool) -> tuple[int, int]:
    "Bytes that autograd saves, weights aside, and those of the largest saved tensor."
    import torch

    own = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
    found = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = (storage.nbytes(), storage)  # held, so that no other takes its place
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        model(images).float().square().mean()
    sizes = [n for n, _ in found.values()]
    return sum(sizes), max(sizes)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="resnext50_32x4d", help="network (default: resnext50_32x4d)")
    parser.add_argument("--batch-size", type=int, default=32, help="default: 32")
    parser.add_argument("--size", type=int, default=128, help="of the input, in pixels (default: 128)")
    parser.add_argument("--points", type=int, default=971, help="default: 971")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    import torch

    from landmarks_fastai.models.networks import build_model

    model = build_model(args.arch, "linear", args.points, args.size).train()
    weights = 4 * sum(p.numel() for p in model.parameters())
    images = torch.zeros(args.batch_size, 3, args.size, args.size)
    totals = []
    for autocast in (False, True):
        kept, largest = saved_bytes(model, images, autocast)
        # autocast's copies of the weights, two bytes each, live from the forward to the backward pass
        copies = weights // 2 * autocast
        parts = {
            "weights": weights,
            "gradients": weights,
            "AdamW, amsgrad: three numbers a weight": 3 * weights,
            "running average": weights,
            "half-precision copies of the weights": copies,
            "activations kept for the backward pass": kept - copies,
            "gradients of activations": 2 * largest,
        }
        totals.append([n / 1e6 for n in parts.values()])
    print(f"{args.arch}, {args.size} px, batches of {args.batch_size}, {args.points} points\n")
    table = [[n, a, b] for n, a, b in zip(parts, *totals, strict=True)]
    print_table(["MB", "float32", "mixed precision"], [*table, ["sum", sum(totals[0]), sum(totals[1])]])


if __name__ == "__main__":
    main()
