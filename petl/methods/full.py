"""Full fine-tuning: every weight of the backbone is trained. The upper end that other methods are measured against."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from petl.backbones.base import BackboneView
from petl.methods.base import EVERY_TOWER, Method, MethodModule, register


class _Full(MethodModule):
    trains_backbone: ClassVar[bool] = True

    def first_gradient(self) -> tuple[str, str]:
        return "patch embedding", "every weight is trained"


@register("full_fine_tuning")
@dataclass(frozen=True)
class FullFineTuning(Method):
    """Full fine-tuning: train every weight of the backbone and the head."""

    mergeable: ClassVar[bool] = True
    towers: ClassVar[tuple[str, ...]] = EVERY_TOWER

    def build(self, view: BackboneView) -> MethodModule:
        return _Full(self, view)

    def parameter_count(self, view: BackboneView) -> int:
        return sum(p.numel() for n, p in view.model.named_parameters() if view.is_backbone(n) and view.fine_tuned(n))
