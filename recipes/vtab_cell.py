"""One cell of a comparison: `petl fit` and `petl test` of a method on a task with a seed, and its record as JSON.

``OUT/METHOD/TASK/seed0.json`` is the record, ``seed0.log`` what the run printed, ``seed0/`` its run folder. A record is
written under another name and renamed, so that a cell is finished or not.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import os
import shutil
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from petl.cli import find_config
from petl.errors import PetlError

GIVEN = "as given"  # how hyper-parameters were chosen: not at all
FAILED = "FAILED"  # in the line about a job
RESUMED = "resumed"  # a file in the run folder of a training that was interrupted
ROUNDS, SECONDS = (3, 20), 1.0  # timed steps: at least, at most, and for how long in between


@dataclass(frozen=True)
class Cell:
    """A run: ``arguments`` are those of `petl fit` beside ``config``, run folder and seed; ``settings`` say how the
    hyper-parameters were chosen."""

    out: Path
    method: str
    task: str
    seed: int
    config: str
    arguments: tuple[str, ...]
    settings: str
    side_by_side: int

    @property
    def folder(self) -> Path:
        return self.out / self.method / self.task / f"seed{self.seed}"

    @property
    def file(self) -> Path:
        return self.folder.with_suffix(".json")

    @property
    def name(self) -> str:
        return f"{self.method} / {self.task} / seed {self.seed}"

    @property
    def key(self) -> dict[str, Any]:
        return {"method": self.method, "task": self.task, "seed": self.seed}

    @property
    def command(self) -> list[str]:
        """All arguments of `petl fit` and `petl test`."""
        return ["--config", str(config_file(self.config)), *self.arguments, "--run_dir", str(self.folder),
                "--seed_everything", str(self.seed), "--data.seed", str(self.seed)]  # fmt: skip

    @property
    def mark(self) -> Path:
        """Where it says what the run folder is of: beside it, since a fresh run deletes that."""
        return self.folder.with_name(f"started-{self.folder.name}.json")

    @property
    def asked(self) -> dict[str, Any]:
        """Everything that was asked of this run; a record or a run state of other requests is not its own."""
        return {"config": config_hash(self.config), "arguments": list(self.arguments), "settings": self.settings}


def config_file(name: str) -> Path:
    """A config by its path, or a shipped one by its name."""
    return Path(name) if Path(name).is_file() else find_config(name)


def config_hash(name: str) -> str:
    """Short hash of what a config says; comments do not count."""
    content = yaml.safe_load(config_file(name).read_text(encoding="utf-8"))
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:12]


def read_json(file: Path) -> dict[str, Any] | None:
    """The content of a file, None where there is none; `PetlError` where it is no JSON object."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise PetlError(f"{file} cannot be read as JSON: {error}. Delete it, and the run is made again.") from error
    if not isinstance(found, dict):
        raise PetlError(f"{file} is no record of a run. Delete it, and the run is made again.")
    return found


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Write ``content`` in one step: a reader sees the old file or the new one."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.tmp-{os.getpid()}")
    with open(temporary, "w", encoding="utf-8") as stream:
        stream.write(json.dumps(content, indent=2) + "\n")
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, file)


def is_finished(file: Path, asked: dict[str, Any]) -> bool:
    """Whether ``file`` is the record of what was asked, carried out; `PetlError` where it is that of something else."""
    record = read_json(file)
    if record is None or record.get("status") != "done":
        return False
    if record.get("asked") != asked:
        had, wants = ([str(x) for v in a.values() for x in (v if isinstance(v, list) else [v])]
                      for a in (record.get("asked", {}), asked))  # fmt: skip
        raise PetlError(
            f"{file} is the record of a run with other settings: it had {[x for x in had if x not in wants]}, this one "
            f"has {[x for x in wants if x not in had]}. Choose another --out, or delete that file to run it again."
        )
    return True


def failure(key: dict[str, Any], reason: str) -> dict[str, Any]:
    """The record of a job that did not come to its end."""
    return {"status": "failed", **key, "reason": reason}


