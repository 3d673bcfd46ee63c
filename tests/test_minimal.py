"""minimal.py: it runs, it is one page, and the notebook beside it has its cells and an image."""

import re

import jupytext
import nbformat
from PIL import Image

from conftest import ROOT

PAGE, NOTEBOOK = ROOT / "minimal.py", ROOT / "minimal.ipynb"


def test_it_runs_in_small(tmp_path, monkeypatch, capsys):
    """Few pairs and iterations; what it learns is in the notebook's outputs."""
    source = PAGE.read_text()
    small, found = re.subn(r"= 4000, 300, 64, ", "= 12, 2, 4, ", source)
    small, measured = re.subn(r"\b200\b", "8", small)
    assert found == 1 and measured >= 3
    monkeypatch.chdir(tmp_path)
    exec(compile(small, "minimal.py", "exec"), {"__name__": "minimal"})
    said = capsys.readouterr().out
    assert said.count("loss of the last batch") == 2 and said.count("read back correctly") == 4
    assert len(Image.open("runs/minimal.png").convert("RGB").getcolors(10**7)) > 20


def test_it_is_one_page_of_the_method_alone():
    source = PAGE.read_text()
    assert source.count("\n") <= 120
    imported = set(re.findall(r"^(?:from|import) (\w+)", source, re.MULTILINE))
    assert not imported & {"pairs", "training", "command", "validation", "argparse"}
    assert not re.search(r"^\s*class ", source, re.MULTILINE)


def test_the_notebook_is_the_same_and_has_its_outputs():
    cells = lambda book: [(cell.cell_type, cell.source) for cell in book.cells]
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert cells(jupytext.read(PAGE)) == cells(notebook), "make notebook"
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    # stderr would show warnings of libraries, with paths of the machine
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert NOTEBOOK.stat().st_size <= 400 * 1024
