"""SSF: counts, the start, what a block and the outer layers compute, biases that the merge adds."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

import petl
from petl.backbones import view as find_view
from tests.conftest import _timm, build, outputs
from tests.methods.by_hand import FAMILIES, attached_and_frozen, check_block, moved, trained_count, vit_b


def test_counts_on_vit_b() -> None:
    view, method = vit_b(), petl.SSF()
    per_block = 2 * (768 + 3 * 768 + 768 + 768 + 3072 + 768)  # norm1, qkv, out, norm2, fc1, fc2
    assert method.parameter_count(view) == 12 * per_block + 2 * 2 * 768 == 205_824
    assert trained_count(method, view) == 205_824
    clip = vit_b(pre_norm=True)  # one norm more, before block 0
    assert method.parameter_count(clip) == trained_count(method, clip) == 205_824 + 2 * 768


@pytest.mark.parametrize("family", FAMILIES)
def test_a_block_by_hand(family: str) -> None:
    model, frozen = attached_and_frozen(family, petl.SSF())
    parts = model.petl.blocks[0]
    scale = {name: part.scale.detach() for name, part in parts.items()}
    shift = {name: part.shift.detach() for name, part in parts.items()}
    if family == "timm_vit":
        for vectors in (scale, shift):
            vectors |= dict(zip("qkv", vectors.pop("qkv").chunk(3), strict=True))
    check_block(family, model, {p: lambda x, p=p: scale[p] * frozen[p](x) + shift[p] for p in frozen})


def test_outer_layers_are_scaled_and_shifted(images: Tensor) -> None:
    model, plain = moved(petl.attach(build("timm_clip"), petl.SSF())), build("timm_clip")
    embedding, pre_norm, final_norm = (model.petl.outer[n] for n in ("patch_embedding", "pre_norm", "final_norm"))
    expected = plain.patch_embed(images) * embedding.scale + embedding.shift
    torch.testing.assert_close(model.patch_embed(images), expected, atol=1e-5, rtol=1e-5)
    x = torch.randn(2, 3, 24)
    for name, part in (("norm_pre", pre_norm), ("norm", final_norm)):
        expected = plain.get_submodule(name)(x) * part.scale + part.shift
        torch.testing.assert_close(model.get_submodule(name)(x), expected, atol=1e-5, rtol=1e-5)


def test_the_start_is_noise_of_the_given_size() -> None:
    module = petl.SSF().build(find_view(_timm(embed_dim=384, num_heads=4)))
    scales, shifts = (
        torch.cat([p.detach().flatten() for n, p in module.named_parameters() if n.endswith(kind)])
        for kind in ("scale", "shift")
    )
    assert scales.mean() == pytest.approx(1, abs=2e-3)
    assert shifts.mean() == pytest.approx(0, abs=2e-3)
    for spread in (scales.std(), shifts.std()):
        assert spread == pytest.approx(0.02, rel=0.05)
    assert not petl.SSF().identity_at_start
    assert petl.SSF(init_std=0).identity_at_start


def test_the_merge_adds_biases_where_there_were_none(images: Tensor) -> None:
    model = moved(petl.attach(_timm(qkv_bias=False).eval(), petl.SSF()))
    before, part = model(images), copy.deepcopy(model.petl.blocks[2]["qkv"])
    assert model.blocks[2].attn.qkv.bias is None
    petl.merge(model)
    torch.testing.assert_close(model(images), before, atol=1e-5, rtol=1e-4)
    assert torch.equal(model.blocks[2].attn.qkv.bias, part.shift)
    assert all(p.requires_grad for p in model.parameters()), "the new biases go with their weights"
    clip = moved(petl.attach(build("hf_clip_vision").requires_grad_(False), petl.SSF()))
    before = outputs(clip, images)
    petl.merge(clip)
    torch.testing.assert_close(outputs(clip, images), before, atol=1e-5, rtol=1e-4)
    assert clip.embeddings.patch_embedding.bias is not None
    assert not any(p.requires_grad for p in clip.parameters())


def test_bad_options() -> None:
    with pytest.raises(petl.PetlError, match="init_std must be a number of at least 0"):
        petl.SSF(init_std=-0.1)
