"Searches: `compare --suggest`, its trials, pruned, failed and interrupted ones."

import json
import re
import shlex
import shutil
import signal
import sys
import time

import pandas as pd
import pytest

import landmarks_fastai
from landmarks_fastai.cli.compare import Parser, split_flags
from landmarks_fastai.cli.options import typed_flags
from landmarks_fastai.cli.search import JOURNAL, Search
from landmarks_fastai.cli.train import first_settings, train_parser
from tests.helpers import ARCH, LINUX, RUNS, check_refused, csv_lines, start

COMMAND = "landmarks_fastai.cli.compare -n s"
SMALL = f"--arch {ARCH} --weights none --size 32 -b 8 --workers 0 --threads 1 --align off"


def opened(folder, line):
    "The search of a command line, with its study opened in a folder."
    args, rest = Parser().parse_known_args(shlex.split(f"-n s {line}"))
    search = Search(args, split_flags(rest))
    search.open(folder)
    return search


def trial(folder, line, scores=(), ended=None):
    "A trial with the scores of its epochs: its run, and what `end` said if it ended with this line."
    search = opened(folder, line)
    run = search.todo[0]
    watch = search.begin(run)
    (folder / run["stages"][0]).mkdir(exist_ok=True)
    (folder / run["stages"][0] / "history.csv").write_text("\n".join(["score", *map(str, scores)]) + "\n")
    stop = watch()
    return run, stop, ended if ended is None else search.end(run, ended), search


@pytest.fixture
def fake_runs(quick_run, tmp_path, monkeypatch):
    "Processes of runs copy a finished run instead of training, and add their flags to the file `calls`; trial_1 fails."
    find = 'words="$*"; while [ "$1" != -n ]; do shift; done'
    copy = f'[ $2 = trial_1 ] && echo "error: no memory" && exit 1; cp -r {quick_run} "$4/$2"'
    (tmp_path / "python").write_text(f'#!/bin/sh\n{find}; echo "$words" >> {tmp_path}/calls; {copy}\n')
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))


# --- the trials


@LINUX
def test_a_search_goes_on_up_to_its_number_of_trials(run_script, fake_runs, tmp_path):
    line = f"{COMMAND} -d x --arch a b -e 4 --wd 0.1 --jobs 2"
    code, out, err = run_script(f"{line} --suggest 3")
    assert code == 1 and "1 combinations have runs that failed" in err
    assert "--arch a | b" in out and "-lr 0.0002 to 0.02" in out and "3 runs in runs/s, 3 of them to do" in out
    code, out, _ = run_script(f"{line} --suggest 5")
    assert "5 runs in runs/s, 2 of them to do" in out and (RUNS / "s" / JOURNAL).exists()
    assert "0 of them to do" in run_script(f"{line} --suggest 2")[1]
    board = pd.read_csv(RUNS / "s" / "leaderboard.csv")
    calls = [shlex.split(call.split(" --workers ")[1]) for call in csv_lines(tmp_path / "calls")]
    assert sorted(call[call.index("-n") + 1] for call in calls) == [f"trial_{k}" for k in range(5)]
    assert all(call[call.index("--wd") + 1] == "0.1" for call in calls) and "--wd" not in board.columns
    assert len(board) == 5 and board["--arch"].isin(["a", "b"]).all() and board["-lr"].nunique() == 5
    (failed,) = board[board.score.isna()].to_dict("records")
    assert failed["failed"] == "seed 0: no memory" and failed["combination"].startswith("trial 1 --arch ")
    (first,) = board[board.combination.str.startswith("trial 0 ")].to_dict("records")
    assert (first["-lr"], first["--size"], first["--aug"], first["--head"]) == (0.002, 128, 1, "map64")


@LINUX
def test_the_best_is_repeated_by_a_command_that_trains_longer(fake_runs, drawn):
    landmarks_fastai.compare("s", data=drawn, epochs=4, suggest=1, freeze=True, size=[64, 96])
    said = (RUNS / "s" / "leaderboard.md").read_text()
    assert "Welch" not in said
    args = train_parser().parse_args(
        shlex.split(re.search(r"Best of 1 finished trials: .*python train.py (.+)", said)[1])
    )
    assert (args.name, args.data, args.epochs, args.freeze, args.size) == ("s_best", str(drawn), 20, True, 64)
    assert (args.lr, args.wd, args.aug, args.head, args.seed) == (0.002, 0.05, 1.0, "map64", 0)


