"README.md and docs/: flags exist, command lines parse, Python runs, links lead to files."

import ast
import importlib.util
import os
import re
import shlex
import shutil
from itertools import pairwise

import pytest

from landmarks_fastai.cli.compare import Parser
from landmarks_fastai.cli.export import export_parser
from landmarks_fastai.cli.finetune import finetune_parser
from landmarks_fastai.cli.predict import predict_parser
from landmarks_fastai.cli.train import train_parser
from tests.helpers import N_POINTS, ROOT

PACKAGE = ROOT / "landmarks_fastai"
PARSERS = {"train": train_parser, "finetune": finetune_parser, "predict": predict_parser}
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
DOCS = {p.relative_to(ROOT).as_posix(): p.read_text(encoding="utf-8") for p in sorted((ROOT / "docs").glob("*.md"))}
OTHERS = {
    name: (ROOT / name).read_text(encoding="utf-8")
    for name in ("CHANGELOG.md", "CONTRIBUTING.md", "tests/README.md", "benchmarks/README.md", "benchmarks/score.md")
}
PAGES = {"README.md": TEXT} | DOCS | OTHERS  # path from the root -> text


def each(pages):
    return pytest.mark.parametrize("page", [pytest.param(page, id=page) for page in pages])


def flags_named(text) -> set[str]:
    return set(re.findall(r"`(-{1,2}[a-z][a-z0-9-]*)[` ]", text)) - {"--help"}


def commands(text) -> list[str]:
    "Lines of code blocks, and code between backticks, that begin with python."
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S)
    lines = [line for block in blocks for line in block.splitlines() if line.startswith("python ")]
    return lines + re.findall(r"`(python [^`]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))


@pytest.fixture
def helps(capsys):
    "What --help of all commands says."
    from landmarks_fastai import competition
    from landmarks_fastai.synthetic import sample

    for parse in (
        *(parser().parse_args for parser in (*PARSERS.values(), export_parser, Parser)),
        sample.main,
        competition.main,
    ):
        with pytest.raises(SystemExit):
            parse(["--help"])
    return capsys.readouterr().out


def test_the_pages_name_most_flags():
    assert len(set().union(*map(flags_named, [TEXT, *DOCS.values()]))) > 25


@each(["README.md", *DOCS])
def test_every_flag_that_is_named_exists(page, helps):
    for flag in flags_named(PAGES[page]):
        assert re.search(rf"(?<![\w-]){flag}(?![\w-])", helps), f"{flag} is in {page}, in no --help"


def test_the_command_lines_of_the_three_stages_parse():
    "Those of the README, and the published entry's; each later stage loads the run before."
    for page, data in (("README.md", "DIR"), ("docs/baseline.md", "")):
        part = PAGES[page].split("## The three stages")[-1]
        lines = re.findall(r"^python (train|finetune|predict)\.py +(.+)$", part, re.M)[:4]
        assert [script for script, _ in lines] == ["train", "finetune", "finetune", "predict"]
        stages = [PARSERS[script]().parse_args(shlex.split(line)) for script, line in lines]
        assert stages[0].data == os.path.abspath(data)
        for before, after in pairwise(stages):
            (loaded,) = [after.pretrained_model] if isinstance(after.pretrained_model, str) else after.pretrained_model
            assert loaded.removesuffix("_best.pth") == before.name


@each(p for p in PAGES if commands(PAGES[p]))
def test_every_command_line_parses_and_its_files_exist(page):
    for line in commands(PAGES[page]):
        words = shlex.split(re.split(r" [|>] ", line)[0], comments=True)[1:]
        if words[0] == "-m":
            assert words[1] == "pytest" or importlib.util.find_spec(words[1]), line
            words = [w for w in words[2:] if w.startswith("tests/")]
            assert all((ROOT / w).is_file() for w in words), line
        elif script := re.fullmatch(r"(train|finetune|predict)\.py", words[0]):
            if words[1:] != ["--help"]:
                PARSERS[script[1]]().parse_args(words[1:])
        else:
            assert (ROOT / words[0]).is_file(), line


@pytest.mark.train
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
    assert any(t.startswith("score") for t in titles) and names["points"].shape == (N_POINTS, 2)


@each(PAGES)
def test_python_of_other_pages_compiles_and_its_imports_exist(page):
    "What README.md and docs/python.md show is run: here, and by test_python_page.py."
    for code in re.findall(r"```python\n(.+?)```", PAGES[page], re.S):
        for node in ast.parse(code, page).body:
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                exec(ast.unparse(node), names := {})
                assert {alias.asname or alias.name.split(".")[0] for alias in node.names} - {"*"} <= names.keys()


@each(PAGES)
def test_pictures_and_links_lead_somewhere(page):
    targets = [t.partition("#")[0] for t in re.findall(r"\]\(([^)\s]+)\)", PAGES[page]) if "://" not in t]
    assert targets or page != "README.md"
    absent = [t for t in targets if t and not ((ROOT / page).parent / t).is_file()]
    assert not absent


def test_readme_links_every_page():
    for page in DOCS:
        assert f"({page})" in TEXT


def test_the_files_and_names_of_the_architecture_exist():
    page = DOCS["docs/architecture.md"]
    pairs = re.findall(r"`([\w/]+\.py)`: ((?:`\w+`(?:, )?)+)", page)
    assert len(pairs) > 15
    for file, names in pairs:
        code = (PACKAGE / file).read_text(encoding="utf-8")
        for name in re.findall(r"\w+", names):
            assert re.search(rf"^(?:def|class) {name}\b", code, re.M), f"{name} is not in {file}"
    for name, file in re.findall(r"`(\w+)` (?:in|\()\s*`([\w/]+\.py)`", page):
        code = (PACKAGE / file).read_text(encoding="utf-8")
        assert re.search(rf"^(?:(?:def|class) {name}\b|{name} = )", code, re.M), f"{name} is not in {file}"
    for file in re.findall(r"`([\w/]+\.py)`", page):
        assert (PACKAGE / file).is_file() or (ROOT / file).is_file(), file
