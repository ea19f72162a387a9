"""Frozen weights in bf16 under every method: what is cast, what stays fp32, whose fingerprint is kept."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import petl
from petl.adapters.artefact import read_config, save
from petl.adapters.state import trained_tensors
from petl.methods import list_methods
from petl.methods.attach import attached
from petl.methods.base import Method
from petl.methods.frozen_dtype import cast_frozen, computes_in_bf16
from tests.conftest import build, expressions_and_images, grounding
from tests.test_contract import classifier, train, variants

METHODS = [
    pytest.param(method, id=f"{name}{i or ''}")
    for name in list_methods()
    for i, method in enumerate(variants(name))
    if method.backbones
]


def dtypes(tensors: object) -> set[torch.dtype]:
    return {t.dtype for t in tensors}  # type: ignore[attr-defined]


@pytest.mark.parametrize("family", ["timm_dinov2", "hf_clip_vision"])
@pytest.mark.parametrize("method", METHODS)
def test_trained_tensors_and_their_optimiser_stay_fp32(method: Method, family: str, images: Tensor, tmp_path) -> None:
    if ("timm_vit" if family.startswith("timm") else family) not in method.backbones:
        pytest.skip("not of this family")
    model, plain = classifier(method, family), classifier(method, family)
    module = attached(model.backbone)
    before, identity = module.view.model.state_dict(), module.identity
    mine = {n for n in before if module.view.is_backbone(n) and not module.owns(n)}
    cast_frozen(module, torch.bfloat16)
    held = {n: t for n, t in module.view.model.state_dict().items() if n in mine and t.is_floating_point()}
    if module.trains_backbone:
        assert dtypes(held.values()) == {torch.float32}
        return
    assert dtypes(held.values()) == {torch.bfloat16}
    assert all(torch.equal(t, before[n].bfloat16()) for n, t in held.items())
    assert dtypes(t for t in trained_tensors(model).values() if t.is_floating_point()) == {torch.float32}

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    out = model.train()(images)  # fp32 images
    out.float().pow(2).sum().backward()
    assert dtypes(p.grad for p in model.parameters() if p.grad is not None) == {torch.float32}
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    optimizer.step()
    assert dtypes(v for s in optimizer.state.values() for v in s.values()) == {torch.float32}

    assert identity.weights is not None
    assert module.identity == attached(plain.backbone).identity
    save(model, tmp_path / "adapter", labels=list("abcd"))
    assert read_config(tmp_path / "adapter")["backbone"]["weights"] == identity.weights
    for base in (build(family), build(family).bfloat16()):
        loaded = petl.load(tmp_path / "adapter", backbone=base).model
        found = trained_tensors(loaded)
        assert all(torch.equal(t, found[n]) for n, t in trained_tensors(model).items())
    assert torch.equal(loaded(images.bfloat16()), model.eval()(images)), "not what a bf16 base computes"


@pytest.mark.parametrize("method", [petl.LoRA(), petl.SparseTuning(), petl.LadderSideTuning()], ids=lambda m: m.name)
def test_the_network_computes_nearly_what_it_did(method: Method, images: Tensor) -> None:
    model, plain = classifier(method, "timm_vit"), classifier(method, "timm_vit")
    plain.head.load_state_dict(model.head.state_dict())
    plain.backbone.petl.load_state_dict(model.backbone.petl.state_dict())
    cast_frozen(attached(model.backbone), torch.bfloat16)
    keep = attached(model.backbone).first_changed() == 0 and method.name == "sparse_tuning"  # which patches may change
    torch.testing.assert_close(model(images).float(), plain(images), atol=0.15 if keep else 0.05, rtol=0.05)


@pytest.mark.parametrize("pair", ["detr+bert", "vit+bert", "clip"])
@pytest.mark.parametrize("method", [petl.DARA(bottleneck=4, relation_dim=4, shared_dim=8),
                                    petl.M2IST(bottleneck=4, relation_dim=4, shared_dim=8),
                                    petl.AdaptFormer(bottleneck=4)], ids=lambda m: m.name)  # fmt: skip
def test_both_encoders_of_a_pair(method: Method, pair: str) -> None:
    model = grounding(pair, method)
    for tower in (model.petl.vision, model.petl.text):
        cast_frozen(tower, torch.bfloat16)
    for view in (model.vision_view, model.text_view):
        named = (*view.model.named_parameters(), *view.model.named_buffers())
        assert dtypes(t for n, t in named if view.is_backbone(n) and t.is_floating_point()) == {torch.bfloat16}
    assert dtypes(p for p in model.parameters() if p.requires_grad) == {torch.float32}
    boxes = model.train()(*expressions_and_images(model))
    assert boxes.dtype == torch.float32
    boxes.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_casting_twice_changes_nothing_more(images: Tensor) -> None:
    model = petl.attach(build("timm_vit"), petl.LinearProbe())
    cast_frozen(attached(model), torch.bfloat16)
    before = attached(model).view.features(images)
    cast_frozen(attached(model), torch.bfloat16)
    assert torch.equal(attached(model).view.features(images), before)
    assert sum(len(m._forward_pre_hooks) for m in model.modules()) == 1


def test_training_goes_down_as_in_fp32(images: Tensor) -> None:
    losses = []
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        model: nn.Module = classifier(petl.LoRA(), "timm_vit")
        cast_frozen(attached(model.backbone), dtype)  # type: ignore[arg-type]
        before = model(images).float().pow(2).sum()
        train(model, images, steps=10)
        losses.append(float((model(images).float() * torch.linspace(-1, 1, 4)).pow(2).sum() / before))
    assert losses[1] == pytest.approx(losses[0], rel=0.1, abs=0.02)


def test_hardware_is_asked() -> None:
    found = torch.cpu.get_capabilities()
    assert computes_in_bf16(torch.device("cpu")) == bool(found.get("avx512_bf16") or found.get("amx_bf16"))
    assert not computes_in_bf16(torch.device("meta"))
