"""RepAdapter (Luo et al., arXiv 2302.08106): a linear bottleneck before attention and before the FFN, which folds into
the layers that read it.

    x' = x + s (B drop(A x + b_A) + b_B)        x: output of norm1 (read by q, k, v) and of norm2 (read by fc1)

A: C -> r. B is grouped: each of g equal parts of the r-dimensional activation gives an equal part of the output, so
that B holds C r / g weights. On ViT-B/16 with r = 8, g = 2: 221,184 weights and 18,624 biases, 239,808 in all.

Folded into a layer W x + b that reads it:  W' = W (I + s B A),   b' = b + s W (B b_A + b_B).

A is Xavier-uniform, B and both biases are zero, so that the network starts at the frozen one. Choice where equal in
value: B is computed with as one block-diagonal C x r matrix, so that the output of its groups needs no rearranging.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from petl.backbones.base import BackboneView
from petl.errors import PetlError
from petl.methods.base import Method, register
from petl.methods.layers import LayerPart, LayersModule, overwrite, parts_of, plain
from petl.nn.linear import Linear

READERS = {"norm1": ("q", "k", "v"), "norm2": ("fc1",)}  # of the output of each norm


class Reparameterised(LayerPart):
    """x + s (B drop(A x + b_A) + b_B) behind a norm."""

    def __init__(self, width: int, method: RepAdapter) -> None:
        super().__init__()
        self.groups, self.scale, self.dropout = method.groups, method.scale, method.dropout
        self.down = Linear(width, method.bottleneck)
        self.up = nn.Parameter(torch.zeros(width, method.bottleneck // method.groups))
        self.up_bias = nn.Parameter(torch.zeros(width))
        nn.init.xavier_uniform_(self.down.weight)
        nn.init.zeros_(self.down.bias)

    def dense_up(self) -> Tensor:
        """B (C, r), zero outside its groups."""
        return torch.block_diag(*self.up.chunk(self.groups))

    def forward(self, layer: nn.Module, x: Tensor) -> Tensor:
        h = plain(layer, x)
        z = F.dropout(self.down(h), self.dropout, self.training)
        change = F.linear(z, self.dense_up().to(z.dtype), self.up_bias.to(z.dtype))
        return torch.add(h, change, alpha=self.scale)

    def folded_into(self, layer: Any) -> tuple[Tensor, Tensor]:
        """Weight and bias with which ``layer``, reading the norm, computes what it does reading x'."""
        weight = layer.weight.float()
        up, bias = self.dense_up(), 0 if layer.bias is None else layer.bias
        shift = weight @ (up @ self.down.bias + self.up_bias)
        return weight + self.scale * (weight @ up) @ self.down.weight, bias + self.scale * shift

    def macs(self, layer: Any, positions: int) -> int:
        return 2 * positions * self.down.weight.numel()


class RepAdapterModule(LayersModule):
    def __init__(self, method: RepAdapter, view: BackboneView) -> None:
        super().__init__(method, view)
        for place, _ in parts_of(view, *READERS, blocks=method.blocks(view)):
            self.add(place, Reparameterised(view.width, method))

    def merge(self) -> None:
        adapted = self.method.blocks(self.view)
        for norm, readers in READERS.items():
            for place, _ in parts_of(self.view, *readers, blocks=adapted):
                part: Any = self.blocks[place.block][norm]  # type: ignore[index]
                overwrite(place.layer, *part.folded_into(place.layer))


@register("rep_adapter")
@dataclass(frozen=True)
class RepAdapter(Method):
    """RepAdapter: linear bottlenecks before attention and FFN that fold into the frozen layers.

    Args:
        bottleneck: r, the width of the adapters.
        groups: g, the parts in which the up-projection maps separately; divides r and the width of the backbone.
        scale: s, the factor on the adapter output; the paper searches 0.1, 0.5, 1, 5, 10 for each task.
        dropout: share of the r-dimensional activations that is dropped in training.
        layers: blocks that get adapters, from 0 or, backwards, from -1; None = all.
    """

    mergeable: ClassVar[bool] = True

    bottleneck: int = 8
    groups: int = 2
    scale: float = 1.0
    dropout: float = 0.1
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        self.require("bottleneck", self.bottleneck, 1)
        self.require("groups", self.groups, 1)
        self.require("scale", self.scale, 0, integer=False)
        self.require("dropout", self.dropout, 0, integer=False, below=1)
        self.check_layers()
        self._divides("bottleneck", self.bottleneck)

    def _divides(self, what: str, size: int) -> None:
        if size % self.groups:
            raise PetlError(f"RepAdapter(groups={self.groups}): groups must divide the {what}, which is {size}.")

    def build(self, view: BackboneView) -> RepAdapterModule:
        self._divides("width of the backbone", view.width)
        return RepAdapterModule(self, view)

    def parameter_count(self, view: BackboneView) -> int:
        c, r = view.width, self.bottleneck
        return len(self.blocks(view)) * 2 * (c * r + c * r // self.groups + r + c)
