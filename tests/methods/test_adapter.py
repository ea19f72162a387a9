"""Adapters in series: counts, the equations by hand, the dead start."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import petl
from petl.backbones import text_encoder
from petl.backbones import view as find_view
from petl.backbones.base import Call
from petl.methods.attach import attached
from tests.conftest import build


def filled(net: nn.Module, method: petl.Method) -> nn.Module:
    """``net`` with ``method`` and trained tensors that are not zero."""
    petl.attach(net, method)
    with torch.no_grad():
        for p in attached(net).parameters():
            p.normal_(0, 0.3)
    return net


@pytest.mark.parametrize(("variant", "count"), [("pfeiffer", 156_768), ("houlsby", 313_536)])
def test_parameter_counts_on_vit_b(variant: str, count: int) -> None:
    import timm

    method = petl.Adapter(bottleneck=8, variant=variant)
    with torch.device("meta"):
        view = find_view(timm.create_model("vit_base_patch16_224"))
        module = method.build(view)
    assert method.parameter_count(view) == count
    assert sum(p.numel() for p in module.parameters()) == count


@pytest.mark.parametrize("activation", ["gelu", "relu"])
@pytest.mark.parametrize("variant", ["pfeiffer", "houlsby"])
def test_the_whole_pass_by_hand(variant: str, activation: str, images: torch.Tensor) -> None:
    """On a network with LayerScale: adapters read the branch behind it."""
    net = filled(build("timm_dinov2"), petl.Adapter(4, variant, activation))
    sigma = {"gelu": F.gelu, "relu": F.relu}[activation]

    def adapter(name: str, h: torch.Tensor) -> torch.Tensor:
        t = dict(attached(net).named_parameters(prefix="a"))
        down = h @ t[f"{name}.down.weight"].T + t[f"{name}.down.bias"]
        return h + sigma(down) @ t[f"{name}.up.weight"].T + t[f"{name}.up.bias"]

    x = net.norm_pre(net._pos_embed(net.patch_embed(images)))
    for i, block in enumerate(net.blocks):
        a = block.ls1(block.attn(block.norm1(x)))
        x = x + (adapter(f"a.blocks.{i}.attention", a) if variant == "houlsby" else a)
        f = block.ls2(block.mlp(block.norm2(x)))
        x = x + adapter(f"a.blocks.{i}.ffn", f)
    torch.testing.assert_close(net(images), net.forward_head(net.norm(x)))


def test_post_norm_blocks_normalise_after_the_sum() -> None:
    bert = build("hf_bert")
    view = text_encoder(bert)
    module = petl.Adapter(4, "houlsby").build(view)
    with torch.no_grad():
        for p in module.parameters():
            p.normal_(0, 0.3)
    layer, x = view.block_modules()[1], torch.randn(2, 5, 32)
    one, two = module.blocks[1]["attention"], module.blocks[1]["ffn"]
    a = layer.attention.output.dense(layer.attention.self(x)[0])
    y = layer.attention.output.LayerNorm(x + a + one.up(F.gelu(one.down(a))))
    f = layer.output.dense(layer.intermediate(y))
    expected = layer.output.LayerNorm(y + f + two.up(F.gelu(two.down(f))))
    found, _ = module.block(1, view.block_view(layer), x, Call(), ())
    torch.testing.assert_close(found, expected)


def test_both_projections_move_within_two_steps_and_a_dead_start_would_not(images: torch.Tensor) -> None:
    for dead in (False, True):
        net = petl.attach(build("timm_vit"), petl.Adapter(4, activation="relu")).train()
        adapters = [attached(net).blocks[i]["ffn"] for i in range(4)]
        if dead:
            for a in adapters:
                nn.init.zeros_(a.down.weight)
        before = [(a.down.weight.clone(), a.up.weight.clone()) for a in adapters]
        optimizer = torch.optim.AdamW(attached(net).parameters(), lr=1e-2, weight_decay=0)
        for _ in range(2):
            optimizer.zero_grad()
            net(images).square().sum().backward()
            optimizer.step()
        for a, (down, up) in zip(adapters, before, strict=True):
            assert torch.equal(a.down.weight, down) == dead
            assert torch.equal(a.up.weight, up) == dead


def test_first_gradient_is_where_the_variant_begins() -> None:
    found = [attached(petl.attach(build("timm_vit"), petl.Adapter(4, v))).first_gradient()[0] for v in
             ("pfeiffer", "houlsby")]  # fmt: skip
    assert found == ["block 0, after the FFN", "block 0, after attention"]


@pytest.mark.parametrize(
    ("options", "word"),
    [({"bottleneck": 0}, "at least 1"), ({"variant": "pfeifer"}, "did you mean 'pfeiffer'"),
     ({"activation": "swish"}, "valid are: gelu, relu")],
)  # fmt: skip
def test_bad_options(options: dict, word: str) -> None:
    with pytest.raises(petl.PetlError, match=word):
        petl.Adapter(**options)
