"""Every notebook runs from top to bottom in a fresh kernel, and says what it claims to say."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_runs(file: Path, tmp_path: Path) -> None:
    notebook = nbformat.read(file, as_version=4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    printed = "".join(
        str(output.get("text", "")) + str(output.get("data", {}).get("text/plain", ""))
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
    )
    if file.stem == "01_quickstart":
        accuracy = float(printed.partition("test accuracy ")[2].partition("%")[0])
        assert accuracy > 70
        assert "True" in printed  # detach gives the plain network back
        assert "other weights" in printed  # the wrong backbone is refused
        assert any(
            o.get("data", {}).get("image/png") for c in notebook.cells if c.cell_type == "code" for o in c.outputs
        )


def test_there_are_notebooks() -> None:
    assert NOTEBOOKS
