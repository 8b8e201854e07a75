"What README.md says is so: its flags exist, its Python runs, the links lead somewhere."

import re
import shlex
import shutil

import pytest

from landmarks_fastai import cli

from .conftest import N_POINTS, ROOT

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_flag_of_the_table_exists_and_its_default_is_the_program_s(capsys):
    helps = ""
    for parse in (cli.train_arguments, cli.finetune_arguments, cli.predict_arguments):
        with pytest.raises(SystemExit):
            parse(["--help"])
        helps += capsys.readouterr().out
    flags = set(re.findall(r"`(-{1,2}[a-z][a-z-]*)[` ]", TEXT)) - {"--help"}
    assert len(flags) > 25
    for flag in flags:
        assert re.search(rf"(?<![\w-]){flag}(?![\w-])", helps), f"{flag} is in the README, in no --help"


def test_the_command_lines_of_the_three_stages_parse():
    lines = re.findall(r"^python (train|finetune|predict)\.py +(.+)$", TEXT, re.M)
    assert [script for script, _ in lines] == ["train", "finetune", "finetune", "predict", "train"]
    assert cli.train_arguments(shlex.split(lines.pop()[1], comments=True)).resume
    for script, line in lines:
        args = getattr(cli, f"{script}_arguments")(shlex.split(line))
        assert args.data == ""


def test_the_lines_of_python_run(drawn, tmp_path, monkeypatch):
    from matplotlib import pyplot as plt

    shutil.copytree(drawn, tmp_path / "faces")
    shutil.copy(next((drawn / "test" / "images").iterdir()), tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    code = re.search(r"```python\n(.+?)```", TEXT, re.S)[1]
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    titles = [ax.get_title() for ax in plt.gcf().axes]
    plt.close("all")
    assert any(t.startswith("score") for t in titles) and names["points"].shape == (1, N_POINTS, 2)


def test_pictures_and_links_lead_somewhere():
    targets = [t for t in re.findall(r"\]\(([^)]+)\)", TEXT) if "://" not in t]
    assert targets and all((ROOT / t).is_file() for t in targets)
