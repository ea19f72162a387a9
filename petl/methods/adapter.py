"""Adapters in series (Houlsby et al., arXiv 1902.00751; Pfeiffer et al., arXiv 2005.00247) on a frozen network.

A branch passes a bottleneck before it is added to the residual stream; with A the attention branch after its output
projection and F the FFN branch after its second linear layer:

    adapter(h) = h + W_up σ(W_down h + b) + b'
    Y  = X + adapter(A)        variant "houlsby" alone
    X' = Y + adapter(F)        both variants

In post-norm networks the sums are what the LayerNorms read. A and F are taken behind LayerScale, where there is one, as
they enter the sums.

Deviations. W_up = 0 at the start, so that the first step sees the frozen network (Houlsby: a small normal; tables of
VTAB-1k often use Xavier for both). W_down is Kaiming-uniform: with both at zero neither would ever move. The backbone's
LayerNorms stay frozen, and "pfeiffer" has no LayerNorm of its own: this is the form of the VTAB-1k tables.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from petl.backbones.base import BackboneView, BlockView, Call, EncoderView, ImageEncoder, TextEncoder
from petl.methods.base import EVERY_TOWER, Method, MethodModule, PairModule, register
from petl.nn.bottleneck import ACTIVATIONS, Bottleneck

PLACES = {"pfeiffer": ("ffn",), "houlsby": ("attention", "ffn")}


class AdapterModule(MethodModule):
    method: Adapter
    changes_blocks: ClassVar[bool] = True

    def __init__(self, method: Adapter, view: EncoderView) -> None:
        super().__init__(method, view)

        def adapter() -> Bottleneck:
            return Bottleneck(view.width, method.bottleneck, activation=method.activation)

        adapted = method.blocks(view)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({place: adapter() for place in PLACES[method.variant] if index in adapted})
            for index in range(view.depth)
        )

    def block(self, index: int, block: BlockView, x: Tensor, call: Call, state: Any) -> tuple[Tensor, Any]:
        adapters: nn.ModuleDict = self.blocks[index]  # type: ignore[assignment]
        if not adapters:
            return block.forward(x, call), state
        a = block.attention(x, call)
        if "attention" in adapters:
            a = a + adapters["attention"](a)
        y = block.after_attention(x, a)
        f = block.ffn(y)
        return block.after_ffn(y, f + adapters["ffn"](f)), state

    def macs(self, tokens: list[tuple[int, int]]) -> int:
        houlsby, adapted = self.method.variant == "houlsby", [tokens[i] for i in self.method.blocks(self.view)]
        return sum(n * houlsby + m for n, m in adapted) * 2 * self.view.width * self.method.bottleneck

    def first_gradient(self) -> tuple[str, str]:
        where = "attention" if self.method.variant == "houlsby" else "the FFN"
        return (
            f"block {self.first_changed()}, after {where}",
            "its adapter is the first trained tensor on the way of the data",
        )


class AdapterPair(PairModule):
    """Adapters in the blocks of both encoders, with nothing in common."""

    vision: MethodModule
    text: MethodModule

    def macs(self, visual_tokens: int, text_tokens: int) -> int:
        towers = (self.vision, visual_tokens), (self.text, text_tokens)
        return sum(tower.macs([(count, count)] * tower.view.depth) for tower, count in towers)

    def first_gradient(self) -> tuple[str, str]:
        where, why = self.vision.first_gradient()
        return f"{where}, of each encoder", why


@register("adapter")
@dataclass(frozen=True)
class Adapter(Method):
    """Adapter: a bottleneck in series after the FFN of every block (and after attention, variant "houlsby").

    Args:
        bottleneck: width b of the adapters.
        variant: "pfeiffer" (one per block, after the FFN) or "houlsby" (two, after attention and after the FFN).
        activation: "gelu" or "relu".
        layers: blocks that get adapters, from 0 or, backwards, from -1; None = all.
    """

    bottleneck: int = 8
    variant: str = "pfeiffer"
    activation: str = "gelu"
    layers: tuple[int, ...] | None = None

    towers: ClassVar[tuple[str, ...]] = EVERY_TOWER

    def __post_init__(self) -> None:
        self.require("bottleneck", self.bottleneck, 1)
        self.choose("variant", tuple(PLACES))
        self.choose("activation", tuple(ACTIVATIONS))
        self.check_layers()

    def build(self, view: BackboneView) -> AdapterModule:
        return AdapterModule(self, view)

    def build_pair(self, vision: ImageEncoder, text: TextEncoder) -> PairModule:
        return AdapterPair(self, AdapterModule(self, vision), AdapterModule(self, text))

    def parameter_count(self, view: BackboneView) -> int:
        """2 C b + b + C for each adapter."""
        b, c = self.bottleneck, view.width
        return len(self.blocks(view)) * len(PLACES[self.variant]) * (2 * c * b + b + c)
