"""Classification heads on pooled features."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from torch import Tensor, nn

from petl.errors import PetlError, nearest
from petl.nn.linear import Linear

HEADS = ("linear", "bn_linear")


class Head(nn.Sequential):
    """``linear``: one linear layer. ``bn_linear``: BatchNorm without affine part before it (MAE's probing head).

    Weight: truncated normal, std 0.01; bias 0. (B, C) -> (B, K).
    """

    def __init__(self, kind: str, in_features: int, num_classes: int) -> None:
        if kind not in HEADS:
            raise PetlError(f"head {kind!r} is not known: {nearest(kind, HEADS)}.")
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        if kind == "bn_linear":
            layers["norm"] = nn.BatchNorm1d(in_features, affine=False, eps=1e-6)
        layers["fc"] = fc = Linear(in_features, num_classes)
        nn.init.trunc_normal_(fc.weight, std=0.01)
        nn.init.zeros_(fc.bias)
        super().__init__(layers)
        self.kind, self.in_features, self.num_classes = kind, in_features, num_classes

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "bn_linear" and self.training and len(x) == 1:
            raise PetlError(
                "head 'bn_linear' normalises over the batch and cannot train on a batch of 1: "
                "use a larger batch_size or head: linear."
            )
        return super().forward(x.contiguous())  # sums over the batch round by memory layout

    def describe(self) -> dict[str, Any]:
        return {"kind": self.kind, "in_features": self.in_features, "num_classes": self.num_classes}
