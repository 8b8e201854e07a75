"""A coverage-guided search for input that a parser answers with anything but its result or a `UserError`.

`python tests/fuzz.py labels` feeds `landmarks.csv`, `python tests/fuzz.py points` `test_points.csv`, `coco`, `yolo`,
`csv` and so on the readers of other tools' labels (`FORMATS`); what follows goes to libFuzzer. See README.md beside this
file.
"""

import os
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import pandas  # noqa: F401 - imported before the hooks: not to be counted as the reader's work
import torch  # noqa: F401 - and it reads its own source, which the hooks do not let it

atheris.enabled_hooks.add("RegEx")
PARTS = ["landmarks_fastai.data.landmarks_csv", "landmarks_fastai.competition", "landmarks_fastai.data.formats"]
with atheris.instrument_imports(include=[*PARTS, "landmarks_fastai.data.sources"]):
    from landmarks_fastai import competition
    from landmarks_fastai.data import landmarks_csv, sources
from landmarks_fastai.errors import UserError  # noqa: E402
from tests.data.test_formats import CASES, write_files  # noqa: E402

MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
HEADER = {"labels": b"n\tx\ty\n", "points": b"n\tlist\n"}
# Target -> a case of tests/data/test_formats.py, and the file of it that is changed
FORMATS = {
    "coco": ("COCO", "c.json"), "labelstudio": ("Label Studio", "s.json"), "labelme": ("labelme", "a.json"),
    "via": ("VIA", "v.json"), "viacsv": ("VIA, CSV", "v.csv"), "cvat": ("CVAT, skeletons", "annotations.xml"),
    "dlib": ("dlib", "d.xml"), "yaml": ("YOLO", "data.yaml"), "yolo": ("YOLO", "labels/a.txt"), "pts": (".pts", "a.pts"),
    "wflw": ("WFLW", "w.txt"), "deeplabcut": ("DeepLabCut, several animals", "d.csv"),
    "csv": ("CSV, visible, group, box, pandas' index, names that are quoted", "p.csv"),
}  # fmt: skip
SEEDS = {
    "labels": [
        b"a\t1\t2\nb\t-3\t4\n",
        b"a\t1.5\t2e1\n\nb\t3\t4\r\n",
        "я\t+1\t 2\n".encode(),
        b"a\t\tnan\nb\t NaN\t\n",
        b"\n\xef\xbb\xbfa\t1\t2",
    ],
    "points": [b"a\t[1, 2]\nb\t[3,4,]\n", b'a\t"[-7]"\r\n\r\nb\t[ 8 ]', "я\t[742, 385]\n".encode()],
}


def lines_of(data: bytes) -> int:
    return data.replace(b"\r\n", b"\n").replace(b"\r", b"\n").count(b"\n") + 1


def check_labels(csv: Path, data: bytes):
    "The rows are what their lines say: in order, as many numbers as columns, names without what ends them."
    last = 1
    for lines, names, values, faults in landmarks_csv.read_rows(csv):
        assert len(lines) == len(names) == len(values) and values.shape[1] >= 1 and values.shape[2:] == (2,)
        assert lines[0] > last and (np.diff(lines) > 0).all()
        assert values.dtype == np.float32 and not (abs(values) > landmarks_csv.LIMIT).any()
        last = lines[-1]
        assert set(faults) <= set(range(len(lines)))
        right = np.delete(np.arange(len(lines)), list(faults))
        for line, name in zip(lines[right], names[right], strict=True):
            assert name.decode("utf-8") and not set(name) & set(b"\t\r\n\0")
            assert data.split(b"\n")[line - 1].split(b"\t")[0] == name
    assert last <= lines_of(data)


def check_points(csv: Path, data: bytes):
    "A row of whole numbers for each name, and no more rows than lines."
    test_points = competition.read_test_points(csv)
    assert test_points.indices.dtype.kind in "iu" and test_points.indices.ndim == 2
    assert len(test_points) == len(test_points.lines) == len(test_points.indices) < lines_of(data)
    assert (np.diff(test_points.lines.astype(np.int64)) > 0).all() and all(test_points.names)


def check_source(target: str, work: Path, data: bytes):
    "The rows of a source: points of float32, none infinite, a place for each row, faults of rows that exist."
    case, name = FORMATS[target]
    (work / name).write_bytes(data)
    labels, _ = sources.read_source(work / CASES[case][0])
    assert labels.stored.dtype == np.float32 and labels.stored.shape == (len(labels), labels.n_points, 2)
    assert len(labels) == len(labels.places) == len(labels.names) and not np.isinf(labels.stored).any()
    assert set(labels.faults) <= set(range(len(labels)))


def feed(target: str, csv: Path, data: bytes):
    "One execution: the first byte says whether a right header stands above the rest."
    if target in FORMATS:
        with suppress(UserError):
            check_source(target, csv.parent, data[1:])
        return
    data = HEADER[target] + data[1:] if data[:1] < b"\xf0" else data[1:]
    with open(csv, "wb") as f:
        f.write(data)
    try:
        {"labels": check_labels, "points": check_points}[target](csv, data)
    except UserError:
        pass


def main():
    if len(sys.argv) < 2 or sys.argv[1] not in {**HEADER, **FORMATS}:
        targets = "|".join([*HEADER, *FORMATS])
        sys.exit(f"usage: python tests/fuzz.py {targets} [libFuzzer's options and corpus folders]")
    target = sys.argv.pop(1)
    with tempfile.TemporaryDirectory(prefix="fuzz", dir=MEMORY) as work:
        child = os.fork()  # libFuzzer ends its process without a word to Python
        if not child:
            search(target, Path(work))
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    sys.exit(code)


def search(target: str, work: Path):
    "Feed `target` until libFuzzer has had enough; does not return."
    csv, corpus = work / f"{target}.csv", work / "seeds"
    corpus.mkdir()
    seeds = SEEDS.get(target)
    if target in FORMATS:
        case, name = FORMATS[target]
        _, files, rows = CASES[case]
        seeds = [(write_files(work, files, sorted({image for image, _ in rows})) / name).read_bytes()]
        sys.stdout = open(os.devnull, "w")  # what the source was taken for, a thousand times a second
    for k, seed in enumerate(seeds):
        (corpus / str(k)).write_bytes(b"-" + seed)
    landmarks_csv.BLOCK = 48  # so that small files are cut too
    atheris.Setup([*sys.argv, str(corpus)], lambda data: feed(target, csv, data))
    atheris.Fuzz()


if __name__ == "__main__":
    main()
