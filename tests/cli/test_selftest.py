"The self-test on this CPU, and that a check which fails is said."

import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from landmarks_fastai.cli import selftest, selftest_checks
from landmarks_fastai.cli.selftest_checks import CHECKS, SMALL, Setup, SkipCheck
from landmarks_fastai.training.callbacks import resume_state
from tests.cli.test_scripts import check_refused
from tests.conftest import ROOT


def rows(out) -> dict[str, list[str]]:
    "The table: result, seconds and figures by the name of the check."
    lines = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in out.splitlines()]
    assert lines[0] == ["check", "result", "s", "figures"] and all(len(line) == 4 for line in lines)
    return {name: rest for name, *rest in lines[2:]}


@pytest.fixture
def setup(drawn, tmp_path):
    return Setup("cpu", drawn, SMALL, 32, 8)


@pytest.mark.slow
def test_all_checks_pass_on_a_cpu(tmp_path):
    command = [sys.executable, "-m", "landmarks_fastai.selftest"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    table = rows(result.stdout)
    assert result.returncode == 0, result
    assert list(table)[3:] == list(CHECKS) and "torch" in table["versions"][2]
    assert {name: result for name, (result, *_) in table.items() if result not in ("", "passed")} in (
        {"--amp fp16": "skipped"},
        {"--amp fp16": "skipped", "torch.compile": "skipped"},  # without a C++ compiler
    )
    assert all(figures for *_, figures in table.values())


def test_a_failed_check_is_a_row_and_the_exit_code(run_script, monkeypatch):
    def passes(setup):
        print("what a stage prints")
        return "1 px | 2 px"

    def fails(setup):
        raise RuntimeError("CUDA error: no kernel image\nmore lines\n")

    def skips(setup):
        raise SkipCheck("no compiler")

    monkeypatch.setattr(selftest_checks, "CHECKS", {"one": passes, "two": fails, "three": skips, "four": passes})
    code, out, err = run_script("landmarks_fastai.cli.selftest")
    check_refused((code, "", err), "1 of 4 checks failed")
    table = rows(out)
    assert [table[name][0] for name in ("one", "two", "three", "four")] == ["passed", "FAILED", "skipped", "passed"]
    assert table["two"][2] == "RuntimeError: CUDA error: no kernel image" and table["three"][2] == "no compiler"
    assert "what a stage prints" not in out and table["one"][2] == r"1 px \| 2 px"


def test_gpu_without_a_gpu_is_an_error(run_script, monkeypatch):
    monkeypatch.setattr(selftest, "find_gpu", lambda: None)
    check_refused(run_script("landmarks_fastai.cli.selftest --gpu"), "--gpu: ", "run without --gpu")


def test_a_device_that_computes_otherwise_fails(setup, monkeypatch):
    step = selftest_checks.step

    def inexact(learn, batch):
        points, *rest = step(learn, batch)
        return [points * (1.01 if learn.machine.channels_last else 1), *rest]

    monkeypatch.setattr(selftest_checks, "step", inexact)
    result, why = selftest_checks.run_check(CHECKS["float32, against the CPU"], setup)
    assert result == "FAILED" and re.match("ValueError: points differ by 0.0.* at most 0.001 expected", why)


def test_a_resume_that_restores_nothing_fails(setup, monkeypatch, data):
    setup.data = data
    monkeypatch.setattr(resume_state, "restore_state", lambda learn, state: None)
    result, why = selftest_checks.run_check(CHECKS["resume"], setup)
    assert result == "FAILED" and "scores" in why
    whole, parts = map(float, re.findall(r"\d+\.\d+", why)[:2])
    assert abs(parts / whole - 1) > 5 * selftest_checks.LIMIT  # so a GPU's limit finds it as well


def test_nan_in_half_precision_fails(setup, monkeypatch):
    build = Setup.learner

    def broken(self, *args, **changes):
        learn, batch = build(self, *args, **changes)
        with torch.no_grad():
            learn.model[1][0].bias.fill_(float("nan"))
        return learn, batch

    monkeypatch.setattr(Setup, "learner", broken)
    result, why = selftest_checks.run_check(CHECKS["--amp bf16"], setup)
    assert result == "FAILED" and why.startswith("ValueError: bf16: losses nan")


def test_the_name_of_a_gpu_has_what_an_issue_needs(monkeypatch):
    card = SimpleNamespace(name="NVIDIA GeForce GTX 1650", total_memory=4_100_000_000, major=7, minor=5)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    monkeypatch.setattr(selftest, "_output", lambda *command: "550.54")
    name = selftest.device_name("cuda")
    assert name.startswith("cuda, NVIDIA GeForce GTX 1650, 4.1 GB, compute capability 7.5, CUDA ")
    assert name.endswith(", driver 550.54")
