"""LN-tuning (Qi et al., arXiv 2211.08682): every LayerNorm of the backbone is trained, weight and bias, nothing else.

    y = (γ + Δγ) · norm(x) + (β + Δβ)

Trained are the shifts Δγ, Δβ, from zero: 2 C in each norm, two norms in each block, and the final norm. Norms that a
network has beyond these (before block 0, of queries and keys) are LayerNorms too and are trained. A norm that is an
Identity, as timm has inside its attention, is none.

Deviation: weight decay pulls the shifts to zero, so that it leads back to the frozen norm and not to γ = 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from petl.backbones.base import BackboneView
from petl.errors import PetlError
from petl.methods.base import Method, register
from petl.methods.layers import LayersModule, Shift, places_with


@register("ln_tuning")
@dataclass(frozen=True)
class LNTuning(Method):
    """LN-tuning: train weight and bias of every LayerNorm of the backbone, and the head.

    Args:
        layers: blocks whose norms are trained, from 0 or, backwards, from -1, and with them the norm behind the last
            block; None = all.
    """

    layers: tuple[int, ...] | None = None

    mergeable: ClassVar[bool] = True

    def __post_init__(self) -> None:
        self.check_layers()

    def build(self, view: BackboneView) -> LayersModule:
        module = LayersModule(self, view)
        for place in places_with(view, "weight", nn.LayerNorm, self.trained_places(view)):
            module.add(place, Shift(place.layer, tuple(n for n, _ in place.layer.named_parameters())))
        if not self.parameter_count(view):
            raise PetlError(f"'ln_tuning' trains LayerNorms, and this {view.family} has none with a weight.")
        return module

    def parameter_count(self, view: BackboneView) -> int:
        norms = places_with(view, "weight", nn.LayerNorm, self.trained_places(view))
        return sum(p.numel() for place in norms for p in place.layer.parameters())
