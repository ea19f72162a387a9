"""Linear probing: the backbone stays as it is, only the classification head is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from petl.backbones.base import BackboneView
from petl.methods.base import EVERY_TOWER, Method, MethodModule, register


class _Probe(MethodModule):
    def reads(self) -> tuple[str, ...]:
        return ()


@register("linear_probe")
@dataclass(frozen=True)
class LinearProbe(Method):
    """Linear probing: train the head alone on frozen features."""

    mergeable: ClassVar[bool] = True
    towers: ClassVar[tuple[str, ...]] = EVERY_TOWER

    def build(self, view: BackboneView) -> MethodModule:
        return _Probe(self, view)

    def parameter_count(self, view: BackboneView) -> int:
        return 0
