"""DARA against its sheet: a forward pass written anew from the equations, wiring of the shared map, refusals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import petl
from petl.methods.attach import attach_pair
from tests.conftest import PAIRS, SMALL_FUSION, build, expressions_and_images, grounding

SMALL = {"bottleneck": 6, "relation_dim": 5, "shared_dim": 20}


def model(pair: str = "detr+bert", **options: Any) -> petl.GroundingModel:
    """A small model whose adapters are far from zero."""
    net = grounding(pair, petl.DARA(**SMALL | options))
    with torch.no_grad():
        for name, p in net.petl.named_parameters():
            p.normal_(0, 0.3)
            if name.endswith("down.bias"):
                p.add_(1)  # else some ReLU is dead on every token
    return net


# ---- the equations of the sheet, section 2.1, without a line of petl


def linear(x: Tensor, layer: nn.Module) -> Tensor:
    return x @ layer.weight.T + layer.bias


class Equations:
    """The adapters of one tower: DA and RA at the layers of ``pairs`` (layer -> index of its pair)."""

    def __init__(self, tower: nn.Module, shared: nn.ModuleList, pairs: dict[int, int], variant: str) -> None:
        self.adapters, self.shared, self.pairs, self.variant = tower.adapters, shared, pairs, variant

    def da(self, i: int, a: Tensor) -> Tensor:
        if i not in self.pairs:
            return a
        part = self.adapters[self.pairs[i]].unimodal
        silent = 0.1 * linear(F.relu(linear(a, part.down)), part.up)
        return a + silent if self.variant == "safe" else silent

    def ra(self, i: int, u: Tensor) -> Tensor | float:
        if i not in self.pairs:
            return 0.0
        part, shared = self.adapters[self.pairs[i]].interactive, self.shared[self.pairs[i]]
        z = F.relu(linear(u, part.down))
        return torch.cat([*([] if part.up is None else [linear(z, part.up)]), linear(z, shared)], -1)


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, keep: Tensor | None = None) -> Tensor:
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    if keep is not None:
        scores = scores.masked_fill(~keep, -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def separate(layer: nn.Module, query_key: Tensor, value: Tensor, keep: Tensor | None) -> Tensor:
    q, k, v = linear(query_key, layer.q_proj), linear(query_key, layer.k_proj), linear(value, layer.v_proj)
    return attention(q, k, v, layer.embed_dim // layer.head_dim if hasattr(layer, "embed_dim") else 3, keep)


def detr(net: nn.Module, adapters: Equations, images: Tensor, seen: Tensor) -> Tensor:
    features, mask = net.backbone(images, seen)[-1]
    x = net.input_projection(features).flatten(2).mT
    pos = net.position_embedding(features.shape, x.device, x.dtype, mask).flatten(2).mT
    for i, layer in enumerate(net.encoder.layers):
        a = linear(separate(layer.self_attn, x + pos, x, mask.flatten(1)[:, None, None]), layer.self_attn.o_proj)
        y = layer.self_attn_layer_norm(x + adapters.da(i, a))
        f = linear(F.relu(linear(y, layer.mlp.fc1)), layer.mlp.fc2)
        x = layer.final_layer_norm(y + f + adapters.ra(i, y))
    return x


def bert(net: nn.Module, adapters: Equations, ids: Tensor, words: Tensor) -> Tensor:
    x = net.embeddings(input_ids=ids)
    for i, layer in enumerate(net.encoder.layer):
        own, out = layer.attention.self, layer.attention.output
        q, k, v = (linear(x, part) for part in (own.query, own.key, own.value))
        a = linear(attention(q, k, v, 4, words.bool()[:, None, None]), out.dense)
        y = out.LayerNorm(x + adapters.da(i, a))
        f = linear(F.gelu(linear(y, layer.intermediate.dense)), layer.output.dense)
        x = layer.output.LayerNorm(f + y + adapters.ra(i, y))
    return x


def timm_vit(net: nn.Module, adapters: Equations, images: Tensor, seen: Tensor) -> Tensor:
    x = net.patch_embed(images)
    x = torch.cat([net.cls_token.expand(len(x), -1, -1), x], 1) + net.pos_embed
    for i, block in enumerate(net.blocks):
        q, k, v = linear(block.norm1(x), block.attn.qkv).chunk(3, -1)
        x = x + adapters.da(i, linear(attention(q, k, v, 3), block.attn.proj))
        u = block.norm2(x)
        x = x + linear(F.gelu(linear(u, block.mlp.fc1)), block.mlp.fc2) + adapters.ra(i, u)
    return net.norm(x)[:, 1:]


def clip_layers(layers: nn.ModuleList, adapters: Equations, x: Tensor, keep: Tensor | None) -> Tensor:
    for i, layer in enumerate(layers):
        n = layer.layer_norm1(x)
        x = x + adapters.da(i, linear(separate(layer.self_attn, n, n, keep), layer.self_attn.out_proj))
        u = layer.layer_norm2(x)
        hidden = linear(u, layer.mlp.fc1)
        x = x + linear(hidden * torch.sigmoid(1.702 * hidden), layer.mlp.fc2) + adapters.ra(i, u)
    return x


def clip_vision(net: nn.Module, adapters: Equations, images: Tensor, seen: Tensor) -> Tensor:
    x = net.pre_layrnorm(net.embeddings(images))
    return net.post_layernorm(clip_layers(net.encoder.layers, adapters, x, None))[:, 1:]


def clip_text(net: nn.Module, adapters: Equations, ids: Tensor, words: Tensor) -> Tensor:
    causal = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
    x = net.embeddings(input_ids=ids)
    return net.final_layer_norm(clip_layers(net.encoder.layers, adapters, x, causal & words.bool()[:, None, None]))


FORWARD: dict[str, tuple[Callable, Callable]] = {
    "detr+bert": (detr, bert),
    "vit+bert": (timm_vit, bert),
    "clip": (clip_vision, clip_text),
}
LAYERS = [  # pair, options, layers of both encoders that must be adapted
    ("detr+bert", {}, (0, 1, 2), (0, 1, 2)),
    ("detr+bert", {"text_layers": "last"}, (0, 1, 2), (1, 2, 3)),
    ("detr+bert", {"text_layers": "even", "pairs": 2}, (0, 2), (1, 3)),
    ("detr+bert", {"text_layers": "even"}, (0, 1, 2), (0, 1, 3)),
    ("vit+bert", {"pairs": 2, "vision_layers": "last"}, (2, 3), (0, 1)),
    ("clip", {"vision_layers": "first", "pairs": 1}, (0,), (0,)),
    ("clip", {}, (0, 1, 3), (0, 1, 2)),
]


@pytest.mark.parametrize("variant", ["safe", "paper"])
@pytest.mark.parametrize(("pair", "options", "vision", "text"), LAYERS)
@torch.no_grad()
def test_the_adapted_encoders_are_the_equations(
    pair: str, options: dict, vision: tuple, text: tuple, variant: str
) -> None:
    net = model(pair, variant=variant, **options)
    inputs = expressions_and_images(net)
    found, words = net.encode(*inputs), inputs[3].bool()
    assert [tuple(t.pair_of) for t in (net.petl.vision, net.petl.text)] == [vision, text]
    for which, forward, layers in zip((0, 1), FORWARD[pair], (vision, text), strict=True):
        tower = (net.petl.vision, net.petl.text)[which]
        adapters = Equations(tower, net.petl.shared, {layer: j for j, layer in enumerate(layers)}, variant)
        plain = build(PAIRS[pair][which])
        expected = forward(plain, adapters, *inputs[2 * which : 2 * which + 2])
        frozen = forward(plain, Equations(tower, net.petl.shared, {}, variant), *inputs[2 * which : 2 * which + 2])
        keep = words if which else torch.ones_like(expected[..., 0], dtype=torch.bool)
        torch.testing.assert_close(found[which][keep], expected[keep], atol=1e-5, rtol=1e-5)
        assert (frozen - expected)[keep].abs().max() > 0.01, "the comparison would not see a missing adapter"


# ---- wiring


def test_both_branches_of_the_relation_adapters_learn() -> None:
    """In the released code the language branch is computed and never read: its gradients are None."""
    net = model()
    net(*expressions_and_images(net)).pow(2).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in net.petl.parameters())
    assert all(p.grad is None for encoder in (net.vision, net.text) for p in encoder.parameters())
    by_tower = []
    for which in (0, 1):  # the gradient of the shared map comes from both encoders
        net.zero_grad()
        net.encode(*expressions_and_images(net))[which].pow(2).sum().backward()
        by_tower.append([s.weight.grad.clone() for s in net.petl.shared])
    assert all(g.any() for gradients in by_tower for g in gradients)


@torch.no_grad()
def test_the_shared_map_is_one_object_and_moves_both_encoders() -> None:
    net = model()
    inputs = expressions_and_images(net)
    assert all(a is b is c for a, b, c in zip(net.petl.vision.shared, net.petl.text.shared, net.petl.shared))
    before = net.encode(*inputs)
    net.petl.shared[1].weight.add_(0.5)
    assert not any(torch.equal(a, b) for a, b in zip(before, net.encode(*inputs), strict=True))
    before = net.encode(*inputs)
    net.petl.vision.adapters[0].unimodal.up.weight.add_(0.5)  # the encoders are linked through nothing else
    after = net.encode(*inputs)
    assert not torch.equal(before[0], after[0])
    assert torch.equal(before[1], after[1])


def test_layers_that_are_not_adapted_compute_what_they_did() -> None:
    net, plain = model(pairs=2, text_layers="first"), build("hf_bert")
    seen: dict[int, tuple] = {}
    for i, layer in enumerate(net.text.encoder.layer):
        layer.register_forward_hook(lambda m, args, kwargs, out, i=i: seen.update({i: (args, kwargs, out)}),
                                    with_kwargs=True)  # fmt: skip
    with torch.no_grad():
        net(*expressions_and_images(net))
        same = [torch.equal(plain.encoder.layer[i](*a, **k), out) for i, (a, k, out) in sorted(seen.items())]
    assert same == [False, False, True, True]


def test_paper_starts_with_a_live_domain_adapter_and_a_silent_relation_adapter() -> None:
    net = grounding("detr+bert", petl.DARA(**SMALL, variant="paper"))
    for tower in (net.petl.vision, net.petl.text):
        for adapter in tower.adapters:
            x = torch.randn(2, 5, tower.view.width)
            assert adapter.unimodal(x).any()
            assert not adapter.interactive(x, net.petl.shared[0]).any()
    for name, p in grounding("detr+bert", petl.DARA(**SMALL)).petl.named_parameters():
        down = name.endswith("down.weight")
        assert bool(p.any()) == down, name  # safe: everything but the down-projections is zero
        if down:  # Kaiming-uniform with a = √5
            assert 0.8 * p.shape[1] ** -0.5 < p.abs().max() <= p.shape[1] ** -0.5


# ---- refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pairs": 4}, r"pairs=4\): the encoders have 3 and 4 layers, so at most 3"),
        ({"shared_dim": 25}, r"shared_dim=25\).* 24 \(image\) and 32 \(text\) channels, so at most 24"),
    ],
)
def test_a_pair_that_does_not_fit_is_refused_and_left_alone(options: dict, message: str) -> None:
    vision, text = build("detr"), build("hf_bert")
    with pytest.raises(petl.PetlError, match=message):
        petl.GroundingModel(vision, text, petl.DARA(**SMALL | options), 96, **SMALL_FUSION)
    for encoder in (vision, text):
        assert not any("forward" in m.__dict__ or "train" in m.__dict__ for m in encoder.modules())
    assert all(p.requires_grad for p in text.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "sfae"}, r"variant='sfae'\): did you mean 'safe'"),
        ({"text_layers": "fist"}, "did you mean 'first'"),
        ({"vision_layers": "all"}, "even, first, last"),
        ({"bottleneck": 0}, "at least 1"),
        ({"relation_dim": 1.5}, "an integer"),
        ({"shared_dim": 0}, "at least 1"),
        ({"pairs": 0}, "at least 1"),
        ({"scale": -0.1}, "at least 0"),
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    with pytest.raises(petl.PetlError, match=message):
        petl.DARA(**options)


@pytest.mark.parametrize("family", ["timm_vit", "hf_bert"])
def test_a_lone_encoder_is_refused_with_the_way_to_go(family: str) -> None:
    with pytest.raises(petl.PetlError, match="GroundingModel"):
        petl.attach(build(family), petl.DARA())


def test_attaching_twice_is_refused_and_detaching_frees() -> None:
    net = model()
    with pytest.raises(petl.PetlError, match="'dara' is attached to this model already"):
        petl.GroundingModel(net.vision, build("hf_bert"), petl.DARA(**SMALL), 96, **SMALL_FUSION)
    with pytest.raises(petl.PetlError, match="attached to this model already"):
        petl.GroundingModel(build("detr"), net.text, petl.DARA(**SMALL), 96, **SMALL_FUSION)
    with pytest.raises(petl.PetlError, match="one module for both"):
        petl.methods.attach.attached(net)
    petl.detach(net)
    assert not any("forward" in m.__dict__ or "train" in m.__dict__ for m in net.modules())
    again = attach_pair(net.vision, net.text, petl.DARA(**SMALL))
    assert again.vision.pair_of == {0: 0, 1: 1, 2: 2}


def test_attaching_twice_to_one_detr_model_is_refused() -> None:
    detr = build("detr")
    petl.GroundingModel(detr, build("hf_bert"), petl.DARA(**SMALL), 96, **SMALL_FUSION)
    with pytest.raises(petl.PetlError, match="attached to the blocks of this detr already"):
        petl.GroundingModel(detr, build("hf_bert"), petl.DARA(**SMALL), 96, **SMALL_FUSION)
