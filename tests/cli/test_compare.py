"Comparisons: what they run, what they say of it, failing and interrupted runs."

import json
import re
import shlex
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import landmarks_fastai
from landmarks_fastai.cli.compare import Parser, make_plan, split_flags
from landmarks_fastai.errors import UserError
from landmarks_fastai.inference.leaderboard import TITLES, differences, is_better
from landmarks_fastai.runs.checkpoint import read_checkpoint
from landmarks_fastai.runs.claim import process_lock
from landmarks_fastai.runs.run import is_plain_name, plain_name
from tests.helpers import ARCH, LINUX, RUNS, check_equal, check_refused, csv_lines, start

COMMAND = "landmarks_fastai.cli.compare -n c"
SMALL = "--weights none --size 32 -b 8 -e 1 --workers 0 --threads 1 --align off"
NAMES = ("<b>nosuch", f"arch_{ARCH.replace(':', '_')}")


def planned(line):
    "The plan of a command line: the combinations of its first seed, and its runs."
    args, rest = Parser().parse_known_args(shlex.split(f"-n c {line}"))
    plan = make_plan(args, split_flags(rest))
    return [run["label"] for run in plan["runs"] if run["seed"] == args.seed], plan


@pytest.fixture(scope="module")
def compared(drawn, tmp_path_factory):
    "A folder of runs with the comparison `c` of a network and one that does not exist, two seeds; and its leaderboard."
    out = tmp_path_factory.mktemp("compared")
    flags = {"data": drawn, "arch": [ARCH, NAMES[0]], "weights": "none", "size": 32, "batch_size": 8, "epochs": 1}
    more = {"workers": 0, "threads": 1, "align": "off", "out": out, "seeds": 2, "jobs": 2}
    return out, landmarks_fastai.compare("c", **flags, **more)


@pytest.fixture
def fake_python(tmp_path, monkeypatch):
    "`fake_python(line)`: the processes of runs execute this line of sh instead, with the flags as its arguments."

    def fake(line):
        (tmp_path / "python").write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / "python").chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))

    return fake


# --- the plan


def test_one_factor_at_a_time_around_the_first_values():
    labels, plan = planned("-d x --arch a b c --opt adamw adam --freeze off on -e 2 --seeds 2 --seed 5")
    assert labels == ["--arch a --opt adamw --freeze off", "--arch b", "--arch c", "--opt adam", "--freeze on"]
    assert [run["seed"] for run in plan["runs"]] == [5] * 5 + [6] * 5
    words = [" ".join(run["words"]) for run in plan["runs"]]
    assert words[0] == "-d x --arch a --opt adamw -e 2 --seed 5"
    assert words[4] == "-d x --arch a --opt adamw --freeze -e 2 --seed 5"
    assert words[8] == "-d x --arch a --opt adam -e 2 --seed 6"
    assert planned("-d x -b 8 --arch a b -b 4 16")[1]["runs"][2]["words"] == "-d x -b 4 --arch b --seed 0".split()
    assert plan["groups"]["--opt"] == {"adamw": labels[0], "adam": "--opt adam"}


def test_grid_is_all_combinations():
    labels, plan = planned("-d x --grid --arch a b --tta on off --sched plateau step")
    assert len(labels) == len(set(labels)) == 8 and plan["groups"][""].keys() == set(labels)
    assert sum("--tta" in run["words"] for run in plan["runs"]) == sum(
        "--no-tta" in run["words"] for run in plan["runs"]
    )
    assert labels[0] == "--arch a --tta on --sched plateau" and labels[-1] == "--arch b --tta off --sched step"


def test_later_stages_get_the_time_limit_and_the_machine(untrained_run):
    _, plan = planned("-d x --size 32 48 --minutes 5 --threads 1 --stages 3")
    assert plan["later"] == ["--minutes", "5", "--threads", "1"]
    assert plan["runs"][1]["stages"] == ["size_48_seed_0", "size_48_seed_0_stage_2", "size_48_seed_0_stage_3"]
    _, plan = planned(f"-pm m --out {untrained_run.parent} --loss mse l1")
    assert plan["runs"][1]["script"] == "finetune.py"
    assert plan["runs"][1]["words"][:4] == ["-pm", str(untrained_run / "best.pth"), "--loss", "l1"]


def test_runs_of_long_and_of_foreign_values_have_names():
    folder = "x" * 150
    for a, b in [(f"{folder}/no.txt", f"{folder}/training.txt"), (f"{'я' * 120}.txt", f"{'я' * 120}_2.txt")]:
        stages = [run["stages"][0] for run in planned(f"-d x --exclude {a} {b}")[1]["runs"]]
        assert len(set(stages)) == 2 and all(map(is_plain_name, stages))
    assert is_plain_name(plain_name("я" * 300))


