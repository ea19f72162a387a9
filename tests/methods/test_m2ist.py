"""M²IST against its sheet: nothing enters the encoders, side streams are sums over hooked taps, refusals."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import petl
from petl.costs import count_saved_bytes
from tests.conftest import PAIRS, SMALL_FUSION, build, expressions_and_images, grounding

SMALL = {"bottleneck": 6, "relation_dim": 5, "shared_dim": 20}
every_pair = pytest.mark.parametrize("pair", PAIRS)


def model(pair: str = "detr+bert", **options: Any) -> petl.GroundingModel:
    """A small model whose adapters are far from zero."""
    return loud(grounding(pair, petl.M2IST(**SMALL | options)))


@torch.no_grad()
def loud(net: petl.GroundingModel) -> petl.GroundingModel:
    for name, p in net.petl.named_parameters():
        p.normal_(0, 0.3)
        if name.endswith("down.bias"):
            p.add_(1)  # else some ReLU is dead on every token
    return net


# ---- the tap table of the sheet, section 6: hooks on named modules of an encoder that petl has not touched

TAPS = {  # blocks, attention tap, FFN tap, seed
    "detr": ("encoder.layers", "self_attn.o_proj", "mlp", None),
    "hf_bert": ("encoder.layer", "attention.output.dense", "output.dense", "embeddings"),
    "timm": ("blocks", "attn", "mlp", "norm_pre"),
    "hf_clip_vision": ("encoder.layers", "self_attn.out_proj", "mlp.fc2", "pre_layrnorm"),
    "hf_clip_text": ("encoder.layers", "self_attn.out_proj", "mlp.fc2", "embeddings"),
    "bundled_vision": ("blocks", "attn", "mlp", "norm_pre"),
    "bundled_text": ("text_model.encoder.layers", "self_attn.out_proj", "mlp.fc2", "text_model.embeddings"),
}


class Tapped:
    """An untouched encoder and what its modules put out in one pass: seed X, last output H, taps A and F."""

    def __init__(self, family: str, inputs: tuple[Tensor, ...]) -> None:
        blocks, attention, ffn, seed = TAPS.get(family) or TAPS[family.partition("_")[0]]
        encoder = build(family)
        self.calls: list[tuple[str, Tensor]] = []
        if family == "detr":
            encoder.input_projection.register_forward_hook(self.keep("seed", lambda t: t.flatten(2).mT))
        else:
            encoder.get_submodule(seed).register_forward_hook(self.keep("seed"))
        for block in encoder.get_submodule(blocks):
            block.get_submodule(attention).register_forward_hook(self.keep("A"))
            block.get_submodule(ffn).register_forward_hook(self.keep("F"))
        with torch.no_grad():
            self.h = self.run(family, encoder, *inputs)
        (self.seed,), self.a, self.f = ([t for n, t in self.calls if n == name] for name in ("seed", "A", "F"))
        assert len(self.a) == len(self.f) == len(encoder.get_submodule(blocks))

    def keep(self, name: str, change: Any = lambda t: t) -> Any:
        return lambda module, args, out: self.calls.append((name, change(out)))

    @staticmethod
    def run(family: str, encoder: nn.Module, x: Tensor, mask: Tensor) -> Tensor:
        if family == "detr":
            return encoder(x, mask).encoder_last_hidden_state
        if family == "hf_clip_vision":
            return encoder.post_layernorm(encoder(x).last_hidden_state)
        if family.startswith(("timm", "bundled_vision")):
            return encoder.forward_features(x)
        return getattr(encoder, "text_model", encoder)(input_ids=x, attention_mask=mask).last_hidden_state


def expert(part: nn.Module, f: Tensor) -> Tensor:
    return 0.1 * (F.relu(f @ part.down.weight.T + part.down.bias) @ part.up.weight.T + part.up.bias)


def interaction(part: nn.Module, shared: nn.Module, a: Tensor) -> Tensor:
    z = F.relu(a @ part.down.weight.T + part.down.bias)
    private = [] if part.up is None else [z @ part.up.weight.T + part.up.bias]
    return torch.cat([*private, z @ shared.weight.T + shared.bias], -1)


CASES = [  # families, options, tapped layers of both encoders
    (("detr", "hf_bert"), {}, (0, 1, 2), (0, 1, 2)),
    (("detr", "hf_bert"), {"side_seed": "zero", "text_layers": "last", "pairs": 2}, (0, 2), (2, 3)),
    (("detr", "hf_bert"), {"text_layers": "even", "vision_layers": "first", "pairs": 2}, (0, 1), (1, 3)),
    (("timm_dinov2", "hf_bert"), {}, (0, 1, 2, 3), (0, 1, 2, 3)),  # LayerScale: taps lie before it
    (("timm_clip", "hf_clip_text"), {"side_seed": "zero"}, (0, 1, 3), (0, 1, 2)),
    (("hf_clip_vision", "hf_clip_text"), {}, (0, 1, 3), (0, 1, 2)),
    (("bundled_vision", "bundled_text"), {}, (2, 5, 8, 11), (0, 1, 2, 3)),
]


def of(families: tuple[str, str], **options: Any) -> petl.GroundingModel:
    size = {"detr": 96, "bundled_vision": 64}.get(families[0], 32)
    towers = [build(f) for f in families]
    return petl.GroundingModel(*towers, petl.M2IST(**SMALL | options), size, **SMALL_FUSION).eval()


@pytest.mark.parametrize(("families", "options", "vision", "text"), CASES)
@torch.no_grad()
def test_fused_streams_are_output_plus_seed_plus_all_experts(
    families: tuple[str, str], options: dict, vision: tuple, text: tuple
) -> None:
    net = of(families, **options)
    inputs = expressions_and_images(net)
    quiet, found = net.encode(*inputs), loud(net).encode(*inputs)
    for which, layers in enumerate((vision, text)):
        tapped, tower = Tapped(families[which], inputs[2 * which : 2 * which + 2]), net.petl.get_submodule(
            ("vision", "text")[which])  # fmt: skip
        assert tuple(tower.pair_of) == layers
        start = tapped.h + tapped.seed if options.get("side_seed") != "zero" else tapped.h
        first = start[:, net.vision_view.prefix_tokens :] if which == 0 else start
        assert torch.equal(quiet[which], first), "all up-projections are zero at the start"
        terms = [expert(a.unimodal, tapped.f[i]) for a, i in zip(tower.adapters, layers, strict=True)]
        terms += [interaction(a.interactive, s, tapped.a[i])
                  for a, s, i in zip(tower.adapters, net.petl.shared, layers, strict=True)]  # fmt: skip
        assert all(term.abs().max() > 1e-2 for term in terms)
        total = start + sum(reversed(terms))  # in another order than the layers
        torch.testing.assert_close(
            found[which], total[:, net.vision_view.prefix_tokens :] if which == 0 else total, atol=1e-5, rtol=1e-5
        )


# ---- isolation


@every_pair
def test_no_gradient_enters_an_encoder_even_where_it_could(pair: str) -> None:
    net = model(pair).train()
    taps: list[bool] = []
    for tower in (net.petl.vision, net.petl.text):
        for part in (p for a in tower.adapters for p in (a.interactive, a.unimodal)):
            part.register_forward_pre_hook(lambda m, args: taps.append(args[0].requires_grad))
    encoders = [p for encoder in (net.vision, net.text) for p in encoder.parameters()]
    for frozen in (True, False):
        for p in encoders:
            p.requires_grad_(not frozen and p.is_floating_point())
        net(*expressions_and_images(net)).pow(2).sum().backward()
        assert all(p.grad is None for p in encoders)
        assert not any(taps)
    assert len(taps) >= 2 * 4 * len(net.petl.shared)  # more where the experts are recomputed for backward
    assert all(p.grad is not None for m in (net.petl, net.head) for p in m.parameters())


@every_pair
def test_encoders_compute_bit_for_bit_what_they_did(pair: str) -> None:
    net, plain = model(pair), grounding(pair)
    images, seen, ids, words = expressions_and_images(net)
    expected = [plain.vision_view.encode(images, seen), plain.text_view.encode(ids, words)]
    for mode in (True, False):
        net.train(mode)
        found = [net.vision_view.encode(images, seen), net.text_view.encode(ids, words)]
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        assert not any(h.requires_grad for h in found)


@every_pair
@torch.no_grad()
def test_every_tap_is_read_once_a_pass_and_nothing_is_left_over(pair: str) -> None:
    net = model(pair)
    reads: Counter[str] = Counter()
    for name, part in net.petl.named_modules():
        if name.endswith(("interactive", "unimodal")):
            part.register_forward_hook(lambda m, args, out, name=name: reads.update([name]))
    inputs = expressions_and_images(net)
    first = net(*inputs)
    pairs = min(net.vision_view.depth, net.text_view.depth)
    assert len(reads) == 4 * pairs
    assert set(reads.values()) == {1}
    assert torch.equal(net(*inputs), first)
    assert set(reads.values()) == {2}
    for tower in (net.petl.vision, net.petl.text):
        assert tower.run.take() is None
        assert tower.run.local.value is None


# ---- memory


def deep(layers: int, method: petl.methods.base.Method | None) -> int:
    """Bytes kept for backward by a narrow pair of encoders with ``layers`` each, in training mode."""
    from timm.models.vision_transformer import VisionTransformer
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    vision = VisionTransformer(img_size=32, patch_size=4, embed_dim=32, depth=layers, num_heads=4, num_classes=0)
    text = BertModel(BertConfig(hidden_size=32, intermediate_size=128, num_hidden_layers=layers, num_attention_heads=4,
                                vocab_size=40, max_position_embeddings=16))  # fmt: skip
    net = petl.GroundingModel(vision, text, method, 32, **SMALL_FUSION).train()
    return count_saved_bytes(net, *expressions_and_images(net))


def test_bytes_kept_for_backward_do_not_see_the_encoders() -> None:
    side, in_encoder = petl.M2IST(**SMALL, pairs=2), petl.DARA(**SMALL, pairs=2)
    floor, tuned = deep(8, None), deep(8, petl.FullFineTuning())
    assert 0 < deep(8, side) - floor < 0.05 * tuned
    assert deep(8, side) == deep(3, side)
    assert deep(8, in_encoder) - floor > 0.05 * tuned, "the measure tells a side adapter from one inside"
    per_pair = (deep(8, petl.M2IST(**SMALL, pairs=6)) - deep(8, side)) / 4
    assert per_pair * 2 == pytest.approx(deep(8, side) - floor, rel=0.02)


# ---- start, shared map, first steps


@every_pair
def test_zero_up_projections_block_the_down_projections_on_the_first_step_only(pair: str) -> None:
    net = grounding(pair, petl.M2IST(**SMALL))
    inputs = expressions_and_images(net)
    optimizer = torch.optim.SGD(net.petl.parameters(), lr=10.0)
    for step in (1, 2):
        optimizer.zero_grad()
        net(*inputs).pow(2).sum().backward()
        for name, p in net.petl.named_parameters():
            blocked = step == 1 and ".down." in name
            assert bool(p.grad.any()) != blocked, (step, name)
        optimizer.step()


@torch.no_grad()
def test_the_shared_map_moves_both_streams_and_an_expert_moves_its_own() -> None:
    net = model()
    inputs = expressions_and_images(net)

    def moved(weight: nn.Parameter) -> list[bool]:
        before = net.encode(*inputs)
        weight.add_(0.5)
        return [not torch.equal(a, b) for a, b in zip(before, net.encode(*inputs), strict=True)]

    assert moved(net.petl.shared[2].weight) == [True, True]
    vision, text = (t.adapters[1] for t in (net.petl.vision, net.petl.text))
    assert moved(vision.unimodal.up.weight) == [True, False]
    assert moved(vision.interactive.up.weight) == [True, False]
    assert moved(text.unimodal.down.weight) == [False, True]
    assert moved(text.interactive.down.weight) == [False, True]


@torch.no_grad()
def test_taps_of_one_layer_are_that_layers_own() -> None:
    """Silencing the adapters of one pair removes its terms and no others."""
    net = model("clip")
    inputs = expressions_and_images(net)
    start = [h.clone() for h in grounding("clip", petl.M2IST(**SMALL)).encode(*inputs)]
    whole, parts = net.encode(*inputs), [torch.zeros_like(h) for h in start]
    for j in range(3):
        other = model("clip")
        other.petl.load_state_dict(net.petl.state_dict())
        for k in {0, 1, 2} - {j}:
            for up in (other.petl.shared[k], *(t.adapters[k].unimodal.up for t in (other.petl.vision, other.petl.text)),
                       *(t.adapters[k].interactive.up for t in (other.petl.vision, other.petl.text))):  # fmt: skip
                nn.init.zeros_(up.weight), nn.init.zeros_(up.bias)
        for total, h, s in zip(parts, other.encode(*inputs), start, strict=True):
            total += h - s
    for a, b, s in zip(whole, parts, start, strict=True):
        torch.testing.assert_close(a, s + b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"side_seed": "zeros"}, r"side_seed='zeros'\): did you mean 'zero'"),
        ({"text_layers": "lst"}, "did you mean 'last'"),
        ({"scale": float("nan")}, "scale"),
        ({"relation_dim": True}, "an integer"),
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    with pytest.raises(petl.PetlError, match=message):
        petl.M2IST(**options)


def test_refusals_on_a_pair_and_on_a_lone_encoder() -> None:
    for options, message in (({"pairs": 4}, "at most 3 can be paired"), ({"shared_dim": 25}, "at most 24")):
        with pytest.raises(petl.PetlError, match=message):
            of(("detr", "hf_bert"), **options)
    with pytest.raises(petl.PetlError, match=r"petl\.GroundingModel"):
        petl.attach(build("hf_clip_vision"), petl.M2IST())
    net = model()
    with pytest.raises(petl.PetlError, match="'m2ist' is attached to this model already"):
        petl.GroundingModel(net.vision, build("hf_bert"), petl.DARA(**SMALL), 96, **SMALL_FUSION)
