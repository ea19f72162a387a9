"""Callbacks that draw what a model does to the first validation samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import WandbLogger
from torch.utils.data import default_collate

from petl.methods.attach import attached
from petl.methods.evit import ReducingModule
from petl.nn.boxes import paired_iou
from petl.pictures import box_grid, kept_patches, token_grid, unnormalise


class _ValidationPictures(Callback):
    """Keeps the first samples of each validation, or of one on recorded activations their numbers."""

    def __init__(self, directory: Path, count: int = 4) -> None:
        self.directory, self.count = directory, count
        self._batch: dict[str, Any] = {}

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if batch_idx == 0 and not trainer.sanity_checking and trainer.is_global_zero:
            kept = ("index",) if "taps" in batch else batch
            self._batch = {k: batch[k][: self.count] for k in kept}

    def taken(self) -> dict[str, Any]:
        """What is kept of the validation that has ended, once; empty where there was none."""
        kept, self._batch = self._batch, {}
        return kept

    def pictured(self, trainer: L.Trainer, pl_module: Any, batch: dict[str, Any]) -> dict[str, Any]:
        """`taken`, with the pictures where it is numbers alone."""
        if batch.keys() != {"index"}:
            return batch
        entries = trainer.datamodule.entries("val")  # type: ignore[attr-defined]
        whole = default_collate([entries[0, index] for index in batch["index"].tolist()])
        return trainer.strategy.batch_to_device(trainer.precision_plugin.convert_input(whole), pl_module.device)


class TokenPictures(_ValidationPictures):
    """After each validation, a picture of which patches kept a token in each stage, with true and predicted label."""

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        batch = self.taken()
        if not batch or not hasattr(pl_module, "backbone"):
            return
        module = attached(pl_module.backbone)
        if not isinstance(module, ReducingModule):
            return
        batch = self.pictured(trainer, pl_module, batch)
        logits, masks = kept_patches(pl_module.backbone, pl_module.model, batch["image"])
        if not masks:
            return
        labels, truth, found = pl_module.labels, batch["label"].tolist(), logits.argmax(-1).tolist()
        preprocessing = trainer.datamodule.preprocessing  # type: ignore[attr-defined]
        file = token_grid(
            unnormalise(batch["image"], preprocessing["mean"], preprocessing["std"]),
            masks,
            module.events,
            [f"{labels[f]} (true: {labels[t]})" for t, f in zip(truth, found, strict=True)],
            [t == f for t, f in zip(truth, found, strict=True)],
            self.directory / f"tokens_step{trainer.global_step:06d}.png",
        )
        for logger in trainer.loggers:
            if hasattr(logger, "log_image"):
                logger.log_image("val/tokens", [str(file)], step=trainer.global_step)


class BoxPictures(_ValidationPictures):
    """After each validation, a picture of true and predicted boxes with their expressions, and a table for W&B."""

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        batch = self.taken()
        if not batch or not hasattr(pl_module, "boxes"):
            return
        batch = self.pictured(trainer, pl_module, batch)
        predicted = pl_module.boxes(batch)
        ious = paired_iou(predicted, batch["box"]).tolist()
        preprocessing = trainer.datamodule.preprocessing  # type: ignore[attr-defined]
        images = unnormalise(batch["image"], preprocessing["mean"], preprocessing["std"])
        file = self.directory / f"boxes_step{trainer.global_step:06d}.png"
        box_grid(images * batch["mask"][:, None], predicted, batch["box"], batch["expression"], file)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_image("val/boxes", [str(file)], step=trainer.global_step)
                rows = [
                    [text, *(f"{[round(v, 3) for v in b]}" for b in (truth, box)), iou]
                    for text, truth, box, iou in zip(
                        batch["expression"], batch["box"].tolist(), predicted.tolist(), ious, strict=True
                    )
                ]
                columns = ["expression", "truth cxcywh", "prediction cxcywh", "IoU"]
                logger.log_table("val/expressions", columns=columns, data=rows, step=trainer.global_step)
