"""A ladder: narrow transformer blocks beside a deep network that read its block outputs and never enter it.

Per tapped block l with output h_l (B, T, d), side state z (B, T, e), e = d / r (sheet autognothi.md, sections 2.1, 7):

    form "sum"     z_0 = 0           z_l = Block_l(z_{l-1} + GELU(W_l h_l))               AutoGnothi, arXiv 2410.21815
    form "gate"    z_0 = W_0 h_0     z_l = Block_l(μ_l z_{l-1} + (1 - μ_l) W_l h_l)       LST, arXiv 2206.06522
                   μ_l = sigmoid(α_l / 0.1), α_l = 0 at the start

The blocks that are not tapped leave z as it is. A ladder of pre-norm blocks ends with a LayerNorm.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from petl.errors import PetlError, nearest
from petl.nn.blocks import chosen_blocks
from petl.nn.linear import Linear

FORMS = ("sum", "gate")
KERNEL_WIDTH = 16  # the CPU's fused attention takes 2.5 times as long on narrower heads; zeros do not change the result
TEMPERATURE = 0.1  # of the gates: they move ten times faster than α


class SideBlock(nn.Module):
    """One transformer block of width e: attention with biases, FFN of 4e with GELU; parameters 12e² + 13e."""

    def __init__(self, width: int, heads: int, norm_first: bool = True, eps: float = 1e-6) -> None:
        super().__init__()
        self.heads, self.norm_first = heads, norm_first
        self.norm1, self.norm2 = nn.LayerNorm(width, eps), nn.LayerNorm(width, eps)
        self.qkv, self.out = Linear(width, 3 * width), Linear(width, width)
        self.fc1, self.fc2 = Linear(width, 4 * width), Linear(4 * width, width)

    def forward(self, x: Tensor, keep: Tensor | None = None, first: int | None = None) -> Tensor:
        """(B, T, e) -> (B, T, e). ``keep``: bool (B, T), True = may be attended, or (B, T, T) per query.

        ``first``: how many tokens of the output are wanted, None = all.
        """
        if self.norm_first:
            y = x[:, :first] + self.attention(self.norm1(x), keep, first)
            return y + self.ffn(self.norm2(y))
        y = self.norm1(x[:, :first] + self.attention(x, keep, first))
        return self.norm2(y + self.ffn(y))

    def attention(self, x: Tensor, keep: Tensor | None, first: int | None = None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each (B, H, T, e / H)
        q = q[:, :, :first]
        mask = None
        if keep is not None:
            seen = keep[:, None] if keep.ndim == 2 else keep
            seen = seen | ~seen.any(-1, keepdim=True)  # a row that sees nothing is not read; this keeps it finite
            mask = seen[:, None, :first]  # (B, 1, 1 or T, T)
        size = q.shape[-1]
        runs = torch.is_grad_enabled() or torch.is_inference_mode_enabled()  # neither: multiply-accumulates are counted
        if size < KERNEL_WIDTH and x.shape[1] > 64 and x.device.type == "cpu" and runs:
            q, k, v = (F.pad(t, (0, KERNEL_WIDTH - size)) for t in (q, k, v))
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=size**-0.5)[..., :size]
        return self.out(attended.transpose(1, 2).flatten(2))

    def ffn(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Ladder(nn.Module):
    """A side block beside each tapped block of a network. Computes in fp32 outside autocast; no gradient reaches h.

    Args:
        width, depth, heads: of the network; the side blocks have as many heads.
        reduction: r; the side blocks are width / r wide.
        form: "sum" or "gate", see above.
        layers: blocks that are tapped, from 0 or, backwards, from -1; None = all.
        norm_first: whether the side blocks are pre-norm.
        eps: of the LayerNorms.

    Raises:
        PetlError: these sizes do not fit together.
    """

    def __init__(
        self,
        width: int,
        depth: int,
        heads: int,
        reduction: int = 8,
        form: str = "sum",
        layers: Sequence[int] | None = None,
        norm_first: bool = True,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.layers = chosen_blocks(depth, layers)
        self.width = side_width(width, heads, reduction)
        if form not in FORMS:
            raise PetlError(f"ladder form {form!r} is not known: {nearest(form, FORMS)}")
        e = self.width
        self.rung = {layer: j for j, layer in enumerate(self.layers)}  # block index -> index of its side block
        self.down = nn.ModuleList(Linear(width, e) for _ in self.layers)
        self.blocks = nn.ModuleList(SideBlock(e, heads, norm_first, eps) for _ in self.layers)
        self.norm = nn.LayerNorm(e, eps) if norm_first else nn.Identity()
        self.seed = Linear(width, e) if form == "gate" else None
        self.alpha = nn.Parameter(torch.zeros(len(self.layers))) if form == "gate" else None

    def begin(self, h0: Tensor) -> Tensor:
        """The side state before block 0, from the embedded tokens (B, T, d): W_0 h_0 (B, T, e), or a zero (1, 1, 1)."""
        if self.seed is None:
            return h0.new_zeros(1, 1, 1, dtype=torch.float32)  # of three axes, so that sums with it are fp32
        return self.seed(h0.detach().float()).float()  # under autocast products are not fp32, the state is

    def step(self, index: int, z: Tensor, h: Tensor, keep: Tensor | None = None, first: int | None = None) -> Tensor:
        """The side state after block ``index`` with output ``h`` (B, T, d); ``keep``, ``first`` as in `SideBlock`."""
        j = self.rung.get(index)
        if j is None:
            return z
        u = self.down[j](h.detach().float())  # (B, T, e)
        if self.alpha is None:
            return self.blocks[j](z + F.gelu(u), keep, first)
        mu = torch.sigmoid(self.alpha[j] / TEMPERATURE)
        return self.blocks[j](mu * z + (1 - mu) * u, keep, first)

    def finish(self, z: Tensor) -> Tensor:
        """What is read of the last state (B, T, e)."""
        return self.norm(z)

    def forward(self, h0: Tensor, taps: Sequence[Tensor], keep: Tensor | None = None) -> Tensor:
        """Embedded tokens and the outputs of all blocks in order, (B, T, d) each -> (B, T, e)."""
        z = self.begin(h0)
        for index, h in enumerate(taps):
            z = self.step(index, z, h, keep)
        return self.finish(z)


class FirstTokens:
    """A ladder of whose last state only the first tokens are wanted: its last side block computes no more.

    Args:
        ladder: which runs.
        first: how many tokens; None = all.
    """

    def __init__(self, ladder: Ladder, first: int | None) -> None:
        self.ladder, self.first = ladder, first

    def begin(self, h0: Tensor) -> Tensor:
        return self.ladder.begin(h0)

    def step(self, index: int, z: Tensor, h: Tensor, keep: Tensor | None = None) -> Tensor:
        last = index == self.ladder.layers[-1]
        return self.ladder.step(index, z, h, keep, self.first if last else None)


def side_width(width: int, heads: int, reduction: int) -> int:
    """e = d / r. Raises `PetlError` unless r divides the width and the heads divide e."""
    if reduction >= 1 and width % reduction == 0 and width // reduction % heads == 0:
        return width // reduction
    if reduction < 1 or width % reduction:
        what = f"does not divide the width {width}"
    else:
        what = f"gives a side width of {width // reduction}, which does not divide into {heads} heads"
    fine = [r for r in range(1, width // heads + 1) if width % r == 0 and width // r % heads == 0]
    raise PetlError(f"ladder reduction={reduction} {what}. Reductions that fit here: {', '.join(map(str, fine))}.")


def ladder_parameters(
    width: int,
    depth: int,
    reduction: int,
    form: str = "sum",
    layers: Sequence[int] | None = None,
    norm_first: bool = True,
) -> int:
    """Sheet section 2.1: L (d e + e + 12e² + 13e), 2e of the last norm, and for "gate" d e + e of W_0 and L gates."""
    rungs, e = len(chosen_blocks(depth, layers)), width // reduction
    down = width * e + e
    gate = down + rungs if form == "gate" else 0
    return rungs * (down + 12 * e * e + 13 * e) + (2 * e if norm_first else 0) + gate


def ladder_macs(
    width: int, depth: int, reduction: int, tokens: int, form: str = "sum", layers: Sequence[int] | None = None
) -> int:
    """Multiply-accumulates of one sample of ``tokens``: per rung T d e + 12 T e² + 2 T² e; for "gate" T d e of W_0."""
    rungs, e = len(chosen_blocks(depth, layers)), width // reduction
    down = tokens * width * e
    return rungs * (down + 12 * tokens * e * e + 2 * tokens * tokens * e) + (down if form == "gate" else 0)
