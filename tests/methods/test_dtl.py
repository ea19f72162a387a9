"""DTL and DTL+: counts, the equations by hand, where the graph begins, what is kept for backward."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import petl
from petl.backbones import view as find_view
from petl.costs import count_saved_bytes
from petl.methods.attach import attached
from tests.conftest import _timm, build
from tests.methods.test_adapter import filled


@pytest.mark.parametrize(("variant", "count"), [("dtl", 36_864), ("plus", 43_776)])
def test_parameter_counts_on_vit_b(variant: str, count: int) -> None:
    import timm

    method = petl.DTL(variant=variant)
    with torch.device("meta"):
        view = find_view(timm.create_model("vit_base_patch16_224"))
        module = method.build(view)
    assert method.parameter_count(view) == count
    assert sum(p.numel() for p in module.parameters()) == count
    assert module.start == 6


@pytest.mark.parametrize("variant", ["dtl", "plus"])
def test_the_whole_pass_by_hand(variant: str, images: torch.Tensor) -> None:
    net = filled(build("timm_dinov2"), petl.DTL(rank=3, variant=variant, start=1, beta=10.0))
    module, images = attached(net), images[..., :16]  # 4 x 2 patches behind 5 prefix tokens
    x = net.norm_pre(net._pos_embed(net.patch_embed(images)))
    r = torch.zeros_like(x)
    for i, (block, (down, up)) in enumerate(zip(net.blocks, module.blocks, strict=True)):
        r = r + x @ down.weight.T @ up.weight.T
        x = x + block.ls1(block.attn(block.norm1(x)))
        x = x + block.ls2(block.mlp(block.norm2(x)))
        if i >= 1:
            t = r * torch.sigmoid(10 * r)
            if variant == "plus":
                picture = t[:, 5:].reshape(3, 4, 2, 24).permute(0, 3, 1, 2)
                picture = F.conv2d(picture, module.conv.weight, padding=1, groups=24)
                t = torch.cat([t[:, :5], picture.permute(0, 2, 3, 1).flatten(1, 2)], 1)
            x = x + t
    torch.testing.assert_close(net(images), net.forward_head(net.norm(x)), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("variant", ["dtl", "plus"])
def test_the_first_half_has_no_graph(variant: str, images: torch.Tensor) -> None:
    net = petl.attach(_timm(depth=12).eval(), petl.DTL(variant=variant)).train()
    seen: list[bool] = []
    for block in net.blocks:
        block.norm1.register_forward_pre_hook(lambda _, args: seen.append(args[0].requires_grad))
    net(images).sum().backward()
    assert seen == [False] * 7 + [True] * 5
    first = attached(net).blocks[0]
    assert first[1].weight.grad.any()
    assert attached(net).first_gradient()[0] == "output of block 6"


def test_of_the_first_half_only_the_inputs_are_kept(images: torch.Tensor) -> None:
    """From one start to the next, one block less is kept: its input remains, nothing of its inside."""

    def kept(**options: object) -> int:
        return count_saved_bytes(petl.attach(_timm(depth=6).eval(), petl.DTL(**options)).train(), images)

    tokens = 3 * 17 * 24 * 4
    steps = [kept(start=s) - kept(start=s + 1) for s in range(5)]
    assert len(set(steps)) == 1, "a block is a block"
    assert steps[0] > 8 * tokens
    # at the latest start: six inputs, six of rank 2, one gate, and what follows the blocks
    inputs, low, gate, after = 6 * tokens, 6 * 3 * 17 * 2 * 4, tokens, 4 * tokens
    assert kept(start=5) <= inputs + low + gate + after


def test_it_keeps_about_half_of_what_an_adapter_keeps(images: torch.Tensor) -> None:
    def kept(method: petl.Method) -> int:
        return count_saved_bytes(petl.attach(_timm(depth=12).eval(), method).train(), images)

    assert kept(petl.DTL()) < 0.6 * kept(petl.Adapter(2))


@pytest.mark.parametrize("variant", ["dtl", "plus"])
def test_checkpointing_recomputes_the_second_half(variant: str, images: torch.Tensor) -> None:
    found = []
    for checkpointing in (False, True):
        net = petl.attach(_timm(depth=8).eval(), petl.DTL(variant=variant)).train()
        attached(net).checkpointing = checkpointing
        found.append(count_saved_bytes(net, images))
    assert found[1] < 0.6 * found[0]


def test_swish_is_nearly_relu_and_learns_from_zero() -> None:
    module = attached(petl.attach(build("timm_vit"), petl.DTL()))
    r = torch.tensor([-1.0, -0.01, 0.0, 0.01, 1.0], requires_grad=True)
    t = module.feedback(r, None)
    torch.testing.assert_close(t, r * torch.sigmoid(100 * r))
    [gradient] = torch.autograd.grad(t.sum(), r)
    assert gradient[2] == 0.5
    torch.testing.assert_close(t[[0, 4]], torch.tensor([0.0, 1.0]))


def test_the_convolution_is_one_and_prefix_tokens_pass_by_it(images: torch.Tensor) -> None:
    module = attached(filled(build("timm_vit"), petl.DTL(variant="plus")))
    convs = [m for m in module.modules() if isinstance(m, nn.Conv2d)]
    assert [tuple(c.weight.shape) for c in convs] == [(24, 1, 3, 3)]
    assert convs[0].bias is None
    r = torch.randn(2, 17, 24)
    changed = r.clone()
    changed[:, 1:] += 1
    assert torch.equal(module.feedback(r, (4, 4))[:, 0], module.feedback(changed, (4, 4))[:, 0])


def test_a_gradient_for_the_picture_passes_the_whole_network(images: torch.Tensor) -> None:
    net = filled(build("timm_vit"), petl.DTL())
    x = images.clone().requires_grad_()
    net(x).sum().backward()
    assert x.grad.any()


def test_plus_refuses_what_has_no_grid_and_the_plain_variant_does_not(images: torch.Tensor) -> None:
    tokens = torch.randn(1, 9, 24)
    assert petl.attach(build("timm_vit"), petl.DTL()).blocks(tokens).shape == (1, 9, 24)
    with pytest.raises(petl.PetlError, match="'dtl' convolves over the patches"):
        petl.attach(build("timm_vit"), petl.DTL(variant="plus")).blocks(tokens)


def test_bad_options_and_a_start_beyond_the_depth() -> None:
    for options, word in (({"rank": 0}, "at least 1"), ({"variant": "dtl+"}, "did you mean 'dtl'"),
                          ({"beta": 0.5}, "at least 1"), ({"start": -1}, "at least 0")):  # fmt: skip
        with pytest.raises(petl.PetlError, match=word):
            petl.DTL(**options)
    net = build("timm_vit")
    with pytest.raises(petl.PetlError, match=r"has 4 blocks, 0 to 3; start=None takes 2"):
        petl.attach(net, petl.DTL(start=4))
    assert not hasattr(net, "petl")
