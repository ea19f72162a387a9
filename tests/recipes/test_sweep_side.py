"""The sweep recipe: members of file and grid, its run folder and table, and its members against runs of their own."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import sweep_side
import torch
import yaml

import petl
from petl.adapters.artefact import read_config, read_tensors
from petl.engine.lightning_cli import run
from petl.errors import PetlError
from tests.recipes.conftest import RECIPES
from tests.test_house import ROOT

BASE = {
    "seed_everything": 3,
    "checkpoint_every": 3,
    "model": {
        "class_path": "petl.Classification",
        "init_args": {"backbone": "bundled/tiny_clip_vision", "lr": 1e-2, "warmup_epochs": 0.5},
    },
    "data": {
        "class_path": "petl.data.Digits",
        "init_args": {"train_size": 16, "val_size": 10, "test_size": 12, "batch_size": 4},
    },
    "trainer": {"max_epochs": 1, "accelerator": "cpu"},
    "cache": "off",
}
LAYERS = {"layers": [0, 3], "reduction": 8}


def write(folder: Path, **sweep: Any) -> Path:
    (folder / "base.yaml").write_text(yaml.safe_dump(BASE))
    file = folder / "sweep.yaml"
    file.write_text(yaml.safe_dump({"config": str(folder / "base.yaml"), "run_dir": str(folder / "run")} | sweep))
    return file


def test_the_shipped_sweep_is_sound() -> None:
    sweep = sweep_side.read_sweep(sweep_side.FILE)
    assert list(sweep["members"])[:2] == ["lr0.001-reduction4-seed0", "lr0.001-reduction4-seed1"]
    assert list(sweep["members"])[-2:] == ["gate", "probe"]
    assert len(sweep["members"]) == 10
    assert sweep["members"]["lr0.004-reduction8-seed1"] == {
        "method": "ladder_side_tuning", "options": {"form": "sum", "reduction": 8}, "lr": 4e-3, "seed": 1
    }  # fmt: skip
    assert sweep["members"]["probe"] == {"method": "linear_probe", "options": {}, "lr": 1e-2}
    config = sweep_side.compose(sweep)
    arguments = config["model"]["init_args"]
    assert config["model"]["class_path"] == "petl.SideSweep"
    assert arguments["backbone"] == "bundled/tiny_clip_vision"
    assert (arguments["lr"], arguments["warmup_epochs"]) == (5e-3, 1)  # of the config, for members that say nothing
    assert "method" not in arguments
    petl.SideSweep(**arguments)


def test_the_grid_names_its_members() -> None:
    found = sweep_side.grid({"options.layers": [[0, 3], [1]], "labels": ["files/parity.csv"], "lr": [1e-3]}, "f")
    assert list(found) == ["layers0_3-labelsparity-lr0.001", "layers1-labelsparity-lr0.001"]
    assert found["layers1-labelsparity-lr0.001"] == {
        "options": {"layers": [1]},
        "labels": "files/parity.csv",
        "lr": 1e-3,
    }
    assert sweep_side.grid({}, "f") == {}


@pytest.mark.parametrize(
    ("sweep", "words"),
    [
        ({"member": {}}, "key 'member': did you mean 'members'"),
        ({"grid": {"lr": 1e-3}}, "grid.lr is 0.001; give a list"),
        ({"grid": {"seed": [0, 0]}}, "two members of the grid are called 'seed0'"),
        ({"grid": {"seed": [0]}, "members": {"seed0": {}}}, "'seed0' is a member of the grid already"),
        ({"members": [1]}, "members is no mapping"),
        ({"config": "quickstart/classificatoin"}, "quickstart/classification"),
        ({"config": "quickstart/grounding"}, "takes a config of petl.Classification"),
        ({"members": {"a": {"lrr": 1}}}, "member 'a': there is no setting 'lrr'"),
        ({}, "no members"),
    ],
)
def test_bad_sweeps(sweep: dict[str, Any], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sweep_side.main(["--sweep", str(write(tmp_path, **sweep))]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("options", "words"), [({"mixup": 0.5}, "has mixup"), ({}, "select is 'best'")])
def test_configs_that_a_sweep_cannot_share(options: dict[str, Any], words: str, tmp_path: Path) -> None:
    sweep = sweep_side.read_sweep(write(tmp_path, members={"a": {}}))
    task = {"class_path": "petl.Classification", "init_args": options}
    base = BASE | {"model": task} | ({} if options else {"select": "best"})
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
    with pytest.raises(PetlError, match=words):
        sweep_side.compose(sweep)


def test_a_sweep_from_the_command_line(tmp_path: Path) -> None:
    file = write(
        tmp_path, grid={"seed": [3, 8]}, defaults={"options": LAYERS}, members={"p": {"method": "linear_probe"}}
    )
    command = [sys.executable, str(RECIPES / "sweep_side.py"), "--sweep", str(file)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}

    def sweep(*more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command, *more], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
        )

    done = sweep()
    assert done.returncode == 0, done.stdout + done.stderr
    folder = tmp_path / "run"
    table = (folder / "table.md").read_text()
    assert table in done.stdout
    assert table.startswith("| member | method | options.layers | options.reduction | seed | trained | val acc |")
    rows = list(csv.DictReader((folder / "table.csv").read_text().splitlines()))
    assert [r["member"] for r in rows] == ["seed3", "seed8", "p"]
    predictors = {r["member"]: petl.load(folder / r["member"] / "adapter") for r in rows}
    for row in rows:
        trained = sum(p.numel() for p in predictors[row["member"]].model.parameters() if p.requires_grad)
        assert int(row["trained"]) == trained
        protocol = read_config(folder / row["member"] / "adapter")["protocol"]
        assert float(row["val acc"]) == protocol["metrics"]["val/acc"]

    # members against runs of their own, weights drawn behind the same seed
    for seed in (3, 8):
        method = {"class_path": "petl.LadderSideTuning", "init_args": LAYERS}
        alone = tmp_path / f"alone{seed}"
        run(["fit", "--config", str(tmp_path / "base.yaml"), "--model.method", str(method), "--run_dir", str(alone),
             "--seed_everything", str(seed)])  # fmt: skip
        ours, theirs = (
            read_tensors(d / "adapter", read_config(d / "adapter")) for d in (folder / f"seed{seed}", alone)
        )
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[k], theirs[k]) for k in ours)

    before = (folder / "seed3" / "adapter" / "adapter_model.safetensors").read_bytes()
    (folder / "table.md").unlink()
    assert sweep().returncode == 0  # goes on at the end
    assert (folder / "table.md").read_text() == table
    assert (folder / "seed3" / "adapter" / "adapter_model.safetensors").read_bytes() == before
    other = sweep("--", "--trainer.max_epochs", "2")
    assert other.returncode == 2
    assert "holds another sweep" in other.stderr
