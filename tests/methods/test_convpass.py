"""Convpass: counts, the equations by hand, the grid of every pass, refusals."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import petl
from petl.backbones import view as find_view
from petl.methods.attach import attached
from petl.methods.convpass import Bypass
from petl.nn.grid import GridConv
from tests.conftest import _timm, build, outputs
from tests.methods.test_adapter import filled


def quick_gelu(z: torch.Tensor) -> torch.Tensor:
    return z * torch.sigmoid(1.702 * z)


def by_hand(bypass: Bypass, u: torch.Tensor, grid: tuple[int, int], prefix: int, scale: float) -> torch.Tensor:
    z = quick_gelu(F.linear(u, bypass.down.weight, bypass.down.bias))
    rows, columns = grid
    picture = z[:, prefix:].reshape(len(z), rows, columns, -1).permute(0, 3, 1, 2)
    patches = F.conv2d(picture, bypass.conv.weight, bypass.conv.bias, padding=1).permute(0, 2, 3, 1)
    pixels = [F.conv2d(z[:, i, :, None, None], bypass.conv.weight, bypass.conv.bias, padding=1) for i in range(prefix)]
    z = torch.cat([*(p.flatten(1)[:, None] for p in pixels), patches.flatten(1, 2)], 1)
    return scale * F.linear(quick_gelu(z), bypass.up.weight, bypass.up.bias)


def test_parameter_count_on_vit_b() -> None:
    import timm

    with torch.device("meta"):
        view = find_view(timm.create_model("vit_base_patch16_224"))
        module = petl.Convpass().build(view)
    assert petl.Convpass().parameter_count(view) == 327_552
    assert sum(p.numel() for p in module.parameters()) == 327_552


@pytest.mark.parametrize("columns", [4, 2])
def test_the_whole_pass_by_hand(columns: int, images: torch.Tensor) -> None:
    """With class token and four registers, on square and on other pictures."""
    net, images = filled(build("timm_dinov2"), petl.Convpass(bottleneck=3, scale=0.7)), images[..., : 8 * columns]
    x = net.norm_pre(net._pos_embed(net.patch_embed(images)))
    for block, bypass in zip(net.blocks, attached(net).blocks, strict=True):
        n = block.norm1(x)
        x = x + block.ls1(block.attn(n)) + by_hand(bypass["attention"], n, (4, columns), 5, 0.7)
        u = block.norm2(x)
        x = x + block.ls2(block.mlp(u)) + by_hand(bypass["ffn"], u, (4, columns), 5, 0.7)
    torch.testing.assert_close(net(images), net.forward_head(net.norm(x)))


@pytest.mark.parametrize("family", ["hf_vit", "hf_clip_vision"])
def test_other_shapes_in_hugging_face_models(family: str, images: torch.Tensor) -> None:
    """Rows and columns are told apart: the transposed picture is not the same grid."""
    net = filled(build(family), petl.Convpass(bottleneck=3))
    grids = []
    bypass = attached(net).blocks[0]["ffn"]
    bypass.register_forward_pre_hook(lambda _, args: grids.append(args[1]))
    for shape in ((32, 16), (16, 32), (32, 32)):
        assert net(images[..., : shape[0], : shape[1]], interpolate_pos_encoding=True) is not None
    assert grids == [(4, 2), (2, 4), (4, 4)]


def test_the_bypass_starts_as_its_centre_pixel() -> None:
    conv = GridConv(8)
    nn.init.dirac_(conv.weight)
    expected = torch.zeros(8, 8, 3, 3)
    expected[:, :, 1, 1] = torch.eye(8)
    bypass = Bypass(24, petl.Convpass(), 1)
    assert torch.equal(bypass.conv.weight, expected)
    assert not bypass.up.weight.any()
    assert bypass.down.weight.abs().max() <= (6 / (24 + 8)) ** 0.5  # Xavier


def test_each_layer_norm_runs_once(images: torch.Tensor) -> None:
    net, calls = petl.attach(build("timm_vit"), petl.Convpass()), []
    for block in net.blocks:
        for norm in (block.norm1, block.norm2):
            norm.register_forward_hook(lambda *_: calls.append(1))
    net(images)
    assert len(calls) == 8


def test_no_class_token_at_all(images: torch.Tensor) -> None:
    net = filled(_timm(class_token=False, global_pool="avg").eval(), petl.Convpass(bottleneck=3))
    u = torch.randn(2, 16, 24)
    found = attached(net).blocks[0]["attention"](u, (4, 4))
    torch.testing.assert_close(found, by_hand(attached(net).blocks[0]["attention"], u, (4, 4), 0, 1.0))
    assert net(images).isfinite().all()


def test_tokens_that_do_not_fill_the_grid_are_refused(images: torch.Tensor) -> None:
    net = petl.attach(build("timm_vit"), petl.Convpass())

    class Dropping(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x[:, :9]

    net.patch_drop = Dropping()
    with pytest.raises(petl.PetlError, match=r"8 patch tokens enter .* a grid of 4 x 4.* patch dropout"):
        net(images)
    net.patch_drop = nn.Identity()
    net(images)
    with pytest.raises(petl.PetlError, match="made no grid"):  # the last pass has taken its grid with it
        net.blocks(torch.randn(1, 17, 24))
    with pytest.raises(petl.PetlError, match="attention mask"):
        net.forward_features(images, attn_mask=torch.ones(17, 17, dtype=torch.bool))


def test_explanations_remove_pixels_or_are_refused(images: torch.Tensor) -> None:
    masks = torch.zeros(3, 2, 16, dtype=torch.bool)
    masks[:, :, :5] = True
    for removal, works in (("mean", True), ("keys", False)):
        net = filled(build("timm_vit"), petl.Convpass(bottleneck=3))
        model = petl.ExplainedClassifier(net, petl.AutoGnothi(removal=removal, reduction=4))
        if works:
            assert model.values(images, masks).isfinite().all()
            continue
        with pytest.raises(petl.PetlError, match="removal='mean'"):
            model.values(images, masks)
        model.gather = False
        with pytest.raises(petl.PetlError, match="still reach its neighbours"):
            model.values(images, masks)


def test_threads_with_pictures_of_different_shapes(images: torch.Tensor) -> None:
    net = filled(build("timm_dinov2"), petl.Convpass(bottleneck=3))
    inputs = [images, images[..., :16], images[..., :16, :], images[..., :8]]
    expected = [net(x).detach() for x in inputs]
    found: list[list[torch.Tensor]] = [[] for _ in inputs]

    def work(i: int) -> None:
        with torch.no_grad():
            found[i].extend(net(inputs[i]) for _ in range(10))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert [len(ys) for ys in found] == [10] * 4
    assert all(torch.equal(y, expected[i]) for i, ys in enumerate(found) for y in ys)


def test_compiled_it_follows_the_shape_of_the_picture(images: torch.Tensor) -> None:
    net = filled(build("timm_dinov2"), petl.Convpass(bottleneck=3))
    torch.compiler.reset()
    compiled = torch.compile(net, fullgraph=True, backend="eager")
    for x in (images, images[..., :16], images[..., :16, :]):
        torch.testing.assert_close(compiled(x), net(x), atol=1e-5, rtol=1e-5)


def test_detach_leaves_no_hook_behind_also_in_a_copy(images: torch.Tensor) -> None:
    net = petl.attach(build("timm_vit"), petl.Convpass())
    twin = copy.deepcopy(net)
    petl.detach(twin)
    assert not twin.patch_embed.proj._forward_hooks
    assert len(net.patch_embed.proj._forward_hooks) == 1
    assert torch.equal(outputs(twin, images), outputs(petl.detach(net), images))


@pytest.mark.parametrize(
    ("options", "word"), [({"bottleneck": 0}, "at least 1"), ({"scale": -1}, "at least 0"), ({"dropout": 1}, "below 1")]
)
def test_bad_options(options: dict, word: str) -> None:
    with pytest.raises(petl.PetlError, match=word):
        petl.Convpass(**options)
