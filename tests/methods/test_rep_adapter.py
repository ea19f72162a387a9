"""RepAdapter: counts, what a block computes with a grouped convolution, the fold, options."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import petl
from tests.conftest import _timm, build
from tests.methods.by_hand import FAMILIES, attached_and_frozen, check_block, moved, trained_count, vit_b


def test_counts_on_vit_b() -> None:
    view, method = vit_b(), petl.RepAdapter()
    weights, biases = 24 * (768 * 8 + 768 * 8 // 2), 24 * (8 + 768)
    assert (weights, biases) == (221_184, 18_624)
    assert method.parameter_count(view) == trained_count(method, view) == weights + biases == 239_808


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_a_block_by_hand(family: str, groups: int) -> None:
    """The paper's form: both projections are convolutions of kernel 1, the second in groups."""
    method = petl.RepAdapter(groups=groups, scale=0.5)
    model, frozen = attached_and_frozen(family, method)

    def after(norm: str, x: Tensor) -> Tensor:
        h, part = frozen[norm](x), model.petl.blocks[0][norm]
        z = F.conv1d(h.transpose(1, 2), part.down.weight[..., None], part.down.bias)
        up = F.conv1d(z, part.up[..., None], part.up_bias, groups=groups)
        return h + 0.5 * up.transpose(1, 2)

    norms = {norm: lambda x, norm=norm: after(norm, x) for norm in ("norm1", "norm2")}
    check_block(family, model.eval(), frozen | norms)


def test_the_fold_is_that_of_the_paper() -> None:
    model = moved(petl.attach(build("timm_vit"), petl.RepAdapter(scale=5.0)))
    part, layer = model.petl.blocks[1]["norm2"], copy.deepcopy(model.blocks[1].mlp.fc1)
    up = torch.zeros(24, 8)
    up[:12, :4], up[12:, 4:] = part.up[:12].detach(), part.up[12:].detach()
    weight, norm = layer.weight, copy.deepcopy(model.blocks[1].norm2.weight)
    petl.merge(model)
    merged = model.blocks[1].mlp.fc1
    expected = weight @ (torch.eye(24) + 5 * up @ part.down.weight)
    torch.testing.assert_close(merged.weight, expected, atol=1e-5, rtol=1e-5)
    expected = layer.bias + 5 * weight @ (up @ part.down.bias + part.up_bias)
    torch.testing.assert_close(merged.bias, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(model.blocks[1].norm2.weight, norm), "the norm itself stays as it was"


def test_the_fold_adds_a_bias_where_there_was_none(images: Tensor) -> None:
    model = moved(petl.attach(_timm(qkv_bias=False), petl.RepAdapter())).eval()
    before = model(images)
    assert model.blocks[0].attn.qkv.bias is None
    petl.merge(model)
    assert model.blocks[0].attn.qkv.bias is not None
    torch.testing.assert_close(model(images), before, atol=1e-5, rtol=1e-4)


def test_both_projections_move_in_two_steps(images: Tensor) -> None:
    model = petl.attach(build("timm_vit"), petl.RepAdapter()).train()
    before = copy.deepcopy(model.petl.state_dict())
    optimizer = torch.optim.AdamW(model.petl.parameters(), lr=0.01, weight_decay=0)
    for _ in range(2):
        optimizer.zero_grad()
        model(images).pow(2).sum().backward()
        optimizer.step()
    assert not [n for n, t in model.petl.state_dict().items() if torch.equal(t, before[n])]


def test_dropout_only_in_training(images: Tensor) -> None:
    model = moved(petl.attach(build("timm_vit"), petl.RepAdapter(dropout=0.5)))
    assert torch.equal(model.eval()(images), model(images))
    assert not torch.equal(model.train()(images), model(images))


def test_bad_options_and_widths() -> None:
    with pytest.raises(petl.PetlError, match="must divide the bottleneck, which is 8"):
        petl.RepAdapter(groups=3)
    with pytest.raises(petl.PetlError, match="bottleneck must be an integer of at least 1"):
        petl.RepAdapter(bottleneck=0)
    model = _timm()
    with pytest.raises(petl.PetlError, match="must divide the width of the backbone, which is 24"):
        petl.attach(model, petl.RepAdapter(bottleneck=10, groups=5))
    assert not hasattr(model, "petl")
