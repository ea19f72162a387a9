"""RLRR (Dong et al., arXiv 2403.19067): rescale the frozen weights by a rank-one matrix, entry by entry.

    W' = W + (s_out s_inᵀ) ⊙ W,   b' = b + f        q, k, v, output projection, fc1, fc2
    y' = γ ⊙ y + β                                  after both LayerNorms of a block (as in SSF)

s_in has one entry per input and s_out one per output of a layer; q, k and v have their own s_in each, also where the
network computes them as one: 19 C + 3 F trained numbers in a block of width C and FFN width F.

``init="paper"``: s_in and s_out Kaiming-uniform (bounds sqrt(6 / C) and sqrt(6)), so that W' starts about 7 % away from
W. ``init="zero_out"``: s_out zero, the frozen network at the start. f = 0, γ = 1, β = 0 in both.

Choice where equal in value: W' is made at each step, out of the frozen W, rather than W x and s_out ⊙ W (s_in ⊙ x)
added up. One product with W instead of two forward, three instead of four with the backward pass, and no output of the
second kept for it; in exchange W' itself is kept, once per batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from petl.backbones.base import BackboneView
from petl.methods.base import Method, register
from petl.methods.layers import LayerPart, LayersModule, parts_of
from petl.methods.ssf import PARTS, ScaleShift

INITS = ("paper", "zero_out")


class Rescaling(LayerPart):
    """W + (s_out s_inᵀ) ⊙ W and b + f of one linear layer; of ``slices`` equal ones computed as one (q, k, v)."""

    def __init__(self, layer: Any, slices: int, init: str) -> None:
        super().__init__()
        outputs, inputs = layer.weight.shape
        self.s_in = nn.Parameter(torch.empty(slices, inputs))
        self.s_out = nn.Parameter(torch.zeros(outputs, 1))
        self.shift = nn.Parameter(torch.zeros(outputs))
        nn.init.kaiming_uniform_(self.s_in)
        if init == "paper":
            nn.init.kaiming_uniform_(self.s_out)  # of fan-in 1

    def merged(self, layer: Any) -> tuple[Tensor, Tensor | None]:
        s_out = self.s_out.unflatten(0, (len(self.s_in), -1))  # (slices, outputs of each, 1)
        ratio = (s_out * self.s_in[:, None]).flatten(0, 1)  # of the change to W
        weight = torch.addcmul(layer.weight, layer.weight, ratio)
        return weight, self.shift if layer.bias is None else layer.bias + self.shift


@register("rlrr")
@dataclass(frozen=True)
class RLRR(Method):
    """RLRR: rescale every frozen weight matrix by a trained rank-one matrix, shift its output, and tune the norms.

    Args:
        init: "paper" (both factors random, not the frozen network at the start) or "zero_out" (output factor zero).
        layers: blocks whose weights are rescaled, from 0 or, backwards, from -1; None = all.
    """

    mergeable: ClassVar[bool] = True

    init: str = "paper"
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        self.choose("init", INITS)
        self.check_layers()

    @property
    def identity_at_start(self) -> bool:
        return self.init == "zero_out"

    def build(self, view: BackboneView) -> LayersModule:
        module = LayersModule(self, view)
        for place, count in parts_of(view, *PARTS, blocks=self.blocks(view)):
            norm = place.name.startswith("norm")
            module.add(place, ScaleShift(place.layer, 0.0) if norm else Rescaling(place.layer, count, self.init))
        return module

    def parameter_count(self, view: BackboneView) -> int:
        return len(self.blocks(view)) * (19 * view.width + 3 * view.hidden)
