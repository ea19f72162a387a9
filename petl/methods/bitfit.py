"""BitFit (Ben Zaken et al., arXiv 2106.10199): every bias of the backbone is trained, no weight.

    y = W x + (b + Δb)         linear layers and the patch embedding
    y = γ · norm(x) + (b + Δb)  LayerNorms

Trained is the shift Δb, from zero; a bias is summed up before the layer runs, so that no activation is added to.
The bias of the keys (a third of that of a fused qkv, `k_proj`, a norm of keys) is counted but changes nothing: it adds
the same number to all attention logits of a query, and the softmax takes it away. On ViT-B/16 that is 9,216 of 102,912.

Deviation from the paper: Δb and not b is what weight decay pulls to zero, so that decay leads back to the frozen bias.
Layers without a bias get none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from petl.backbones.base import BackboneView
from petl.errors import PetlError
from petl.methods.base import Method, register
from petl.methods.layers import LayersModule, Shift, places_with


@register("bitfit")
@dataclass(frozen=True)
class BitFit(Method):
    """BitFit: train every bias of the backbone and the head.

    Args:
        layers: blocks whose biases are trained, from 0 or, backwards, from -1, and with them those behind the last
            block; None = all.
    """

    layers: tuple[int, ...] | None = None

    mergeable: ClassVar[bool] = True

    def __post_init__(self) -> None:
        self.check_layers()

    def build(self, view: BackboneView) -> LayersModule:
        module = LayersModule(self, view)
        for place in places_with(view, "bias", blocks=self.trained_places(view)):
            module.add(place, Shift(place.layer, ("bias",)))
        if not self.parameter_count(view):
            raise PetlError(f"'bitfit' trains biases, and this {view.family} has none. Use 'ln_tuning' or 'ssf'.")
        return module

    def parameter_count(self, view: BackboneView) -> int:
        return sum(p.layer.bias.numel() for p in places_with(view, "bias", blocks=self.trained_places(view)))
