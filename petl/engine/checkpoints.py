"""Run state on disk: written next to its target and renamed, read with ``weights_only=True`` and nothing else."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint

from petl.errors import PetlError


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning moves a finished checkpoint from the system's temporary folder, which copies (and can be cut short)
    where that is another file system. Here the temporary file lies beside the target."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        target = Path(path)
        temporary = target.with_name(f".{target.name}.tmp")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary, "wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
            temporary.unlink(missing_ok=True)
            raise PetlError(
                f"the checkpoint could not be written to {target}: {error}. The previous one is untouched."
            ) from error

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = True) -> dict[str, Any]:
        try:
            return torch.load(path, map_location=map_location or "cpu", weights_only=True)
        except Exception as error:  # pickle, zip and runtime errors: whatever it is, this file cannot be used
            raise PetlError(f"checkpoint {path} cannot be read (cut, or not made by petl): {error}") from error


class RunCheckpoint(ModelCheckpoint):
    """Keeps ``last.ckpt`` up to date: every so many steps, and when training ends.

    Never between a step and the validation that follows it: Lightning does not run that validation when it resumes
    from there. Such a save waits for the end of the epoch, or for the next step.
    """

    def __init__(self, dirpath: Path, every_n_steps: int) -> None:
        super().__init__(dirpath, filename="last", save_top_k=0)
        if every_n_steps < 1:
            raise PetlError(
                f"checkpoint_every is {every_n_steps}: give the number of steps between run states, 1 or more."
            )
        self.every_n_steps, self._due = every_n_steps, False

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._due = self._due or trainer.global_step % self.every_n_steps == 0
        every = trainer.val_check_batch
        validates = every is not None and (batch_idx + 1) % every == 0
        if self._due and not validates and not trainer.is_last_batch:
            self._save(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._due:
            self._save(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Nothing: see the class."""

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._save(trainer)

    def _save(self, trainer: L.Trainer) -> None:
        self._due = False
        trainer.save_checkpoint(Path(str(self.dirpath)) / "last.ckpt")
