"""Full fine-tuning: every weight of the backbone is trained. The upper end that other methods are measured against.

Layer-wise learning-rate decay as in BEiT (arXiv 2106.08254) and MAE (arXiv 2111.06377): with the embeddings as layer 0,
block i (from 0) as layer i + 1, final norm and head as layer depth + 1,

    learning rate of layer l = lr · decay^(depth + 1 - l)

Deviation: what stands between embeddings and blocks (a norm before the first block) is layer 0, as in timm.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import takewhile
from typing import Any, ClassVar

from torch import nn
from torch.utils.checkpoint import checkpoint

from petl.backbones.base import BackboneView
from petl.errors import PetlError
from petl.methods.base import EVERY_TOWER, Method, MethodModule, register


class RecomputedBlock:
    """The replacement of a block's ``forward``: its own one, recomputed in the backward pass where that is asked for.

    The block itself and not its view, so that blocks that cannot be split work too, with their dropout.
    """

    def __init__(self, block: nn.Module, module: MethodModule) -> None:
        self.block, self.module = block, module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        plain = type(self.block).forward
        if self.module.checkpointing and self.module.training:
            return checkpoint(plain, self.block, *args, use_reentrant=False, **kwargs)
        return plain(self.block, *args, **kwargs)


class _Full(MethodModule):
    method: FullFineTuning
    trains_backbone: ClassVar[bool] = True

    def __init__(self, method: FullFineTuning, view: BackboneView) -> None:
        super().__init__(method, view)
        self.blocks_prefix = f"{view.block_path}."
        names = (n for n, _ in view.model.named_parameters())
        self.embeddings = frozenset(takewhile(lambda n: not n.startswith(self.blocks_prefix), names))

    def install(self) -> None:
        for block in self.view.block_modules():
            block.forward = RecomputedBlock(block, self).forward  # type: ignore[method-assign]

    def uninstall(self) -> None:
        for block in self.view.block_modules():
            del block.forward

    def lr_scale(self, name: str) -> float:
        layer = 0 if name in self.embeddings else self.view.depth + 1
        if name.startswith(self.blocks_prefix):
            layer = int(name.removeprefix(self.blocks_prefix).partition(".")[0]) + 1
        return self.method.layer_decay ** (self.view.depth + 1 - layer)

    def first_gradient(self) -> tuple[str, str]:
        return "patch embedding", "every weight is trained"


@register("full_fine_tuning")
@dataclass(frozen=True)
class FullFineTuning(Method):
    """Full fine-tuning: train every weight of the backbone and the head.

    Args:
        layer_decay: factor on the learning rate from one layer to the one before it, in (0, 1]; 1 = none.
    """

    layer_decay: float = 1.0

    mergeable: ClassVar[bool] = True
    towers: ClassVar[tuple[str, ...]] = EVERY_TOWER

    def __post_init__(self) -> None:
        self.require("layer_decay", self.layer_decay, 0, integer=False)
        if not 0 < self.layer_decay <= 1:
            raise PetlError(f"FullFineTuning(layer_decay={self.layer_decay}): it lies in (0, 1]; 0.65 to 0.9 is usual.")

    def build(self, view: BackboneView) -> MethodModule:
        return _Full(self, view)

    def parameter_count(self, view: BackboneView) -> int:
        return sum(p.numel() for n, p in view.model.named_parameters() if view.is_backbone(n) and view.fine_tuned(n))
