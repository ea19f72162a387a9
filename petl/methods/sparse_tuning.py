"""Sparse-Tuning (Liu et al., arXiv 2405.14700): token reduction and Dense Adapters on a frozen ViT.

``variant="paper"`` is what the figures draw. In block i, with y = x + Attn(LN1 x), and at event blocks (a quarter, a
half and three quarters of the depth: 3, 6, 9 of 12) y <- S(y), where S keeps the patches that the class token attends
to most and merges the rest (petl/nn/token_reduction.py):

    z_i = W_down y + W_down_prev S(a_{i-1}) + W_down_skip S(a_{i-3})        (terms that exist)
    a_i = s W_up ReLU(z_i)
    x   = (y + FFN(LN2 y)) + a_i

S on earlier adapter outputs a_j is the very selection that y got, applied when it happens.

Deviations from the paper, or choices where it is silent: biases in all projections; Kaiming-uniform W_down*, zero W_up
and biases (identity at the start); no keep-rate schedule; merge weights not normalised, fused tokens take part in the
next event (both as in the released code); an event that would reject a single patch is left out when fusing.

``variant="reference"`` computes what the released code computes, defects included: a two-level adapter inside each
block (2b = 64, b = 32 wide), no cross-layer links, group sums of adapter outputs added after blocks 2, 5, 8, 11 (the
embedded tokens once more at the first, the last adapter left out), truncated-normal initialisation (std 0.02), bare
``ceil`` and no exception for a single rejected patch. It holds for depth 12 and events at 3, 6, 9 only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from petl.backbones.base import BackboneView, BlockView, Call
from petl.errors import PetlError, nearest
from petl.methods.base import register
from petl.methods.evit import ReducingMethod, ReducingModule, State
from petl.nn.linear import Linear
from petl.nn.token_reduction import TokenReducer

VARIANTS = ("paper", "reference")


class DenseAdapter(nn.Module):
    """Adapter of one block, variant ``paper``; links to the previous and the third-last adapter where these exist."""

    def __init__(self, index: int, width: int, bottleneck: int, scale: float) -> None:
        super().__init__()
        self.down = Linear(width, bottleneck)
        self.down_prev = Linear(width, bottleneck) if index >= 1 else None
        self.down_skip = Linear(width, bottleneck) if index >= 3 else None
        self.up = Linear(bottleneck, width)
        self.scale = scale
        for layer in (m for m in self.children() if isinstance(m, Linear)):
            nn.init.kaiming_uniform_(layer.weight, a=math.sqrt(5))
            nn.init.zeros_(layer.bias)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor, history: Sequence[Tensor]) -> Tensor:
        z = self.down(x)
        if self.down_prev is not None:
            z = z + self.down_prev(history[-1])
        if self.down_skip is not None:
            z = z + self.down_skip(history[-3])
        a = self.up(F.relu(z))
        return a if self.scale == 1.0 else self.scale * a


class ReferenceAdapter(nn.Module):
    """Adapter of one block, variant ``reference`` (sheet section 3.4)."""

    def __init__(self, width: int, bottleneck: int) -> None:
        super().__init__()
        b = bottleneck
        self.down1, self.down2, self.up1 = Linear(width, 2 * b), Linear(2 * b, b), Linear(b, 2 * b)
        self.down3, self.up2 = Linear(3 * b, 2 * b), Linear(2 * b, width)
        for layer in (m for m in self.children() if isinstance(m, Linear)):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.down1(x))
        s = self.down2(h)
        return self.up2(self.down3(torch.cat([s, self.up1(s)], -1)) + h)


class SparseTuningModule(ReducingModule):
    """Variant ``paper``. The history holds the last three adapter outputs, in the token layout of the stream."""

    method: SparseTuning

    def __init__(self, method: SparseTuning, view: BackboneView) -> None:
        super().__init__(method, view, TokenReducer(method.keep_rate, method.fuse))
        self.blocks = nn.ModuleList(
            DenseAdapter(i, view.width, method.bottleneck, method.scale) for i in range(view.depth)
        )

    def block(self, index: int, block: BlockView, x: Tensor, call: Call, state: Any) -> tuple[Tensor, Any]:
        x, state = self.attend(index, block, x, call, state)
        a = self.blocks[index](x, state.history)
        self.finish(index, state)
        return x + block.ffn(x) + a, state._replace(history=(*state.history[-2:], a))

    def history_length(self, index: int) -> int:
        return min(index, 3)

    def macs(self, tokens: list[tuple[int, int]]) -> int:
        c, b = self.view.width, self.method.bottleneck
        downs = [1 + (i >= 1) + (i >= 3) for i in range(self.view.depth)]
        return super().macs(tokens) + sum(m * c * b * (1 + d) for (_, m), d in zip(tokens, downs, strict=True))

    def first_gradient(self) -> tuple[str, str]:
        return "block 0, after attention", "its adapter is the first trained tensor on the residual stream"


class ReferenceModule(ReducingModule):
    """Variant ``reference``. The history holds the terms of the current group sum, the embedded tokens first."""

    method: SparseTuning

    def __init__(self, method: SparseTuning, view: BackboneView) -> None:
        reducer = TokenReducer(method.keep_rate, method.fuse, ordered_reject=True, skip_single=False, tolerance=0.0)
        super().__init__(method, view, reducer)
        self.blocks = nn.ModuleList(ReferenceAdapter(view.width, method.bottleneck) for _ in range(view.depth))

    def begin(self, x: Tensor) -> Any:
        return State(history=(x,))

    def block(self, index: int, block: BlockView, x: Tensor, call: Call, state: Any) -> tuple[Tensor, Any]:
        x, state = self.attend(index, block, x, call, state)
        a = self.blocks[index](x)
        x = x + (block.ffn(x) + a)
        self.finish(index, state)
        last = index + 1 == self.view.depth
        terms = state.history if last else (*state.history, a)  # the last adapter is never collected (off by one)
        if index % 3 != 2:
            return x, state._replace(history=terms)
        total = terms[0]
        for term in terms[1:]:
            total = total + term
        return x + total, state._replace(history=())

    def first_gradient(self) -> tuple[str, str]:
        return "block 0, after attention", "its adapter is the first trained tensor on the residual stream"

    def macs(self, tokens: list[tuple[int, int]]) -> int:
        c, b = self.view.width, self.method.bottleneck
        return super().macs(tokens) + sum(m * (4 * b * c + 10 * b * b) for _, m in tokens)


@register("sparse_tuning")
@dataclass(frozen=True)
class SparseTuning(ReducingMethod):
    """Sparse-Tuning: drop and merge patch tokens at three depths, and train Dense Adapters in every block.

    Args:
        keep_rate: share of patch tokens kept at each event, in (0, 1]; 1.0 keeps all.
        drop_blocks: blocks (from 0) at which tokens are dropped; None = a quarter, a half, three quarters of the depth.
        bottleneck: width b of the adapters; the reference variant is 2b wide inside.
        scale: factor on the adapter output.
        fuse: merge the rejected tokens into one instead of dropping them.
        variant: "paper" (the figures) or "reference" (the released code, defects included).
    """

    bottleneck: int = 32
    scale: float = 1.0
    variant: str = "paper"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("bottleneck", self.bottleneck, 1)
        self.require("scale", self.scale, 0, integer=False)
        if self.variant not in VARIANTS:
            raise PetlError(f"SparseTuning(variant={self.variant!r}): {nearest(self.variant, VARIANTS)}")
        if self.variant == "reference" and self.scale != 1.0:
            raise PetlError("SparseTuning(variant='reference'): the released code has no scale; leave it at 1.0.")

    @property
    def identity_at_start(self) -> bool:
        return self.variant == "paper" and self.keep_rate == 1

    def build(self, view: BackboneView) -> ReducingModule:
        self.check_reduction(view)
        if self.variant == "paper":
            return SparseTuningModule(self, view)
        events = self.events(view)
        if view.depth != 12 or not set(events) <= {3, 6, 9}:
            raise PetlError(
                "SparseTuning(variant='reference') adds up adapters in groups that hold for 12 blocks and events at "
                f"blocks 3, 6, 9 only; here: {view.depth} blocks, events {list(events)}. Use variant='paper'."
            )
        return ReferenceModule(self, view)

    def parameter_count(self, view: BackboneView) -> int:
        c, b, depth = view.width, self.bottleneck, view.depth
        if self.variant == "reference":
            return depth * (4 * b * c + 10 * b * b + 2 * b + b + 2 * b + 2 * b + c)
        downs = sum(1 + (i >= 1) + (i >= 3) for i in range(depth))
        return (downs + depth) * c * b + downs * b + depth * c
