"""RLRR: counts, the two starts, what a block computes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import petl
from petl.backbones import view as find_view
from petl.methods.rlrr import Rescaling
from tests.conftest import build, outputs
from tests.methods.by_hand import FAMILIES, attached_and_frozen, check_block, trained_count, vit_b


def test_counts_on_vit_b() -> None:
    view, method = vit_b(), petl.RLRR()
    square, up, down = 3 * 768, 768 + 2 * 3072, 3072 + 2 * 768  # s_in, s_out and f of q, k, v, out; of fc1; of fc2
    per_block = 4 * square + up + down + 2 * 2 * 768
    assert per_block == 31 * 768  # q, k and v each have an s_in; with one for all three it would be 29
    assert method.parameter_count(view) == 12 * per_block == 285_696
    assert trained_count(method, view) == 285_696


@pytest.mark.parametrize("family", FAMILIES)
def test_a_block_by_hand(family: str) -> None:
    """In output space: s_out ⊙ W (s_in ⊙ x) beside W x."""
    model, layers = attached_and_frozen(family, petl.RLRR(init="zero_out"))
    view = find_view(build(family))
    weights = view.block_view(view.block_modules()[0]).block_weights()
    parts = dict(model.petl.blocks[0].items())
    s_in = {n: p.s_in[0] for n, p in parts.items() if "norm" not in n}
    s_out = {n: p.s_out[:, 0] for n, p in parts.items() if "norm" not in n}
    shift = {n: p.shift for n, p in parts.items()}
    if family == "timm_vit":
        s_in |= dict(zip("qkv", parts["qkv"].s_in, strict=True))
        s_out |= dict(zip("qkv", parts["qkv"].s_out[:, 0].chunk(3), strict=True))
        shift |= dict(zip("qkv", parts["qkv"].shift.chunk(3), strict=True))
    frozen = dict(layers)
    for part in frozen:
        if "norm" in part:
            layers[part] = lambda x, p=part: parts[p].scale * frozen[p](x) + shift[p]
        else:
            layers[part] = lambda x, p=part: (
                frozen[p](x) + s_out[p] * ((s_in[p] * x) @ weights[f"{p}.weight"].T) + shift[p]
            )
    check_block(family, model, layers)


def test_paper_start_is_about_seven_per_cent_away() -> None:
    layer = nn.Linear(768, 768).requires_grad_(False)
    part = Rescaling(layer, 1, "paper").requires_grad_(False)
    change = part.merged(layer)[0] - layer.weight
    assert part.s_out.abs().max() == pytest.approx(6**0.5, rel=0.02)  # 2.45: fan-in 1
    ratio = (part.s_out * part.s_in).abs().max()
    assert 0.2 < ratio <= 6**0.5 * (6 / 768) ** 0.5 + 1e-6  # 0.217
    assert change.norm() / layer.weight.norm() == pytest.approx(0.07, abs=0.005)
    assert torch.equal(part.merged(layer)[1], layer.bias)


def test_zero_out_is_no_dead_start(images: Tensor) -> None:
    model = petl.attach(build("timm_vit"), petl.RLRR(init="zero_out"))
    part = model.petl.blocks[1]["fc1"]
    optimizer = torch.optim.SGD(model.petl.parameters(), lr=0.01)
    for step in range(2):
        optimizer.zero_grad()
        outputs(model, images).pow(2).sum().backward()
        assert part.s_out.grad.any()
        assert bool(part.s_in.grad.any()) == (step > 0)
        optimizer.step()
    assert part.s_out.any()


def test_bad_options() -> None:
    with pytest.raises(petl.PetlError, match="did you mean 'zero_out'"):
        petl.RLRR(init="zero")
