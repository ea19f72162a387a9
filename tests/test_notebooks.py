"""Every notebook runs from top to bottom in a fresh kernel, and says what it claims to say."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


def pictures(notebook: nbformat.NotebookNode) -> list[str]:
    outputs = [o for cell in notebook.cells if cell.cell_type == "code" for o in cell.outputs]
    return [o["data"]["image/png"] for o in outputs if o.get("data", {}).get("image/png")]


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
        assert pictures(notebook)
    if file.stem == "02_grounding":
        costs = {line.split()[0]: line for line in printed.splitlines() if "kept for backward" in line}
        kept = {method: float(line.partition("MiB")[0].split()[-1]) for method, line in costs.items()}
        assert kept["linear_probe"] < kept["m2ist"] < 0.5 * kept["dara"]
        assert "gradient goes back to side streams" in costs["m2ist"]
        [(first, last)] = re.findall(r"loss ([\d.]+) -> ([\d.]+) in", printed)
        assert float(last) < 0.2 * float(first)
        [(hits, count)] = re.findall(r"(\d+) of (\d+) expressions are hit", printed)
        assert int(hits) > 0.8 * int(count)
        [box] = re.findall(r"the [a-z ]+:((?: [\d.]+){4}) \(x0 y0 x1 y1", printed)
        [truth] = re.findall(r"truth:((?: [\d.]+){4})", printed)
        assert all(abs(float(a) - float(b)) < 6 for a, b in zip(box.split(), truth.split(), strict=True))
        assert "this text encoder is the right architecture with other weights" in printed  # the wrong pair is refused
        assert len(pictures(notebook)) == 2  # boxes on eight scenes, and the scene that was grounded
    if file.stem == "03_explain":
        assert "same logits, bit for bit: True" in printed
        assert float(printed.partition("v(1) - v(0): ")[2].split()[0]) <= 1e-6
        pearson = float(re.findall(r"autognothi +.*pearson ([-\d.]+)", printed)[0])
        assert pearson > 0.6  # with the exact values
        insertion = {k: float(v) for k, v in re.findall(r"^(\S.*?) +insertion ([-\d.]+)", printed, re.MULTILINE)}
        assert len(insertion) == 5
        assert insertion["autognothi"] > insertion["random"]
        assert "this classifier is the right architecture with other weights" in printed
        assert len(pictures(notebook)) == 1
    if file.stem == "04_compare":
        assert "5 jobs, 0 finished before" in printed
        table = (tmp_path / "comparison" / "table.md").read_text()
        assert table in printed
        accuracy = {k: float(v) for k, v in re.findall(r"^\| (\S.*?) \| ([\d.]+) \| [\d.]+ \|$", table, re.MULTILINE)}
        assert len(accuracy) == 5
        assert max(accuracy.values()) > 35  # chance: 10
        assert "[0.485, 0.456, 0.406] in bitfit/digits/0" in printed  # refused
        assert len(pictures(notebook)) == 1


def test_there_are_notebooks_without_outputs() -> None:
    assert [f.stem for f in NOTEBOOKS] == ["01_quickstart", "02_grounding", "03_explain", "04_compare"]
    for file in NOTEBOOKS:
        notebook = nbformat.read(file, as_version=4)
        nbformat.validate(notebook)
        assert not any(cell.outputs or cell.execution_count for cell in notebook.cells if cell.cell_type == "code")
