"""`petl report`: what a run would cost, printed before it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from petl.cli import main


def printed(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    assert main(["report", *args]) == 0
    return capsys.readouterr().out


def test_report_of_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    out = printed(capsys, "--config", "quickstart/classification", "--memory", "1GiB")
    trained, head = (int(n.replace(",", "")) for n in re.findall(r"([\d,]+) (?:trained|in the head)", out))
    peak = float(re.findall(r"([\d.]+) MiB per image at the peak", out)[0])
    fixed = sum(float(n) for n in re.findall(r"([\d.]+) MiB of", out))
    batch = int(re.findall(r"at most ([\d,]+) images in 1.074 GB", out)[0])
    assert "counted     in float32, on tensors without data" in out
    assert "CUDA context" in out
    assert batch == pytest.approx((1024 - fixed) / peak, rel=0.01)  # the figures are rounded
    rows = [line.replace(",", "").split() for line in out.partition("parameters by module\n")[2].splitlines()[1:]]
    assert [row[0] for row in rows][-3:] == ["backbone.petl.blocks", "head.fc", "all"]
    assert [sum(int(row[i]) for row in rows[:-1]) for i in (1, 2)] == [int(n) for n in rows[-1][1:]]
    assert int(rows[-1][2]) == trained + head


def test_the_forecast_is_for_the_precision_of_the_trainer(capsys: pytest.CaptureFixture[str]) -> None:
    found = {}
    for precision, words in (
        ("bf16-mixed", "under autocast to bfloat16"),
        ("bf16-true", "in bfloat16"),
        ("32-true", "in float32"),
    ):
        out = printed(capsys, "--config", "quickstart/classification", "--trainer.precision", precision)
        assert f"counted     {words}, on tensors without data" in out
        found[precision] = float(re.findall(r"([\d.]+) MiB per image kept", out)[0])
    assert found["bf16-true"] < found["bf16-mixed"] < found["32-true"]


def test_frozen_weights_are_counted_in_the_dtype_they_are_held_in(capsys: pytest.CaptureFixture[str]) -> None:
    found = []
    for dtype in ("float32", "bfloat16"):
        out = printed(capsys, "--config", "quickstart/classification", "--model.frozen_dtype", dtype)
        assert f"counted     in {dtype}" in out
        found.append([float(n) for n in re.findall(r"([\d.]+) MiB of (?:weights|gradients)", out)])
    (weights, trained), (half, same) = found
    assert trained == same
    assert half == pytest.approx((weights - trained) / 2 + trained, abs=0.15)


def test_memory_needs_a_unit_and_a_model(config: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for args, word in (
        (["report", "--config", str(config), "--memory", "8"], "memory '8': give a number with its unit"),
        (["report", "--config", "quickstart/explain", "--memory", "8GB"], "no forecast of memory"),
        (["data", "check", "--config", str(config), "--memory", "8GB"], "no option 'memory'"),
    ):
        assert main(args) == 2
        assert word in capfd.readouterr().err
