"""The frozen part of a classifier: what is recorded of it, and that the model runs from it as from pictures."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import petl
from petl.backbones.classifier import Classifier
from petl.methods.attach import attached
from petl.models.frozen import FrozenFeatures
from petl.nn.head import Head
from tests.conftest import FAMILIES, build

METHODS: dict[str, tuple[petl.Method, int]] = {  # and how many taps it takes
    "probe": (petl.LinearProbe(), 1),
    "ladder": (petl.LadderSideTuning(reduction=2), 4),
    "gate": (petl.LadderSideTuning(reduction=2, form="gate", layers=(0, 2)), 4),  # "embedded" and the last block too
    "last_lora": (petl.LoRA(r=2, layers=(2, 3)), 1),
    "last_adaptformer": (petl.AdaptFormer(bottleneck=3, layers=(-1,)), 1),
    "last_full": (petl.FullFineTuning(layers=(3,)), 1),
}


def classifier(family: str, name: str) -> Classifier:
    """A model whose trained tensors are no longer where they start."""
    backbone = petl.attach(build(family), METHODS[name][0])
    torch.manual_seed(1)
    model = Classifier(backbone, Head("linear", attached(backbone).view.width, 3))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn_like(parameter)
    return model


def gradients(model: nn.Module, logits: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    logits.square().sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", METHODS)
def test_from_taps_as_from_pictures_bit_for_bit(family: str, name: str) -> None:
    model, x = classifier(family, name), torch.randn(3, 3, 32, 32)
    frozen = FrozenFeatures(model.backbone)
    taps = frozen.record(x)
    assert set(taps) == set(frozen.names)
    assert len(taps) == METHODS[name][1]
    model.train()
    torch.manual_seed(2)  # dropout of the adapters
    live = model(x)
    torch.manual_seed(2)
    replayed = model.head(frozen.features(taps))
    assert torch.equal(live, replayed)
    expected, found = gradients(model, live), gradients(model, replayed)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[n], found[n]) for n in expected)


@pytest.mark.parametrize("name", METHODS)
def test_taps_do_not_depend_on_what_is_trained_and_carry_no_gradient(name: str) -> None:
    x = torch.randn(2, 3, 32, 32)
    first = FrozenFeatures(petl.attach(build("timm_vit"), METHODS[name][0])).record(x)
    later = FrozenFeatures(classifier("timm_vit", name).backbone).record(x)
    for tap in first:
        assert torch.equal(first[tap], later[tap])
        assert not later[tap].requires_grad


@pytest.mark.parametrize("name", ["last_lora", "probe", "ladder"])
def test_taps_of_a_sample_do_not_depend_on_its_batch(name: str) -> None:
    frozen, x = FrozenFeatures(classifier("timm_vit", name).backbone), torch.randn(5, 3, 32, 32)
    whole, alone = frozen.record(x), [frozen.record(x[i : i + 1]) for i in range(5)]
    for tap in frozen.names:
        torch.testing.assert_close(whole[tap], torch.cat([a[tap] for a in alone]), rtol=1e-5, atol=1e-6)


def test_recording_ends_where_nothing_more_is_needed() -> None:
    model = classifier("timm_vit", "last_lora")
    blocks, ran = attached(model.backbone).view.block_modules(), []
    for i, block in enumerate(blocks):
        block.register_forward_pre_hook(lambda *_, i=i: ran.append(i))
    FrozenFeatures(model.backbone).record(torch.randn(1, 3, 32, 32))
    assert ran == [0, 1]


@pytest.mark.parametrize("method", [petl.LoRA(), petl.SparseTuning(), petl.VPT(prompts=2), petl.BitFit(), petl.DTL()])
def test_methods_that_begin_at_the_first_block_have_nothing_to_record(method: Any) -> None:
    assert FrozenFeatures(petl.attach(build("timm_vit"), method)).names == ()


def test_samples_that_were_not_recorded_are_completed_and_rounded_as_the_others() -> None:
    model, x = classifier("timm_vit", "ladder"), torch.randn(4, 3, 32, 32)
    frozen = FrozenFeatures(model.backbone)
    kept = {name: tap.bfloat16() for name, tap in frozen.record(x).items()}
    holes = {name: tap.clone() for name, tap in kept.items()}
    for tap in holes.values():
        tap[[0, 3]] = 0
    batch = {"taps": holes, "image": x[[0, 3]], "missing": torch.tensor([0, 3])}
    assert all(torch.equal(tap, kept[name]) for name, tap in frozen.complete(batch).items())
    assert torch.allclose(frozen.features(kept), frozen.features(frozen.record(x)), atol=0.05)
