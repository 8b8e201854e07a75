"docs/three_stages.ipynb runs from its first cell to its last."

import re

import nbformat
import pytest
from nbclient import NotebookClient

from tests.helpers import ROOT


@pytest.mark.slow
def test_three_stages(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.delenv("MPLBACKEND")  # the kernel's shows figures
    (tmp_path / "docs").mkdir()
    notebook = nbformat.read(ROOT / "docs/three_stages.ipynb", 4)
    NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(tmp_path / "docs")}}).execute()
    outputs = {cell.source: cell.outputs for cell in notebook.cells if cell.cell_type == "code"}
    pictures = [source for source, outs in outputs.items() if any("image/png" in o.get("data", {}) for o in outs)]
    for call in ("show_batch", "lr_find", "show_results", "plot_top_losses"):
        assert any(call in source for source in pictures), call
    text = "".join(o.get("text", "") for outs in outputs.values() for o in outs if o.output_type == "stream")
    scores = [
        float(score) for score in re.findall(r"score value: ([0-9]+[.][0-9]+)", text)
    ]  # SaveModelCallback prints each best
    assert scores[-1] < scores[0] / 2
    (distance,) = (o["data"]["text/plain"] for o in outputs[notebook.cells[-1].source] if "data" in o)
    assert float(re.search(r"[0-9]+[.][0-9e-]+", distance)[0]) < 0.01
