"""The layers of a block by part, and the layers outside the blocks."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from timm.layers import SwiGLU
from torch import Tensor, nn

import petl
from petl.backbones import view as find_view
from petl.backbones.base import Call
from tests.conftest import FAMILIES, _timm, build, outputs

PARTS = ["norm1", "q", "k", "v", "out", "norm2", "fc1", "fc2"]


@pytest.mark.parametrize("family", FAMILIES)
def test_parts_are_the_layers_in_order_and_have_the_weights(family: str) -> None:
    view = find_view(build(family))
    for module in view.block_modules():
        block = view.block_view(module)
        parts = block.parts()
        assert list(parts) == PARTS
        sizes = {name: (part.layer.weight.shape[0] // part.of, part.slice) for name, part in parts.items()}
        fused = family.startswith("timm")
        assert sizes == {name: (48 if name == "fc1" else 24, "qkv".find(name) if fused and name in "qkv" else 0)
                         for name in PARTS}  # fmt: skip
        if family == "timm_dinov2":
            continue  # its block weights are refused: norms of queries and keys
        for name, tensor in block.block_weights().items():
            part, kind = name.split(".")
            own = getattr(parts[part].layer, kind).chunk(parts[part].of)[parts[part].slice]
            assert torch.equal(own, tensor), name


@pytest.mark.parametrize("family", FAMILIES)
def test_a_block_runs_each_part_once_and_in_order(family: str) -> None:
    view = find_view(build(family))
    block = view.block_view(view.block_modules()[1])
    seen: list[nn.Module] = []
    layers = list(dict.fromkeys(part.layer for part in block.parts().values()))
    for layer in layers:
        layer.register_forward_hook(lambda m, a, out: seen.append(m))
    block.forward(torch.randn(2, 17, view.width), Call((None,) if family.startswith("hf") else ()))
    assert seen == layers


@pytest.mark.parametrize("family", FAMILIES)
def test_outer_layers_run_once_around_the_blocks(family: str, images: Tensor) -> None:
    model = build(family)
    view = find_view(model)
    outer, seen = view.outer_layers(), []
    pre_norm = ["pre_norm"] if family in ("timm_clip", "hf_clip_vision") else []
    assert list(outer) == ["patch_embedding", *pre_norm, "final_norm"]
    assert isinstance(outer["patch_embedding"], nn.Conv2d)
    for name, layer in (*outer.items(), ("block", view.block_modules()[0])):
        layer.register_forward_hook(lambda m, a, out, name=name: seen.append(name))
    outputs(model, images)
    assert seen == ["patch_embedding", *pre_norm, "block", "final_norm"]


def test_the_final_norm_is_the_one_that_computes() -> None:
    pooled, none = _timm(global_pool="avg"), _timm(final_norm=False)
    assert find_view(pooled).outer_layers()["final_norm"] is pooled.fc_norm
    assert list(find_view(none).outer_layers()) == ["patch_embedding"]


def test_blocks_and_embeddings_that_cannot_be_told_apart_are_refused() -> None:
    from timm.layers import HybridEmbed
    from timm.layers.attention import Attention

    ffn, attention = _timm(mlp_layer=SwiGLU), _timm()
    attention.blocks[0].attn = Attention(24, 3, gated=True)
    for model in (ffn, attention):
        view = find_view(model)
        with pytest.raises(petl.PetlError, match="are not known one by one"):
            view.block_view(view.block_modules()[0]).parts()
    hybrid = _timm(embed_layer=partial(HybridEmbed, nn.Conv2d(3, 24, 4, stride=4), proj=False), patch_size=1)
    with pytest.raises(petl.PetlError, match="no single convolution"):
        find_view(hybrid).outer_layers()
