"""The benchmark of methods on a small network: the table that it writes. Its figures mean nothing there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from petl.errors import PetlError

SMALL = ("--model", "vit_tiny_patch16_224", "--input", "32", "--rounds", "1", "--batch", "1")


def test_the_section_is_written_beside_others(tmp_path: Path) -> None:
    file = tmp_path / "BENCHMARKS.md"
    file.write_text("# Benchmarks\n\n## Another\n\n| what |\n|---|\n| it |\n")
    script = str(Path(__file__).parents[2] / "recipes" / "bench_methods.py")
    command = [sys.executable, script, *SMALL, "--methods", "bitfit", "adaptformer", "--out", str(file)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    text = file.read_text()
    assert text.startswith("# Benchmarks\n\n## Another\n\n| what |\n|---|\n| it |\n\n## Methods, vit_tiny_patch16_224")
    lines = [[cell.strip() for cell in line.strip("| ").split("|")] for line in text.splitlines() if "|" in line]
    header = next(line for line in lines if line[0] == "method")
    costs = {line[0]: line[1:] for line in lines if len(line) == len(header)}
    full, lora = costs["full_fine_tuning"], costs["plain `peft` LoRA"]
    assert {"bitfit", "adaptformer"} < costs.keys()
    assert lora[0] == f"{12 * 8 * (192 + 3 * 192):,}"  # A and B of rank 8 for each qkv
    assert [full[i] for i in (2, 5, 8)] == ["1.00"] * 3 == [lora[i] for i in (3, 6, 9)]
    trained = [float(line[2]) for line in lines if line[0] in costs.keys() - {"method", "plain network", "---"}]
    assert trained == sorted(trained, reverse=True)
    targets = {line[0]: line[2] for line in lines if len(line) == 3}
    assert targets["inference, time of bitfit merged over the plain network"] == "1.00 ± 0.02"
    assert not any("adaptformer merged" in what for what in targets)
    assert sum("19 ladder adapters" in what for what in targets) == 2


def test_an_unknown_method_is_named() -> None:
    from bench_methods import chosen  # type: ignore[import-not-found]  # recipes/ is on the path: conftest.py

    with pytest.raises(PetlError, match="did you mean 'bitfit'"):
        chosen(["bitfitt"])
    assert chosen(["ssf", "full_fine_tuning"]) == ["full_fine_tuning", "ssf"]
    assert "peft" not in chosen(None), "it has no default type"
