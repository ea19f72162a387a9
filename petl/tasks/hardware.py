"""What the hardware decides: the dtype of frozen weights and the kernel of the optimiser."""

from __future__ import annotations

from typing import Any

import torch

from petl.errors import PetlError
from petl.methods.frozen_dtype import computes_in_bf16

IN_BF16 = ("32-true", "bf16-mixed")  # precisions of the trainer that leave weights as they are and compute in bf16


def frozen_dtype(option: str, precision: str, device: torch.device) -> torch.dtype | None:
    """What frozen weights are cast to on ``device`` under the trainer's ``precision``; None = they stay as they are.

    Raises:
        PetlError: "bfloat16" is asked for, and the trainer's precision is another one.
    """
    if option == "bfloat16" and precision not in IN_BF16:
        raise PetlError(
            f"frozen_dtype='bfloat16' goes with trainer.precision 32-true (trained tensors fp32, frozen ones bf16) or "
            f"bf16-mixed, not with {precision}, which has a dtype of its own for all weights or for compute."
        )
    fits = option == "bfloat16" or (option == "auto" and precision in IN_BF16 and computes_in_bf16(device))
    return torch.bfloat16 if fits else None


def adamw(groups: list[dict[str, Any]], lr: float, weight_decay: float, trainer: Any) -> torch.optim.AdamW:
    """AdamW over ``groups``: one kernel for all tensors where they lie on a CUDA device.

    Not with a gradient scaler (precision 16-mixed): the fused kernel unscales by itself, and Lightning then refuses to
    clip gradients. Not on the CPU, where it gains little and rounds otherwise.
    """
    scaled = getattr(getattr(trainer, "precision_plugin", None), "scaler", None) is not None
    fused = not scaled and all(p.is_cuda for group in groups for p in group["params"])
    return torch.optim.AdamW(groups, lr=lr, weight_decay=weight_decay, fused=fused or None)
