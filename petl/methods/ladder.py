"""Ladder Side-Tuning (Sung et al., arXiv 2206.06522): a narrow transformer beside a frozen one, fed by its blocks.

With h_0 the embedded tokens, h_l the output of block l (B, T, d), nothing of it with a gradient, and e = d / r:

    form "gate"    z_0 = W_0 h_0     z_l = Block_l(μ_l z_{l-1} + (1 - μ_l) W_l h_l),   μ_l = sigmoid(α_l / 0.1), α_l = 0
    form "sum"     z_0 = 0           z_l = Block_l(z_{l-1} + GELU(W_l h_l))            (AutoGnothi, arXiv 2410.21815)
    output         h_L + W_up LN(z_L),   W_up = 0 at the start           (in post-norm networks without this LN)

What the network has after its last block (norm, pooling, head) reads the output. The backward pass ends there and in
the side blocks: of the backbone only the h_l of tapped blocks are kept, for the gradients of W_l.

Deviations. The paper feeds W_up LN(z_L) alone to the frozen head; here it is added to h_L, so that the first step sees
the frozen network. "sum" is the default form; the paper's is "gate". No dropout beside the network. Weights pruned from
the backbone (``init="prune"``) are chosen by magnitude, not by Fisher information: one set of residual channels for all
blocks, by the L1 norms of the rows that write to them; the paper chooses layer after layer. Side blocks have GELU and
plain LayerNorms whatever the backbone has, and an FFN of 4e; where the backbone's has fewer rows, the others start at
random with an output of zero. Each keeps the attention mask of its block, padding and causality included, but not the
positions that DETR adds in every layer. Encoders only: there is no decoder to cross-attend.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from petl.backbones.base import BackboneView, BlockView, Call, EncoderView, ImageEncoder, TextEncoder
from petl.backbones.replay import MASK, visible
from petl.backbones.taps import Reader
from petl.errors import PetlError
from petl.methods.base import EVERY_TOWER, Method, MethodModule, PairModule, register
from petl.nn.bottleneck import up_projection
from petl.nn.ladder import FORMS, FirstTokens, Ladder, SideBlock, ladder_macs, ladder_parameters

INITS = ("random", "prune")


class LadderModule(MethodModule):
    """The state is z (B, T, e), in fp32 whatever the dtype of the encoder."""

    method: LadderSideTuning
    changes_blocks: ClassVar[bool] = True

    def __init__(self, method: LadderSideTuning, view: EncoderView) -> None:
        super().__init__(method, view)
        blocks = [view.block_view(m) for m in view.block_modules()]
        eps = next((m.eps for m in blocks[0].module.modules() if isinstance(m, nn.LayerNorm)), 1e-6)
        self.ladder = Ladder(
            view.width, view.depth, view.heads, method.reduction, method.form, method.layers, view.norm_first, eps
        )
        self.up = up_projection(self.ladder.width, view.width)
        if method.init == "prune":
            weights = [blocks[i].block_weights() for i in self.ladder.layers]
            prune(weights, cast(list[SideBlock], list(self.ladder.blocks)), view.heads)

    def begin(self, x: Tensor) -> Tensor:
        return self.ladder.begin(x)

    def block(self, index: int, block: BlockView, x: Tensor, call: Call, state: Any) -> tuple[Tensor, Any]:
        with torch.no_grad():
            h = block.forward(x, call)
        if index in self.ladder.rung:
            keep = visible(call, h.shape[1], h.device)
            if self.checkpointing and self.training and torch.is_grad_enabled():
                state = checkpoint(
                    self.ladder.step, index, state, h, keep, use_reentrant=False, preserve_rng_state=False
                )
            else:
                state = self.ladder.step(index, state, h, keep)
        if index + 1 < self.view.depth:
            return h, state
        return self.last(h, state), state

    def last(self, h: Tensor, z: Tensor) -> Tensor:
        return h + self.up(self.ladder.finish(z)).to(h.dtype)

    def reads(self) -> tuple[str, ...]:
        tapped = (*self.ladder.layers, self.view.depth - 1)
        seed = ["embedded"] if self.ladder.seed else []
        mask = () if isinstance(self.view, BackboneView) else (MASK,)  # a vision transformer attends to all its tokens
        return (*seed, *mask, *dict.fromkeys(f"block.{i}" for i in tapped))

    def reader(self, first: int | None) -> Reader:
        return FirstTokens(self.ladder, first)

    def macs(self, tokens: list[tuple[int, int]]) -> int:
        view, method, count = self.view, self.method, tokens[0][0]
        rungs = ladder_macs(view.width, view.depth, method.reduction, count, method.form, method.layers)
        return rungs + count * self.ladder.width * view.width

    def first_gradient(self) -> tuple[str, str]:
        return "output of the last block", "the side blocks read the others without a gradient"


class LadderPair(PairModule):
    vision: LadderModule
    text: LadderModule

    def macs(self, visual_tokens: int, text_tokens: int) -> int:
        return self.vision.macs([(visual_tokens,) * 2]) + self.text.macs([(text_tokens,) * 2])

    def first_gradient(self) -> tuple[str, str]:
        return "outputs of the last layers", "the side blocks read the encoders without a gradient"


@torch.no_grad()
def prune(weights: Sequence[dict[str, Tensor]], blocks: Sequence[SideBlock], heads: int) -> None:
    """Set side blocks to parts of frozen blocks (`BlockView.block_weights`), the rows with the largest L1 norms.

    Kept are e residual channels, the same in all blocks; in every head e / H rows of q, k and v together; 4e rows of
    the FFN. What a matrix keeps of its outputs, the next one keeps of its inputs.
    """
    e = blocks[0].out.out_features
    writers = sum(w[f"{part}.weight"].float().abs().sum(1) for w in weights for part in ("out", "fc2"))
    channels = _largest(cast(Tensor, writers), e)
    for w, block in zip(weights, blocks, strict=True):
        w = {name: t.float() for name, t in w.items()}
        q, k, v = (w[f"{part}.weight"][:, channels] for part in "qkv")  # (d, e)
        score = (q.abs() + k.abs() + v.abs()).sum(1).unflatten(0, (heads, -1))  # (H, d / H)
        if score.shape[1] < e // heads:
            raise PetlError(
                f"init='prune' wants {e // heads} rows of every attention head and this backbone's have "
                f"{score.shape[1]}; take a larger reduction."
            )
        first = torch.arange(heads, device=score.device)[:, None] * score.shape[1]
        rows = (_largest(score, e // heads) + first).flatten()  # (e,)
        hidden = _largest(w["fc1.weight"][:, channels].abs().sum(1), min(4 * e, len(w["fc1.weight"])))
        for i, part in enumerate("qkv"):
            _set(block.qkv, w, part, rows, channels, at=i * e)
        _set(block.out, w, "out", channels, rows)
        block.fc2.weight.zero_()  # the inputs that stay so belong to rows of fc1 that the backbone does not have
        _set(block.fc1, w, "fc1", hidden, channels)
        _set(block.fc2, w, "fc2", channels, hidden)
        for part, norm in (("norm1", block.norm1), ("norm2", block.norm2)):
            for name, parameter in norm.named_parameters():
                if f"{part}.{name}" in w:
                    parameter.copy_(w[f"{part}.{name}"][channels])


def _largest(score: Tensor, count: int) -> Tensor:
    """Indices of the ``count`` largest entries along the last axis, in their order."""
    return score.topk(count).indices.sort().values


def _set(layer: nn.Linear, weights: dict[str, Tensor], part: str, rows: Tensor, columns: Tensor, at: int = 0) -> None:
    """Rows ``at`` and following of ``layer`` to these rows and columns of a part's weight; no bias counts as zero."""
    span = slice(at, at + len(rows))
    layer.weight[span, : len(columns)] = weights[f"{part}.weight"][rows][:, columns].to(layer.weight.device)
    bias = weights.get(f"{part}.bias")
    layer.bias[span] = 0 if bias is None else bias[rows].to(layer.bias.device)


