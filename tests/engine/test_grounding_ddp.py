"""Two processes on the CPU (gloo): every expression counted once, one adapter, the result of one process."""

from __future__ import annotations

import csv
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.data.test_expressions import entry, write
from tests.engine.conftest import petl_command
from tests.engine.grounding import QUICK, Petl, commands

DDP: list[object] = ["--trainer.devices", 2, "--trainer.strategy", "ddp"]
TRAIN, VAL, TEST = 16, 7, 9
CENTRE, CORNER = [10.0, 7.5, 20.0, 15.0], [0.0, 0.0, 8.0, 6.0]  # a fresh model says "the middle": a hit, and a miss


@pytest.fixture(scope="module")
def petl() -> Iterator[Petl]:
    with commands() as run:
        yield run


def two_ranks() -> tuple[dict[str, str], ...]:
    """What a launcher tells the processes of a run."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "NODE_RANK": "0", "WORLD_SIZE": "2"}
    return tuple(common | {"LOCAL_RANK": str(rank)} for rank in range(2))


def options(folder: Path, method: str) -> list[object]:
    """A list with odd numbers of expressions, two of them too long; write it where it is not there."""
    if not (folder / "list.jsonl").exists():
        lines = []
        for split, count in (("train", TRAIN), ("val", VAL), ("test", TEST)):
            for i in range(count):
                text = f"thing {i}" if split == "test" or i else "the thing that is further to the left than the other"
                box = CORNER if i % 3 == 1 else CENTRE
                lines.append(entry(len(lines), expression=text, bbox=box, split=split, width=40, height=30))
        write(folder, *lines)
    return ["--config", "quickstart/grounding", *QUICK, "--data", "petl.data.Expressions", "--data.file", "list.jsonl",
            "--model.method", method, "--model.query_length", 8, "--model.head_epochs", 0.5,
            "--trainer.max_epochs", 2]  # fmt: skip


def result(run: Path) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    metrics: dict[str, float] = {}
    for stage in ("fit", "test"):
        metrics |= json.loads((run / f"{stage}_metrics.json").read_text())
    return load_file(run / "adapter" / "adapter_model.safetensors"), metrics


def predictions(run: Path) -> list[dict[str, Any]]:
    rows = [row for file in run.glob("predictions*.csv") for row in csv.DictReader(file.open())]
    return sorted(rows, key=lambda row: int(row["index"]))


@pytest.mark.parametrize("method", ["M2IST", "DARA"])
def test_two_processes_equal_one(method: str, petl: Petl, tmp_path: Path) -> None:
    given = options(tmp_path, method)
    petl("fit", *given, "--run_dir", "one", cwd=tmp_path)
    if method == "M2IST":  # as a person starts it: Lightning starts the second process
        done = petl_command("fit", *map(str, [*given, *DDP]), "--run_dir", "two", cwd=tmp_path)
    else:
        done = petl("fit", *given, *DDP, "--run_dir", "two", cwd=tmp_path, environments=two_ranks())
    assert "find_unused_parameters" not in done.stderr
    for verb in ("test", "predict"):
        petl(verb, *given, "--run_dir", "one", cwd=tmp_path)
        petl(verb, *given, *DDP, "--run_dir", "two", cwd=tmp_path, environments=two_ranks())

    (one, alone), (two, together) = (result(tmp_path / run) for run in ("one", "two"))
    assert one.keys() == two.keys()
    for key, tensor in one.items():
        torch.testing.assert_close(two[key], tensor, atol=2e-3, rtol=1e-2)
    # 7 and 9 expressions do not divide by two: a duplicated or lost one would show
    for key in ("val/acc", "val/iou", "val/loss", "test/acc", "test/iou", "test/loss"):
        assert together[key] == pytest.approx(alone[key], abs=1e-4), key
    assert alone["test/acc"] == pytest.approx(6 / TEST), "the middle is right in two of three"
    assert alone["val/acc"] == pytest.approx(5 / VAL)

    assert len([*(tmp_path / "two").glob("predictions_rank*.csv")]) == 2
    rows, expected = predictions(tmp_path / "two"), predictions(tmp_path / "one")
    assert [r["expression"] for r in rows] == [f"thing {i}" for i in range(TEST)] == [r["expression"] for r in expected]
    for row, other in zip(rows, expected, strict=True):
        assert [float(row[k]) for k in ("x0", "y0", "x1", "y1")] == pytest.approx(
            [float(other[k]) for k in ("x0", "y0", "x1", "y1")], abs=1e-3
        )
    assert len([*(tmp_path / "two" / "pictures").glob("boxes_*.png")]) == 2, "one after each epoch, from one process"
    config = json.loads((tmp_path / "two" / "adapter" / "adapter_config.json").read_text())
    assert config["protocol"]["training"]["devices"] == 2
    assert done.stderr.count("2 of 23 expressions are longer than query_length=8") == 1, "not once per process"


def test_a_scene_is_shared_between_processes(petl: Petl, tmp_path: Path) -> None:
    """Several expressions of one picture in a batch, which it is encoded once for, on both sides."""
    given: list[object] = [
        "--config", "quickstart/grounding", *QUICK, "--data.train_size", 9, "--data.val_size", 3, "--data.test_size", 1,
        "--data.expressions_per_scene", 3, "--model.method.side_seed", "zero",
    ]  # fmt: skip
    petl("fit", *given, "--run_dir", "one", cwd=tmp_path)
    petl("fit", *given, *DDP, "--run_dir", "two", cwd=tmp_path, environments=two_ranks())
    one, two = (load_file(tmp_path / r / "adapter" / "adapter_model.safetensors") for r in ("one", "two"))
    for key, tensor in one.items():
        torch.testing.assert_close(two[key], tensor, atol=2e-3, rtol=1e-2)
    values = [json.loads((tmp_path / r / "fit_metrics.json").read_text()) for r in ("one", "two")]
    for key in ("val/acc", "val/iou"):
        assert values[0][key] == pytest.approx(values[1][key], abs=1e-4)
