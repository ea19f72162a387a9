"""Every method that says it merges exactly leaves the plain model behind: its cost, its modules, its names."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import petl
from petl.costs import count_macs
from petl.methods import list_methods
from petl.methods.base import Method
from tests.conftest import build, outputs
from tests.methods.by_hand import moved
from tests.test_contract import variants

MERGEABLE = [
    pytest.param(method, id=f"{name}{i or ''}")
    for name in list_methods()
    for i, method in enumerate(variants(name))
    if method.mergeable and method.backbones
]


def test_the_methods_of_the_papers_are_here() -> None:
    names = {case.values[0].name for case in MERGEABLE}
    assert {"bitfit", "ln_tuning", "ssf", "rlrr", "fact", "rep_adapter", "linear_probe", "full_fine_tuning"} <= names


@pytest.mark.parametrize("family", ["timm_vit", "hf_vit"])
@pytest.mark.parametrize("method", MERGEABLE)
def test_a_merged_model_costs_what_the_plain_one_does(method: Method, family: str, images: Tensor) -> None:
    plain = build(family)
    model = moved(petl.attach(build(family), method), 0.05).eval()
    attached = outputs(model, images)
    petl.merge(model)
    assert count_macs(model, images[:1]) == count_macs(plain, images[:1])
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in plain.parameters())
    assert [(n, type(m)) for n, m in model.named_modules()] == [(n, type(m)) for n, m in plain.named_modules()]
    assert list(model.state_dict()) == list(plain.state_dict())
    assert not [n for n, m in model.named_modules() if "forward" in m.__dict__ or m._forward_hooks]
    torch.testing.assert_close(outputs(model, images), attached, atol=2e-5, rtol=1e-4)