@register("ladder_side_tuning")
@dataclass(frozen=True)
class LadderSideTuning(Method):
    """Ladder side-tuning: a narrow transformer beside the frozen one, no gradient inside it.

    Args:
        reduction: r; the side blocks are width / r wide and have as many heads as the backbone.
        form: how a block's output enters: "sum" (GELU and a sum, as AutoGnothi) or "gate" (a learned mean, as LST).
        layers: blocks that have a side block, from 0 or, backwards, from -1; None = all.
        init: side blocks start at "random" or as pruned blocks of the backbone, "prune".
    """

    reduction: int = 8
    form: str = "sum"
    layers: tuple[int, ...] | None = None
    init: str = "random"

    towers: ClassVar[tuple[str, ...]] = EVERY_TOWER

    def __post_init__(self) -> None:
        self.require("reduction", self.reduction, 1)
        self.choose("form", FORMS)
        self.choose("init", INITS)
        self.check_layers()

    def build(self, view: BackboneView) -> LadderModule:
        return LadderModule(self, view)

    def build_pair(self, vision: ImageEncoder, text: TextEncoder) -> PairModule:
        return LadderPair(self, LadderModule(self, vision), LadderModule(self, text))

    def parameter_count(self, view: BackboneView) -> int:
        """Sheet autognothi.md, section 2.1, and (e + 1) d of the up-projection."""
        rungs = ladder_parameters(view.width, view.depth, self.reduction, self.form, self.layers, view.norm_first)
        return rungs + (view.width // self.reduction + 1) * view.width
