"""Sparse-Tuning against its sheet: golden outputs, counts, wiring, refusals."""

from __future__ import annotations

import zlib

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import nn

import petl
from petl.backbones import view as find_view
from petl.costs import count_macs, count_saved_bytes
from petl.methods.attach import attached
from petl.methods.sparse_tuning import DenseAdapter
from tests.conftest import _timm, build, outputs, private


def formula_tensor(name: str, shape: torch.Size) -> torch.Tensor:
    """The golden outputs' weights: a tensor is a function of its name (README of the golden folder)."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    a = rng.standard_normal(tuple(shape), dtype=np.float32) * np.float32(0.05)
    return torch.from_numpy(a + np.float32(1) if "norm" in name and name.endswith("weight") else a)


@pytest.fixture(scope="module")
def vit_b() -> nn.Module:
    return timm.create_model("vit_base_patch16_224", num_classes=1000).eval()


@pytest.mark.parametrize("variant", ["paper", "reference"])
def test_golden_outputs(variant: str) -> None:
    golden = load_file(private("..", "golden", "sparse_tuning.safetensors"))
    model = timm.create_model("vit_base_patch16_224", num_classes=10).eval()
    model.load_state_dict({k: formula_tensor(k, v.shape) for k, v in model.state_dict().items()})
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((2, 3, 224, 224), dtype=np.float32))
    with torch.no_grad():
        plain = model(x)
        torch.testing.assert_close(plain, golden["plain"], atol=1e-3, rtol=0)
        for keep in (1.0, 0.7):
            module = attached(petl.attach(model, petl.SparseTuning(keep_rate=keep, variant=variant)))
            names = {k: k for k in module.state_dict()}
            if variant == "reference":
                names = {k: k.replace(".", ".adaptmlp.", 2).replace("blocks.adaptmlp", "blocks") for k in names}
            module.load_state_dict({k: formula_tensor(names[k], v.shape) for k, v in module.state_dict().items()})
            expected = golden[f"{variant}.keep{keep}.fuse1.seed0"]
            torch.testing.assert_close(model(x), expected, atol=1e-3, rtol=0)
            assert not torch.allclose(expected, plain, atol=1e-2)
            assert torch.equal(petl.detach(model)(x), plain)


@pytest.mark.parametrize(
    ("options", "count"),
    [({}, 1_091_584), ({"bottleneck": 8}, 279_808), ({"bottleneck": 16}, 550_400), ({"bottleneck": 64}, 2_173_952),
     ({"variant": "reference"}, 1_314_432)],
)  # fmt: skip
def test_parameter_counts_on_vit_b(vit_b: nn.Module, options: dict, count: int) -> None:
    method = petl.SparseTuning(**options)
    assert method.parameter_count(find_view(vit_b)) == count
    module = method.build(find_view(vit_b))
    assert sum(p.numel() for p in module.parameters()) == count


@pytest.mark.parametrize(
    ("options", "gmacs"),
    [({"bottleneck": 32, "keep_rate": r}, g) for r, g in
     [(1.0, 17.776), (0.9, 15.578), (0.8, 13.481), (0.7, 11.740), (0.6, 10.197), (0.5, 8.911)]]
    + [({"bottleneck": 8, "keep_rate": 0.7}, 11.642), ({"variant": "reference"}, 11.775),
       ({"variant": "reference", "fuse": False}, 11.648), ({"variant": "reference", "keep_rate": 1.0}, 17.820)],
)  # fmt: skip
def test_macs_on_vit_b(vit_b: nn.Module, options: dict, gmacs: float) -> None:
    view = find_view(vit_b)
    module = petl.SparseTuning(**options).build(view)
    tokens = module.token_counts(196)
    assert (view.macs(tokens, 196) + module.macs(tokens)) / 1e9 == pytest.approx(gmacs, rel=1e-3)


def test_counted_macs_on_vit_b_are_the_published_figure(vit_b: nn.Module) -> None:
    petl.attach(vit_b, petl.SparseTuning())
    try:
        assert count_macs(vit_b, torch.zeros(1, 3, 224, 224)) / 1e9 == pytest.approx(11.740, rel=1e-3)
    finally:
        petl.detach(vit_b)


def model(depth: int = 12, **options: object) -> nn.Module:
    net = petl.attach(_timm(depth=depth).eval(), petl.SparseTuning(**{"bottleneck": 4, **options}))
    with torch.no_grad():
        for p in attached(net).parameters():
            p.normal_(0, 0.2)
    return net


def test_tensor_names(images: torch.Tensor) -> None:
    names = {n for n, _ in attached(model()).named_parameters()}
    parts = {i: {n.split(".")[2] for n in names if n.startswith(f"blocks.{i}.")} for i in range(12)}
    assert parts[0] == {"down", "up"}
    assert parts[1] == parts[2] == {"down", "down_prev", "up"}
    assert all(parts[i] == {"down", "down_prev", "down_skip", "up"} for i in range(3, 12))
    reference = {n.split(".")[2] for n, _ in attached(model(variant="reference")).named_parameters()}
    assert reference == {"down1", "down2", "up1", "down3", "up2"}


def test_zero_adapters_equal_frozen_evit(images: torch.Tensor) -> None:
    net = build("timm_vit")
    expected = outputs(petl.attach(net, petl.EViT(keep_rate=0.5)), images)
    petl.detach(net)
    found = outputs(petl.attach(net, petl.SparseTuning(keep_rate=0.5)), images)
    torch.testing.assert_close(found, expected, atol=0, rtol=0)


def test_keep_one_runs_no_index_op(images: torch.Tensor) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Seen(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.names: set[str] = set()

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.names.add(str(func))
            return func(*args, **(kwargs or {}))

    for rate, expected in ((1.0, False), (0.5, True)):
        net = model(keep_rate=rate)
        with Seen() as seen:
            net(images)
        assert any("sort" in n or "gather" in n or "aten.index" in n for n in seen.names) == expected


def test_wiring_of_the_cross_layer_links() -> None:
    """The gradient of adapter 4 (block 3) reaches adapters 3 and 1 directly, and adapter 2 only through adapter 3."""
    net = model(keep_rate=1.0)
    adapters = [m for m in attached(net).blocks if isinstance(m, DenseAdapter)]
    x = torch.randn(1, 17, 24)
    history = [torch.randn(1, 17, 24, requires_grad=True) for _ in range(3)]  # outputs of blocks 0, 1, 2

    def reached(adapter: DenseAdapter) -> list[bool]:
        grads = torch.autograd.grad(adapter(x, history).sum(), history, allow_unused=True)
        return [g is not None and bool(g.any()) for g in grads]

    assert reached(adapters[3]) == [True, False, True]
    with torch.no_grad():
        for p in adapters[3].down_prev.parameters():
            p.zero_()
    assert reached(adapters[3]) == [True, False, False]
    assert reached(adapters[2]) == [False, False, True]


def test_without_links_it_is_parallel_adapters(images: torch.Tensor) -> None:
    net = model(keep_rate=1.0)
    for adapter in attached(net).blocks:
        for link in (adapter.down_prev, adapter.down_skip):
            if link is not None:
                nn.init.zeros_(link.weight)
                nn.init.zeros_(link.bias)
    expected = images
    x = net.patch_embed(expected)
    x = net.norm_pre(net._pos_embed(x))
    for block, adapter in zip(net.blocks, attached(net).blocks, strict=True):
        x = x + block.attn(block.norm1(x))
        x = x + block.mlp(block.norm2(x)) + adapter.up(adapter.down(x).relu())
    torch.testing.assert_close(net(images), net.forward_head(net.norm(x)))


def test_history_is_reduced_with_the_indices_of_the_stream(images: torch.Tensor) -> None:
    """Patch by patch: permuting the patches of the input permutes nothing that matters to the class token."""
    net = model(keep_rate=0.5)
    with torch.no_grad():
        net.pos_embed.zero_()
    patches = images.unfold(2, 8, 8).unfold(3, 8, 8).flatten(2, 3)  # (B, 3, 16, 8, 8)
    shuffled = patches[:, :, torch.randperm(16)].unflatten(2, (4, 4))
    shuffled = shuffled.permute(0, 1, 2, 4, 3, 5).flatten(2, 3).flatten(3, 4)
    torch.testing.assert_close(net(shuffled), net(images), atol=1e-4, rtol=1e-4)


def test_registers_are_protected_and_the_fused_token_is_a_candidate(images: torch.Tensor) -> None:
    net = petl.attach(build("timm_dinov2"), petl.SparseTuning(keep_rate=0.5, drop_blocks=(0, 1)))
    module = attached(net)
    module.record = []
    net(images)
    first, second = module.record[0]
    assert first.prefix == 5
    assert first.keep.shape == (3, 8)
    assert second.keep.shape == (3, 5)
    assert second.keep.max() <= 8  # index 8 is the token merged at the first event


def test_only_up_and_head_move_first(images: torch.Tensor) -> None:
    net = petl.attach(build("timm_vit"), petl.SparseTuning(bottleneck=4)).train()
    outputs(net, images).pow(2).sum().backward()
    moved = {n for n, p in net.named_parameters() if p.grad is not None and p.grad.any()}
    assert all(n.split(".")[3] == "up" for n in moved if n.startswith("petl"))
    assert {"head.weight", "petl.blocks.0.up.weight"} <= moved


def test_saved_bytes_shrink_with_the_tokens(vit_b: nn.Module) -> None:
    """The memory target of the issue, counted: at keep 0.7 at most 0.70 of the bytes at keep 1.0."""
    saved = []
    x = torch.zeros(2, 3, 224, 224)
    for rate in (0.7, 1.0):
        petl.attach(vit_b, petl.SparseTuning(keep_rate=rate)).train()
        saved.append(count_saved_bytes(vit_b, x))
        petl.detach(vit_b)
    assert saved[0] / saved[1] <= 0.70


@pytest.mark.parametrize(
    ("network", "options", "word"),
    [
        ({"class_token": False, "global_pool": "avg"}, {}, "no class token"),
        ({"global_pool": "avg"}, {}, "pools over patches"),
        ({"class_token": False, "global_pool": "map"}, {}, "no class token"),
        ({}, {"drop_blocks": (1, 4)}, "4 blocks, 0 to 3"),
        ({}, {"variant": "reference"}, "12 blocks"),
        ({"depth": 12}, {"variant": "reference", "drop_blocks": (2, 5)}, "blocks 3, 6, 9"),
    ],
)
def test_refusals_say_why_and_leave_the_model_alone(network: dict, options: dict, word: str) -> None:
    net = _timm(**network)
    with pytest.raises(petl.PetlError, match=word):
        petl.attach(net, petl.SparseTuning(**options))
    assert not hasattr(net, "petl")
    assert all(p.requires_grad for p in net.parameters())


@pytest.mark.parametrize(
    "options",
    [
        {"keep_rate": 0},
        {"keep_rate": "x"},
        {"bottleneck": 0},
        {"bottleneck": 2.5},
        {"variant": "papr"},
        {"drop_blocks": (-1,)},
        {"scale": -1},
        {"variant": "reference", "scale": 0.1},
    ],
)
def test_bad_options(options: dict) -> None:
    with pytest.raises(petl.PetlError):
        petl.SparseTuning(**options)


def test_blocks_of_another_kind_and_masks_are_refused(images: torch.Tensor) -> None:
    from timm.models.vision_transformer import ParallelScalingBlock

    with pytest.raises(petl.PetlError, match="ParallelScalingBlock"):
        petl.attach(_timm(block_fn=ParallelScalingBlock), petl.SparseTuning())
    petl.attach(_timm(block_fn=ParallelScalingBlock), petl.LinearProbe())  # blocks are left alone
    net = model(depth=4)
    with pytest.raises(petl.PetlError, match="attention mask"):
        net(images, attn_mask=torch.ones(17, 17, dtype=torch.bool))


def test_library_checkpointing_and_single_blocks_are_refused(images: torch.Tensor) -> None:
    net = model(depth=4)
    with pytest.raises(petl.PetlError, match="block 2 was called where block 0"):
        net.blocks[2](torch.randn(1, 17, 24))
    net.set_grad_checkpointing(True)
    with pytest.raises(petl.PetlError, match=r"petl\.checkpointing"):
        net.train()(images)
