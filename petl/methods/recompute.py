"""Activation checkpointing of blocks that run as they are: those of methods that work inside single layers."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint


class RecomputedBlock:
    """The replacement of a block's ``forward``: its own one, recomputed in the backward pass of training.

    The block itself and not its view, so that blocks that cannot be split work too, with their dropout.
    """

    def __init__(self, block: nn.Module, module: nn.Module) -> None:
        self.block, self.module = block, module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        plain = type(self.block).forward
        if self.module.training:
            return checkpoint(plain, self.block, *args, use_reentrant=False, **kwargs)
        return plain(self.block, *args, **kwargs)
