"""What every task shares: slim strict checkpoints, steps that depend on their number alone, optimiser and schedule."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from petl.adapters.state import set_trained_tensors, trained_tensors
from petl.errors import PetlError, nearest
from petl.methods.base import TowerModule
from petl.methods.frozen_dtype import FROZEN_DTYPES, cast_frozen
from petl.methods.regional import compile_blocks
from petl.models.frozen import Frozen
from petl.tasks.hardware import adamw, frozen_dtype

Factor = Callable[[int], float]


class FrozenTask(L.LightningModule):
    """A task on a frozen backbone. Subclasses build ``self.model`` (a `Classifier` or attached model) in `setup`.

    Checkpoints hold the trained tensors only and are loaded strictly. At the start of every step the random generators
    are seeded from (seed, step, rank), so that a resumed run draws what the uninterrupted one would have drawn.
    """

    strict_loading = False  # Lightning's check, replaced by the exact one of `set_trained_tensors`

    def __init__(
        self,
        lr: float,
        weight_decay: float,
        warmup_epochs: float,
        min_lr: float,
        frozen_dtype: str = "float32",
        compile: bool = False,
    ) -> None:
        super().__init__()
        self.require_non_negative(lr=lr, weight_decay=weight_decay, warmup_epochs=warmup_epochs, min_lr=min_lr)
        if frozen_dtype not in FROZEN_DTYPES:
            raise PetlError(
                f"{type(self).__name__}(frozen_dtype={frozen_dtype!r}): {nearest(frozen_dtype, FROZEN_DTYPES)}"
            )
        self.frozen_dtype, self.compiles = frozen_dtype, compile
        self.lr, self.weight_decay, self.warmup_epochs, self.min_lr = lr, weight_decay, warmup_epochs, min_lr
        self.model: nn.Module

    def require_non_negative(self, **values: float) -> None:
        """Raise `PetlError` for an option below zero or not finite."""
        for name, value in values.items():
            if not 0 <= value < math.inf:
                raise PetlError(f"{type(self).__name__}({name}={value}): {name} must be a number of at least 0.")

    @property
    def seed(self) -> int:
        """The seed of `lightning.seed_everything`, 0 where it was not called."""
        return int(os.environ.get("PL_GLOBAL_SEED", 0))

    # ---- how the frozen network is held and run

    def configure_model(self) -> None:
        self.hold_frozen(str(self.trainer.precision), self.trainer.strategy.root_device)
        if self.compiles:
            for tower in self.towers():
                compile_blocks(tower)

    def hold_frozen(self, precision: str, device: torch.device) -> None:
        """Cast the frozen weights to what ``frozen_dtype`` means on ``device`` under the trainer's ``precision``."""
        dtype = frozen_dtype(self.frozen_dtype, precision, device)
        if dtype is not None:
            for tower in self.towers():
                cast_frozen(tower, dtype)

    # ---- what is the same in every epoch

    def frozen_part(self) -> Frozen | None:
        """What of the model `petl.TapCache` may compute once."""
        return None

    def varies(self) -> str | None:
        """Why the task itself makes training inputs differ from epoch to epoch, or None."""
        return None

    # ---- checkpoints: trained tensors and optimiser state, plain tensors only

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"] = trained_tensors(self.model)
        checkpoint["method_state"] = [tower.training_state() for tower in self.towers()]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        set_trained_tensors(self.model, checkpoint["state_dict"], "the checkpoint")
        checkpoint["state_dict"] = {}
        for tower, state in zip(self.towers(), checkpoint.get("method_state", []), strict=False):
            tower.load_training_state(state)

    # ---- steps

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        digest = hashlib.sha256(f"{self.seed}/{self.global_step}/{self.global_rank}".encode()).digest()
        value = int.from_bytes(digest[:4], "little")
        torch.manual_seed(value)
        np.random.seed(value)  # timm's Mixup draws from numpy

    def towers(self) -> tuple[TowerModule, ...]:
        """The method's modules beside each encoder: they scale learning rates and take part in the steps."""
        return ()

    def regularised(self, loss: Tensor) -> Tensor:
        """``loss`` with what the method adds to it."""
        terms = [t for tower in self.towers() if (t := tower.regularisation()) is not None]
        return loss + torch.stack(terms).sum() if terms else loss

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any] | None = None
    ) -> None:
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        for tower in self.towers():  # the gradients of this step are there until the next one zeroes them
            tower.after_step(self.global_step + 1, self.total_steps)

    def resting(self) -> list[nn.Parameter]:
        """Trained tensors that have no step now."""
        return []

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        for parameter in self.resting():
            parameter.grad = None  # no step, whatever weight decay and moments would do

    def with_all(self, loss: Tensor) -> Tensor:
        """``loss`` in which all tensors take part, so that DDP need not search for those that do not."""
        return loss + 0.0 * sum(p.sum() for p in self.resting()) if self.trainer.world_size > 1 else loss

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Trained parameters in groups for AdamW; a group's own ``lr`` follows the same schedule."""
        return self.by_rate([p for p in self.model.parameters() if p.requires_grad], self.lr)

    def by_rate(self, parameters: list[nn.Parameter], lr: float) -> list[dict[str, Any]]:
        """``parameters`` in one group for each learning rate, ``lr`` times `TowerModule.lr_scale`."""
        scales = {id(p): tower.lr_scale(n) for tower in self.towers() for n, p in tower.view.model.named_parameters()}
        groups: dict[float, list[nn.Parameter]] = {}
        for parameter in parameters:
            groups.setdefault(scales.get(id(parameter), 1.0), []).append(parameter)
        return [{"params": members, "lr": lr * scale} for scale, members in groups.items()]

    def configure_optimizers(self) -> OptimizerLRScheduler:
        groups = [g for g in self.parameter_groups() if g["params"]]
        if not groups:
            raise PetlError(
                "nothing is trained: neither the method nor the head has parameters that require gradients."
            )
        optimizer = adamw(groups, self.lr, self.weight_decay, self.trainer)
        self.total_steps = self._total_steps()
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self.factors(self.total_steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def factors(self, total: int) -> Factor | list[Factor]:
        """Factor on the learning rates by step of ``total``; a list where every group has one of its own."""
        warmup = self.warmup_steps(self.warmup_epochs, total)
        return lambda step: (step + 1) / (warmup + 1) if step < warmup else self.decay(step, warmup, total)

    def warmup_steps(self, warmup_epochs: float, total: int) -> int:
        epochs = self.trainer.max_epochs or -1
        return int(total * warmup_epochs / epochs) if epochs > 0 else 0

    def decay(self, step: int, warmup: int, total: int) -> float:
        """Factor on the learning rates at ``step`` of ``total``, after the warm-up: a cosine to ``min_lr``."""
        return cosine(self.min_lr / self.lr if self.lr else 0.0, step, warmup, total)

    def _total_steps(self) -> int:
        """Optimiser steps of the whole training.

        Not `Trainer.estimated_stepping_batches` for petl's data: asking it here makes Lightning build the loaders
        before it restores their state, which then never happens.
        """
        trainer, per_epoch = self.trainer, self.steps_per_epoch()
        if trainer.max_steps > 0 or not trainer.max_epochs or trainer.max_epochs < 0 or per_epoch is None:
            return max(1, trainer.max_steps if trainer.max_steps > 0 else int(trainer.estimated_stepping_batches))
        return max(1, per_epoch * trainer.max_epochs)

    def steps_per_epoch(self) -> int | None:
        """Optimiser steps of an epoch, None for data that is not petl's."""
        batches = getattr(self.data, "steps_per_epoch", None)
        return None if batches is None else math.ceil(batches / self.trainer.accumulate_grad_batches)

    def decay_in_words(self) -> str:
        return f"cosine to {self.min_lr:g}"

    @property
    def data(self) -> Any:
        """The data module of the running trainer, or None."""
        return getattr(self.trainer, "datamodule", None)

    def protocol(self) -> dict[str, Any]:
        """Everything on the model's side that decides a number."""
        return {
            "optimizer": "AdamW",
            "lr": self.lr,
            "weight_decay": self.weight_decay,
            "schedule": f"linear warm-up over {self.warmup_epochs:g} epochs, {self.decay_in_words()}, per step",
            "seed": self.seed,
            "epochs": self.trainer.max_epochs,
            "precision": str(self.trainer.precision),
            "devices": self.trainer.world_size,
            **({"frozen_dtype": ", ".join(self._frozen_dtypes()), "compile": self.compiles} if self.towers() else {}),
        }

    def _frozen_dtypes(self) -> dict[str, None]:
        """Of the encoders' weights, each once."""
        weights = (next(tower.view.model.parameters()) for tower in self.towers())
        return dict.fromkeys(str(w.dtype).removeprefix("torch.") for w in weights)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.model(*inputs)


def cosine(low: float, step: int, warmup: int, total: int) -> float:
    """From 1 at step ``warmup`` to ``low`` at ``total``."""
    progress = (step - warmup) / max(1, total - warmup)
    return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