@contextlib.contextmanager
def printing_to(file: Path) -> Iterator[None]:
    """Sends what Python code prints to the end of ``file``."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with (
        open(file, "a", encoding="utf-8", buffering=1) as log,
        contextlib.redirect_stdout(log),
        contextlib.redirect_stderr(log),
    ):
        yield


def run_cell(cell: Cell) -> str:
    """Run a cell and write its record; returns a line about it. Nothing but what ends a process comes out of it."""
    with printing_to(cell.folder.with_suffix(".log")):
        try:
            record = _run(cell)
        except Exception as error:  # whatever it is: the other cells shall go on
            traceback.print_exc()
            reason = str(error) if isinstance(error, PetlError) else f"{type(error).__name__}: {error}"
            write_json(cell.file, failure(cell.key, reason))
            return f"{cell.name}: {FAILED}: {reason}"
        finally:
            gc.collect()  # modules and their hooks refer to each other
    write_json(cell.file, record)
    shutil.rmtree(cell.folder / "checkpoints", ignore_errors=True)  # a finished run is not resumed
    return f"{cell.name}: {record['test']['acc']:.1%} in {record['wall_seconds']:.0f} s"


def _run(cell: Cell) -> dict[str, Any]:
    import torch

    from petl.engine.lightning_cli import run

    began = time.perf_counter()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    if not cell.mark.is_file() or read_json(cell.mark) != cell.asked:
        shutil.rmtree(cell.folder, ignore_errors=True)
        write_json(cell.mark, cell.asked)
    if not (cell.folder / "fit_metrics.json").is_file():
        if (cell.folder / "checkpoints" / "last.ckpt").is_file():
            (cell.folder / RESUMED).touch()
            run(["fit", *cell.command, "--ckpt_path", "last"])
        else:
            run(["fit", *cell.command, "--overwrite", "true"])
        gc.collect()
    cli = run(["test", *cell.command])
    return {
        "status": "done",
        **cell.key,
        "asked": cell.asked,
        "protocol": protocol(cell),
        "test": {k.removeprefix("test/"): v for k, v in (read_json(cell.folder / "test_metrics.json") or {}).items()},
        "cost": cost(cell, cli),
        "wall_seconds": time.perf_counter() - began,
    }


def protocol(cell: Cell) -> dict[str, Any]:
    """How the number came about, from the adapter of the run."""
    from importlib.metadata import version

    import torch

    import petl
    from petl.adapters.artefact import read_config

    config = read_config(cell.folder / "adapter")
    base, how = config["backbone"], config["protocol"]
    return {
        "weights": base["weights"] or base["weights_bf16"],
        "backbone": {key: base[key] for key in ("name", "args", "weights_file", "parameters")},
        "preprocessing": how["data"]["preprocessing"],
        "augmentation": how["data"]["augmentation"],
        "splits": how["data"]["splits"],
        "selection": how["selection"],
        "settings": cell.settings,
        "search": read_json(cell.folder.with_name("search.json")) if cell.settings != GIVEN else None,
        "epochs": how["training"]["epochs"],
        "batch_size": how["data"]["batch_size"],
        "seed": how["training"]["seed"],
        "method": config["method"],
        "head": config["head"],
        "training": how["training"],
        "versions": {"petl": petl.__version__, "peft": version("peft"), **how["versions"]},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "side_by_side": cell.side_by_side,
    }


def cost(cell: Cell, cli: Any) -> dict[str, Any]:
    """What the run took, counted (`petl.report`) and measured; None for what this run cannot tell.

    ``cli``: of `petl test`, with the trained model and the data.
    """
    import petl

    model, data = cli.model.model, cli.datamodule
    report = petl.report(model, (3, *data.preprocessing["image_size"]))
    fitted = read_json(cell.folder / "fit_metrics.json") or {}
    resumed = (cell.folder / RESUMED).exists()  # what was measured is the last part of the training
    device = cli.trainer.strategy.root_device
    train, infer = images_per_second(cli, model.to(device), device)
    model.cpu()
    return {
        "method_parameters": report.trainable,
        "head_parameters": report.head,
        "macs": report.macs,
        "saved_bytes_per_image": report.saved_bytes.per_image,
        "saved_bytes_constant": report.saved_bytes.constant,
        "train_images_per_second": train,
        "inference_images_per_second": infer,
        "seconds": None if resumed else fitted.get("seconds"),  # of the whole training
        # on a CPU the peak is that of the process with all its libraries, over every run it made: it says nothing
        "peak_memory_bytes": fitted.get("peak_memory_bytes") if device.type == "cuda" and not resumed else None,
    }


def images_per_second(cli: Any, model: Any, device: Any) -> tuple[float, float]:
    """Training steps and inference on one batch of the task's images, without loading; medians."""
    import torch
    import torch.nn.functional as F

    batch = next(iter(cli.datamodule.evaluation_loader("train", whole=True)))
    images, labels = batch["image"].to(device), batch["label"].to(device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0)
    context = cli.trainer.precision_plugin.forward_context

    def step() -> None:
        with context():
            loss = F.cross_entropy(model(images).float(), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def infer() -> None:
        with torch.inference_mode(), context():
            model(images)

    model.train()
    train = len(images) / _median(step)
    model.eval()
    return train, len(images) / _median(infer)


def _median(function: Callable[[], None]) -> float:
    """Median seconds of a call, after one to warm up."""
    from timing import clock

    function()
    times: list[float] = []
    while len(times) < ROUNDS[0] or (len(times) < ROUNDS[1] and sum(times) < SECONDS):
        times.append(clock(function))
    return statistics.median(times)
