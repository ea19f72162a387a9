"""Boxes in pairs: prediction i against truth i."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.ops import box_convert


def paired_iou(predicted: Tensor, truth: Tensor) -> Tensor:
    """IoU (B,) of boxes (B, 4), cxcywh in [0, 1]; the prediction is clamped to the canvas first.

    torchvision's `box_iou` compares all with all, (B, B); here one division per pair.
    """
    a = box_convert(predicted.float(), "cxcywh", "xyxy").clamp(0, 1)
    b = box_convert(truth.float(), "cxcywh", "xyxy")
    extent = (torch.minimum(a[:, 2:], b[:, 2:]) - torch.maximum(a[:, :2], b[:, :2])).clamp(min=0)
    overlap = extent.prod(1)
    areas = [(box[:, 2:] - box[:, :2]).prod(1) for box in (a, b)]
    return overlap / (areas[0] + areas[1] - overlap).clamp(min=1e-12)
