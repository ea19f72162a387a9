"""AdaptFormer: counts, the equation by hand, what its input is."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import petl
from petl.backbones import view as find_view
from petl.methods.attach import attached
from tests.conftest import build
from tests.methods.test_adapter import filled


@pytest.mark.parametrize(("bottleneck", "count"), [(64, 1_189_632), (8, 156_768)])
def test_parameter_counts_on_vit_b(bottleneck: int, count: int) -> None:
    import timm

    method = petl.AdaptFormer(bottleneck)
    with torch.device("meta"):
        view = find_view(timm.create_model("vit_base_patch16_224"))
        module = method.build(view)
    assert method.parameter_count(view) == count
    assert sum(p.numel() for p in module.parameters()) == count


def test_the_adapter_reads_the_stream_that_is_not_normalised(images: torch.Tensor) -> None:
    """By hand; the same with LN x' instead of x' gives something else."""
    net = filled(build("timm_dinov2"), petl.AdaptFormer(bottleneck=4, scale=0.5))
    found = {}
    for normalised in (False, True):
        x = net.norm_pre(net._pos_embed(net.patch_embed(images)))
        for block, a in zip(net.blocks, attached(net).blocks, strict=True):
            x = x + block.ls1(block.attn(block.norm1(x)))
            u = block.norm2(x)
            read = u if normalised else x
            adapter = F.relu(read @ a.down.weight.T + a.down.bias) @ a.up.weight.T + a.up.bias
            x = x + block.ls2(block.mlp(u)) + 0.5 * adapter
        found[normalised] = net.forward_head(net.norm(x))
    torch.testing.assert_close(net(images), found[False])
    assert not torch.allclose(net(images), found[True], atol=1e-2)


def test_scale_also_holds_for_the_bias(images: torch.Tensor) -> None:
    net = petl.attach(build("timm_vit"), petl.AdaptFormer(4, scale=0.1))
    adapter = attached(net).blocks[0]
    torch.nn.init.ones_(adapter.up.bias)
    torch.testing.assert_close(adapter(torch.randn(2, 3, 24)), torch.full((2, 3, 24), 0.1))


def test_dropout_is_live_in_training_alone(images: torch.Tensor) -> None:
    net = filled(build("timm_vit"), petl.AdaptFormer(4, dropout=0.5))
    assert torch.equal(net(images), net(images))
    net.train()
    assert not torch.equal(net(images), net(images))
    net.eval()
    assert torch.equal(net(images), net(images))


def test_a_fresh_adapter_is_silent_and_its_up_projection_learns_first(images: torch.Tensor) -> None:
    net = petl.attach(build("timm_vit"), petl.AdaptFormer(4)).train()
    net(images).square().sum().backward()
    moved = {n for n, p in attached(net).named_parameters() if p.grad is not None and p.grad.any()}
    assert {n.split(".")[2] for n in moved} == {"up"}
    assert len(moved) == 8


@pytest.mark.parametrize(
    ("options", "word"), [({"bottleneck": 0}, "at least 1"), ({"scale": -1}, "at least 0"), ({"dropout": 1}, "below 1")]
)
def test_bad_options(options: dict, word: str) -> None:
    with pytest.raises(petl.PetlError, match=word):
        petl.AdaptFormer(**options)
