"""Backbone views, loading by name, and the identity of frozen weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import petl
from petl.backbones import load_backbone
from petl.backbones import view as find_view
from petl.backbones.base import Call
from petl.backbones.identity import identify
from tests.conftest import FAMILIES, _timm, build, outputs


@pytest.mark.parametrize("family", FAMILIES)
def test_the_two_halves_of_each_block_are_the_block(family: str) -> None:
    model = build(family)
    view = find_view(model)
    x = torch.randn(2, view.prefix_tokens + 16, view.width)
    for module in view.block_modules():
        block = view.block_view(module)
        args = (None,) if family.startswith("hf") else ()
        y = x + block.attention(x, Call(args))
        torch.testing.assert_close(y + block.ffn(y), module(x, *args), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_class_token_row_is_the_softmax_of_the_network(family: str) -> None:
    model = build(family)
    view = find_view(model)
    block = view.block_view(view.block_modules()[1])
    block.capture()
    x = torch.randn(2, view.prefix_tokens + 16, view.width)
    args = (None,) if family.startswith("hf") else ()
    branch, row = block.attention_and_cls_row(x, Call(args))
    block.release()
    torch.testing.assert_close(branch, block.attention(x, Call(args)))
    if family.startswith("timm"):  # the eager map of timm, caught behind its dropout
        attn, maps = block.module.attn, []
        attn.fused_attn = False
        handle = attn.attn_drop.register_forward_hook(lambda m, a, out: maps.append(out))
        block.attention(x, Call())
        handle.remove()
    else:
        attn = block._attn()
        attn.config._attn_implementation = "eager"
        inner = block.module.layer_norm1(x) if family == "hf_clip_vision" else block.module.layernorm_before(x)
        maps = [attn(inner, None)[1]]
    torch.testing.assert_close(row, maps[0].mean(1)[:, 0], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_features_are_what_the_own_head_gets(family: str, images: torch.Tensor) -> None:
    model = build(family)
    view = find_view(model)
    features = view.features(images)
    assert features.shape == (3, view.width)
    out = outputs(model, images)
    head = view.head_modules()
    torch.testing.assert_close(head[0][1](features) if head else features, out)


def test_hidden_states_of_hf_models_stay_available(images: torch.Tensor) -> None:
    model = petl.attach(build("hf_clip_vision"), petl.SparseTuning(keep_rate=0.5))
    out = model(images, output_hidden_states=True)
    assert [h.shape[1] for h in out.hidden_states] == [17, 17, 10, 7, 5]


def test_own_head_is_trained_and_backbone_is_not() -> None:
    model = petl.attach(build("timm_vit"), petl.SparseTuning())
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {"head.weight", "head.bias"} <= trained
    assert all(n.startswith(("petl.", "head.")) for n in trained)


def test_identity_tells_weights_from_architecture_and_ignores_head_and_adapters() -> None:
    model = build("timm_vit")
    before = identify(find_view(model))
    with torch.no_grad():
        model.head.weight.add_(1)
    petl.attach(model, petl.SparseTuning())
    assert identify(find_view(model)) == before == model.petl.identity
    other = build("timm_vit")
    with torch.no_grad():
        other.blocks[0].mlp.fc1.bias[0] += 1e-4 * other.blocks[0].mlp.fc1.bias[0].abs() + 1e-6
    assert "other weights" in (before.difference(identify(find_view(other))) or "")
    assert "another architecture" in (before.difference(identify(find_view(_timm(depth=3)))) or "")
    assert before.difference(identify(find_view(build("timm_vit").bfloat16()))) is None  # recognised by its bf16 digest
    assert before.difference(identify(find_view(build("timm_vit")))) is None


def test_load_backbone_by_name_with_arguments_and_local_weights(tmp_path: Path) -> None:
    args = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "mlp_ratio": 2}
    args["norm_eps"] = 1e-5
    source = load_backbone("timm/vit_tiny_patch16_224", args, pretrained=False)
    assert source.blocks[0].norm1.eps == 1e-5
    head = {"head.weight": torch.zeros(7, 24), "head.bias": torch.zeros(7)}
    save_file({**source.state_dict(), **head}, tmp_path / "w.safetensors")
    loaded = load_backbone("timm/vit_tiny_patch16_224", args, tmp_path / "w.safetensors")
    assert identify(find_view(loaded)) == identify(find_view(source))
    with pytest.raises(petl.PetlError, match="does not fit"):
        load_backbone("timm/vit_tiny_patch16_224", {**args, "depth": 3}, tmp_path / "w.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "w.safetensors").read_bytes()[:-10])
    with pytest.raises(petl.PetlError, match="not a readable"):
        load_backbone("timm/vit_tiny_patch16_224", args, tmp_path / "cut.safetensors")


@pytest.mark.parametrize(
    ("name", "args", "word"),
    [
        ("timm/vit_base_patch16_244", {}, "vit_base_patch16_224"),
        ("vit_base_patch16_224", {}, "starts with 'timm/'"),
        ("bundled/tiny_clip_visoin", {}, "bundled/tiny_clip_vision"),
        ("timm/vit_tiny_patch16_224", {"img_sise": 32}, "img_size"),
        ("timm/vit_tiny_patch16_224", {"checkpoint_path": "x.pth"}, "checkpoint_path"),
        ("timm/vit_tiny_patch16_224", {"embed_dim": 25}, "could not be built"),
        ("timm/hf-hub:someone/model", {}, "timm has no model"),
        ("hf/no/such/place/at/all", {}, "could not be built"),
    ],
)
def test_bad_names_and_arguments(name: str, args: dict, word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(petl.PetlError, match=word):
        load_backbone(name, args, pretrained=False)


def test_list_backbones() -> None:
    assert petl.list_backbones("bundled/*") == ["bundled/tiny_clip_vision"]
    assert "timm/vit_base_patch16_224.orig_in21k" in petl.list_backbones()
    assert "timm/deit_tiny_patch16_224.fb_in1k" in petl.list_backbones("timm/deit*")
