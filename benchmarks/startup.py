#!/usr/bin/env python
"""How long a start waits for `landmarks.csv`, and what it keeps in memory meanwhile.

    python benchmarks/startup.py                 # 20,000 rows x 971 points
    python benchmarks/startup.py -N 393930 --ways loop,first,later

A file of N rows is written; each way then reads it in a fresh process:

    loop     a plain Python line loop into int arrays, as contestants had it
    pandas   `pandas.read_csv` of the whole file, and its numbers as one array
    first    this program where no cache file is there yet
    later    this program where one is

Times are without imports, memory is the peak above that of a process which has only done the way's imports. The file
was just written, so all read it from the page cache. Every way must give the same checksum of the points of 100 rows.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

from measure import ROOT, fresh, peak_mb, print_table

WAYS = {"loop": "Python line loop", "pandas": "pandas, whole", "first": "first start", "later": "later start"}
SAMPLE = 100  # rows whose points are summed


def write_csv(path: Path, rows: int, points: int):
    "Rows of faces somewhere in their images, a sixth of the coordinates of four digits, some negative."
    import numpy as np

    rng = np.random.default_rng(0)
    shapes = rng.integers(-40, 700, (50, 2 * points))
    with open(path, "w") as f:
        f.write("file_name\t" + "\t".join(f"Point_M{k}_{a}" for k in range(points) for a in "XY") + "\n")
        texts = ["\t".join(map(str, (s * rng.uniform(0.2, 3)).astype(int))) for s in shapes for _ in range(10)]
        for i in range(rows):
            f.write(f"{i:032x}.jpg\t{texts[i % len(texts)]}\n")


def read_loop(csv):
    import numpy as np

    names, points = [], []
    with open(csv) as f:
        next(f)
        for line in f:
            name, *values = line.rstrip("\n").split("\t")
            names.append(name)
            points.append(np.array(list(map(int, values)), np.int16).reshape(-1, 2))
    return len(names), lambda i: points[i]


def read_pandas(csv):
    import pandas as pd

    frame = pd.read_csv(csv, sep="\t")
    points = frame.iloc[:, 1:].to_numpy().reshape(len(frame), -1, 2)
    return len(frame), lambda i: points[i]


def read_ours(csv):
    from landmarks_fastai.data.labels import read_labels

    labels = read_labels(csv)
    return len(labels), labels.points


def child(way: str, csv: str):
    sys.path.insert(0, str(ROOT))
    import numpy  # noqa: F401

    if way in ("pandas", "first"):
        import pandas  # noqa: F401
    if way in ("first", "later"):
        from landmarks_fastai.data import labels  # noqa: F401
    before, start = peak_mb(), time.perf_counter()
    rows, points = {"loop": read_loop, "pandas": read_pandas}.get(way, read_ours)(csv)
    took = time.perf_counter() - start
    total = sum(int(points(i).sum()) for i in range(0, rows, max(1, rows // SAMPLE)))
    print(json.dumps({"seconds": took, "mb": peak_mb() - before, "rows": rows, "total": total}))


def measure(csv: Path, ways) -> dict:
    found = {}
    for way in ways:
        if way == "first":
            csv.with_name(csv.name + ".cache").unlink(missing_ok=True)
        found[way] = fresh(__file__, "--child", way, csv)
    if len({(f["rows"], f["total"]) for f in found.values()}) != 1:
        sys.exit(f"the ways disagree about what is in the file: {found}")
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-N", type=int, default=20_000, help="rows (default: 20000; the competition: 393930)")
    parser.add_argument("--points", type=int, default=971, help="points of a row (default: 971)")
    parser.add_argument(
        "--ways", default=",".join(WAYS), help="which to measure (default: all; pandas keeps 16 kB a row)"
    )
    parser.add_argument("--folder", default=tempfile.gettempdir(), help="where the file is written")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return child(*args.child)
    ways = args.ways.split(",")
    if unknown := [w for w in ways if w not in WAYS]:
        parser.error(f"--ways: {unknown[0]} is none of {', '.join(WAYS)}")
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        csv = Path(folder) / "landmarks.csv"
        write_csv(csv, args.N, args.points)
        print(f"{args.N} rows x {args.points} points, {csv.stat().st_size / 1e6:.0f} MB, {os.cpu_count()} cores\n")
        found = measure(csv, ways)
    base = found[ways[0]]["seconds"]
    print_table(
        ["way", "seconds", f"times faster than {WAYS[ways[0]]}", "peak MB above imports"],
        [[WAYS[w], f["seconds"], base / f["seconds"], f["mb"]] for w, f in found.items()],
    )


if __name__ == "__main__":
    main()
