"""LN-tuning: which norms, what a block computes, norms that are none."""

from __future__ import annotations

from functools import partial

import pytest
import torch.nn.functional as F
from timm.layers import RmsNorm
from torch import Tensor, nn

import petl
from tests.conftest import _timm, build, outputs
from tests.methods.by_hand import FAMILIES, attached_and_frozen, check_block, trained_count, vit_b

NAMES = {"timm_vit": ("norm1", "norm2"), "hf_vit": ("layernorm_before", "layernorm_after")}


def test_counts_on_vit_b() -> None:
    view = vit_b()
    assert petl.LNTuning().parameter_count(view) == (2 * 12 + 1) * 2 * 768 == 38_400
    assert trained_count(petl.LNTuning(), view) == 38_400


@pytest.mark.parametrize("family", FAMILIES)
def test_a_block_by_hand(family: str) -> None:
    model, layers = attached_and_frozen(family, petl.LNTuning())
    for part, name in zip(("norm1", "norm2"), NAMES[family], strict=True):
        trained = model.petl.blocks[0][name]
        norm = build(family).get_submodule(f"{model.petl.view.block_path}.0.{name}")
        weight, bias = norm.weight + trained.weight, norm.bias + trained.bias
        layers[part] = lambda x, w=weight, b=bias, eps=norm.eps: w * F.layer_norm(x, (24,), eps=eps) + b
    check_block(family, model, layers)


def test_norms_of_every_network_and_identities_that_are_none(images: Tensor) -> None:
    """timm has an Identity named norm inside its attention, on which peft's LNTuningConfig stops."""
    expected = {
        "timm_vit": {"norm1", "norm2"},
        "timm_dinov2": {"norm1", "norm2", "attn_q_norm", "attn_k_norm"},
        "hf_clip_vision": {"layer_norm1", "layer_norm2"},
    }
    assert isinstance(build("timm_vit").blocks[0].attn.norm, nn.Identity)
    for family, names in expected.items():
        module = petl.attach(build(family), petl.LNTuning()).petl
        assert all(set(block) == names for block in module.blocks)
    clip = petl.attach(build("timm_clip"), petl.LNTuning())
    assert set(clip.petl.outer) == {"norm_pre", "norm"}
    outputs(clip, images).sum().backward()
    assert all(p.grad is not None for p in clip.petl.parameters())


def test_norms_without_bias_and_networks_without_norms() -> None:
    model = petl.attach(_timm(norm_layer=partial(nn.LayerNorm, bias=False)), petl.LNTuning())
    assert sum(p.numel() for p in model.petl.parameters()) == 9 * 24
    assert petl.LNTuning().parameter_count(model.petl.view) == 9 * 24
    with pytest.raises(petl.PetlError, match="has none with a weight"):
        petl.attach(_timm(norm_layer=RmsNorm), petl.LNTuning())
