"""Cells, workers and the sweep: resume, failures, SIGKILL, search, on a tiny task with the bundled backbone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import vtab
import vtab_cell
import vtab_search
from lightning.pytorch.callbacks import Callback
from vtab_cell import GIVEN, Cell, is_finished, run_cell
from vtab_methods import arguments, read_methods
from vtab_pool import run_all

from petl.adapters.artefact import read_config
from petl.data import VTAB
from petl.engine.lightning_cli import run
from petl.errors import PetlError
from tests.recipes.conftest import RECIPES
from tests.test_house import ROOT

COMMON = ("--model.backbone", "bundled/tiny_clip_vision", "--trainer.max_epochs", "2", "--trainer.accelerator", "cpu",
          "--model.warmup_epochs", "0.2", "--data.batch_size", "20", "--data.num_workers", "0",
          "--checkpoint_every", "3")  # fmt: skip


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vtab_cell, "ROUNDS", (1, 1))


def make_cell(layout: Path, out: Path, method: str = "evit", **changes: Any) -> Cell:
    data = ("--data.root", str(layout), "--data.task", "digits")
    settings = arguments(read_methods()[method])
    cell = Cell(out, method, "digits", 1, "vtab/compare", (*data, *COMMON, *settings), GIVEN, 1)
    return replace(cell, **changes)


def read(file: Path) -> dict[str, Any]:
    found = json.loads(file.read_text())
    assert isinstance(found, dict)
    return found


@pytest.fixture(scope="module")
def finished(layout: Path, tmp_path_factory: pytest.TempPathFactory) -> Cell:
    """A cell after its run."""
    cell = make_cell(layout, tmp_path_factory.mktemp("cell"))
    assert "FAILED" not in run_cell(cell)
    return cell


def test_a_record_says_how_its_number_came_about(finished: Cell, layout: Path) -> None:
    found = read(finished.file)
    p, c = found["protocol"], found["cost"]
    assert (found["status"], found["method"], found["task"], found["seed"]) == ("done", "evit", "digits", 1)
    adapter = read_config(finished.folder / "adapter")
    data = VTAB(str(layout), "digits", "train800val200", image_size=64, mean=(0.5,) * 3, std=(0.5,) * 3)
    data.read()
    assert p["weights"] == adapter["backbone"]["weights"]
    assert {s: v["sha256"] for s, v in p["splits"].items()} == {s: data.splits[s].digest() for s in ("train", "test")}
    assert p["splits"]["train"]["images"] == 80
    assert p["preprocessing"]["image_size"] == [64, 64]
    assert (p["selection"], p["settings"], p["search"], p["epochs"], p["seed"]) == ("last epoch", GIVEN, None, 2, 1)
    assert p["method"]["options"]["keep_rate"] == 0.7
    assert (p["training"]["lr"], p["training"]["weight_decay"]) == (0.01, 1e-4)
    assert {"petl", "torch", "timm", "peft"} <= p["versions"].keys()
    assert found["test"] == {k.removeprefix("test/"): v for k, v in read(finished.folder / "test_metrics.json").items()}
    assert {"acc", "mean_class_acc"} <= found["test"].keys()
    assert c["method_parameters"] == 0
    assert c["head_parameters"] == 10 * (adapter["head"]["in_features"] + 1)
    assert c["macs"] > 1e7
    assert min(c["train_images_per_second"], c["inference_images_per_second"], c["seconds"]) > 0
    assert c["peak_memory_bytes"] is None  # not measured on a CPU
    assert not (finished.folder / "checkpoints").exists()
    assert "test/acc" in finished.folder.with_suffix(".log").read_text()


def test_a_finished_cell_is_known_by_what_was_asked(finished: Cell) -> None:
    assert is_finished(finished.file, finished.asked)
    longer = replace(finished, arguments=(*finished.arguments, "--trainer.max_epochs", "9"))
    with pytest.raises(PetlError, match=r"this one has \['9'\]. Choose another --out"):
        is_finished(longer.file, longer.asked)
    assert not is_finished(finished.file.with_name("seed7.json"), finished.asked)


def test_a_killed_cell_continues_from_its_run_state(finished: Cell, layout: Path, tmp_path: Path) -> None:
    class Stop(Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            if trainer.global_step == 7:
                raise KeyError("the power went out")

    cell = make_cell(layout, tmp_path)
    vtab_cell.write_json(cell.mark, cell.asked)
    with pytest.raises(KeyError, match="power"):
        run(["fit", *cell.command], [Stop()])
    assert (cell.folder / "checkpoints" / "last.ckpt").is_file()
    assert "FAILED" not in run_cell(cell)
    found, whole = read(cell.file), read(finished.file)
    assert found["test"] == whole["test"]  # bit for bit
    assert found["cost"]["seconds"] is None  # nobody knows what the first part took
    log = cell.folder.with_suffix(".log").read_text()
    assert "epoch 2/2" in log
    assert "epoch 1/2" not in log  # it began at step 6 of 8


def test_a_failure_is_recorded_and_what_was_done_is_not_done_again(
    layout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cell = make_cell(layout, tmp_path, "linear")

    def broken(*args: Any) -> None:
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(vtab_cell, "cost", broken)
    assert run_cell(cell) == "linear / digits / seed 1: FAILED: RuntimeError: CUDA out of memory"
    found = read(cell.file)
    assert (found["status"], found["reason"]) == ("failed", "RuntimeError: CUDA out of memory")
    assert "Traceback" in cell.folder.with_suffix(".log").read_text()
    assert not is_finished(cell.file, cell.asked)
    fitted = (cell.folder / "fit_metrics.json").stat().st_mtime_ns
    monkeypatch.undo()
    assert "FAILED" not in run_cell(cell)
    assert (cell.folder / "fit_metrics.json").stat().st_mtime_ns == fitted  # trained before, without a break
    assert read(cell.file)["cost"]["seconds"] == read(cell.folder / "fit_metrics.json")["seconds"]
    other = replace(cell, arguments=(*cell.arguments, "--model.lr", "0.5"))
    assert "FAILED" not in run_cell(other)  # other arguments: from the beginning
    assert (cell.folder / "fit_metrics.json").stat().st_mtime_ns > fitted


def test_the_sweep_goes_on_after_failures_and_reports_them(
    finished: Cell, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cells = [replace(finished, seed=seed) for seed in (1, 2, 3, 4)]
    lines = {2: None, 3: f"{cells[2].name}: FAILED: a reason", 4: f"{cells[3].name}: 50.0% in 1 s"}
    monkeypatch.setattr(vtab, "run_all", lambda left, *_: ((cell, lines[cell.seed]) for cell in left))
    failures = vtab.sweep(cells, run_cell, [{}])
    assert failures == [f"{cells[1].name}: FAILED: {vtab.DIED}", lines[3]]
    assert read(cells[1].file) == {"status": "failed", **cells[1].key, "reason": vtab.DIED}
    printed = capsys.readouterr().out
    assert "4 jobs, 1 finished before, 1 at a time" in printed
    assert "[3/3, 0 min left] evit / digits / seed 4: 50.0% in 1 s" in printed


def test_bad_settings_fail_with_their_reason(layout: Path, tmp_path: Path) -> None:
    wrong = ("--model.method", '{"class_path": "petl.EViT", "init_args": {"keep_rate": 7}}')
    cell = make_cell(layout, tmp_path)
    cell = replace(cell, arguments=(*cell.arguments, *wrong))
    assert "keep_rate" in run_cell(cell)
    assert "keep_rate" in read(cell.file)["reason"]


# ---- workers


def test_workers_live_on_and_a_dead_one_is_replaced() -> None:
    from tests.recipes.jobs import work

    found = dict(run_all(["a", "die", "b", "c"], work, [{"WORKER": "1"}, {"WORKER": "2"}]))
    assert found.pop("die") is None
    assert {job: line.split()[0] for job, line in found.items() if line} == {"a": "a", "b": "b", "c": "c"}
    assert {line.split()[1] for line in found.values() if line} <= {"1", "2"}
    assert "WORKER" not in os.environ
    alone = dict(run_all(["a", "b", "c"], work, [{"WORKER": "1"}]))
    assert len({line.split()[2] for line in alone.values() if line}) == 1  # one process did them all


def test_workers_end_with_whoever_started_them(tmp_path: Path) -> None:
    code = "from tests.recipes.jobs import work; from vtab_pool import run_all; list(run_all(['wait'], work, [{}]))"
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{RECIPES}"}
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env=environment)
    file, deadline = tmp_path / "worker.pid", time.monotonic() + 60
    while not (file.is_file() and file.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    parent.kill()
    parent.wait()
    while running(int(file.read_text())):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def running(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    done = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True)
    return bool(done.stdout.strip()) and not done.stdout.strip().startswith("Z")


def test_workers_share_gpus_or_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    assert vtab.environments(None) == [{"OMP_NUM_THREADS": "8"}]
    assert vtab.environments(3) == [{"OMP_NUM_THREADS": "2"}] * 3
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert [e["CUDA_VISIBLE_DEVICES"] for e in vtab.environments(None)] == ["5", "7"]
    assert [e["CUDA_VISIBLE_DEVICES"] for e in vtab.environments(3)] == ["5", "7", "5"]


# ---- choice of hyper-parameters


def test_search_chooses_prunes_and_continues(layout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    optuna = pytest.importorskip("optuna")
    settings = read_methods()["evit"] | {"search": {"lr": {"low": 1e-7, "high": 1e-2, "log": True}}}
    before = ("--data.root", str(layout), "--data.task", "digits", *COMMON)
    search = vtab_search.Search(tmp_path, "evit", "digits", "vtab/compare", before, settings, (), 4)
    fits: list[list[str]] = []

    def counted(args: list[str], callbacks: Any) -> Any:
        fits.append(args)
        if len(fits) == 3:
            raise KeyboardInterrupt
        return run(args, callbacks)

    monkeypatch.setattr("petl.engine.lightning_cli.run", counted)
    monkeypatch.setattr(optuna.pruners, "MedianPruner", lambda **_: optuna.pruners.ThresholdPruner(lower=0.9))
    with pytest.raises(KeyboardInterrupt):
        vtab_search.run_search(search)
    assert not search.file.exists()
    journal = optuna.storages.journal.JournalFileBackend(str(tmp_path / "evit" / "digits" / "search.journal"))
    study = optuna.load_study(study_name="search", storage=optuna.storages.JournalStorage(journal))
    killed = study.ask().suggest_float("lr", 1e-7, 1e-2, log=True)  # SIGKILL leaves a trial running
    monkeypatch.setattr(optuna.pruners, "MedianPruner", lambda **_: optuna.pruners.NopPruner())
    assert vtab_search.FAILED not in vtab_search.run_search(search)
    found = read(search.file)
    assert found["trials"] == 4
    assert (found["pruned"], found["complete"]) == (2, 2)
    assert len(fits) == 3 + 2
    rates = [float(args[args.index("--model.lr") + 1]) for args in fits]
    assert rates[0] == 1e-2  # that of the methods file
    assert rates[3] == killed
    assert len(set(rates)) == 5
    assert all(args[args.index("--data.train_split") + 1] == "train800" for args in fits)
    assert 1e-7 <= found["chosen"]["lr"] <= 1e-2
    assert search.chosen()["lr"] == found["chosen"]["lr"]
    assert is_finished(search.file, search.asked)
    assert "4 trials" in search.rule
    bad = replace(search, method="bad", settings=settings | {"options": {"keep_rate": 7}})
    assert "no trial of 4 came to its end" in vtab_search.run_search(bad)
    assert read(bad.file)["status"] == "failed"


# ---- SIGKILL


def test_a_killed_sweep_loses_at_most_the_running_cell(layout: Path, tmp_path: Path) -> None:
    what = ["--methods", "linear", "evit", "bitfit", "--tasks", "digits", "--root", str(layout), "--out", "out"]
    command = [sys.executable, str(RECIPES / "vtab.py"), *what, "--", *COMMON, "--trainer.max_epochs", "1"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with open(tmp_path / "killed.txt", "w") as output:
        sweep = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=output, stderr=output,
                                 start_new_session=True)  # fmt: skip
        deadline = time.monotonic() + 240
        while not (first := list((tmp_path / "out").glob("*/*/seed*.json"))):
            assert sweep.poll() is None, (tmp_path / "killed.txt").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.killpg(sweep.pid, signal.SIGKILL)
        sweep.wait()
    before = {f: (f.stat().st_ino, f.stat().st_mtime_ns) for f in first}
    assert 1 <= len(before) < 3
    again = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0, again.stdout + again.stderr
    assert f"3 jobs, {len(before)} finished before" in again.stdout
    assert {f: (f.stat().st_ino, f.stat().st_mtime_ns) for f in before} == before
    assert len(list((tmp_path / "out").glob("*/*/seed*.json"))) == 3
    table = (tmp_path / "out" / "table.md").read_text()
    assert table in again.stdout
    assert "missing" not in table
    assert "failed" not in table
    assert all(f"\n| {label} | " in table for label in ("linear probe", "EViT, keep 0.7, and linear probe", "BitFit"))
