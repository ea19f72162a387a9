"""The cache of frozen activations: what a frozen network computes of an input is computed once."""

from __future__ import annotations

import os
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from petl.costs import parse_memory
from petl.data.cached import Inputs
from petl.data.tap_places import Memory
from petl.data.tap_store import Compute, Filling, TapStore
from petl.errors import PetlError, nearest
from petl.models.frozen import Stream
from petl.tasks.source import rank_zero_print

MODES = ("auto", "off", "require")
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
IN_MEMORY = "memory"


class TapCache(Callback):
    """Computes what the frozen network makes of each input once, before the first step, and trains on that.

    Works for what needs no more of the network than recorded activations: a linear probe (pooled features), a method
    beside the network (the blocks it reads), AutoGnothi's side networks, or a method that begins at a later block (that
    block's input); and for splits whose inputs are the same in every epoch. Of a pair of encoders, pictures and
    expressions are recorded apart: each once, and expressions also where the pictures vary. The recorded tensors are
    those that the network computes, rounded to ``dtype``: with "float32" (or with frozen weights in bf16) training is
    bit for bit what it is without the cache.

    Args:
        mode: "auto" where possible and worth it, "require" = an error says why not, "off".
        directory: where the activations lie, for all runs together; "memory" = in this process alone; None =
            $PETL_CACHE or ~/.cache/petl/taps.
        limit: of all that lies there, e.g. "20GB"; what has not been used for longest makes room. Inputs beyond it are
            computed at every step.
        dtype: that they are kept in, "bfloat16" or "float32".

    Raises:
        PetlError: an unknown option; with "require", a training that has nothing to cache.
    """

    def __init__(
        self, mode: str = "auto", directory: str | None = None, limit: str = "20GB", dtype: str = "bfloat16"
    ) -> None:
        if mode not in MODES:
            raise PetlError(f"cache {mode!r}: {nearest(mode, MODES)}")
        if dtype not in DTYPES:
            raise PetlError(f"cache_dtype {dtype!r}: {nearest(dtype, DTYPES)}")
        self.mode, self.dtype, self.limit = mode, DTYPES[dtype], parse_memory(limit)
        self.directory = None if directory == IN_MEMORY else Path(directory) if directory else default_directory()

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        data: Any = getattr(trainer, "datamodule", None)
        if hasattr(data, "cached"):
            data.cached, data.place = {}, (None, None) if self.mode == "off" else (self.directory, self.limit)
        if self.mode == "off":
            return
        plan, without = self._plan(trainer, pl_module, data)
        if plan:
            rest = "".join(f"; no {what}, since {why}" for what, why in without.items())
            rank_zero_print(f"cache: {self._fill(trainer, pl_module, data, plan)}{rest}")
        elif self.mode == "require":
            raise PetlError(f"cache: require, but nothing can be cached: {next(iter(without.values()))}.")
        else:
            rank_zero_print(f"cache: none, since {next(iter(without.values()))}")

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._forget(trainer)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._forget(trainer)

    @staticmethod
    def _forget(trainer: L.Trainer) -> None:
        """The taps are of this training's network: the next one with the same data may have another."""
        data: Any = getattr(trainer, "datamodule", None)
        if hasattr(data, "cached"):
            data.cached = {}

    def _plan(self, trainer: L.Trainer, task: Any, data: Any) -> tuple[dict[Stream, list[str]], dict[str, str]]:
        """The splits of each stream (see petl/models/frozen.py) whose inputs are the same in every epoch; and what is
        not cached, with the reason."""
        part = task.frozen_part() if hasattr(task, "frozen_part") else None
        if part is None or not hasattr(data, "cached"):
            return {}, {"inputs": "this task or this data does not support it"}
        plan: dict[Stream, list[str]] = {}
        without: dict[str, str] = {}
        for stream in part.streams:
            for split in (s for s in ("train", "val") if s in data.splits):
                changes = split == "train" and stream.kind == "image" and task.varies()
                reason = changes or data.varies(split, stream.kind)
                if not stream.names:
                    without[f"{stream.kind}s"] = stream.obstacle
                elif reason:
                    without[f"{stream.kind}s of {split}"] = reason
                else:
                    plan.setdefault(stream, []).append(split)
        if plan and self.mode == "auto" and trainer.max_epochs == 1:
            return {}, {"inputs": "one epoch sees each input once"}
        if plan and self.mode == "auto" and _epochs(trainer, data) < 2:
            return {}, {"inputs": "so short a training sees few inputs twice"}
        return plan, without

    def _fill(self, trainer: L.Trainer, task: Any, data: Any, plan: dict[Stream, list[str]]) -> str:
        """Compute what is missing and hand readers to ``data``; returns what there is, in words."""
        limit, lines = self.limit, []
        for stream, splits in plan.items():
            key, dtype, fillings = self._key(trainer, stream, data), stream.dtype or self.dtype, []
            store = TapStore(key, dtype, self.directory, limit)
            for split in splits:
                digests = stream.digests(data.contents(split, stream.kind))
                compute = _computing(trainer, task, stream, data.inputs(split, stream.kind))
                fillings.append(store.fill(digests, compute, data.batch_size))
                trainer.strategy.barrier()
                reader = store.reader(digests)
                # beside pictures, batches are made by loader processes, which cannot read from a GPU
                alone = stream.alone and data.varies(split) is None
                if alone and reader.complete and reader.fits(task.device):
                    reader = reader.to(task.device)
                if reader.spec:  # an input that is not there is rounded as the others
                    data.cached.setdefault(split, {})[stream.name] = reader
            if isinstance(store.place, Memory):
                limit = max(1, store.place.left)
            lines.append(_line(stream, splits, fillings))
        return f"{'; '.join(lines)}; {str(self.dtype).removeprefix('torch.')} in {self.directory or 'memory'}"

    def _key(self, trainer: L.Trainer, stream: Stream, data: Any) -> dict[str, Any]:
        weights = next(stream.view.model.parameters())
        return {
            **stream.fingerprint(),
            "taps": list(stream.names),
            "preprocessing": data.preprocessing if stream.kind == "image" else {},
            "precision": [str(trainer.precision), str(weights.dtype), str(stream.dtype or self.dtype)],
            "device": weights.device.type,
            "versions": {name: version(name) for name in ("torch", "timm", "transformers")},
        }


