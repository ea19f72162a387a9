"""Ladder Side-Tuning: counts, what is kept for backward, masks of text encoders, pruned starts, refusals."""

from __future__ import annotations

import json

import pytest
import timm
import torch
from torch import Tensor, nn

import petl
from petl.backbones import _find
from petl.backbones import view as find_view
from petl.backbones.base import BlockView, Call, EncoderView
from petl.costs import count_macs, count_saved_bytes
from petl.methods.attach import attached
from petl.methods.base import from_dict
from petl.methods.ladder import LadderModule, LadderSideTuning, visible
from petl.nn.ladder import SideBlock
from tests.conftest import _timm, build, expressions_and_images, grounding, outputs


def moved(model: nn.Module) -> nn.Module:
    """The same model with every trained tensor somewhere else."""
    with torch.no_grad():
        for p in model.petl.parameters():  # type: ignore[union-attr]
            p.add_(0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    return model


def encoder(family: str) -> EncoderView:
    model = build(family)
    if family == "detr":
        from petl.backbones.detr import DetrImageEncoder

        model = DetrImageEncoder(model)  # type: ignore[arg-type]
    found = _find(model)
    assert found is not None
    return found


def test_counts_on_vit_b() -> None:
    model = timm.create_model("vit_base_patch16_224", num_classes=10)
    view, method = find_view(model), petl.LadderSideTuning()
    up = 96 * 768 + 768
    assert method.parameter_count(view) == 2_229_130 - (96 * 10 + 10) + up
    module = method.build(view)
    assert sum(p.numel() for p in module.parameters()) == method.parameter_count(view)
    share = 12 * (768 * 96 + 12 * 96 * 96 + 2 * 197 * 96) * 197 + 197 * 96 * 768
    tokens = module.token_counts(196)
    assert module.macs(tokens) == share
    assert share / view.macs(tokens, 196) < 0.035
    petl.attach(model, method)
    assert count_macs(model, torch.zeros(1, 3, 224, 224)) == view.macs(tokens, 196) + share


def test_only_taps_and_side_activations_are_kept(images: Tensor) -> None:
    width, side, depth, tokens, heads = 64, 16, 4, 17, 4

    def kept(checkpointing: bool = False) -> int:
        model = _timm(embed_dim=width, num_heads=heads, mlp_ratio=4)
        petl.attach(model, petl.LadderSideTuning(reduction=4)).train()
        attached(model).checkpointing = checkpointing
        return (count_saved_bytes(model, images) - count_saved_bytes(model, images[:2])) // 4

    after = tokens * (2 * width + 2 * side + 4)  # final norm: input and output; ladder's norm and W_up
    rung = tokens * (17 * side + heads + 4)  # W h, its GELU in the sum, two norms, qkv, attention (and its sums), FFN
    assert kept() <= depth * (tokens * width + rung) + after
    assert kept(checkpointing=True) <= depth * tokens * (width + side) + after


def test_no_gradient_enters_the_backbone(images: Tensor) -> None:
    model = moved(petl.attach(build("timm_vit"), petl.LadderSideTuning(4)))
    for p in model.parameters():
        p.requires_grad_()  # even where something asks for it
    images = images.clone().requires_grad_()
    outputs(model.train(), images).pow(2).sum().backward()
    reached = {n for n, p in model.named_parameters() if p.grad is not None and not n.startswith("petl.")}
    assert reached == {"norm.weight", "norm.bias", "head.weight", "head.bias"}
    assert images.grad is None
    assert all(p.grad is not None and p.grad.any() for p in model.petl.parameters())  # type: ignore[union-attr]
    assert attached(model).first_gradient()[0] == "output of the last block"


@pytest.mark.parametrize("layers", [None, (0, 2)])
def test_the_frozen_norm_reads_the_sum(layers: tuple[int, ...] | None, images: Tensor) -> None:
    plain, model = build("timm_vit"), moved(petl.attach(build("timm_vit"), petl.LadderSideTuning(2, "gate", layers)))
    stream: list[Tensor] = []
    plain.blocks[0].register_forward_pre_hook(lambda m, args: stream.append(args[0]))  # type: ignore[index, union-attr]
    for block in plain.blocks:  # type: ignore[union-attr]
        block.register_forward_hook(lambda m, args, out: stream.append(out))
    plain(images)
    module = attached(model)
    z = module.ladder(stream[0], stream[1:])  # type: ignore[operator]
    expected = plain.forward_head(plain.norm(stream[-1] + module.up(z)))  # type: ignore[operator]
    torch.testing.assert_close(model(images), expected, atol=1e-6, rtol=1e-6)


# --- masks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pair", ["detr+bert", "clip"])
def test_padding_of_a_text_does_not_matter(pair: str) -> None:
    model = moved(grounding(pair, petl.LadderSideTuning(1)))
    images, seen, ids, words = expressions_and_images(model)
    other = torch.where(words.bool(), ids, 7)
    found, changed = (model.encode(images, seen, i, words)[-1] for i in (ids, other))
    assert torch.equal(found[0, :4], changed[0, :4])
    whole = model.encode(images, seen, other, torch.ones_like(words))[-1]
    assert pair == "clip" or not torch.equal(found[0, :4], whole[0, :4])


def test_the_text_tower_of_clip_stays_causal() -> None:
    model = moved(grounding("clip", petl.LadderSideTuning(1)))
    images, seen, ids, words = expressions_and_images(model)
    for mask in (words, torch.ones_like(words)):  # a mask of its own, and the causality of sdpa
        found = model.encode(images, seen, ids, mask)[-1]
        later = model.encode(images, seen, torch.cat([ids[:, :3], ids[:, 3:].flip(1)], 1), mask)[-1]
        assert torch.equal(found[:, :3], later[:, :3])


def test_a_margin_of_a_picture_does_not_matter_to_detr() -> None:
    model = moved(grounding("detr+bert", petl.LadderSideTuning(1)))
    keep = torch.tensor([[True] * 6 + [False] * 3])
    module, call = model.petl.vision, Call((keep[:, None, None].expand(1, 1, 9, 9),), {})
    block = model.vision_view.block_view(model.vision_view.block_modules()[0])
    del block.module.forward
    x = torch.randn(1, 9, 24)
    one, two = (
        module.block(0, block, torch.where(keep[..., None], x, fill), call, module.begin(x))[1] for fill in (0.0, 5.0)
    )
    assert torch.equal(one[keep], two[keep])


def test_masks_of_every_attention_are_read() -> None:
    keep = torch.tensor([[True, True, False], [True, True, True]])
    bool_mask = keep[:, None, None].expand(2, 1, 3, 3)
    float_mask = torch.zeros(2, 1, 3, 3).masked_fill(~bool_mask, torch.finfo(torch.float32).min)
    tril = torch.ones(3, 3, dtype=torch.bool).tril()

    def read(*args: object, **kwargs: object) -> Tensor | None:
        return visible(Call(args, kwargs), 3, keep.device)

    assert read() is None
    assert read(None, None) is None
    for mask in (bool_mask, float_mask, float_mask.masked_fill(~bool_mask, -torch.inf), keep.long()):
        for found in (read(mask), read(attention_mask=mask)):
            assert found is not None
            assert torch.equal(found.expand(2, 3, 3), bool_mask[:, 0])
        found = read(mask, is_causal=True)
        assert found is not None
        assert torch.equal(found, bool_mask[:, 0] & tril)
    found = read(attn_mask=bool_mask[:, :, :1])  # timm
    assert found is not None
    assert torch.equal(found, keep[:, None])
    found = read(None, is_causal=True)
    assert found is not None
    assert torch.equal(found[0], tril)
    for odd in (float_mask.expand(2, 4, 3, 3), object()):
        with pytest.raises(petl.PetlError, match=r"cannot read the attention mask .*set_attn_implementation\('sdpa'\)"):
            read(odd)
    with pytest.raises(petl.PetlError, match=r"a Tensor of shape \(3, 3\)"):
        read(attn_mask=tril)


# --- pruned starts ----------------------------------------------------------------------------------------------------

FAMILIES = ["timm_vit", "timm_clip", "hf_vit", "hf_clip_vision", "hf_bert", "hf_clip_text", "detr"]


def indices_of(part: Tensor, whole: Tensor) -> list[int]:
    """Where the entries of ``part`` stand in ``whole``."""
    return [int((whole == value).nonzero().item()) for value in part]


@pytest.mark.parametrize("family", FAMILIES)
def test_pruned_blocks_are_parts_of_the_backbone(family: str) -> None:
    view = encoder(family)
    reduction = 7 if family == "hf_clip_text" else 4
    module = LadderModule(LadderSideTuning(reduction, init="prune"), view)
    e, head = view.width // reduction, view.width // view.heads
    frozen = [view.block_view(m).block_weights() for m in view.block_modules()]
    writers = sum(w[f"{p}.weight"].abs().sum(1) for w in frozen for p in ("out", "fc2"))
    assert isinstance(writers, Tensor)
    channels = writers.topk(e).indices.sort().values
    for w, block in zip(frozen, module.ladder.blocks, strict=True):
        assert isinstance(block, SideBlock)
        assert torch.equal(block.norm1.weight, w["norm1.weight"][channels])
        assert torch.equal(block.norm2.bias, w["norm2.bias"][channels])
        assert torch.equal(block.out.bias, w["out.bias"][channels])
        rows = indices_of(block.qkv.bias[:e], w["q.bias"])
        assert [r // head for r in rows] == [h for h in range(view.heads) for _ in range(e // view.heads)]
        for part, own in zip("qkv", block.qkv.weight.chunk(3), strict=True):
            assert torch.equal(own, w[f"{part}.weight"][rows][:, channels])
        assert torch.equal(block.out.weight, w["out.weight"][channels][:, rows])
        norms = w["fc1.weight"][:, channels].abs().sum(1)
        hidden = norms.topk(min(4 * e, view.hidden)).indices.sort().values
        n = len(hidden)
        assert torch.equal(block.fc1.weight[:n], w["fc1.weight"][hidden][:, channels])
        assert torch.equal(block.fc1.bias[:n], w["fc1.bias"][hidden])
        assert torch.equal(block.fc2.weight[:, :n], w["fc2.weight"][channels][:, hidden])
        assert not block.fc2.weight[:, n:].any()


@pytest.mark.parametrize("family", ["timm_vit", "timm_scaled", "hf_vit", "hf_bert"])
def test_pruning_by_one_is_the_block_itself(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("tests.conftest").conftest.ENCODERS, "timm_scaled", lambda: _timm(init_values=0.5))
    view = encoder(family)
    module = LadderModule(LadderSideTuning(1, "gate", init="prune"), view)
    assert module.ladder.seed is not None
    assert module.ladder.alpha is not None
    with torch.no_grad():
        module.ladder.alpha.fill_(20.0)  # μ = 1
        module.ladder.seed.weight.copy_(torch.eye(view.width))
        module.ladder.seed.bias.zero_()
        x = torch.randn(2, 7, view.width)
        z = module.ladder.begin(x)
        for index, frozen in enumerate(view.block_modules()):
            x = view.block_view(frozen).forward(x, Call())
            z = module.ladder.step(index, z, torch.randn_like(x))
            torch.testing.assert_close(z, x, atol=2e-5, rtol=1e-5)


def test_missing_biases_count_as_zero() -> None:
    model = _timm(qkv_bias=False)
    module = petl.LadderSideTuning(2, init="prune").build(find_view(model))
    for block in module.ladder.blocks:
        assert isinstance(block, SideBlock)
        assert not block.qkv.bias.any()


def test_a_pruned_start_is_the_frozen_network_and_trains(images: Tensor) -> None:
    model = build("timm_vit")
    expected = model(images)
    petl.attach(model, petl.LadderSideTuning(2, "gate", (1, 3), "prune"))
    assert torch.equal(model(images), expected)
    optimizer = torch.optim.AdamW(attached(model).parameters(), lr=1e-2)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = model.train()(images).pow(2).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_blocks_that_cannot_be_pruned_are_refused(images: Tensor) -> None:
    model = build("timm_dinov2")
    expected = outputs(model, images)
    with pytest.raises(petl.PetlError, match=r"norms inside its attention .* Start it at random"):
        petl.attach(model, petl.LadderSideTuning(init="prune"))
    assert torch.equal(outputs(model, images), expected)
    gated = timm.create_model("vit_base_patch14_reg4_dinov2", img_size=28, depth=1, embed_dim=24, num_heads=3,
                              mlp_layer=timm.layers.SwiGLUPacked)  # fmt: skip
    with pytest.raises(petl.PetlError, match=r"a GluMlp FFN|a SwiGLU\w* FFN"):
        petl.attach(gated, petl.LadderSideTuning(init="prune"))
    with pytest.raises(petl.PetlError, match=r"weights of a Identity cannot be read part by part"):
        BlockView.block_weights(
            type("Other", (BlockView,), dict.fromkeys(BlockView.__abstractmethods__))(nn.Identity())
        )


# --- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reduction": 0}, r"LadderSideTuning\(reduction=0\): reduction must be an integer of at least 1"),
        ({"reduction": 2.0}, r"reduction must be an integer"),
        ({"form": "gates"}, r"LadderSideTuning\(form='gates'\): did you mean 'gate'\?"),
        ({"init": "pruned"}, r"LadderSideTuning\(init='pruned'\): did you mean 'prune'"),
        ({"layers": 3}, r"layers=3\): give a list of block numbers"),
        ({"layers": [0.5]}, r"layers=\[0.5\]\): give a list of block numbers"),
    ],
)
def test_wrong_options(options: dict, message: str) -> None:
    with pytest.raises(petl.PetlError, match=message):
        petl.LadderSideTuning(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"reduction": 5}, "does not divide the width 24"), ({"reduction": 3}, "does not divide into 3 heads"),
     ({"layers": [4]}, r"\[4\] are out of range; this network has blocks 0 to 3"), ({"layers": []}, "it is empty")],
)  # fmt: skip
def test_options_that_do_not_fit_leave_the_backbone_alone(options: dict, message: str, images: Tensor) -> None:
    model = build("timm_vit")
    with pytest.raises(petl.PetlError, match=message):
        petl.attach(model, petl.LadderSideTuning(**options))
    assert not hasattr(model, "petl")
    petl.attach(model, petl.LinearProbe())


def test_layers_survive_a_config() -> None:
    method = petl.LadderSideTuning(layers=[0, 2])  # type: ignore[arg-type]
    assert method.layers == (0, 2)
    assert from_dict(json.loads(json.dumps(method.to_dict()))) == method
