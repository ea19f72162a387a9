"""Convpass (Jie & Deng, arXiv 2207.07039): convolutional bypasses beside attention and FFN of a frozen ViT.

    x' = x + Attn(LN x) + s bypass(LN x)
    y  = x' + FFN(LN x') + s bypass'(LN x')
    bypass(u) = W_up dropout(σ(conv(σ(W_down u)))),  σ(z) = z sigmoid(1.702 z)

conv is 3 x 3 over the patches on their grid, h channels wide; each prefix token is convolved as a picture of one pixel.
The grid is that of the image at hand, whatever its size and shape (petl/methods/grid.py). Biases in all three layers.
W_down is Xavier-uniform, conv starts as the identity (its centre), W_up and the biases at zero: at the start the
network computes what the frozen one does.

Deviations: none. The published code has the grid 14 x 14, one prefix token and h = 8 written into it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from timm.layers import QuickGELU
from torch import Tensor, nn

from petl.backbones.base import BackboneView, BlockView, Call
from petl.methods.base import Method, MethodModule, register
from petl.methods.grid import PatchGrid
from petl.nn.bottleneck import up_projection
from petl.nn.grid import GridConv
from petl.nn.linear import Linear


class Bypass(nn.Module):
    """One bypass on (B, P + R · S, C); parameters 2 C h + h + C and 9 h² + h."""

    def __init__(self, width: int, method: Convpass, prefix: int) -> None:
        super().__init__()
        self.prefix, self.scale = prefix, method.scale
        self.down, self.conv = Linear(width, method.bottleneck), GridConv(method.bottleneck)
        self.up, self.dropout = up_projection(method.bottleneck, width), nn.Dropout(method.dropout)
        self.activation = QuickGELU()
        nn.init.xavier_uniform_(self.down.weight)
        nn.init.dirac_(self.conv.weight)
        for layer in (self.down, self.conv):
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]

    def forward(self, u: Tensor, grid: tuple[int, int]) -> Tensor:
        z = self.activation(self.down(u))
        z = torch.cat([self.conv.single(z[:, : self.prefix]), self.conv(z[:, self.prefix :], grid)], 1)
        a = self.up(self.dropout(self.activation(z)))
        return a if self.scale == 1.0 else self.scale * a


class ConvpassModule(MethodModule):
    """The state is the grid of the patches."""

    method: Convpass
    changes_blocks: ClassVar[bool] = True

    def __init__(self, method: Convpass, view: BackboneView) -> None:
        super().__init__(method, view)
        self.grid = PatchGrid(view, method.name)

        def bypass() -> Bypass:
            return Bypass(view.width, method, view.prefix_tokens)

        adapted = method.blocks(view)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({place: bypass() for place in ("attention", "ffn") if index in adapted})
            for index in range(view.depth)
        )

    def install(self) -> None:
        self.grid.watch()

    def uninstall(self) -> None:
        self.grid.release()

    def begin(self, x: Tensor) -> tuple[int, int]:
        return self.grid.take(x)

    def block(self, index: int, block: BlockView, x: Tensor, call: Call, state: Any) -> tuple[Tensor, Any]:
        bypasses: nn.ModuleDict = self.blocks[index]  # type: ignore[assignment]
        if not bypasses:
            return block.forward(x, call), state
        self.grid.refuse_mask(call)
        n = block.attention_input(x)
        a = block.attention_branch(block.attend(n, call))
        y = block.after_attention(x, a + bypasses["attention"](n, state))
        u = block.ffn_input(y)
        f = block.ffn_branch(block.ffn_output(u))
        return block.after_ffn(y, f + bypasses["ffn"](u, state)), state

    def macs(self, tokens: list[tuple[int, int]]) -> int:
        h, prefix = self.method.bottleneck, self.view.prefix_tokens
        bypassed = [t for i in self.method.blocks(self.view) for t in tokens[i]]
        return sum(t * 2 * self.view.width * h + (9 * (t - prefix) + prefix) * h * h for t in bypassed)

    def first_used(self) -> int:
        return 0  # the grid is read off the patch embedding of the same pass

    def first_gradient(self) -> tuple[str, str]:
        return (
            f"block {self.first_changed()}, after attention",
            "its bypass is the first trained tensor that adds to the residual stream",
        )


@register("convpass")
@dataclass(frozen=True)
class Convpass(Method):
    """Convpass: bottlenecks with a 3 x 3 convolution, parallel to attention and FFN of every block.

    Args:
        bottleneck: width h of the bypasses.
        scale: factor s on what they add; searched from 0.01 to 100 for each task in the paper.
        dropout: dropout before the up-projection while training.
        layers: blocks that get bypasses, from 0 or, backwards, from -1; None = all.
    """

    bottleneck: int = 8
    scale: float = 1.0
    dropout: float = 0.1
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        self.require("bottleneck", self.bottleneck, 1)
        self.require("scale", self.scale, 0, integer=False)
        self.require("dropout", self.dropout, 0, integer=False, below=1)
        self.check_layers()

    def build(self, view: BackboneView) -> ConvpassModule:
        return ConvpassModule(self, view)

    def parameter_count(self, view: BackboneView) -> int:
        """2 C h + h + C of the projections and 9 h² + h of the convolution, twice for each block."""
        h, c = self.bottleneck, view.width
        return len(self.blocks(view)) * 2 * (2 * c * h + h + c + 9 * h * h + h)
