"What the benchmarks share: a fresh process a figure, its peak memory, tables, exponents of growth."

import json
import math
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def fresh(script, *words, env=None) -> dict:
    "Run `python script words` in a process of its own; the JSON that its last line prints."
    done = subprocess.run(
        [sys.executable, str(script), *map(str, words)],
        stdout=subprocess.PIPE, text=True, env=os.environ | (env or {}),
    )  # fmt: skip
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
    cells = [header, ["---"] * len(header), *[[_cell(v) for v in row] for row in rows]]
    for row in cells:
        print("| " + " | ".join(row) + " |")


def _cell(value) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def exponent(sizes, values) -> float:
    "Least-squares slope of log(value) over log(size): 1 is linear."
    x, y = [math.log(s) for s in sizes], [math.log(v) for v in values]
    mx, my = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True)) / sum((a - mx) ** 2 for a in x)
