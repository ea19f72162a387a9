"""Full fine-tuning: every weight of the backbone is trained. The upper end that other methods are measured against.

With ``layers`` these blocks alone are, and what follows the last block: "Partial-k" of the VPT paper (arXiv 2203.12119)
where they are the last k. The other blocks and the embeddings rest in ``eval()``, and the gradient ends at the first.

Layer-wise learning-rate decay as in BEiT (arXiv 2106.08254) and MAE (arXiv 2111.06377): with the embeddings as layer 0,
block i (from 0) as layer i + 1, final norm and head as layer depth + 1,

    learning rate of layer l = lr · decay^(depth + 1 - l)

Deviation: what stands between embeddings and blocks (a norm before the first block) is layer 0, as in timm.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from petl.backbones.base import BackboneView, EncoderView
from petl.errors import PetlError
from petl.methods.base import EVERY_TOWER, Method, MethodModule, register


class _Full(MethodModule):
    method: FullFineTuning
    trains_backbone: ClassVar[bool] = True

    def __init__(self, method: FullFineTuning, view: BackboneView) -> None:
        super().__init__(method, view)
        self.trained = method.trained(view)

    def trains(self, name: str) -> bool:
        return name in self.trained

    def train(self, mode: bool = True) -> _Full:
        super().train(mode)
        modules, trained = dict(self.view.model.named_modules()), self.method.trained_places(self.view)
        for name, place in self.view.places(modules).items():
            if name and place not in trained and self.view.is_backbone(f"{name}."):
                modules[name].training = False
        return self

    def lr_scale(self, name: str) -> float:
        place = self.trained.get(name, self.view.depth)  # that of the head is behind the blocks
        return self.method.layer_decay ** (self.view.depth - place)

    def first_gradient(self) -> tuple[str, str]:
        if self.method.layers is None:
            return "patch embedding", "every weight is trained"
        return f"block {self.first_changed()}", "it is the first whose weights are trained"


@register("full_fine_tuning")
@dataclass(frozen=True)
class FullFineTuning(Method):
    """Full fine-tuning: train every weight of the backbone and the head.

    Args:
        layer_decay: factor on the learning rate from one layer to the one before it, in (0, 1]; 1 = none.
        layers: blocks that are trained, from 0 or, backwards, from -1, and with them what follows the last block; None
            = everything.
    """

    layer_decay: float = 1.0
    layers: tuple[int, ...] | None = None

    mergeable: ClassVar[bool] = True
    towers: ClassVar[tuple[str, ...]] = EVERY_TOWER

    def __post_init__(self) -> None:
        self.check_layers()
        self.require("layer_decay", self.layer_decay, 0, integer=False)
        if not 0 < self.layer_decay <= 1:
            raise PetlError(f"FullFineTuning(layer_decay={self.layer_decay}): it lies in (0, 1]; 0.65 to 0.9 is usual.")

    def build(self, view: BackboneView) -> MethodModule:
        return _Full(self, view)

    def parameter_count(self, view: BackboneView) -> int:
        trained = self.trained(view)
        return sum(p.numel() for n, p in view.model.named_parameters() if n in trained)

    def trained(self, view: EncoderView) -> dict[str, int]:
        """Places of the trained parameters (see `EncoderView.places`)."""
        places, trained = view.places(n for n, _ in view.model.named_parameters()), self.trained_places(view)
        return {n: p for n, p in places.items() if p in trained and view.is_backbone(n) and view.fine_tuned(n)}
