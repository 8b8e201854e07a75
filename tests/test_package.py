"The package as pip installs it: what it needs, its commands, and what can be imported without PyTorch."

import importlib
import os
import re
import subprocess
import sys

import pytest

import landmarks_fastai
from landmarks_fastai.runs.run import Record, Run
from tests.helpers import ROOT

tomllib = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")  # which pytest brings
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]


def requirements(name: str) -> set[str]:
    "The lines of a requirements file, without comments and `-r`."
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    return {line for line in lines if line and not line.startswith(("#", "-r "))}


def test_requirements_files_name_what_the_extras_name():
    assert requirements("requirements.txt") == {*PROJECT["dependencies"], *EXTRAS["train"]}
    dev = set(EXTRAS["dev"]) - {"landmarks-fastai[train,export,video,search]"}
    assert requirements("requirements-dev.txt") == dev.union(*(EXTRAS[name] for name in ("export", "video", "search")))
    assert set(EXTRAS["runtime"]) <= set(EXTRAS["export"])
    assert (ROOT / "requirements-dev.txt").read_text().startswith("-r requirements.txt\n")


@pytest.mark.parametrize("name", PROJECT["scripts"])
def test_every_command_answers_help(name, monkeypatch, capsys):
    module, function = PROJECT["scripts"][name].split(":")
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as ended:
        getattr(importlib.import_module(module), function)()
    out = capsys.readouterr().out
    assert ended.value.code == 0 and out.startswith(f"usage: {name} ") and re.search(r"--out (DIR|FILE)", out)


def test_import_needs_numpy_and_pillow_alone():
    names = {re.match(r"[\w-]+", line)[0] for line in EXTRAS["train"]}
    assert {"torch", "fastai", "pandas"} <= names
    code = (
        f"import sys; sys.modules |= dict.fromkeys({sorted(names)}); import landmarks_fastai as p; print(p.__version__)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout.strip(), done.stderr) == (landmarks_fastai.__version__, "")


@pytest.mark.parametrize(
    "missing, script, words", [("torch", "predict", ["-pm", "x"]), ("fastai", "train", ["-d", ""])]
)
def test_missing_package_is_one_line_with_the_pip_command(missing, script, words, tmp_path):
    code = (
        f"import sys; from importlib.abc import MetaPathFinder\n"
        "class Blocked(MetaPathFinder):\n"
        "    def find_spec(self, name, *args):\n"
        f"        if name == {missing!r}: raise ModuleNotFoundError(name=name)\n"
        f"sys.meta_path.insert(0, Blocked()); sys.argv = ['landmarks', *{words!r}]\n"
        f"from landmarks_fastai.cli.{script} import command; command()"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env=env)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert missing in done.stderr and "pip install -r requirements.txt" in done.stderr


@pytest.mark.parametrize(
    "typed,command", [("train.py", "python train.py"), ("bin/landmarks-train.exe", "landmarks-train")]
)
def test_resume_command_is_that_of_the_script_or_of_the_installed_command(tmp_path, monkeypatch, typed, command):
    monkeypatch.setattr(sys, "argv", [typed])
    run = Run(tmp_path, "r", Record("train.py"))
    assert run.resume_command == f"{command} --resume -n r --out {tmp_path}"
