"""Callbacks that draw what a model does to the first validation samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import WandbLogger

from petl.methods.attach import attached
from petl.methods.evit import ReducingModule
from petl.nn.boxes import paired_iou
from petl.pictures import box_grid, kept_patches, token_grid, unnormalise


class _ValidationPictures(Callback):
    """Keeps the first samples of each validation."""

    def __init__(self, directory: Path, count: int = 4) -> None:
        self.directory, self.count = directory, count
        self._batch: dict[str, Any] | None = None

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if batch_idx == 0 and not trainer.sanity_checking and trainer.is_global_zero:
            self._batch = {k: v[: self.count] for k, v in batch.items()}


class TokenPictures(_ValidationPictures):
    """After each validation, a picture of which patches kept a token in each stage, with true and predicted label."""

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        batch, self._batch = self._batch, None
        if batch is None or not hasattr(pl_module, "backbone"):
            return
        module = attached(pl_module.backbone)
        if not isinstance(module, ReducingModule):
            return
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
        batch, self._batch = self._batch, None
        if batch is None or "box" not in batch:
            return
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
