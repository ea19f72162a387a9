"""The bundled two-tower CLIP: what it is, what it can do, and where it comes from."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torchvision.transforms.functional import pil_to_tensor
from transformers import CLIPTextModelWithProjection

from petl.backbones import bundled, load_backbone
from petl.data import scenes

FIRST_SCENE, SCENES = 20_000_000, 50  # pre-training saw scenes below 40,000; its own evaluation starts at 10,000,000


def count(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def test_towers_are_ordinary_small_models() -> None:
    vision, text = bundled.vision(), bundled.text()
    assert type(vision) is VisionTransformer
    assert type(text) is CLIPTextModelWithProjection
    assert len(vision.blocks) == 12
    assert vision.num_prefix_tokens == 1
    assert count(vision) <= 3_000_000
    assert count(text) <= 2_000_000
    assert vision(torch.zeros(2, 3, 64, 64)).shape == (2, bundled.WIDTH)
    files = [p for p in bundled.ROOT.iterdir() if p.is_file()]
    assert sum(p.stat().st_size for p in files) <= 8 * 2**20


def test_origin_is_recorded_and_true() -> None:
    info = bundled.info()
    assert info == json.loads((bundled.ROOT / "MODEL.json").read_text(encoding="utf-8"))
    assert isinstance(info["seed"], int)
    assert info["steps"] > 0
    assert {"photos", "scenes"} <= info["data"].keys()
    assert info["data"]["scenes"].endswith(f"version {scenes.VERSION}")
    assert (Path(__file__).parents[2] / info["recipe"]).is_file()
    assert info["held_out"]["cifar10_zero_shot"] > 0.3  # chance 0.1
    assert info["held_out"]["scene_retrieval_at_1_of_200"] > 0.3  # chance 0.005
    joint = bundled.vision(num_classes=bundled.EMBED_DIM)
    assert info["parameters"] == {"vision": count(joint), "text": count(bundled.text())}


@torch.no_grad()
def test_captions_of_unseen_scenes_are_retrieved() -> None:
    unseen = [scenes.make_scene(FIRST_SCENE + i) for i in range(SCENES)]
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (bundled.MEAN, bundled.STD))
    images = torch.stack([(pil_to_tensor(s.image) / 255 - mean) / std for s in unseen])
    captions = [s.caption for s in unseen]
    words = bundled.tokenizer()(captions, padding=True, truncation=True, return_tensors="pt")

    def hits(pretrained: bool) -> tuple[int, int]:
        vision = bundled.vision(pretrained, num_classes=bundled.EMBED_DIM).eval()
        image = F.normalize(vision(images), dim=-1)
        text = bundled.text(pretrained)(input_ids=words.input_ids, attention_mask=words.attention_mask).text_embeds
        scores = image @ F.normalize(text, dim=-1).T  # (picture, caption)
        to_text = sum(captions[j] == captions[i] for i, j in enumerate(scores.argmax(1).tolist()))
        to_image = sum(captions[j] == captions[i] for i, j in enumerate(scores.argmax(0).tolist()))
        return to_text, to_image

    assert min(hits(pretrained=True)) >= SCENES // 2  # chance is 1 of 50
    assert max(hits(pretrained=False)) <= SCENES // 5


def test_random_weights_on_request() -> None:
    for tower in (bundled.vision, bundled.text):
        trained, again, random = tower().state_dict(), tower().state_dict(), tower(pretrained=False).state_dict()
        assert trained.keys() == random.keys()
        assert all(torch.equal(trained[k], again[k]) for k in trained)
        assert not any(torch.equal(trained[k], random[k]) for k in trained if k.endswith("weight"))
    name = "bundled/tiny_clip_vision"
    loaded, plain = load_backbone(name).state_dict(), load_backbone(name, pretrained=False).state_dict()
    assert torch.equal(loaded["blocks.0.mlp.fc1.weight"], bundled.vision().state_dict()["blocks.0.mlp.fc1.weight"])
    assert not torch.equal(plain["blocks.0.mlp.fc1.weight"], loaded["blocks.0.mlp.fc1.weight"])


def test_the_recipe_builds_this_very_tokenizer(tmp_path: Path) -> None:
    from recipes.pretrain_tiny_clip import build_tokenizer

    build_tokenizer(tmp_path / "tokenizer.json")
    assert (tmp_path / "tokenizer.json").read_bytes() == (bundled.ROOT / "tokenizer.json").read_bytes()


def test_tokenizer_knows_every_word_of_the_scenes() -> None:
    tokenizer = bundled.tokenizer()
    unknown = tokenizer.unk_token_id
    for i in range(SCENES):
        scene = scenes.make_scene(FIRST_SCENE + i)
        for sentence in (scene.caption, *(e.text for e in scenes.expressions(scene))):
            ids = tokenizer(sentence).input_ids
            assert unknown not in ids, sentence
            assert (ids[0], ids[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
            assert len(ids) <= bundled.CONTEXT
    assert tokenizer("The RED circle!").input_ids == tokenizer("the red circle").input_ids
    assert unknown in tokenizer("a xylophone").input_ids
