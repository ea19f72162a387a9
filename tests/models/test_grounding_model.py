"""The grounding model: the integers of the sheets on the real sizes, masks, refusals."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    DetrConfig,
    DetrModel,
)

import petl
from petl.backbones import image_encoder, text_encoder
from petl.backbones.detr import DetrImageEncoder
from petl.methods import attach
from tests.conftest import PAIRS, SMALL_FUSION, build, expressions_and_images, grounding

SMALL = {"bottleneck": 6, "relation_dim": 5, "shared_dim": 20}
VL_PART = 8_393_732


def count(*parts: Any, trained: bool = False) -> int:
    return sum(p.numel() for m in parts for p in m.parameters() if p.requires_grad or not trained)


# ---- DETR-R50 + BERT-base at 640 pixels, on the meta device: sheet rec_task.md, section 1.2


@pytest.fixture(scope="module")
def real() -> Callable[..., petl.GroundingModel]:
    with torch.device("meta"):
        vision, text = DetrModel(DetrConfig()), BertModel(BertConfig())
    vision = DetrImageEncoder(vision)
    models: list[petl.GroundingModel] = []

    def make(method: Any = None, **options: Any) -> petl.GroundingModel:
        if models:
            attach.remove(models.pop())
        with torch.device("meta"), pytest.MonkeyPatch.context() as patch:
            patch.setattr(attach, "identify", lambda view: None)  # a hash of weights, which meta tensors do not have
            models.append(petl.GroundingModel(vision, text, method, **options))
        return models[0]

    return make


def test_every_part_has_its_published_size(real: Callable[..., petl.GroundingModel]) -> None:
    model = real()
    assert model.image_size == 640
    assert count(model) == 149_745_860
    assert count(model.vision.backbone) == 23_454_912
    assert count(model.vision.input_projection) == 524_544
    assert count(model.vision.encoder) == 7_890_432
    assert count(model.text) == 109_482_240
    assert count(model.text.pooler) == 590_592
    head = model.head
    assert count(head) == count(model, trained=True) == VL_PART
    assert [count(p) for p in (head.visual_projection, head.text_projection, head.reg_token)] == [65_792, 196_864, 256]
    assert [count(p) for p in (head.position, head.layers, head.box)] == [107_776, 7_890_432, 132_612]
    assert {count(layer) for layer in (*head.layers, *model.vision.encoder.layers)} == {1_315_072}


def test_full_fine_tuning_trains_what_transvg_trains(real: Callable[..., petl.GroundingModel]) -> None:
    model = real(petl.FullFineTuning())
    assert count(model, trained=True) == 149_523_460 - 590_592  # the pooler is never used, here it is not trained
    assert count(model.vision.backbone, trained=True) == 23_232_512
    frozen = {n.split(".")[1] for n, p in model.vision.backbone.named_parameters() if not p.requires_grad}
    assert frozen == {"conv1", "layer1"}
    assert count(model.text, trained=True) == 109_482_240 - 590_592
    method = petl.FullFineTuning()
    assert method.pair_parameter_count(model.vision_view, model.text_view) + VL_PART == count(model, trained=True)


def test_forty_tokens_need_5120_parameters_more(real: Callable[..., petl.GroundingModel]) -> None:
    short = {n: p.numel() for n, p in real().named_parameters()}
    model = real(query_length=40)
    long = {n: p.numel() for n, p in model.named_parameters()}
    assert {n: long[n] - short[n] for n in long if long[n] != short[n]} == {"head.position.weight": 5_120}
    assert long.keys() == short.keys()
    assert long["head.position.weight"] == 112_896


@pytest.mark.parametrize(
    ("method", "trained"),
    [(petl.DARA(), 2_962_944), (petl.M2IST(), 2_962_944), (petl.DARA(variant="paper"), 2_962_944),
     (petl.DARA(bottleneck=16), 1_585_344), (petl.M2IST(text_layers="last", side_seed="zero"), 2_962_944)],
)  # fmt: skip
def test_methods_on_detr_and_bert(real: Callable[..., petl.GroundingModel], method: Any, trained: int) -> None:
    model = real(method)
    assert count(model.petl) == trained
    assert count(model, trained=True) == trained + VL_PART
    assert method.pair_parameter_count(model.vision_view, model.text_view) == trained
    assert len(model.petl.shared) == len(model.petl.vision.adapters) == len(model.petl.text.adapters) == 6
    sizes = {n.split(".", 1)[1]: 0 for n, _ in model.petl.vision.adapters.named_parameters()}
    assert not any(n.startswith("interactive.up") for n in sizes), "C_s = C_v: no private rows on the image side"
    if method.bottleneck == 128:
        parts = [(t.adapters[0].unimodal, t.adapters[0].interactive) for t in (model.petl.vision, model.petl.text)]
        assert [count(p) for pair in parts for p in pair] == [65_920, 32_896, 197_504, 98_432 + 66_048]
        assert count(model.petl.shared[0]) == 33_024


def clip(vision: dict, text: dict) -> tuple[nn.Module, nn.Module]:
    return CLIPVisionModel(CLIPVisionConfig(**vision)), CLIPTextModel(CLIPTextConfig(**text))


LARGE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
GENERIC: list[tuple[Callable[[], tuple[nn.Module, nn.Module]], int, int]] = [  # encoders, pairs, parameters per pair
    (lambda: (timm.create_model("vit_base_patch16_224"), BertModel(BertConfig())), 12, 756_992),
    (lambda: clip({}, {}), 12, 625_408),
    (lambda: clip(LARGE, {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}), 12, 888_576),
    (lambda: (timm.create_model("vit_small_patch16_224"), BertModel(BertConfig())), 12, 559_616),
]


@pytest.mark.parametrize(("encoders", "pairs", "each"), GENERIC, ids=["vit-b+bert", "clip-b", "clip-l", "vit-s+bert"])
def test_methods_on_other_pairs(encoders: Callable, pairs: int, each: int) -> None:
    with torch.device("meta"):
        vision, text = encoders()
        views = image_encoder(vision), text_encoder(text)
        for method in (petl.M2IST(), petl.DARA(), petl.M2IST(pairs=5)):
            built = method.build_pair(*views)
            assert count(built) == method.pair_parameter_count(*views) == each * (method.pairs or pairs)


# ---- the shared map is one tensor everywhere


@pytest.mark.parametrize("method", [petl.DARA(**SMALL), petl.M2IST(**SMALL)], ids=lambda m: m.name)
def test_shared_tensors_are_registered_saved_and_optimised_once(method: Any) -> None:
    model = grounding("detr+bert", method)
    shared = [s.weight for s in model.petl.shared]
    everywhere = [p for _, p in model.named_parameters(remove_duplicate=False)]
    names = [n for n in model.state_dict() if "shared" in n]
    assert sorted(names) == sorted(f"petl.shared.{j}.{kind}" for j in range(3) for kind in ("weight", "bias"))
    task = petl.Grounding(build("detr"), build("hf_bert"), method, 96, tokenizer=SimpleNamespace(), **SMALL_FUSION)
    groups = task.parameter_groups()
    assert [sum(p is s for p in everywhere) for s in shared] == [1, 1, 1]
    grouped = [p for g in groups for p in g["params"]]
    assert [sum(p is s.weight for p in grouped) for s in task.model.petl.shared] == [1, 1, 1]
    assert len({id(p) for p in grouped}) == len(grouped)
    torch.optim.AdamW(groups, lr=1e-4)  # raises for a parameter in two groups


# ---- forward


@pytest.mark.parametrize("pair", PAIRS)
@torch.no_grad()
def test_masks_mean_what_they_say(pair: str) -> None:
    model = grounding(pair)
    images, seen, ids, words = expressions_and_images(model)
    boxes = model(images, seen, ids, words)
    assert (boxes.shape, boxes.dtype) == ((3, 4), torch.float32)
    assert 0 <= boxes.min() < boxes.max() <= 1
    other = ids.masked_fill(words == 0, 9)  # what stands in the padding of an expression does not matter
    assert torch.equal(model(images, seen, other, words), boxes)
    assert not torch.equal(model(images, seen, ids.masked_fill(words == 1, 9), words), boxes)

    def moved(*changed: Tensor) -> Tensor:
        return (model(*changed) - boxes).abs().amax(1) > 1e-6

    assert moved(images, seen, ids, 1 - words)[0]
    assert moved(images, ~seen, ids, words)[:2].all()
    assert not moved(images, seen.float(), ids, words.bool()).any()
    assert not moved(images, seen.long(), ids, words.float()).any()
    words[0] = 0  # nothing but padding
    assert model(images, seen, ids, words).isfinite().all()
    assert torch.equal(model(images, seen, ids, words)[1:], boxes[1:])


def test_detr_without_its_decoder() -> None:
    detr = build("detr")
    model = petl.GroundingModel(detr, build("hf_bert"), None, 96, **SMALL_FUSION)
    assert not [n for n in model.state_dict() if "decoder" in n or "quer" in n.split(".")[1]]
    assert model.vision.encoder is detr.encoder
    assert model.vision.backbone is detr.backbone
    assert count(model.vision) == count(detr.backbone, detr.input_projection, detr.encoder)
    same = petl.GroundingModel(DetrImageEncoder(build("detr")), build("hf_bert"), None, 96, **SMALL_FUSION)
    assert same.state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize(
    ("vision", "text", "options", "message"),
    [
        ("timm_vit", "hf_bert", {"image_size": 40}, r"image_size=40: .* for 32 x 32 pixels"),
        ("hf_clip_vision", "hf_bert", {"image_size": 224}, r"image_size=224: .* for 32 x 32 pixels"),
        ("detr", "hf_bert", {"image_size": 16}, "image_size=16"),
        ("detr", "hf_bert", {"query_length": 2}, r"query_length=2: it lies between 3 .* 16 positions"),
        ("detr", "hf_clip_text", {"query_length": 17}, "query_length=17"),
        ("detr", "hf_bert", {"fusion_heads": 3}, "does not divide"),
        ("hf_bert", "hf_bert", {}, "no image encoder that petl can use"),
        ("detr", "timm_vit", {}, "no text encoder that petl can use"),
        ("timm_vit", "hf_bert", {"method": petl.SparseTuning()}, "half of a pair"),
    ],
)
def test_what_does_not_fit_is_refused_and_left_alone(vision: str, text: str, options: dict, message: str) -> None:
    towers = build(vision), build(text)
    with pytest.raises(petl.PetlError, match=message):
        petl.GroundingModel(*towers, **{"image_size": 32, **SMALL_FUSION, **options})
    assert all(p.requires_grad for p in towers[1].parameters())
    assert not any("forward" in m.__dict__ or "train" in m.__dict__ for t in towers for m in t.modules())


def test_a_text_encoder_without_weights_is_refused_and_both_left_alone() -> None:
    vision = build("timm_vit")
    with torch.device("meta"):
        text = BertModel(BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48))
    with pytest.raises(petl.PetlError, match="no weights yet"):
        petl.GroundingModel(vision, text, petl.DARA(**SMALL), 32, **SMALL_FUSION)
    assert "train" not in vision.__dict__
    assert all(p.requires_grad for p in vision.parameters())


def test_inputs_of_another_size_are_refused() -> None:
    model = grounding("detr+bert")
    images, seen, ids, words = expressions_and_images(model)
    with pytest.raises(petl.PetlError, match=r"4 visual tokens .* built for 9"):
        model(images[..., :64, :64], seen[:, :64, :64], ids, words)
    with pytest.raises(petl.PetlError, match=r"6 text tokens .* built for 7"):
        model(images, seen, ids[:, :6], words[:, :6])
    dynamic = petl.GroundingModel(build("timm_dinov2"), build("hf_bert"), None, 48, **SMALL_FUSION)
    assert dynamic.head.visual_tokens == 36
    assert dynamic.eval()(*dynamic.example(2)).shape == (2, 4)


def test_encoders_by_name_and_none_for_the_size_they_know() -> None:
    model = petl.GroundingModel("bundled/tiny_clip_vision", "bundled/tiny_clip_text", **SMALL_FUSION)
    assert (model.image_size, model.head.visual_tokens) == (64, 64)
    assert model.petl.method == petl.LinearProbe()
    with pytest.raises(petl.PetlError, match="bundled/tiny_clip_text"):
        petl.GroundingModel("bundled/tiny_clip_vision", "bundled/tiny_clip_txet")