@pytest.mark.parametrize(
    "line, parts",
    [
        ("-d x", ["--minutes 5", "-e"]),
        ("-d x -e 1 --seeds 2", ["--seeds", "--suggest"]),
        ("-d x -e 1 --grid", ["--grid", "--suggest"]),
        ("-d x -e 1 --stages 2", ["--stages", "--suggest"]),
        ("-pm m -e 1", ["-pm", "--suggest"]),
        ("-d x -e 1 --resume", ["--resume"]),
        ("-d x -e 1 --opt adamw nosuch", ["--opt", "nosuch"]),
        ("-d x -e 1 -b 8 0", ["batch_size is 0"]),
        ("-d x -e 1 -lr 1 --wd 1 --aug 1 --head linear --size 32", ["nothing to search"]),
    ],
)
def test_mistakes_are_one_line(line, parts, run_script):
    check_refused(run_script(f"{COMMAND} --suggest 2 {line}"), *parts)
    assert not RUNS.exists()


def test_without_optuna_it_is_one_line(run_script, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    check_refused(run_script(f"{COMMAND} --suggest 2 -d x -e 1"), 'pip install "optuna>=5"')


def test_other_flags_and_other_folders_are_refused(run_script, tmp_path):
    opened(tmp_path / "s", "-d x -e 1 --suggest 2 --opt adam adamw")
    opened(tmp_path / "s", "--opt adam adamw --threads 2 -e 1 --suggest 3 -d x")  # the same, on another machine
    for line, parts in (
        ("-d x -e 2 --suggest 2", ["-e 1", "choose another name"]),
        ("-d x -e 1 --suggest 2 --size 32", ["--size 128 | 96", "choose another name"]),
        ("-d x -e 1 --suggest 2 --arch a b", ["was started with", "-e 1", "choose another name"]),
        ("-d x -e 1 --arch a b", ["is a search"]),
    ):
        check_refused(run_script(f"{COMMAND} --out {tmp_path} {line}"), *parts)
    (tmp_path / "s" / "trial_0").mkdir()
    for text in ("no\njournal\n", ""):
        (tmp_path / "s" / JOURNAL).write_text(text)
        check_refused(run_script(f"{COMMAND} --out {tmp_path} -d x -e 1 --suggest 2"), "is damaged")
    (tmp_path / "s" / JOURNAL).unlink()
    check_refused(run_script(f"{COMMAND} --out {tmp_path} -d x -e 1 --suggest 2"), "is not the folder of a comparison")


@pytest.mark.parametrize(
    "line, missing", [("", set()), ("--opt adam", {"--wd"}), ("--recipe baseline", {"--aug"}), ("--aug 0", {"--aug"})]
)
def test_the_first_trial_has_the_defaults_and_what_is_off_is_not_searched(line, missing, tmp_path):
    line = f"-d x -e 1 --suggest 2 {line}"
    run, _, _, search = trial(tmp_path / "s", line)
    assert search.ranges.keys() == {"-lr", "--wd", "--aug"} - missing
    words = line.replace(" --suggest 2", "").split()
    defaults, first = (first_settings(typed_flags(search.parser.parse_args(w))) for w in (words, run["words"]))
    assert first == defaults


# --- interrupted, pruned


def test_a_stopped_trial_is_taken_up_with_its_values(tmp_path):
    line = "-d x --arch a b c d -e 10 --suggest 4"
    runs = [trial(tmp_path / "a", line, [3.0], "no memory")[0] for _ in range(3)]
    for k in range(3):  # stopped while it ran, and killed within a line and with the lock of the journal
        stopped = [trial(tmp_path / "b", line, [3.0], ended)[0] for ended in (None, "stopped: the state is saved")]
        with open(tmp_path / "b" / JOURNAL, "ab") as file:
            file.write(b'{"op_code": 5, "tr')
        (tmp_path / "b" / f"{JOURNAL}.lock").touch()
        last, _, said, search = trial(tmp_path / "b", line, [3.0], "no memory")
        assert [run["words"] for run in stopped] == [last["words"]] * 2 and said == "no memory"
        assert last["words"] == runs[k]["words"] and last["stages"] == [f"trial_{k}"]
    assert [run["failed"] for run in search.plan()["runs"]] == ["no memory"] * 3 + [""]
    assert len({run["label"].split(maxsplit=2)[2] for run in runs}) == 3


def test_a_journal_may_end_anywhere(tmp_path):
    line = "-d x --arch a b -e 10 --suggest 3"
    for _ in range(3):
        trial(tmp_path / "a", line, [3.0], "no memory")
    lines = csv_lines(tmp_path / "a" / JOURNAL)
    for k in range(len(lines)):
        folder = tmp_path / str(k)
        folder.mkdir()
        (folder / JOURNAL).write_text("\n".join(lines[:k]) + "\n" * (k > 0))
        for _ in opened(folder, line).todo:
            trial(folder, line, [3.0], "no memory")
        runs = opened(folder, line).plan()["runs"]
        assert [(run["number"], len(run["values"]), run["failed"]) for run in runs] == [
            (i, 7, "no memory") for i in range(3)
        ]
        assert len(lines) > 20 and runs[0]["words"] == opened(tmp_path / "a", line).plan()["runs"][0]["words"]


def test_a_trial_that_is_worse_than_the_median_is_pruned(tmp_path, quick_run):
    folder, line = tmp_path / "s", "-d x -e 10 --suggest 7"
    for scores in ([9, 8, 5], [9, 8, 6], [9, 8, 7], [9, 8, 8], [9, 8, 9], [20, "nan", 6.9, 30]):
        run, stop, _, search = trial(folder, line, scores)
        shutil.copytree(quick_run, folder / run["stages"][0], dirs_exist_ok=True)
        assert not stop and search.end(run, "") == ""
    run, stop, _, search = trial(folder, line, [20, 15])  # no comparison yet
    assert not stop and run["stages"] == ["trial_6"]
    run, stop, _, search = trial(folder, line, [20, 15, 7.1, 2])
    state = folder / "trial_6" / "state.safetensors"
    state.touch()
    assert stop and search.end(run, "stopped: the state is saved") == "pruned in epoch 3 at score 7.1"
    assert not state.exists() and search.plan()["runs"][6]["failed"] == ""
    (folder / "compare.json").write_text(json.dumps(search.plan() | {"command": "x"}))
    board = landmarks_fastai.compare("s", out=tmp_path, show=True)
    assert board.pruned.tolist() == [""] * 6 + ["pruned in epoch 3 at score 7.1"] and not board.failed.any()
    assert "| pruned in epoch 3 at score 7.1 |" in (folder / "leaderboard.md").read_text()
    assert opened(folder, line).todo == []


def test_with_a_time_limit_a_step_is_a_share_of_the_time(tmp_path, quick_run, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("landmarks_fastai.cli.search.time.monotonic", lambda: clock[0])
    search = opened(tmp_path, "-d x --minutes 10 --suggest 6")
    for k, (run, score) in enumerate(zip(search.todo, [1, 2, 3, 4, 5, 4], strict=True)):
        clock[0] = 1e4 * k
        watch = search.begin(run)
        (tmp_path / f"trial_{k}").mkdir()
        (tmp_path / f"trial_{k}" / "history.csv").write_text(f"score\n{score}\n")
        clock[0] += 170
        assert not watch()  # the first comparison is after three tenths of the time
        clock[0] += 20
        assert watch() == (k == 5)
        shutil.copytree(quick_run, tmp_path / f"trial_{k}", dirs_exist_ok=True)
        search.end(run, "")


@pytest.mark.slow
@LINUX
def test_killed_twice_in_a_trial_a_search_resumes_its_run(drawn, tmp_path):
    "SIGKILL and SIGTERM of the search alone; the run saves its state."
    line = f"{SMALL} -b 4 -e 3 --save-every 0 -d {drawn} -n s --suggest 3".split()
    folder, values = RUNS / "s", []
    state, log = folder / "trial_1" / "state.safetensors", folder / "trial_1.log"
    for number in (signal.SIGKILL, signal.SIGTERM, None):
        process = start(["-m", "landmarks_fastai.compare", *line], tmp_path)
        while number and process.poll() is None:  # the run of a killed search goes on until it has saved its state
            if "resuming at epoch" in log.read_text() if number == signal.SIGTERM else state.exists():
                process.send_signal(number)
                break
            time.sleep(0.01)
        out, err = process.communicate(timeout=600)
        assert process.returncode == {signal.SIGKILL: -9, signal.SIGTERM: 143, None: 0}[number], out + err
        assert "Warning" not in err and "Traceback" not in err, err
        values.append(json.loads((folder / "trial_1" / "run.json").read_text())["flags"])
    assert values[0] == values[1] == values[2]
    assert ["resuming at epoch" in (folder / f"trial_{k}.log").read_text() for k in range(3)] == [False, True, False]
    board = pd.read_csv(folder / "leaderboard.csv").sort_values("combination")
    assert [text.split(" -")[0] for text in board.combination] == ["trial 0", "trial 1", "trial 2"]
    assert board.seeds.tolist() == [1, 1, 1] and board["-lr"].nunique() == 3 and (folder / JOURNAL).exists()
    assert [len(csv_lines(folder / f"trial_{k}" / "history.csv")) for k in range(3)] == [4, 4, 4]
