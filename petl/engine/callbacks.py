"""Callbacks of a petl run: progress, the adapter, results and predictions on disk."""

from __future__ import annotations

import csv
import json
import os
import platform
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, TQDMProgressBar

from petl.adapters.artefact import read_config, read_tensors
from petl.adapters.state import set_trained_tensors
from petl.errors import PetlError


def _scalars(metrics: dict[str, Any], prefixes: tuple[str, ...]) -> dict[str, float]:
    return {k: float(v) for k, v in metrics.items() if k.startswith(prefixes)}


class Progress(TQDMProgressBar):
    """Lightning's bar with images per second and the time left for the whole training; one line per epoch in a log."""

    def __init__(self) -> None:
        super().__init__(refresh_rate=1 if sys.stderr.isatty() else 0)
        self._began, self._first_step, self._images = 0.0, 0, 0

    def on_train_start(self, *args: Any) -> None:
        super().on_train_start(*args)
        self._began, self._first_step, self._images = time.perf_counter(), args[0].global_step, 0

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._images += len(batch["index"]) * trainer.world_size
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        items = super().get_metrics(trainer, pl_module)
        items.pop("v_num", None)
        return items | self._speed(trainer)

    def _speed(self, trainer: L.Trainer) -> dict[str, str]:
        elapsed, steps = time.perf_counter() - self._began, trainer.global_step - self._first_step
        if not steps or not self._began:
            return {}
        left = int(elapsed / steps * max(0, int(trainer.estimated_stepping_batches) - trainer.global_step))
        return {"img/s": f"{self._images / elapsed:.0f}", "eta": f"{left // 60}:{left % 60:02d}"}

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_epoch_end(trainer, pl_module)
        # on every rank: the metrics are computed here, and that waits for all of them
        numbers = _scalars(trainer.callback_metrics, ("train/loss", "train/acc", "val/acc"))
        if self.is_disabled and trainer.is_global_zero:
            shown = {k: f"{v:.4f}" for k, v in numbers.items()} | self._speed(trainer)
            line = "  ".join(f"{k} {v}" for k, v in shown.items())
            print(f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}  {line}", flush=True)


class SaveAdapter(Callback):
    """Writes the adapter: when training ends (``select="last"``), or whenever ``monitor`` improves (``"best"``)."""

    def __init__(self, directory: Path, select: str = "last", monitor: str = "val/acc") -> None:
        self.directory, self.select, self.monitor = directory, select, monitor
        self.best = float("-inf")
        self.metrics: dict[str, float] = {}  # of the last validation; in the run state, for a run resumed at its end

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "metrics": self.metrics}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best, self.metrics = float(state["best"]), dict(state["metrics"])

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        self.metrics = _scalars(trainer.callback_metrics, ("val/",))
        if self.select != "best":
            return
        if self.monitor not in trainer.callback_metrics:
            raise PetlError(f"select: best needs {self.monitor!r}, which this run does not log.")
        value = float(trainer.callback_metrics[self.monitor])
        if value > self.best:
            self.best = value
            self._write(trainer, pl_module)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.select == "last":
            self._write(trainer, pl_module)
        elif self.best == float("-inf"):
            raise PetlError(
                f"select: best found no validation with a number for {self.monitor!r}; no adapter was written."
            )

    def _write(self, trainer: L.Trainer, pl_module: Any) -> None:
        if not trainer.is_global_zero:
            return
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        rule = "last epoch" if self.select == "last" else f"best {self.monitor} over epochs"
        pl_module.save_adapter(
            self.directory,
            {
                "training": pl_module.protocol(),
                "data": data.protocol(),
                "selection": rule,
                "metrics": self.metrics,
                "versions": {p: version(p) for p in ("torch", "timm", "transformers", "lightning")}
                | {"python": platform.python_version()},
            },
        )


class LoadAdapter(Callback):
    """Puts the run's adapter into the model before it is evaluated."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def _load(self, trainer: L.Trainer, pl_module: Any) -> None:
        if trainer.state.fn == "fit":
            return
        config = read_config(self.directory)
        mine = pl_module.method.to_dict()
        if json.loads(json.dumps(mine)) != config["method"]:
            held = config["method"]
            raise PetlError(f"{self.directory} holds {held}, the config asks for {mine}: not the same method.")
        pl_module.check_adapter(self.directory, config)
        set_trained_tensors(pl_module.model, read_tensors(self.directory, config), str(self.directory))

    on_validation_start = on_test_start = on_predict_start = _load


class Results(Callback):
    """Metrics of ``validate`` and ``test`` as JSON, predictions as CSV, and what a training took."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._began = 0.0
        self._columns: list[str] = []
        self._rows: list[tuple[Any, ...]] = []

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._began = time.perf_counter()

    def on_fit_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        if trainer.strategy.root_device.type == "cuda":
            peak = torch.cuda.max_memory_allocated()
        self._write(trainer, "fit", {
            "seconds": time.perf_counter() - self._began,
            "peak_memory_bytes": peak,
            **_scalars(trainer.callback_metrics, ("train/", "val/")),
        })  # fmt: skip

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == "validate":
            self._write(trainer, "validate", _scalars(trainer.callback_metrics, ("val/",)))

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._write(trainer, "test", _scalars(trainer.callback_metrics, ("test/",)))

    def _write(self, trainer: L.Trainer, stage: str, values: dict[str, float]) -> None:
        if trainer.is_global_zero:
            self.directory.mkdir(parents=True, exist_ok=True)
            (self.directory / f"{stage}_metrics.json").write_text(json.dumps(values, indent=2) + "\n")

    def on_predict_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._columns = list(outputs)
        self._rows += list(zip(*outputs.values(), strict=True))

    def on_predict_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        name = "predictions.csv" if trainer.world_size == 1 else f"predictions_rank{trainer.global_rank}.csv"
        temporary = self.directory / f".{name}.tmp"
        with open(temporary, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(self._columns)
            writer.writerows(sorted(self._rows))  # by index, the first column
        os.replace(temporary, self.directory / name)
