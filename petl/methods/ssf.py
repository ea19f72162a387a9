"""SSF (Lian et al., arXiv 2210.08823): scale and shift the features after every operation of the frozen network.

    y' = γ ⊙ y + β         y: output of the patch embedding, of each LayerNorm, of qkv, output projection, fc1, fc2

γ ~ N(1, σ²) and β ~ N(0, σ²) with σ = 0.02, so that the network starts beside the frozen one and not at it. After a
linear layer (convolution, LayerNorm) both fold into its weight and bias: W' = γ ⊙ W (row by row), b' = γ ⊙ b + β.

Deviations: after a LayerNorm the folded vectors are computed with at every step, which is the same function at less
memory. ``init_std=0`` starts at the frozen network. Norms of queries and keys inside the attention are left alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from petl.backbones.base import BackboneView
from petl.methods.base import Method, register
from petl.methods.layers import LayerPart, LayersModule, Place, outer_places, parts_of, plain

PARTS = ("norm1", "q", "k", "v", "out", "norm2", "fc1", "fc2")


class ScaleShift(LayerPart):
    """γ ⊙ y + β on the output channels of a layer."""

    def __init__(self, layer: Any, init_std: float) -> None:
        super().__init__()
        channels = layer.weight.shape[0]
        self.scale = nn.Parameter(1 + init_std * torch.randn(channels))
        self.shift = nn.Parameter(init_std * torch.randn(channels))

    def merged(self, layer: Any) -> tuple[Tensor, Tensor | None]:
        rows = self.scale.view(-1, *[1] * (layer.weight.ndim - 1))
        return layer.weight * rows, self.shift if layer.bias is None else self.scale * layer.bias + self.shift

    def forward(self, layer: nn.Module, x: Tensor) -> Tensor:
        if isinstance(layer, nn.LayerNorm):
            return super().forward(layer, x)
        y = plain(layer, x)  # (…, C), or (B, C, h, w) of the patch embedding
        scale, shift = self.scale.to(y.dtype), self.shift.to(y.dtype)
        if isinstance(layer, nn.Conv2d):
            scale, shift = scale[:, None, None], shift[:, None, None]
        return torch.addcmul(shift, y, scale)


@register("ssf")
@dataclass(frozen=True)
class SSF(Method):
    """SSF: scale and shift the features after every layer of the frozen backbone.

    Args:
        init_std: deviation of scales from 1 and of shifts from 0 at the start; 0 starts at the frozen network.
        layers: blocks whose features are scaled and shifted, from 0 or, backwards, from -1, and with them those of the
            norm behind the last block; None = all.
    """

    mergeable: ClassVar[bool] = True

    init_std: float = 0.02
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        self.require("init_std", self.init_std, 0, integer=False)
        self.check_layers()

    @property
    def identity_at_start(self) -> bool:
        return self.init_std == 0

    def build(self, view: BackboneView) -> LayersModule:
        module = LayersModule(self, view)
        inside = (place for place, _ in parts_of(view, *PARTS, blocks=self.blocks(view)))
        for place in (*self._outer(view), *inside):
            module.add(place, ScaleShift(place.layer, self.init_std))
        return module

    def _outer(self, view: BackboneView) -> list[Place]:
        return [place for place in outer_places(view) if place.block in self.trained_places(view)]

    def parameter_count(self, view: BackboneView) -> int:
        c, f, blocks, outer = view.width, view.hidden, len(self.blocks(view)), len(self._outer(view))
        return 2 * (blocks * (7 * c + f) + outer * c)  # outputs of a block: norms 2 C, qkv 3 C, out C, fc1 F, fc2 C
