"""BitFit: which biases, the inert ones, what a block computes, what is kept for backward."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import petl
from petl.backbones import view as find_view
from petl.costs import count_saved_bytes
from tests.conftest import HF_SHAPE, _timm, build, outputs
from tests.methods.by_hand import FAMILIES, attached_and_frozen, check_block, moved, trained_count, vit_b


def test_counts_on_vit_b() -> None:
    view = vit_b()
    per_block = 768 + 3 * 768 + 768 + 768 + 3072 + 768  # norm1, qkv, out, norm2, fc1, fc2
    assert petl.BitFit().parameter_count(view) == 12 * per_block + 2 * 768 == 102_912
    assert trained_count(petl.BitFit(), view) == 102_912


@pytest.mark.parametrize("family", FAMILIES)
def test_a_block_by_hand(family: str) -> None:
    model, frozen = attached_and_frozen(family, petl.BitFit())
    shifts = {n.removesuffix(".bias"): t for n, t in model.petl.blocks[0].state_dict().items()}
    if family == "timm_vit":
        q, k, v = shifts["attn_qkv"].chunk(3)
        where = {"out": "attn_proj", "norm1": "norm1", "norm2": "norm2", "fc1": "mlp_fc1", "fc2": "mlp_fc2"}
        shift = {"q": q, "k": k, "v": v} | {part: shifts[name] for part, name in where.items()}
    else:
        where = {
            "q": "attention_q_proj", "k": "attention_k_proj", "v": "attention_v_proj", "out": "attention_o_proj",
            "norm1": "layernorm_before", "norm2": "layernorm_after", "fc1": "mlp_fc1", "fc2": "mlp_fc2",
        }  # fmt: skip
        shift = {part: shifts[name] for part, name in where.items()}
    assert len(shifts) == (6 if family == "timm_vit" else 8)
    check_block(family, model, {p: lambda x, p=p: frozen[p](x) + shift[p] for p in frozen})


def test_patch_embedding_and_final_norm_are_shifted_too(images: Tensor) -> None:
    model = moved(petl.attach(build("timm_vit"), petl.BitFit()))
    outer = model.petl.outer
    assert set(outer) == {"patch_embed_proj", "norm"}
    plain = build("timm_vit")
    tokens = F.conv2d(images, plain.patch_embed.proj.weight, None, stride=8).flatten(2).transpose(1, 2)
    expected = tokens + plain.patch_embed.proj.bias + outer["patch_embed_proj"].bias
    torch.testing.assert_close(model.patch_embed(images), expected, atol=1e-5, rtol=1e-5)
    x = torch.randn(2, 3, 24)
    torch.testing.assert_close(model.norm(x), plain.norm(x) + outer["norm"].bias)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_key_bias_is_inert(family: str, images: Tensor) -> None:
    model = petl.attach(build(family), petl.BitFit())
    outputs(model, images).pow(2).sum().backward()
    for block in model.petl.blocks:
        if family == "timm_vit":
            _, key, value = block["attn_qkv"].bias.grad.chunk(3)
        else:
            key, value = (block[f"attention_{p}_proj"].bias.grad for p in "kv")
        assert key.abs().max() < 1e-4 * value.abs().max()


def test_every_bias_of_the_feature_path_and_no_other(images: Tensor) -> None:
    from transformers import ViTConfig, ViTModel

    for model in (build("timm_dinov2"), build("timm_clip"), build("hf_clip_vision"), ViTModel(ViTConfig(**HF_SHAPE))):
        biases = {
            n: p.shape
            for n, p in model.named_parameters()
            if n.endswith(".bias") and not n.startswith(("head.", "pooler."))
        }
        module = petl.attach(model, petl.BitFit()).petl
        assert len(list(module.parameters())) == len(biases)
        assert sum(p.numel() for p in module.parameters()) == sum(s.numel() for s in biases.values())
        outputs(model, images).sum().backward()
        assert all(p.grad is not None for p in module.parameters())


def test_no_activation_is_kept_for_the_weights(images: Tensor) -> None:
    def kept(method: petl.BitFit) -> int:
        return count_saved_bytes(petl.attach(build("timm_vit"), method), images)

    assert kept(petl.BitFit()) < kept(petl.SSF())


def test_first_gradient() -> None:
    found = {f: petl.BitFit().build(find_view(build(f))).first_gradient()[0] for f in ("timm_vit", "hf_clip_vision")}
    assert found == {
        "timm_vit": "patch embedding",
        "hf_clip_vision": "norm before block 0",
    }  # its embedding has no bias


def test_a_network_without_biases_is_refused() -> None:
    norm = partial(nn.LayerNorm, bias=False)
    model = _timm(norm_layer=norm, qkv_bias=False, proj_bias=False, pre_norm=True)
    with pytest.raises(petl.PetlError, match="has none"):
        petl.attach(model, petl.BitFit())
    assert not hasattr(model, "petl")
