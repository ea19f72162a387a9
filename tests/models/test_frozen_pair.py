"""The frozen parts of a pair of encoders: what is recorded, and that the pair runs from it as from its inputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import petl
from petl.backbones import image_encoder, text_encoder
from petl.models.frozen import FrozenPair, FrozenText, FrozenTower
from petl.models.grounding import GroundingModel
from tests.conftest import PAIRS, build, expressions_and_images, grounding

SMALL = {"bottleneck": 6, "relation_dim": 5, "shared_dim": 20}


def methods(pair: str) -> dict[str, petl.Method | None]:
    reduction = 1 if pair == "clip" else 2
    return {
        "none": None,
        "m2ist": petl.M2IST(**SMALL),
        "m2ist, some layers": petl.M2IST(**SMALL, side_seed="zero", pairs=2, text_layers="last"),
        "ladder": petl.LadderSideTuning(reduction=reduction),
        "gate": petl.LadderSideTuning(reduction=reduction, form="gate", layers=(0, -1)),
    }


def moved(pair: str, method: petl.Method | None, dtype: torch.dtype = torch.float32) -> GroundingModel:
    """A model whose trained tensors are no longer where they start, with encoders in ``dtype``."""
    model: Any = grounding(pair, method, dropout=0.0)
    for encoder in (model.vision, model.text):
        encoder.to(dtype)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.petl.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model.train()


def frozen(model: GroundingModel, ids: Tensor, words: Tensor) -> FrozenPair:
    """With a tokenizer for which expressions are the numbers of rows of ``ids``."""

    def tokens(expressions: Any) -> tuple[Tensor, Tensor]:
        rows = [int(e) for e in expressions]
        return ids[rows], words[rows]

    return FrozenPair(
        FrozenTower("image", model.petl.vision, model.vision_view.encode, ("image", "mask")),
        FrozenText(model.petl.text, model.text_view.encode, tokens),
    )


def gradients(model: GroundingModel, boxes: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    boxes.square().sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", ["padded", "unpadded", "bfloat16"])
@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("name", methods(""))
def test_from_taps_as_from_images_and_words_bit_for_bit(name: str, pair: str, kind: str) -> None:
    model = moved(pair, methods(pair)[name], torch.bfloat16 if kind == "bfloat16" else torch.float32)
    images, seen, ids, words = expressions_and_images(model)
    images = images.to(next(model.vision.parameters()).dtype)
    if kind == "unpadded":  # without padding Hugging Face's models make no mask at all
        words, seen = torch.ones_like(words), torch.ones_like(seen)
    part = frozen(model, ids, words)
    taps = {"image": part.vision.record(images, seen), "text": part.text.record(["0", "1", "2"])}
    for stream in part.streams:
        assert set(taps[stream.kind]) == set(stream.names)
        assert not any(t.requires_grad for t in taps[stream.kind].values())
        taps[stream.kind] = dict(sorted(taps[stream.kind].items()))  # a store keeps no order

    def replayed() -> Tensor:
        batch = {"taps": taps, "missing": {}}
        visual = part.vision.output(batch)[:, model.vision_view.prefix_tokens :]
        return model.locate(visual, seen, part.text.output(batch), words)

    live = model(images, seen, ids, words)
    assert torch.equal(live, replayed())
    expected, found = gradients(model, live), gradients(model, replayed())
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[n], found[n]) for n in expected)


@pytest.mark.parametrize(
    "family", ["timm_vit", "timm_dinov2", "hf_clip_vision", "hf_vit", "hf_bert", "hf_clip_text", "detr"]
)
@torch.no_grad()
def test_what_follows_the_last_block(family: str) -> None:
    model: Any = grounding("detr+bert").vision if family == "detr" else build(family)
    view: Any
    inputs: tuple[Tensor, ...]
    if family in ("hf_bert", "hf_clip_text"):
        view, inputs = text_encoder(model), (torch.randint(3, 39, (2, 7)), torch.ones(2, 7, dtype=torch.long))
    else:
        size = 96 if family == "detr" else 32
        view, inputs = image_encoder(model), (torch.randn(2, 3, size, size), torch.ones(2, size, size) > 0)
    last: list[Tensor] = []

    def keep(block: object, args: object, out: Any) -> None:
        last.append(out[0] if isinstance(out, tuple) else out)

    view.block_modules()[-1].register_forward_hook(keep)
    assert torch.equal(view.encode(*inputs), view.after_blocks(last[0]))


@torch.no_grad()
def test_masks_are_kept_per_sample_and_no_larger_than_they_say() -> None:
    for pair, rows in (("vit+bert", 1), ("clip", 7)):  # CLIP's is causal
        model = moved(pair, petl.LadderSideTuning(reduction=1))
        _, _, ids, words = expressions_and_images(model)
        mask = frozen(model, ids, words).text.record(["0", "1"])["mask"]
        assert (mask.dtype, mask.shape) == (torch.bool, (2, rows, 7))
        assert mask[:, -1].sum(1).tolist() == words[:2].sum(1).tolist()
    assert "mask" not in frozen(model, ids, words).vision.names


@torch.no_grad()
def test_inputs_that_were_not_recorded_are_recorded_and_rounded_as_the_others() -> None:
    model = moved("vit+bert", methods("")["m2ist"])
    images, seen, ids, words = expressions_and_images(model)
    part = frozen(model, ids, words)
    kept = {n: t.bfloat16() for n, t in part.vision.record(images, seen).items()}
    holes = {n: t.clone().index_fill_(0, torch.tensor([0, 2]), 0) for n, t in kept.items()}
    rows = torch.tensor([0, 2])
    batch = {"taps": {"image": holes}, "missing": {"image": {"rows": rows, "image": images[rows], "mask": seen[rows]}}}
    assert all(torch.equal(t, kept[n]) for n, t in part.vision.complete(batch).items())


def test_equal_tokens_have_equal_digests() -> None:
    model = moved("vit+bert", None)
    _, _, ids, words = expressions_and_images(model)
    ids[1], words[1] = ids[0], words[0]
    one, two, three = frozen(model, ids, words).text.digests(["0", "1", "2"])
    assert one == two != three
    words[1] = 1  # the same ids with another mask
    assert len(set(frozen(model, ids, words).text.digests(["0", "1"]))) == 2


@pytest.mark.parametrize("method", [petl.DARA(**SMALL), petl.FullFineTuning()])
def test_methods_inside_the_encoders_have_nothing_to_record(method: petl.Method) -> None:
    model = moved("vit+bert", method)
    part = frozen(model, *expressions_and_images(model)[2:])
    assert [s.names for s in part.streams] == [(), ()]
    assert part.vision.obstacle == f"{method.name} changes what the encoders compute"
