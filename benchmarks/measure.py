"What the benchmarks share: a fresh process a figure, its peak memory, tables, a network, labelled images."

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def fresh(script, *words):
    "Run `python script words` in a process of its own; the JSON that its last line prints."
    done = subprocess.run([sys.executable, str(script), *map(str, words)], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"{Path(script).name} {' '.join(map(str, words))} failed")
    return json.loads(done.stdout.splitlines()[-1])


def peak_mb() -> float:
    """Peak resident memory of this process, in MB, mapped file pages included.

    VmHWM: unlike `getrusage`'s figure it begins anew with the process, not with its parent's.
    """
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024 / 1e6


def print_table(header: list[str], rows: list[list]):
    "A Markdown table, numbers to three digits."
    for row in [header, ["---"] * len(header), *[[_cell(v) for v in row] for row in rows]]:
        print("| " + " | ".join(row) + " |", flush=True)


def _cell(value) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def write_network(folder: Path, arch: str, size: int, points: int):
    "A checkpoint of a run `b` with random weights and a flip map, without a second pass."
    import torch

    from landmarks_fastai.models.networks import build_model
    from landmarks_fastai.runs.checkpoint import read_checkpoint, write_checkpoint
    from landmarks_fastai.runs.run import Run
    from landmarks_fastai.settings import DataFacts, Settings

    torch.manual_seed(0)
    settings = Settings(arch=arch, size=size, data=str(folder), align=0.0)
    model = build_model(arch, settings.head, points, size).train()
    # a network's own random norms make all images alike: a few batches of noise give them a spread
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(8, 3, size, size))
    (folder / "b").mkdir()
    facts = DataFacts(n_points=points, flip_indices=tuple(reversed(range(points))))
    write_checkpoint(Run(folder, "b"), model, settings, facts, 0.0, 0.0, 0)
    return read_checkpoint(folder / "b" / "best.pth")


def validation_images(data: str, predictor, n: int):
    "Up to `n` validation images of a checkpoint, evenly spaced, and their points (images, n_points, 2), pixels."
    import numpy as np

    from landmarks_fastai.data.block import landmark_dataloaders

    network = predictor.networks[0]
    items = list(landmark_dataloaders(data, network.settings, network.facts).valid.items.sample(n))
    return items, np.stack([item.points for item in items])
