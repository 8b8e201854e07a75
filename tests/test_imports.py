"The direction of imports: a module imports from its own layer or from layers below it, and no two modules import each other."

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "landmarks_fastai"
PAGE = (PACKAGE.parent / "docs" / "architecture.md").read_text(encoding="utf-8").split("## Imports")[1]
# from the bottom to the top: the first column of the page's table
LAYERS = [set(re.findall(r"`(\w+)(?:\.py|/)`", row)) for row in re.findall(r"^\| (`.+?) \|", PAGE, re.M)]


def _graph() -> dict[str, set[str]]:
    "module -> the package's modules that it imports, inside functions too"
    modules = {".".join(p.relative_to(PACKAGE).with_suffix("").parts) for p in PACKAGE.rglob("*.py")}
    graph = {}
    for module in modules - {"__init__"}:
        tree = ast.parse((PACKAGE / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8"))
        graph[module] = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("landmarks_fastai"):
                assert node.level == 0
                base = node.module.removeprefix("landmarks_fastai").strip(".")
                for alias in node.names:
                    full = f"{base}.{alias.name}".strip(".")
                    graph[module].add(
                        full if full in modules else f"{base}.__init__" if f"{base}.__init__" in modules else base
                    )
    return graph


def _layer(module: str) -> int:
    if module.endswith("__main__"):  # a command
        return len(LAYERS) - 1
    return next(k for k, names in enumerate(LAYERS) if module.split(".")[0] in names)


def test_every_module_is_in_a_layer():
    assert {m.split(".")[0] for m in _graph()} == set().union(*LAYERS)


def test_imports_run_downwards():
    upwards = [(m, i) for m, imported in _graph().items() for i in imported if _layer(i) > _layer(m)]
    assert not upwards


def test_no_two_modules_import_each_other():
    order = list(TopologicalSorter(_graph()).static_order())  # raises CycleError
    assert set(order) >= _graph().keys()


def test_nothing_below_the_scripts_imports_cli_or_draws_faces():
    users = {m for m, imported in _graph().items() for i in imported if i.startswith(("cli", "synthetic"))}
    assert {m.split(".")[0] for m in users} <= {"cli", "synthetic", "compare", "doctor", "export", "labels", "report"}