def _epochs(trainer: L.Trainer, data: Any) -> float:
    """Whole passes through the training data, with what limits the number of its steps."""
    whole = max(1, len(data.splits["train"]) // data.batch_size)
    epochs = trainer.max_epochs if trainer.max_epochs is not None and trainer.max_epochs >= 0 else float("inf")
    batches = epochs * data.steps_per_epoch
    if trainer.max_steps >= 0:
        batches = min(batches, trainer.max_steps * trainer.accumulate_grad_batches)
    return batches / whole


def _computing(trainer: L.Trainer, task: Any, stream: Stream, inputs: Inputs) -> Compute:
    """Taps of some inputs, as the training would compute them."""

    def compute(positions: list[int]) -> dict[str, Tensor]:
        whole = inputs(positions)
        batch = trainer.precision_plugin.convert_input({name: whole[name] for name in stream.takes})
        batch = trainer.strategy.batch_to_device(batch, task.device)
        with trainer.precision_plugin.forward_context():
            return stream.record(*batch.values())

    return compute


def _line(stream: Stream, splits: list[str], fillings: list[Filling]) -> str:
    found, new, left = (sum(getattr(f, part) for f in fillings) for part in ("found", "computed", "left_out"))
    what = stream.names[0] if len(stream.names) == 1 else f"{len(stream.names)} taps"
    size = sum(f.nbytes for f in fillings) / 2**20
    line = (
        f"{what} of {found + new:,} {stream.kind}s ({', '.join(splits)}), {size:,.1f} MiB, {new:,} computed now and "
        f"{found:,} found"
    )
    if left:
        reason = next((f.reason for f in fillings if f.reason), "")
        line += f", {left:,} others are computed at every step ({reason})"
    return line


def default_directory() -> Path:
    """$PETL_CACHE, or petl/taps below the user's cache."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("PETL_CACHE") or home / "petl" / "taps")
