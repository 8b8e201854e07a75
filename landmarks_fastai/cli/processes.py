"The processes of a comparison or a search: a run's stages one after the other, several runs side by side."

import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

from landmarks_fastai.cli.search import Search
from landmarks_fastai.errors import UserError, one_line
from landmarks_fastai.runs.claim import process_lock
from landmarks_fastai.runs.run import Run, read_record, results_of
from landmarks_fastai.utils.hardware import available_cores, gpu_count

PACKAGES = str(Path(__file__).resolve().parents[2])


class Runner:
    "Runs what is not finished of a plan, each stage in a process of its own."

    def __init__(self, folder: Path, plan: dict[str, Any], jobs: int | None, search: Search | None):
        self.folder, self.plan, self.search = folder, plan, search
        gpus = gpus_of(plan)
        self.jobs, self.places = jobs or len(gpus), queue.SimpleQueue()
        for k in range(self.jobs):
            self.places.put(gpus[k % len(gpus)])
        share = max(1, available_cores() // self.jobs)
        # words after these replace them
        self.machine = [] if os.environ.get("OMP_NUM_THREADS") else ["--threads", str(share)]
        self.machine += ["--workers", str(min(8, share if gpus[0] else share // 2 if share > 2 else 0))]
        self.missing = search.todo if search else [r for r in plan["runs"] if not results_of(folder, r["stages"])]
        self.processes: list[Any] = []
        self.stopping = threading.Event()

    def run(self, finished: Callable[[], None]) -> None:
        "Run all, and call `finished` after each run. A signal stops the processes; they save their states."
        self.print_plan()
        begun = time.monotonic()
        with ThreadPoolExecutor(self.jobs) as pool:
            futures = {pool.submit(self.run_one, run): run for run in self.missing}
            try:
                for k, future in enumerate(as_completed(futures), 1):
                    run, left = futures[future], (time.monotonic() - begun) / k * (len(self.missing) - k) / 60
                    run["failed"] = future.result()
                    said = run["failed"] or f"score {results_of(self.folder, run['stages'])['score']:.6g}"
                    about = f"{run['label']}, seed {run['seed']}: {said}"
                    print(f"{k} of {len(self.missing)}: {about}; {left:.1f} minutes left", flush=True)
                    finished()
            except BaseException:
                self.stopping.set()
                pool.shutdown(wait=False, cancel_futures=True)
                for process in self.processes:
                    process.stdin.close()
                said = "stopping: the runs save their states, and the same command continues"
                print(said, file=sys.stderr, flush=True)
                raise

    def print_plan(self) -> None:
        "Print what will run, how many and for how long."
        minutes = [run["minutes"] * len(run["stages"]) / self.jobs for run in self.missing]
        about = self.search.about if self.search else dict.fromkeys(run["label"] for run in self.plan["runs"])
        print("\n".join(f"  {line}" for line in about))
        long = f"{sum(minutes):.3g} minutes" if all(minutes) else "for as long as their epochs take"
        counts = f"{len(self.plan['runs'])} runs in {self.folder}, {len(self.missing)} of them to do"
        print(f"{counts}, {self.jobs} at a time, {long}", flush=True)

    def run_one(self, run: dict[str, Any]) -> str:
        "Run the stages of a run that are not finished; return the line of what failed."
        gpu, line, search = self.places.get(), "", self.search
        try:
            watch = search.begin(run) if search else None
            script, words = run["script"], run["words"]
            for name in run["stages"]:
                if not line and not results_of(self.folder, [name]):
                    line = self.run_stage(script, name, [*self.machine, *words], gpu, watch)
                script, words = "finetune.py", ["-pm", str(self.folder / name / "best.pth"), *self.plan["later"]]
            return search.end(run, line) if search and not self.stopping.is_set() else line
        finally:
            self.places.put(gpu)

    def run_stage(self, script: str, name: str, words: list[str], gpu: str, watch: Callable[[], bool] | None) -> str:
        "Run a stage in a process, whose output is added to NAME.log; return its error's line. `watch` may stop it."
        locked = True
        while locked and not self.stopping.wait(0.2):  # the process of a comparison that was killed saves its state
            with process_lock(self.folder / f".{name}.lock") as free:
                locked = not free
        if self.stopping.is_set():
            return "stopped"
        start = ["--overwrite"]  # what cannot be read, or has lost its checkpoint
        with suppress(UserError):
            record = read_record(Run(self.folder, name))
            start = ["--resume"] if record and not record.ended else start
        code = f"from {__name__} import stage_process; stage_process({script.removesuffix('.py')!r})"
        command = [sys.executable, "-c", code, *words, "-n", name, "--out", str(self.folder), *start]
        env = {"PYTHONPATH": os.pathsep.join(filter(None, [PACKAGES, os.environ.get("PYTHONPATH")]))}
        env |= {"CUDA_VISIBLE_DEVICES": gpu} if gpu else {}
        with open(self.folder / f"{name}.log", "a+", encoding="utf-8", errors="replace") as log:
            begin = log.seek(0, os.SEEK_END)
            # in a session of its own: it gets a Ctrl-C once, by the end of its stdin
            files = {"stdin": subprocess.PIPE, "stdout": log, "stderr": log, "start_new_session": True}
            process: Any = subprocess.Popen(command, env=os.environ | env, **files)
            self.processes.append(process)
            if self.stopping.is_set():
                process.stdin.close()
            while watch and process.poll() is None and not self.stopping.is_set():
                if watch():
                    process.stdin.close()
                with suppress(subprocess.TimeoutExpired):
                    process.wait(1)
            status = process.wait()
            log.seek(begin)
            return error_of(status, [line.strip() for line in log if line.strip()])


def gpus_of(plan: dict[str, Any]) -> list[str]:
    "Return the numbers of the GPUs that runs are shared out to; an empty text without --gpu."
    if "--gpu" not in plan["later"]:
        return [""]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    return visible if visible[0] else [*map(str, range(gpu_count()))] or [""]


def error_of(status: int, lines: list[str]) -> str:
    "Return why a process failed, from its exit code and what it printed; nothing if it did not."
    if status < 0:
        return f"killed by signal {-status}, as the system does where memory is short"
    errors = [line.removeprefix("error: ") for line in lines if line.startswith(("error: ", "stopped: "))]
    return one_line((errors or lines or [f"exit code {status}"])[-1]) if status else ""


def stage_process(script: str) -> None:
    "What the process of a stage executes: the script, stopped as by SIGTERM when the comparison stops, or is killed."

    def stop_with_comparison() -> None:
        os.read(0, 1)  # nobody writes: it returns when the other end of the pipe is closed
        if getattr(signal.getsignal(signal.SIGTERM), "number", None) is None:  # a second signal would end it at once
            os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop_with_comparison, daemon=True).start()
    import_module(f"landmarks_fastai.cli.{script}").command()
