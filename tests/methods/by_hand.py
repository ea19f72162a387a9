"""One pre-norm block written out with plain operations, layer by layer, for tests to change a layer of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import petl
from petl.backbones import view as find_view
from petl.backbones.base import BackboneView
from petl.methods.base import Method
from tests.conftest import build

Layers = dict[str, Callable[[Tensor], Tensor]]
FAMILIES = ("timm_vit", "hf_vit")  # one with a fused qkv, one with split projections; both have exact GELU


def frozen_layers(model: nn.Module, index: int = 0) -> Layers:
    """What each layer of a block computes, from copies of its weights."""
    block = find_view(model).block_view(find_view(model).block_modules()[index])
    w = {name: t.clone() for name, t in block.block_weights().items()}
    eps, width = block.parts()["norm1"].layer.eps, len(w["norm1.weight"])

    def linear(part: str) -> Callable[[Tensor], Tensor]:
        return lambda x: x @ w[f"{part}.weight"].T + w[f"{part}.bias"]

    def norm(part: str) -> Callable[[Tensor], Tensor]:
        return lambda x: F.layer_norm(x, (width,), w[f"{part}.weight"], w[f"{part}.bias"], eps)

    return {p: norm(p) if "norm" in p else linear(p) for p in ("norm1", "q", "k", "v", "out", "norm2", "fc1", "fc2")}


def run(layers: Layers, x: Tensor, heads: int) -> Tensor:
    """The block on tokens (B, N, C)."""
    h = layers["norm1"](x)
    q, k, v = (layers[p](h).unflatten(-1, (heads, -1)).transpose(1, 2) for p in "qkv")
    a = (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(-1) @ v
    y = x + layers["out"](a.transpose(1, 2).flatten(2))
    return y + layers["fc2"](F.gelu(layers["fc1"](layers["norm2"](y))))


def moved(model: nn.Module, size: float = 0.2) -> nn.Module:
    """The same model with every trained tensor of its method somewhere else."""
    with torch.no_grad():
        for p in model.petl.parameters():
            p.add_(size * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    return model


def attached_and_frozen(family: str, method: Method) -> tuple[nn.Module, Layers]:
    """A small network with trained tensors that are not at their start, and the frozen layers of its first block."""
    model = build(family)
    return moved(petl.attach(model, method)), frozen_layers(build(family))


def first_block(model: nn.Module, x: Tensor) -> Tensor:
    """What the first block of ``model`` computes on tokens (B, N, C)."""
    block = find_view(model).block_modules()[0]
    return block(x) if hasattr(model, "blocks") else block(x, None)


def check_block(family: str, model: nn.Module, layers: Layers) -> None:
    """The first block of ``model`` computes what ``layers`` say, attached and merged, which is not the frozen block."""
    heads, x = model.petl.view.heads, torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(2))
    expected, frozen = run(layers, x, heads), first_block(build(family), x)
    torch.testing.assert_close(run(frozen_layers(build(family)), x, heads), frozen, atol=1e-5, rtol=1e-5)
    assert (frozen - expected).abs().max() > 0.05, "the trained tensors change nothing worth testing"
    torch.testing.assert_close(first_block(model, x), expected, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(first_block(petl.merge(model), x), expected, atol=2e-5, rtol=1e-4)


def vit_b(**options: Any) -> BackboneView:
    """The view of a ViT-B/16 without memory for its weights."""
    import timm

    with torch.device("meta"):
        return find_view(timm.create_model("vit_base_patch16_224", num_classes=0, **options))


def trained_count(method: Method, view: BackboneView) -> int:
    """Trained numbers that the method really has on this backbone."""
    with torch.device("meta"):
        return sum(p.numel() for p in method.build(view).parameters())
