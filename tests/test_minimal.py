"""minimal.py runs and fits on one page; the notebook beside it has its cells and an image."""

import re

import jupytext
import nbformat
from PIL import Image

from conftest import ROOT

SCRIPT, NOTEBOOK = ROOT / "minimal.py", ROOT / "minimal.ipynb"


def test_minimal_runs_at_toy_size(tmp_path, monkeypatch, capsys):
    """Few pairs and iterations; the notebook's outputs show what the full run learns."""
    source = SCRIPT.read_text()
    source, sizes = re.subn(r"= 4000, 300, 64, ", "= 12, 2, 4, ", source)
    source, counts = re.subn(r"\b200\b", "8", source)
    assert sizes == 1 and counts >= 3
    monkeypatch.chdir(tmp_path)
    exec(compile(source, "minimal.py", "exec"), {"__name__": "minimal"})
    output = capsys.readouterr().out
    assert output.count("loss of the last batch") == 2 and output.count("read back correctly") == 4
    assert len(Image.open("runs/minimal.png").convert("RGB").getcolors(10**7)) > 20


def test_minimal_is_one_page_without_the_pipeline():
    source = SCRIPT.read_text()
    assert source.count("\n") <= 120
    imported = set(re.findall(r"^(?:from|import) (\w+)", source, re.MULTILINE))
    assert not imported & {"pairs", "training", "command", "validation", "argparse"}
    assert not re.search(r"^\s*class ", source, re.MULTILINE)


def test_notebook_has_the_scripts_cells_and_an_image():
    cells = lambda book: [(cell.cell_type, cell.source) for cell in book.cells]
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert cells(jupytext.read(SCRIPT)) == cells(notebook), "make notebook"
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    # stderr would hold warnings of libraries, with paths of the machine.
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert NOTEBOOK.stat().st_size <= 400 * 1024