@pytest.mark.parametrize(
    "line, parts",
    [
        ("-d x --nosuch 1 2", ["--nosuch 1"]),
        ("-d x --opt adamw nosuch", ["--opt", "nosuch", "adamw"]),
        ("-d x -b 8 0", ["batch_size is 0"]),
        ("-d x --arch", ["--arch", "expected one argument"]),
        ("-d x --freeze off maybe", ["maybe"]),
        ("-d x --seeds 0", ["0 is not a number from 1"]),
        ("-d x --arch a", ["nothing to compare", "--seeds 3"]),
        ("a b", ["unrecognized arguments: a b"]),
        ("-d x --size 32 64 --seeds 2 96", ["unrecognized arguments: 96"]),
        ("-d x --arch a b --grid off", ["unrecognized arguments: off"]),
        ("-d x --arch a b --resume", ["--resume"]),
        ("-pm nosuch --loss mse l1", ["nosuch not found"]),
        ("--show", ["is not the folder of a comparison", "check -n"]),
    ],
)
def test_mistakes_are_one_line(line, parts, run_script):
    check_refused(run_script(f"{COMMAND} {line}"), *parts)
    assert not RUNS.exists()


def test_names_and_folders_that_are_refused(run_script):
    check_refused(run_script("landmarks_fastai.cli.compare -n a/b -d x --arch a b"), "is not a plain file name")
    check_refused(run_script("landmarks_fastai.cli.compare -d x --arch a b"), "-n/--name")
    (RUNS / "c").mkdir(parents=True)
    check_refused(run_script(f"{COMMAND} -d x --arch a b"), "is not the folder of a comparison")
    for flags in (
        {"nosuch": [1, 2]},
        {"wd": np.array([0.1, -1])},
        {"opt": ["adam", "sgd"], "seeds": [2, 3], "minutes": None},
    ):
        with pytest.raises(UserError, match="nosuch|-1|unrecognized arguments: 3"):
            landmarks_fastai.compare("c", data="x", grid=False, show=False, **flags)


# --- running


@LINUX
def test_runs_side_by_side_share_cores_and_gpus(run_script, fake_python, tmp_path, monkeypatch):
    fake_python(f'shift 2; echo "$CUDA_VISIBLE_DEVICES $*" >> {tmp_path}/calls; sleep 0.5; exit 3')
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr("landmarks_fastai.cli.processes.available_cores", lambda: 12)
    code, out, err = run_script(f"{COMMAND} -d x --gpu --arch a b c d")
    calls = csv_lines(tmp_path / "calls")
    assert code == 1 and "4 combinations have runs that failed" in err and "2 at a time" in out
    assert {call.split()[0] for call in calls} == {"4", "7"} and len(calls) == 4
    assert all("--threads 6 --workers 6 " in call for call in calls)
    assert "--arch a, seed 0: exit code 3" in (RUNS / "c" / "leaderboard.md").read_text()


@LINUX
def test_a_killed_run_is_recorded_and_the_rest_go_on(run_script, fake_python):
    fake_python("kill -9 $$")
    code, out, _ = run_script(f"{COMMAND} -d x --arch a b --seeds 2 --minutes 2.5")
    assert code == 1 and "4 runs in runs/c, 4 of them to do, 1 at a time, 10 minutes" in out
    board = pd.read_csv(RUNS / "c" / "leaderboard.csv")
    assert board.failed.str.count("killed by signal 9").tolist() == [2, 2] and board.score.isna().all()


def test_the_second_start_is_refused(run_script):
    RUNS.mkdir()
    with process_lock(RUNS / ".c.lock"):
        check_refused(run_script(f"{COMMAND} -d x --arch a b"), "another process is running it", "--show")


