"""The folder of a run, its run.json, and the checkpoint that `-pm NAME` means.

Nothing heavy is imported here: a run has its name before torch is imported, so that a run that is killed in its first
second can be resumed.
"""

import dataclasses
import json
import os
import platform
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import landmarks_fastai
from landmarks_fastai.errors import UserError
from landmarks_fastai.settings import OUT, Settings
from landmarks_fastai.utils.distributed import is_first, this_process
from landmarks_fastai.utils.files import reason, remove_temporary_files, rename, write_text
from landmarks_fastai.utils.hardware import Machine

MAX_NAME = 200  # bytes of a run's name: with suffixes it must fit into a file system's 255
SAVED = ("best.pth", "state.safetensors")  # a run without either has saved nothing
LISTING = "bad.csv"
PLAN = "compare.json"  # of a comparison
OVERLAY = "overlay"  # folder of the copies with points
# Format -> the file of a prediction's points; a folder for pts.
PREDICTIONS = {
    "csv": "predictions.csv", "json": "predictions.json", "coco": "predictions.coco.json",
    "cvat": "predictions.cvat.json", "pts": "predictions", "npy": "predictions.npy",
}  # fmt: skip
# The folder of a run has one of them at least.
TENSORBOARD = "tensorboard"  # folder of --log tensorboard
RUN_FILES = {*SAVED, LISTING, *PREDICTIONS.values(), "run.json", "submit.csv"}

MACHINE = {"gpu", *(f.name for f in dataclasses.fields(Machine))} - {"device"}  # flags that another start may change
FLAGS = {  # of settings whose flag is not --the-name
    "batch_size": ("-b", "--batch-size"),
    "epochs": ("-e", "--epochs"),
    "lr": ("-lr", "--lr", "--learning-rate"),
    "data": ("-d", "--data"),
    "pretrained_model": ("-pm", "--pretrained-model"),
}


def flags_of(name: str) -> tuple[str, ...]:
    "The spellings of a setting's flag."
    return FLAGS.get(name, ("--" + name.replace("_", "-"),))


def setting_of(flag: str) -> str:
    "The name of the setting of a flag --the-name or --no-the-name."
    return re.sub("^--(no-)?", "", flag).replace("-", "_")


@dataclass(frozen=True)
class Record:
    "The contents of run.json: how a run was started. Settings and data are set when its fit begins."

    script: str  # train.py or finetune.py
    flags: dict[str, Any] = field(default_factory=dict)  # those of the command line; paths are absolute
    digest: str = ""  # SHA-256 of the checkpoint that a later stage starts from
    settings: dict | None = None  # `Settings.to_dict()`
    facts: dict | None = None  # `DataFacts.to_dict()`
    labels: Any = None  # `identity` of the labels
    left_out: list[int] = field(default_factory=list)  # rows that are neither trained on nor validated on
    threads: int = 0  # of PyTorch on the CPU; 0: as many as other programs left free
    loaded: Any = None  # score and NME of the checkpoint that a later stage starts from
    versions: dict[str, str] = field(default_factory=dict)  # of what the fit began with: Python, PyTorch, …
    results: dict[str, Any] = field(default_factory=dict)  # of a finished stage: score, images a second, memory, …
    ended: bool = False

    @property
    def checkpoint(self) -> str:
        "Path of the checkpoint that a later stage starts from; empty for a first stage."
        return self.flags.get("pretrained_model", "")


def typed_as(script: str) -> str:
    """The command of a script: `python train.py`, or `landmarks-train` in a process started as an installed command.

    In a process of torchrun, the same with its numbers of machines and processes.
    """
    process = this_process()
    if process.store and script != "predict.py":  # which runs in one process
        machines = f" --nnodes {process.machines} …" if process.machines > 1 else ""
        return f"torchrun{machines} --nproc-per-node {process.local_count} {script}"
    installed = Path(sys.argv[0]).stem.startswith("landmarks-")
    return f"landmarks-{Path(script).stem}" if installed else f"python {script}"


