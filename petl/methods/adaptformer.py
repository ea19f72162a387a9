"""AdaptFormer (Chen et al., arXiv 2205.13535): a bottleneck parallel to the FFN of every block of a frozen network.

With x' the residual stream after attention:

    y = x' + FFN(LN x') + s W_up dropout(ReLU(W_down x' + b)) + s b'

The adapter reads x' itself, not LN x' (a common slip in ports). W_down is Kaiming-uniform, W_up and the biases are
zero: at the start the network computes what the frozen one does. In post-norm networks x' is behind the LayerNorm that
follows attention, and all three terms are in the sum that the next LayerNorm reads.

Deviations: none in pre-norm networks; the published code has no post-norm form.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from petl.backbones.base import BackboneView, BlockView, Call, EncoderView, ImageEncoder, TextEncoder
from petl.methods.adapter import AdapterPair
from petl.methods.base import EVERY_TOWER, Method, MethodModule, PairModule, register
from petl.nn.bottleneck import Bottleneck


class AdaptFormerModule(MethodModule):
    method: AdaptFormer
    changes_blocks: ClassVar[bool] = True

    def __init__(self, method: AdaptFormer, view: EncoderView) -> None:
        super().__init__(method, view)
        adapted = method.blocks(view)
        self.blocks = nn.ModuleList(
            Bottleneck(view.width, method.bottleneck, method.scale, dropout=method.dropout)
            if index in adapted
            else nn.Identity()
            for index in range(view.depth)
        )

    def block(self, index: int, block: BlockView, x: Tensor, call: Call, state: Any) -> tuple[Tensor, Any]:
        adapter = self.blocks[index]
        if isinstance(adapter, nn.Identity):
            return block.forward(x, call), state
        y = block.after_attention(x, block.attention(x, call))
        return block.after_ffn(y, block.ffn(y) + adapter(y)), state

    def macs(self, tokens: list[tuple[int, int]]) -> int:
        adapted = self.method.blocks(self.view)
        return sum(tokens[i][1] for i in adapted) * 2 * self.view.width * self.method.bottleneck

    def first_gradient(self) -> tuple[str, str]:
        return (
            f"block {self.first_changed()}, after the FFN",
            "its adapter is the first trained tensor that adds to the residual stream",
        )


@register("adaptformer")
@dataclass(frozen=True)
class AdaptFormer(Method):
    """AdaptFormer: a bottleneck parallel to the FFN of every block, or of some.

    Args:
        bottleneck: width of the adapters (8 in most tables of VTAB-1k).
        scale: factor s on what they add.
        dropout: dropout inside the adapters while training.
        layers: blocks that get one, from 0 or, backwards, from -1; None = all.
    """

    bottleneck: int = 64
    scale: float = 0.1
    dropout: float = 0.1
    layers: tuple[int, ...] | None = None

    towers: ClassVar[tuple[str, ...]] = EVERY_TOWER

    def __post_init__(self) -> None:
        self.require("bottleneck", self.bottleneck, 1)
        self.require("scale", self.scale, 0, integer=False)
        self.require("dropout", self.dropout, 0, integer=False, below=1)
        self.check_layers()

    def build(self, view: BackboneView) -> AdaptFormerModule:
        return AdaptFormerModule(self, view)

    def build_pair(self, vision: ImageEncoder, text: TextEncoder) -> PairModule:
        return AdapterPair(self, AdaptFormerModule(self, vision), AdaptFormerModule(self, text))

    def parameter_count(self, view: BackboneView) -> int:
        """2 C b + b + C for each block."""
        b, c = self.bottleneck, view.width
        return len(self.blocks(view)) * (2 * c * b + b + c)