@pytest.mark.train
def test_leaderboard_of_finished_and_failed_runs(compared):
    out, board = compared
    assert board.combination.tolist() == [f"--arch {ARCH}", f"--arch {NAMES[0]}"] and board["--arch"][0] == ARCH
    checkpoints = [read_checkpoint(out / "c" / f"{NAMES[1]}_seed_{seed}" / "best.pth") for seed in (0, 1)]
    scores = [checkpoint.score for checkpoint in checkpoints]
    row, failed = board.to_dict("records")
    assert row["score"] == pytest.approx(np.mean(scores)) and row["score_sd"] == pytest.approx(np.std(scores, ddof=1))
    assert row["scores"] == " ".join(map(str, scores)) and row["seeds"] == 2 and not row["failed"]
    assert row["nme_box_diag"] == pytest.approx(np.mean([checkpoint.nme for checkpoint in checkpoints]))
    assert row["parameters"] == sum(p.numel() for p in checkpoints[0].model().parameters()) / 1e6
    assert row["file_mb"] == pytest.approx(checkpoints[0].path.stat().st_size / 1e6)
    assert 0 < row["minutes"] < 30 and 100 < row["memory_mb"] < 20_000
    assert 0 < row["train_images_s"] < 1e5 and 0 < row["predict_images_s"] < 1e5
    assert failed["seeds"] == 0 and failed["failed"].count("no such network") == 2
    written = pd.read_csv(out / "c" / "leaderboard.csv").fillna({"scores": "", "failed": ""})
    pd.testing.assert_frame_equal(written, board, check_dtype=False)


@pytest.mark.train
def test_page_and_table_are_shown_at_any_time_and_escaped(compared, run_script, tmp_path):
    out = Path(shutil.copytree(compared[0], tmp_path / "out"))
    names = ("leaderboard.csv", "leaderboard.md", "leaderboard.html")
    before = [(out / "c" / name).read_text() for name in names]
    for name in names:
        (out / "c" / name).unlink()
    code, text, err = run_script(f"{COMMAND} --show --out {out}")
    assert (code, err.count("\n")) == (1, 1) and f"look at {out / 'c' / 'leaderboard.html'}" in text
    assert [(out / "c" / name).read_text() for name in names] == before
    page, table = before[2], before[1]
    assert "<b>nosuch" not in page and "&lt;b&gt;nosuch" in page and page.count("<svg") == 2
    assert not re.search(r"<script|<link|url\(http|(src|href)=\"(?!data:|#)", page)
    assert (
        all(title in page and title in table for title in TITLES.values())
        and "python -m landmarks_fastai.compare" in page
    )
    assert "| 2 | --arch <b>nosuch | failed |" in table and " (2 seeds) | 0." in table


@pytest.mark.train
def test_other_flags_for_the_same_runs_are_refused(compared, run_script, drawn):
    out, _ = compared
    line = f"{COMMAND} --out {out} -d {drawn} --arch {ARCH} b {SMALL.replace('-e 1', '-e 2')} --seeds 2"
    check_refused(run_script(line), f"{NAMES[1]}_seed_0", "-e 1", "choose another name")
    line = f"{COMMAND} --out {out} -d {drawn} --arch x y"
    check_refused(run_script(line), f"-n c compares others, as {NAMES[1]}_seed_0", "choose another name")


@pytest.mark.train
@LINUX
def test_with_flags_in_another_order_stopped_runs_resume_and_damaged_ones_start_over(
    compared, run_script, fake_python, drawn, tmp_path
):
    out = Path(shutil.copytree(compared[0], tmp_path / "out"))
    stopped, damaged = (out / "c" / f"{NAMES[1]}_seed_{seed}" for seed in (0, 1))
    record = json.loads((stopped / "run.json").read_text())
    (stopped / "run.json").write_text(json.dumps(record | {"ended": False}))
    (damaged / "run.json").write_text('{"script": "tr')
    fake_python(f'echo "$*" >> {tmp_path}/calls; exit 3')
    line = f"--seeds 2 {SMALL.replace('--threads 1', '--threads 2')} --out {out} --arch '{NAMES[0]}' {ARCH} -d {drawn}"
    assert "4 runs in" in run_script(f"{COMMAND} {line}")[1]
    calls = {call.split(" -n ")[1].split()[0]: call.split()[-1] for call in csv_lines(tmp_path / "calls")}
    assert (calls[stopped.name], calls[damaged.name]) == ("--resume", "--overwrite")
    (damaged / "run.json").write_text(json.dumps(record | {"ended": True}))
    (damaged / "best.pth").write_bytes(b"")  # the table has its results, the curves are without it
    assert landmarks_fastai.compare("c", out=out, show=True).seeds.tolist() == [1, 0]


@LINUX
def test_a_run_that_failed_at_its_start_may_get_other_flags(run_script, fake_python):
    fake_python("exit 3")
    for data in ("nosuch", "x"):
        assert run_script(f"{COMMAND} -d {data} --arch a b")[0] == 1
    assert "-d x" in (RUNS / "c" / "leaderboard.md").read_text()


# --- the words