def versions() -> dict[str, str]:
    "The versions that a run depends on."
    packages = {name: metadata.version(name) for name in ("torch", "torchvision", "fastai", "timm", "numpy")}
    return {"landmarks_fastai": landmarks_fastai.__version__, "Python": platform.python_version(), **packages}


def is_plain_name(name: str) -> bool:
    "Return whether a folder may have this name on every system: it is not hidden, and does not lead elsewhere."
    plain = name and not name.startswith(".") and not re.search(r'[/\\:*?"<>|\x00-\x1f]', name)
    return bool(plain) and len(os.fsencode(name)) <= MAX_NAME


def plain_name(name: str) -> str:
    "Return a plain name like another name."
    return re.sub(r"[^\w.+-]", "_", name).lstrip(".").encode()[:MAX_NAME].decode(errors="ignore") or "run"


class Run:
    "The folder `out`/NAME with the files of one stage. The run that it overwrites is `out`/.NAME.old until it ends."

    def __init__(self, out: str | os.PathLike, name: str, record: Record | None = None):
        self.out, self.name = Path(out), name
        self.record: Any = record  # None: of a stage that is not resumed
        self.folder, self.old = self.out / name, self.out / f".{name}.old"
        self.overwrites = False  # whether an older run comes back if this one fails now

    def write(self, name: str, save: Callable[[Path], Any]) -> None:
        "Call `save` with the path of a file of the run; in the first process alone, the others write nothing."
        if is_first():
            save(self.folder / name)
        self.overwrites = self.overwrites and name not in SAVED

    def write_record(self, record: Record) -> None:
        "Write run.json, and set `record`."
        self.write("run.json", lambda path: write_text(path, json.dumps(asdict(record), indent=1)))
        self.record = record

    @property
    def saved(self) -> bool:
        "Whether a checkpoint or a state was saved."
        return any((self.folder / name).exists() for name in SAVED)

    @property
    def resume_command(self) -> str:
        "The command that resumes the run, for the current folder."
        return f"{typed_as(self.record.script)} --resume -n {shlex.quote(self.name)}{self.out_flag}"

    def start_command(self, record: Record) -> str:
        "The command that starts the run as its record says."
        words = [typed_as(record.script), "-n", shlex.quote(self.name)]
        for name, value in record.flags.items():
            flag = flags_of(name)[0]
            if isinstance(value, bool):
                words.append(flag if value else flag.replace("--", "--no-"))
            else:
                words += [flag, shlex.quote(str(value))]
        return " ".join(words) + self.out_flag

    @property
    def out_flag(self) -> str:
        "The flag --out with a space before it; empty for the default folder."
        return "" if self.out == Path(OUT) else f" --out {shlex.quote(str(self.out))}"

    def repair(self) -> None:
        "End an --overwrite: bring the old run back if this one has saved nothing, else remove it. Remove temporary files."
        if self.old.exists():
            if not self.saved:
                with suppress(FileNotFoundError):
                    rename(self.folder / LISTING, self.old / LISTING)  # it outlives a run that fails
                shutil.rmtree(self.folder, ignore_errors=True)
                rename(self.old, self.folder)
            shutil.rmtree(self.old, ignore_errors=True)
        remove_temporary_files(self.folder)

    def discard(self, *kept: str) -> None:
        "Remove the files of the run except `kept`, and the folder if it is empty then."
        # run.json last: if this process is killed here, the folder is still known as a run's
        for path in sorted(self.folder.glob("*"), key=lambda p: p.name == "run.json"):
            if path.name == TENSORBOARD:
                shutil.rmtree(path, ignore_errors=True)
            elif path.name not in kept:
                with suppress(OSError):  # a folder that a user made
                    path.unlink(missing_ok=True)
        with suppress(OSError):
            self.folder.rmdir()


