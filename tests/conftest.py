"""Tiny random backbones of every family, and the private data that some tests need."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

torch.set_num_threads(1)
HF_SHAPE = {
    "hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 3, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def _timm(**options: object) -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 4, "num_heads": 3, "mlp_ratio": 2}
    return VisionTransformer(**({"num_classes": 5} | shape | options))


def _clip() -> nn.Module:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    return CLIPVisionModel(CLIPVisionConfig(**HF_SHAPE))


def _vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(ViTConfig(**HF_SHAPE, num_labels=5))


FAMILIES = {
    "timm_vit": _timm,
    "timm_dinov2": partial(_timm, init_values=0.5, reg_tokens=4, qk_norm=True, dynamic_img_size=True, num_classes=0),
    "timm_clip": partial(_timm, pre_norm=True, drop_path_rate=0.3, proj_drop_rate=0.2),
    "hf_clip_vision": _clip,
    "hf_vit": _vit,
}


def build(family: str) -> nn.Module:
    """A small network with the same random weights at every call; LayerNorms and biases are not trivial."""
    torch.manual_seed(7)
    model = FAMILIES[family]()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.15)
    return model.eval()


def outputs(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The tensor that a model returns: logits where it has a head, pooled features otherwise."""
    out = model(x)
    for name in ("logits", "pooler_output"):
        out = getattr(out, name, out) if not isinstance(out, torch.Tensor) else out
    assert isinstance(out, torch.Tensor)
    return out


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def private(*parts: str) -> Path:
    """A file of the private test data, or skip with the reason."""
    root = Path(os.environ.get("PETL_TEST_DATA") or Path(__file__).parents[2] / "shared" / "data")
    path = root.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"private test data is absent: {'/'.join(parts)} (set PETL_TEST_DATA)")
    return path