def test_differences_that_exceed_the_spread():
    samples = {"a": [1.0, 1.1, 0.9], "b": [1.2, 1.0, 1.1], "c": [3.0, 3.1, 3.2], "d": [2.0], "e": [1.0, 6.0, 2.0]}
    assert differences(samples) == [
        "a is better than c.",
        "a cannot be told apart from b and e with 3 seeds.",
        "b is better than c.",
        "b and e cannot be told apart with 3 seeds.",
        "e and c cannot be told apart with 3 seeds.",
    ]
    assert differences({"a": [1.0], "b": [2.0]}) == []
    assert differences({"a": [1.0, 1.0], "b": [2.0, 2.0]}) == ["a is better than b."]


def test_seeds_are_compared_in_pairs():
    "Every seed is better by 0.1, and the seeds differ by 1 and 2; a seed that one of them lacks is left out."
    nan = float("nan")
    a, b = [1.0, 2.0, 4.0], [1.1, 2.11, 4.09]
    assert differences({"a": a, "b": b}) == ["a is better than b."]
    assert differences({"a": a, "b": [2.11, 4.09, 1.1]}) == ["a and b cannot be told apart with 3 seeds."]
    assert differences({"b": [nan, *b], "a": [0.5, *a]}) == ["a is better than b."]
    # the seed that b lacks makes the mean of a higher
    assert differences({"b": [nan, *b], "a": [9.0, *a]}) == ["b and a cannot be told apart with 3 or 4 seeds."]
    assert differences({"a": [1.0, 2.0, nan], "b": [nan, 4.0, 5.0]}) == ["a and b cannot be told apart with 2 seeds."]


def test_is_better_is_the_paired_interval():
    """Differences of -1, 0 and 1 plus a shift: by hand, the standard error is 1 / sqrt(3) = 0.577, and t of two degrees of
    freedom at 97.5% is 4.303: 2.484 is the limit.
    """
    a, b = np.array([-1.0, 0.0, 1.0]), np.array([0.0, 0.0, 0.0])
    assert is_better(a, b + 2.49) and not is_better(a, b + 2.48)
    assert is_better(b - 2.49, a) and not is_better(a, b - 2.49)
    assert not is_better([1.0, 1.0], [1.0, 1.0])


# --- interrupted


def finished(process):
    out, err = process.communicate(timeout=1200)
    assert process.returncode == 0, out + err
    return out


@pytest.mark.slow
@LINUX
def test_interrupted_at_five_moments_the_leaderboard_is_the_same(drawn, tmp_path):
    "SIGKILL, Ctrl-C and SIGTERM, of the comparison alone and of its run, in the first and in later runs and stages."
    line = f"{SMALL} -b 4 --save-every 0 --arch {ARCH} timm:test_vit -d {drawn} -n c --minutes 0 --stages 2".split()

    def begin(folder):
        folder.mkdir(exist_ok=True)
        return start(["-m", "landmarks_fastai.compare", *line], folder)

    finished(begin(tmp_path / "a"))
    folder = tmp_path / "b" / "runs" / "c"
    moments = [
        (0, 2, signal.SIGKILL),
        (0, 5, signal.SIGINT),
        (1, 3, signal.SIGTERM),
        (2, 1, signal.SIGKILL),
        (3, 4, signal.SIGKILL),
    ]
    plan = json.loads((tmp_path / "a" / "runs" / "c" / "compare.json").read_text())
    stages = [stage for run in plan["runs"] for stage in run["stages"]]
    for place, states, number in moments:
        process, path, seen = begin(tmp_path / "b"), folder / stages[place] / "state.safetensors", set()
        while len(seen) < states and process.poll() is None:
            if path.exists():
                seen.add(path.stat().st_ino)
            time.sleep(0.005)
        process.send_signal(number)
        out, err = process.communicate(timeout=600)
        codes = {signal.SIGKILL: -9, signal.SIGINT: 130, signal.SIGTERM: 143}
        assert process.returncode == codes[number] and "Traceback" not in err, out + err
    out = finished(begin(tmp_path / "b"))
    assert "resuming at epoch" in "".join(log.read_text() for log in folder.glob("*.log"))
    boards = [pd.read_csv(tmp_path / name / "runs" / "c" / "leaderboard.csv") for name in "ab"]
    columns = ["combination", "--arch", "score", "scores", "seeds", "nme_box_diag", "parameters"]
    assert boards[0][columns].equals(boards[1][columns])
    # the archive of torch.save is aligned after the name of a temporary file, whose length differs
    assert boards[0].file_mb.tolist() == pytest.approx(boards[1].file_mb.tolist(), abs=0.001)
    for stage in stages:
        shutil.copytree(tmp_path / "a" / "runs" / "c" / stage, folder / "whole")
        check_equal(stage, "whole", folder)
        shutil.rmtree(folder / "whole")
    assert not [*folder.rglob("*.lock"), *folder.rglob("*.tmp")]
