"A search: `python -m landmarks_fastai.compare -d DIR -n NAME --suggest 20 --minutes 5`. Optuna suggests the settings."

import argparse
import math
import os
import shlex
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from landmarks_fastai.cli import options, train
from landmarks_fastai.errors import UserError, one_line
from landmarks_fastai.runs.run import MACHINE, Record, Run, flags_of, results_of, setting_of

JOURNAL = "optuna.journal"  # in the folder: values, state and scores of each trial
STUDY = "search"
STEPS = 10  # of a trial: its best score so far is compared with that of others at the same step
WARMUP = 3  # steps before the first comparison
LONGER = 5  # the command that is printed for the best trial trains so many times as long


class Search:
    """The trials of a search, which are the runs `trial_0`, `trial_1`, … of its folder; Optuna's journal is their record.

    Raises `UserError` for flags that a search refuses, and without Optuna.
    """

    def __init__(self, args: argparse.Namespace, flags: dict[str, list[str]]):
        later = flags.keys() & set(flags_of("pretrained_model"))
        if args.grid or args.seeds > 1 or args.stages > 1 or later:
            raise UserError("a trial of --suggest is one run of train.py: leave out --grid, --seeds, --stages, -pm")
        try:
            import optuna
        except ModuleNotFoundError:
            raise UserError('--suggest needs Optuna: pip install "optuna>=5"') from None
        self.optuna, self.args, self.parser, self.lock = optuna, args, train.train_parser(), threading.Lock()
        self.parser.raises, self.flags = True, flags | {"--seed": [str(args.seed)]}
        # flag -> its values, the default first; flag -> the ends of its range, whose geometric mean is the default
        self.choices = {flag: values for flag, values in flags.items() if len(values) > 1}
        self.ranges: dict[str, Any] = {}
        for flag, value in ((flag, value) for flag, values in self.choices.items() for value in values):
            self.words({flag: value})  # a mistake in the last one is told now, not in hours
        settings = train.first_settings(self.words({})[1])
        size, lr, wd, aug = settings.size, settings.lr, settings.wd, settings.aug
        sizes = [str(side) for side in (size, size - 32, size + 32, size + 64) if side >= 32]
        heads = [*dict.fromkeys((settings.head, "map64", "linear", "512,bn,relu,drop0.5"))]
        space: dict[str, Any] = {"lr": (lr / 10, lr * 10), "wd": (wd / 10, wd * 10), "aug": (aug / 2, aug * 2)}
        for name, values in (space | {"size": sizes, "head": heads}).items():
            if not flags.keys() & set(flags_of(name)) and values[0]:  # 0, switched off, has no range around it
                (self.choices if isinstance(values, list) else self.ranges)[flags_of(name)[0]] = values
        if not (self.choices or self.ranges):
            raise UserError("nothing to search: give fewer flags, or several values, as --head linear 512,relu")
        fixed = {flag: values for flag, values in sorted(self.flags.items()) if setting_of(flag) not in MACHINE}
        self.about = [
            shlex.join(options.words_of(self.parser, {k: v for k, v in fixed.items() if k not in self.choices}))
        ]
        self.about += [f"{flag} {' | '.join(values)}" for flag, values in sorted(self.choices.items())]
        self.about += [f"{flag} {low:g} to {high:g}" for flag, (low, high) in self.ranges.items()]

    def words(self, values: dict[str, str]) -> tuple[list[str], dict[str, Any]]:
        "The words of a trial with these values, else the first choices; and what train.py reads from them."
        first = {flag: choices[:1] for flag, choices in self.choices.items()}
        words = options.words_of(self.parser, self.flags | first | {flag: [value] for flag, value in values.items()})
        typed = options.typed_flags(self.parser.parse_args(words))
        if not (typed.get("minutes") or typed.get("epochs")):
            raise UserError("--suggest needs the length of a trial: --minutes 5, or -e")
        train.first_settings(typed)
        return words, typed

    def open(self, folder: Path) -> None:
        "Open or create the study in a folder that this process has locked, and set `todo`, the runs that are not finished."
        optuna, path = self.optuna, folder / JOURNAL
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        folder.mkdir(exist_ok=True)
        for file in folder.glob(f"{JOURNAL}.lock*"):  # of a process that was killed
            file.unlink()
        path.touch()
        os.truncate(path, path.read_bytes().rfind(b"\n") + 1)  # it may have been killed within a line
        journal = optuna.storages.journal
        lock = journal.JournalFileOpenLock(str(path))  # Optuna's default is a symlink, which Windows allows to few
        pruner = optuna.pruners.MedianPruner(n_warmup_steps=WARMUP)
        try:
            self.storage = optuna.storages.JournalStorage(journal.JournalFileBackend(str(path), lock))
            self.study = optuna.create_study(storage=self.storage, study_name=STUDY, pruner=pruner, load_if_exists=True)
            if not self.study.get_trials() and any(folder.glob("trial_*")):
                raise ValueError
        except (ValueError, KeyError):
            raise UserError(f"{path} is damaged: choose another name") from None
        if (before := self.study.user_attrs.get("flags", self.about)) != self.about:
            started = one_line("; ".join(before))
            raise UserError(f"-n {folder.name} was started with {started}: choose another name, or the same flags")
        if not (trials := self.study.get_trials()):
            self.study.set_user_attr("flags", self.about)
            # the first trial has the defaults: the best of the search is not worse
            first = {flag: values[0] for flag, values in self.choices.items()}
            self.study.enqueue_trial(first | {flag: math.sqrt(low * high) for flag, (low, high) in self.ranges.items()})
        self.folder, self.total = folder, max(self.args.suggest, len(trials))
        self.todo = [run for run in self.plan()["runs"] if run["state"] in ("RUNNING", "WAITING")]

    def run_of(self, number: int, trial: Any) -> dict[str, Any]:
        "The run of a trial, as the plan has it."
        values = {flag: value if isinstance(value, str) else f"{value:.3g}" for flag, value in trial.params.items()}
        words, typed = self.words(values)
        run = {"label": " ".join([f"trial {number}", *map(" ".join, values.items())]), "words": words, "flags": typed}
        line, state = trial.user_attrs.get("line", ""), trial.state.name
        run |= {"values": values | {"pruned": line * (state == "PRUNED")}, "failed": line * (state == "FAIL")}
        run |= {"number": number, "state": state, "stages": [f"trial_{number}"], "script": "train.py"}
        return run | {"minutes": typed.get("minutes", 0), "seed": self.args.seed}

    def plan(self) -> dict[str, Any]:
        "The plan of the search so far."
        trials, best = self.study.get_trials(deepcopy=False), "No trial is finished yet."
        waiting = self.optuna.trial.create_trial(state=self.optuna.trial.TrialState.WAITING)
        runs = [self.run_of(*item) for item in enumerate([*trials, *[waiting] * (self.total - len(trials))])]
        if done := sum(run["state"] == "COMPLETE" for run in runs):
            run, score = runs[self.study.best_trial.number], self.study.best_value
            flags = {k: LONGER * v if k in ("minutes", "epochs") else v for k, v in run["flags"].items()}
            command = Run(self.args.out, f"{self.args.name}_best").start_command(Record("train.py", flags))
            best = f"Best of {done} finished trials: {run['label']}, score {score:.4g}; to train it longer: {command}"
        return {"groups": {}, "later": ["--gpu"] if "--gpu" in self.flags else [], "runs": runs, "best": best}

    def begin(self, run: dict[str, Any]) -> Callable[[], bool]:
        "Fill in a run, of a stopped trial or a new one; return what to call every second: whether to stop the run."
        from landmarks_fastai.inference.report import stages_of

        with self.lock:
            if run["state"] == "RUNNING":  # when the search started
                study_id = self.storage.get_study_id_from_name(STUDY)
                trial_id = self.storage.get_trial_id_from_study_id_trial_number(study_id, run["number"])
                trial = self.optuna.trial.Trial(self.study, trial_id)
            else:
                trial = self.study.ask()
            # a seed for each trial: one sampler from the start would repeat the first trials after a stop
            self.study.sampler = self.optuna.samplers.TPESampler(seed=(1000 * self.args.seed + trial.number) % 2**32)
            for flag, values in self.choices.items():  # a stopped trial keeps the values that it has
                trial.suggest_categorical(flag, values)
            for flag, (low, high) in self.ranges.items():
                trial.suggest_float(flag, low, high, log=True)
            frozen = self.study.get_trials(deepcopy=False)[trial.number]
            run.update(self.run_of(trial.number, frozen), trial=trial, pruned="")
        # With a time limit trials have different numbers of epochs: there a step is a share of the time. A resumed trial
        # counts from its last step.
        minutes, epochs, reported = run["minutes"], run["flags"].get("epochs", 0), frozen.last_step or 0
        began = time.monotonic() - 60 * minutes * reported / STEPS

        def watch() -> bool:
            nonlocal reported
            stages = stages_of(self.folder / run["stages"][0])
            scores = stages[-1].scores.tolist() if stages else []
            share = (time.monotonic() - began) / (60 * minutes) if minutes else len(scores) / epochs
            for step in range(reported + 1, min(STEPS, int(STEPS * share) + 1)):
                known = scores if minutes else scores[: step * epochs // STEPS]
                if not run["pruned"] and (finite := [score for score in known if math.isfinite(score)]):
                    trial.report(min(finite), reported := step)
                    if trial.should_prune():
                        run["pruned"] = f"pruned in epoch {len(known)} at score {min(finite):.4g}"
            return bool(run["pruned"])

        return watch

    def end(self, run: dict[str, Any], line: str) -> str:
        "Tell Optuna how a run ended; return why it has no score. A trial that was stopped goes on with the next start."
        trial, states = run["trial"], self.optuna.trial.TrialState
        if results := results_of(self.folder, run["stages"]):
            self.study.tell(trial, results["score"])
        elif run["pruned"] or not line.startswith("stopped"):
            trial.set_user_attr("line", line := run["pruned"] or line)
            self.study.tell(trial, state=states.PRUNED if run["pruned"] else states.FAIL)
            if run["pruned"]:  # the states of all would fill the disk
                (self.folder / run["stages"][0] / "state.safetensors").unlink(missing_ok=True)
        return line
