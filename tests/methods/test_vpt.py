"""VPT: counts, where prompts enter and leave, what each block sees of them, refusals."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import petl
from petl.backbones import view as find_view
from petl.costs import count_macs
from petl.methods.attach import attached
from tests.conftest import _timm, build


def model(family: str = "timm_dinov2", **options: object) -> nn.Module:
    return petl.attach(build(family), petl.VPT(**{"prompts": 3, **options}))


def inputs_of_blocks(net: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """What enters the attention of every block, before its LayerNorm."""
    seen: list[torch.Tensor] = []
    handles = [b.norm1.register_forward_pre_hook(lambda _, args: seen.append(args[0])) for b in net.blocks]
    net(x)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize(("variant", "count"), [("shallow", 38_400), ("deep", 460_800)])
def test_parameter_counts_on_vit_b(variant: str, count: int) -> None:
    import timm

    with torch.device("meta"):
        view = find_view(timm.create_model("vit_base_patch16_224"))
        module = petl.VPT(variant=variant).build(view)
    assert petl.VPT(variant=variant).parameter_count(view) == count
    assert sum(p.numel() for p in module.parameters()) == count


@pytest.mark.parametrize("patch", [8, (8, 4)])
def test_prompts_start_uniform_within_the_bound_of_the_patch_size(patch: object) -> None:
    prompts = attached(petl.attach(_timm(patch_size=patch), petl.VPT())).prompts
    bound = math.sqrt(6 / (3 * (64 if patch == 8 else 32) + 24))
    assert 0.95 * bound < prompts.abs().max() <= bound
    assert prompts.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)


@pytest.mark.parametrize("variant", ["deep", "shallow"])
def test_the_whole_pass_by_hand(variant: str, images: torch.Tensor) -> None:
    net = model(variant=variant)
    prompts = attached(net).prompts
    x = net.norm_pre(net._pos_embed(net.patch_embed(images)))
    for i, block in enumerate(net.blocks):
        if i == 0 or variant == "deep":
            old = 3 if i else 0
            x = torch.cat([x[:, :5], prompts[i].expand(3, -1, -1), x[:, 5 + old :]], 1)
        x = x + block.ls1(block.attn(block.norm1(x)))
        x = x + block.ls2(block.mlp(block.norm2(x)))
    x = torch.cat([x[:, :5], x[:, 8:]], 1)
    torch.testing.assert_close(net(images), net.forward_head(net.norm(x)))


def test_prompts_of_a_block_do_not_survive_in_deep_mode(images: torch.Tensor) -> None:
    for variant, replaced in (("deep", True), ("shallow", False)):
        net = model(variant=variant)
        seen = inputs_of_blocks(net, images)
        assert [tuple(x.shape) for x in seen] == [(3, 5 + 3 + 16, 24)] * 4  # N + p tokens reach every block
        prompts = attached(net).prompts
        assert torch.equal(seen[0][:, 5:8], prompts[0].expand(3, -1, -1))
        for i in range(1, 4):
            own = torch.equal(seen[i][:, 5:8], prompts[i % len(prompts)].expand(3, -1, -1))
            assert own == replaced


def test_pooling_over_patches_sees_the_usual_tokens(images: torch.Tensor) -> None:
    net = petl.attach(_timm(global_pool="avg", class_token=False).eval(), petl.VPT(prompts=3))
    seen: list[torch.Tensor] = []
    net.norm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    assert net.forward_features(images).shape == (3, 16, 24)
    assert seen[0].shape == (3, 16, 24)


def test_token_counts_and_macs(images: torch.Tensor) -> None:
    net = model("timm_vit")
    module = attached(net)
    tokens = module.token_counts(16)
    assert tokens == [(20, 20)] * 4
    assert module.macs(tokens) == 0
    assert count_macs(net, images[:1]) == module.view.macs(tokens, 16)


def test_gradient_reaches_the_prompts_of_every_block_and_is_declared(images: torch.Tensor) -> None:
    net = model()
    net(images).square().sum().backward()
    prompts = attached(net).prompts
    assert prompts.grad is not None
    assert all(g.any() for g in prompts.grad.flatten(0, 1))
    assert attached(net).first_gradient()[0] == "input of block 0"


def test_dropout_is_on_the_prompts_and_live_in_training_alone(images: torch.Tensor) -> None:
    net = model(dropout=0.5)
    assert torch.equal(net(images), net(images))
    net.train()
    prompts = inputs_of_blocks(net, images)[0][:, 5:8]
    scale = prompts / attached(net).prompts[0]
    assert set(scale.round(decimals=3).flatten().tolist()) == {0.0, 2.0}
    assert not torch.equal(prompts[0], prompts[1])


def test_masks_and_explanations_are_refused(images: torch.Tensor) -> None:
    net = model("timm_vit")
    with pytest.raises(petl.PetlError, match="attention mask over the original tokens"):
        net.forward_features(images, attn_mask=torch.ones(17, 17, dtype=torch.bool))
    with pytest.raises(petl.PetlError, match="'vpt' adds tokens inside this classifier"):
        petl.ExplainedClassifier(net)


@pytest.mark.parametrize(
    ("options", "word"),
    [({"prompts": 0}, "at least 1"), ({"variant": "dep"}, "did you mean 'deep'"), ({"dropout": 1.0}, "below 1")],
)
def test_bad_options(options: dict, word: str) -> None:
    with pytest.raises(petl.PetlError, match=word):
        petl.VPT(**options)
