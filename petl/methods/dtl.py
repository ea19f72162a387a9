"""DTL, disentangled transfer learning (Fu et al., arXiv 2312.07856): one low-rank side stream beside a frozen ViT.

With x_0 the embedded tokens, x_i the tokens after block i (counted from 1) and r_0 = 0:

    r_i = r_{i-1} + x_{i-1} A_iᵀ B_iᵀ                 A_i (r, C) Kaiming-uniform, B_i (C, r) zero at the start
    x_i = block_i(x_{i-1}) + g(θ(r_i))                from the middle of the depth on; before it x_i = block_i(x_{i-1})
    θ(r) = r sigmoid(β r)

g is the identity (``variant="dtl"``) or one depthwise 3 x 3 convolution without bias that all blocks share, over the
patches on their grid, while prefix tokens pass by it ("plus", DTL+). r_i = 0 at the start, so the network computes what
the frozen one does. The blocks up to number ``start`` (from 0) have no graph: of them only the inputs x_{i-1} are kept
for backward, for the gradient of A_i.

Deviations. Features are what the backbone's own pooling gives; the published head reads the LayerNorm of the mean of
all patch tokens. The order of θ and g is that of the released code. No stochastic depth.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from petl.backbones.base import BackboneView, BlockView, Call
from petl.errors import PetlError
from petl.methods.base import Method, MethodModule, register
from petl.methods.grid import PatchGrid
from petl.nn.grid import GridConv
from petl.nn.linear import Linear

VARIANTS = ("dtl", "plus")


class LowRank(nn.Sequential):
    """x Aᵀ Bᵀ on (…, C); parameters 2 C r."""

    def __init__(self, width: int, rank: int) -> None:
        down, up = Linear(width, rank, bias=False), Linear(rank, width, bias=False)
        nn.init.zeros_(up.weight)
        super().__init__(down, up)


class DTLModule(MethodModule):
    """The state is the grid of the patches (None in variant "dtl") and r."""

    method: DTL
    changes_blocks: ClassVar[bool] = True

    def __init__(self, method: DTL, view: BackboneView) -> None:
        super().__init__(method, view)
        plus = method.variant == "plus"
        self.start = method.first(view)
        self.blocks = nn.ModuleList(LowRank(view.width, method.rank) for _ in range(view.depth))
        self.conv = GridConv(view.width, depthwise=True, bias=False) if plus else None
        self.grid = PatchGrid(view, method.name) if plus else None

    def install(self) -> None:
        if self.grid is not None:
            self.grid.watch()

    def uninstall(self) -> None:
        if self.grid is not None:
            self.grid.release()

    def begin(self, x: Tensor) -> Any:
        return None if self.grid is None else self.grid.take(x), x.new_zeros(())

    def block(self, index: int, block: BlockView, x: Tensor, call: Call, state: Any) -> tuple[Tensor, Any]:
        if self.grid is not None:
            self.grid.refuse_mask(call)
        grid, r = state
        r = r + self.blocks[index](x)
        x = block.forward(x, call)  # up to block `start` no input has a gradient, so autograd records nothing of it
        if index >= self.start:
            x = x + self.feedback(r, grid)
        return x, (grid, r)

    def first_changed(self) -> int:
        return self.start

    def first_used(self) -> int:
        return 0  # the side stream reads every block

    def feedback(self, r: Tensor, grid: tuple[int, int] | None) -> Tensor:
        """g(θ(r)), (B, P + N, C)."""
        beta = self.method.beta
        t = F.silu(beta * r) / beta  # r sigmoid(β r), with one tensor kept for backward instead of two
        if self.conv is None or grid is None:
            return t
        prefix = self.view.prefix_tokens
        return torch.cat([t[:, :prefix], self.conv(t[:, prefix:], grid)], 1)

    def macs(self, tokens: list[tuple[int, int]]) -> int:
        c, prefix = self.view.width, self.view.prefix_tokens
        stream = sum(n for n, _ in tokens) * 2 * c * self.method.rank
        return stream + (0 if self.conv is None else sum(n - prefix for n, _ in tokens[self.start :]) * 9 * c)

    def first_gradient(self) -> tuple[str, str]:
        return f"output of block {self.start}", "the side stream enters the backbone there and reads it before"


@register("dtl")
@dataclass(frozen=True)
class DTL(Method):
    """DTL: a low-rank side stream that enters the second half of the blocks, no gradient inside the first.

    Args:
        rank: rank of the maps from each block to the side stream.
        variant: "dtl", or "plus" (one depthwise convolution over the patches, shared by all blocks).
        start: first block (from 0) whose output the stream is added to; None = half of the depth.
        beta: sharpness of the gate; large values come close to ReLU.
    """

    rank: int = 2
    variant: str = "dtl"
    start: int | None = None
    beta: float = 100.0

    def __post_init__(self) -> None:
        self.require("rank", self.rank, 1)
        self.choose("variant", VARIANTS)
        self.require("beta", self.beta, 1, integer=False)
        if self.start is not None:
            self.require("start", self.start, 0)

    def first(self, view: BackboneView) -> int:
        """The first block that gets the stream; `PetlError` for one beyond the depth."""
        start = view.depth // 2 if self.start is None else self.start
        if start >= view.depth:
            raise PetlError(
                f"DTL(start={start}): this backbone has {view.depth} blocks, 0 to {view.depth - 1}; start=None takes "
                f"{view.depth // 2}, half of the depth."
            )
        return start

    def build(self, view: BackboneView) -> DTLModule:
        return DTLModule(self, view)

    def parameter_count(self, view: BackboneView) -> int:
        """2 C r for each block, and 9 C of the shared convolution."""
        return view.depth * 2 * view.width * self.rank + (9 * view.width if self.variant == "plus" else 0)
