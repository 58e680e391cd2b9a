"""The notebook runs from top to bottom, and shows what it says: a schedule, the memory, scores."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parent.parent / "docs" / "tour.ipynb"


def test_it_is_kept_without_outputs():
    nbformat = pytest.importorskip("nbformat")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert all(not c.outputs and c.execution_count is None for c in notebook.cells if c.cell_type == "code")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the kernel's own libraries
def test_it_runs(tmp_path: Path):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = nbclient.NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    trained, schedule, memory, scores = (c.outputs for c in notebook.cells if c.cell_type == "code")
    assert "the number" in printed(trained)
    assert "exact prefix" in printed(schedule) and any("image/png" in o.get("data", {}) for o in schedule)
    assert "all memory" in printed(memory)
    found = dict(re.findall(r"(exact|zero_memory) +(\d+\.\d+) bits per byte", printed(scores)))
    assert 0 < float(found["exact"]) < 8 and found["exact"] != found["zero_memory"]
    assert (tmp_path / "runs" / "clerks" / "result.json").is_file()


def printed(outputs: list) -> str:
    """What a cell wrote to standard output."""
    return "".join(o.text for o in outputs if o.output_type == "stream" and o.name == "stdout")