def read_record(run: Run) -> Record | None:
    "Read run.json; None if there is none. Raises `UserError` for a file of another kind."
    path = run.folder / "run.json"
    try:
        record = Record(**json.loads(path.read_text(encoding="utf-8")))
        if unknown := record.flags.keys() - MACHINE - {*Settings.names(), "pretrained_model", "recipe", "weights"}:
            raise ValueError(f"unknown flags: {', '.join(unknown)}")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as e:
        raise UserError(f"{path} is not the record of a run ({reason(e)}): start over with --overwrite") from None
    return record


def results_of(out: Path, names: Iterable[str]) -> dict[str, Any]:
    "The results of a run and its later stages, with the minutes of all; empty if one of them is not finished, or damaged."
    results: list[dict[str, Any]] = []
    for name in names:
        record, file = None, out / name / "best.pth"
        with suppress(UserError):
            record = read_record(Run(out, name))
        if not (record and record.ended and record.results and file.exists()):
            return {}
        results.append(
            record.results | {"file_mb": file.stat().st_size / 1e6, "parameters": record.results["parameters"] / 1e6}
        )
    return results[-1] | {"minutes": sum(stage["minutes"] for stage in results)}


def read_plan(folder: Path) -> dict[str, Any]:
    "Read the plan of a comparison, as cli/compare.py makes it. Raises `UserError` if there is none, or a damaged one."
    try:
        plan = json.loads((folder / PLAN).read_text(encoding="utf-8"))
        return {"best": plan.get("best")} | {key: plan[key] for key in ("command", "groups", "later", "runs")}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as e:
        raise UserError(
            f"{folder} is not the folder of a comparison ({PLAN}: {reason(e)}): check -n and --out"
        ) from None


def stopped_runs(out: str | os.PathLike) -> str:
    "Names of the runs in a folder that can be resumed: the first 20, joined by commas; `none` if there are none."
    names = []
    for path in sorted(Path(out).glob("[!.]*/run.json")):
        if len(names) == 20:
            return ", ".join([*names, "…"])
        with suppress(UserError):
            if (record := read_record(Run(out, path.parent.name))) and not record.ended:
                names.append(path.parent.name)
    return ", ".join(names) or "none"


def run_folders(out: str | os.PathLike) -> list[Path]:
    "Folders of runs in the output folder: what is in them was written by this program."
    folders = (path for path in Path(out).glob("*") if path.is_dir())
    return [path for path in folders if {file.name for file in path.glob("*")} & {*RUN_FILES, OVERLAY}]


def run_name(checkpoint: str | os.PathLike) -> str:
    "The name of the run that a checkpoint file belongs to."
    path = Path(os.path.abspath(checkpoint))
    return path.parent.name or "best" if path.name == "best.pth" else path.stem


def find_checkpoint_file(name: str, out: str | os.PathLike) -> Path:
    "The file that `-pm` means, a path or the name of a run. Raises `UserError` that lists the existing names."
    if name.endswith(".pth") and os.path.isfile(name):
        return Path(name)
    stem = name.removesuffix(".pth")
    run = stem.removesuffix("_best")  # as in the published entry's command lines
    for folder in ("", out):
        for end in (os.path.join(stem, "best.pth"), os.path.join(run, "best.pth"), f"{stem}.pth"):
            if os.path.isfile(path := os.path.join(folder, end)):
                return Path(path)
    if os.path.isfile(name):
        raise UserError(f"-pm {name} is not a checkpoint: a checkpoint's file name ends in .pth")
    checkpoints = sorted(Path(out).glob("[!.]*/best.pth"), key=os.path.getmtime, reverse=True)
    names = ", ".join(p.parent.name for p in checkpoints[:20]) or "none"
    more = f" and {len(checkpoints) - 20} older ones" if len(checkpoints) > 20 else ""
    raise UserError(f"-pm {name} not found, neither as a path nor in {out}; there are: {names}{more}")
