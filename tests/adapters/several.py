"""Adapters for the tests of sets. "Alone" is what `petl.load(directory)` gives for one of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

import petl
from petl.backbones.classifier import Classifier
from petl.methods.base import Method
from petl.nn.head import Head
from tests.conftest import build, outputs

PREPROCESSING = {"image_size": [32, 32], "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic",
                 "mode": "resize"}  # fmt: skip
WIDTH = 24
MIXTURE: dict[str, tuple[Method, int]] = {
    "probe": (petl.LinearProbe(), 3),
    "ladder": (petl.LadderSideTuning(reduction=4), 4),
    "gate": (petl.LadderSideTuning(reduction=2, form="gate", layers=(0, 2)), 5),
    "sparse": (petl.SparseTuning(bottleneck=4), 6),
    "bits": (petl.BitFit(), 4),
}


def base(family: str = "timm_clip") -> nn.Module:
    return build(family)


def adapter(where: Path, method: Method, classes: int = 4, family: str = "timm_clip", **records: Any) -> Path:
    """An adapter with random trained tensors and head; labels carry the name of its folder."""
    torch.manual_seed(sum(map(ord, where.name)))
    model = Classifier(petl.attach(base(family), method), Head("linear", WIDTH, classes))
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    labels = [f"{where.name}-{i}" for i in range(classes)]
    return petl.save(model, where, **({"labels": labels, "preprocessing": PREPROCESSING} | records))


def alone(directory: Path, x: torch.Tensor, family: str = "timm_clip") -> torch.Tensor:
    with torch.inference_mode():
        return outputs(petl.load(directory, backbone=base(family)).model, x)


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return found.shape == expected.shape and bool((found - expected).abs().max() <= 1e-5)
