"""Two processes on the CPU (gloo): the same data once, one adapter, one W&B run, and the result of one process."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.engine.conftest import petl_command


def test_two_processes_equal_one(config: Path, tmp_path: Path) -> None:
    # mixup pairs images inside a process's part of the batch, so it is off where one process is the reference
    config.write_text(config.read_text().replace("    mixup: 0.5\n", "") + "  logger: {class_path: petl.WandbLogger}\n")
    found = {}
    for name, extra in {"one": [], "two": ["--trainer.devices", "2", "--trainer.strategy", "ddp"]}.items():
        run = tmp_path / name
        petl_command("fit", "--config", str(config), "--run_dir", str(run), *extra, cwd=tmp_path)
        petl_command("test", "--config", str(config), "--run_dir", str(run), *extra, cwd=tmp_path)
        metrics = [json.loads((run / f"{s}_metrics.json").read_text()) for s in ("fit", "test")]
        found[name] = (load_file(run / "adapter" / "adapter_model.safetensors"), metrics)
        offline = list((run / "wandb").glob("offline-run-*"))
        identifier = (run / "wandb_run_id.txt").read_text()
        assert {p.name.rpartition("-")[2] for p in offline} == {identifier}
        files = (run / "metrics").glob("*/metrics.csv")
        rows = [r for f in files for r in csv.DictReader(f.open()) if r.get("val/acc")]
        assert len(rows) == 3
    (one, metrics_one), (two, metrics_two) = found["one"], found["two"]
    assert one.keys() == two.keys()
    for key, tensor in one.items():
        torch.testing.assert_close(two[key], tensor, atol=2e-3, rtol=1e-2)
    # 37 validation and 41 test images do not divide by two: a duplicated or lost one would show
    for a, b in zip(metrics_one, metrics_two, strict=True):
        for key in ("val/acc", "val/mean_class_acc", "test/acc", "test/mean_class_acc"):
            if key in a:
                assert abs(a[key] - b[key]) < 1e-6, key


def test_a_batch_that_two_processes_cannot_share_is_refused(config: Path, tmp_path: Path) -> None:
    two = ["--trainer.devices", "2", "--trainer.strategy", "ddp", "--data.batch_size", "7"]
    done = petl_command("fit", "--config", str(config), *two, cwd=tmp_path, check=False)
    assert done.returncode != 0
    assert "nearest: 6 or 8" in done.stderr + done.stdout
