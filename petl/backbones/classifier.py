"""A backbone, with whatever is attached to it, and a classification head on its pooled features."""

from __future__ import annotations

from torch import Tensor, nn

from petl.backbones import view
from petl.nn.head import Head


class Classifier(nn.Module):
    """Images (B, 3, H, W) -> logits (B, K): ``head(features(backbone, x))``."""

    def __init__(self, backbone: nn.Module, head: Head) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head
        self._view = view(backbone)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self._view.features(x))
