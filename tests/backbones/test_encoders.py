"""Encoders of grounding: the views of DETR and of text towers, loading by name, released DETR checkpoints."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models import resnet18
from torchvision.ops import FrozenBatchNorm2d

import petl
from petl.backbones import image_encoder, load_backbone, load_text_encoder, text_encoder
from petl.backbones import view as find_view
from petl.backbones.base import Call
from petl.backbones.detr import DetrImageEncoder, read_released
from tests.conftest import build, expressions_and_images, grounding

TEXT = ("hf_bert", "hf_clip_text", "bundled_text")


def batch() -> tuple[Tensor, ...]:
    return expressions_and_images(grounding("detr+bert"))


# ---- views


@pytest.mark.parametrize("family", ["detr", *TEXT])
@torch.no_grad()
def test_the_parts_of_each_block_are_the_block(family: str) -> None:
    """On the very arguments that the library hands to its layers, padding masks and position codes included."""
    images, seen, ids, words = batch()
    if family == "detr":
        model: nn.Module = DetrImageEncoder(build("detr")).eval()
        view: Any = image_encoder(model)
        inputs = images, seen
    else:
        model = build(family)
        view, inputs = text_encoder(model), (ids, words)
    calls: list[tuple] = []
    for module in view.block_modules():
        module.register_forward_hook(lambda m, a, k, out: calls.append((m, a, k, out)), with_kwargs=True)
    view.encode(*inputs)
    assert len(calls) == view.depth
    for module, args, kwargs, out in calls:
        block, call = view.block_view(module), Call(args[1:], kwargs)
        assert torch.equal(block.forward(args[0], call), out)
        assert isinstance(call.mask(), Tensor)


@torch.no_grad()
def test_encode_is_what_the_library_computes() -> None:
    images, seen, ids, words = batch()
    detr = build("detr")
    expected = detr(pixel_values=images, pixel_mask=seen).encoder_last_hidden_state
    encoder = DetrImageEncoder(detr)
    assert torch.equal(image_encoder(encoder).encode(images, seen), expected)
    assert torch.equal(encoder(images), detr(pixel_values=images).encoder_last_hidden_state)
    for family in TEXT:
        model = build(family)
        expected = getattr(model, "text_model", model)(input_ids=ids, attention_mask=words).last_hidden_state
        assert torch.equal(text_encoder(model).encode(ids, words), expected)
        assert expected.shape == (*ids.shape, text_encoder(model).width)
        assert text_encoder(model).max_length == model.config.max_position_embeddings


@torch.no_grad()
def test_grid_and_token_mask_are_those_of_the_network() -> None:
    encoder = DetrImageEncoder(build("detr"))
    view = image_encoder(encoder)
    for height, width in ((96, 96), (33, 64), (100, 131)):
        seen = torch.ones(2, height, width, dtype=torch.bool)
        seen[0, height * 2 // 3 :], seen[1, :, : width // 2] = False, False
        features, mask = encoder.backbone(torch.zeros(2, 3, height, width), seen)[-1]
        assert view.grid((3, height, width)) == tuple(features.shape[-2:])
        assert torch.equal(view.token_mask(seen), mask.flatten(1))
    vit = image_encoder(build("timm_vit"))  # patches of 8 pixels, 4 x 4 tokens; nearest pixel: the patch's first
    seen = torch.zeros(1, 32, 32, dtype=torch.bool)
    seen[0, 8:24, :17] = True
    tokens = vit.token_mask(seen)
    assert (tokens.dtype, tokens.shape) == (torch.bool, (1, 16))
    assert tokens[0].view(4, 4).int().tolist() == [[0, 0, 0, 0], [1, 1, 1, 0], [1, 1, 1, 0], [0, 0, 0, 0]]
    assert torch.equal(vit.token_mask(seen.float()), tokens)
    assert [view.accepts(s) for s in (31, 32, 640)] == [False, True, True]
    assert [vit.accepts(s) for s in (31, 32, 40)] == [False, True, False]


def test_networks_that_do_not_fit_are_named() -> None:
    from transformers import BertConfig, BertModel
    from transformers.models.bert.modeling_bert import BertLayer

    with pytest.raises(petl.PetlError, match="BertModel is no image encoder"):
        image_encoder(build("hf_bert"))
    with pytest.raises(petl.PetlError, match=r"DetrModel is no image encoder .*as petl\.backbones\.detr\.Detr"):
        image_encoder(build("detr"))
    with pytest.raises(petl.PetlError, match="VisionTransformer is no text encoder"):
        text_encoder(build("timm_vit"))
    with pytest.raises(petl.PetlError, match="hf_bert model does not classify images"):
        find_view(build("hf_bert"))
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    decoder = BertModel(BertConfig(**small, is_decoder=True))
    with pytest.raises(petl.PetlError, match="a layer of this BERT is a BertLayer"):
        text_encoder(decoder).block_view(decoder.encoder.layer[0])

    class Own(BertLayer):
        pass

    with pytest.raises(petl.PetlError, match="is a Own"):
        text_encoder(build("hf_bert")).block_view(Own(BertConfig(**small)))


# ---- by name, from a local folder in the layout of the hub


@torch.no_grad()
def test_load_by_name(tmp_path: Path) -> None:
    from transformers import BertTokenizer

    detr, bert = build("detr"), build("hf_bert")
    detr.save_pretrained(tmp_path / "detr")
    bert.save_pretrained(tmp_path / "bert")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "bus", "##es"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "bert")
    images, seen, ids, mask = batch()
    encoder = load_backbone(f"hf/{tmp_path}/detr")
    assert isinstance(encoder, DetrImageEncoder)
    assert not encoder.training
    assert torch.equal(encoder(images, seen), DetrImageEncoder(detr)(images, seen))
    text, tokenizer = load_text_encoder(f"hf/{tmp_path}/bert")
    assert torch.equal(text_encoder(text).encode(ids, mask), text_encoder(bert).encode(ids, mask))
    assert tokenizer(["red buses"])["input_ids"] == [[2, 5, 6, 7, 3]]
    random = load_text_encoder(f"hf/{tmp_path}/bert", pretrained=False)[0]
    assert not torch.equal(random.embeddings.word_embeddings.weight, bert.embeddings.word_embeddings.weight)
    with pytest.raises(petl.PetlError, match="'bert' model; petl takes clip, clip_vision_model, vit, detr"):
        load_backbone(f"hf/{tmp_path}/bert")
    with pytest.raises(petl.PetlError, match="'detr' model; petl takes bert, clip, clip_text_model"):
        load_text_encoder(f"hf/{tmp_path}/detr")
    with pytest.raises(petl.PetlError, match="did you mean 'bundled/tiny_clip_text'"):
        load_text_encoder("bundled/tiny_clip_txt")
    with pytest.raises(petl.PetlError, match="starts with 'hf/' or 'bundled/'"):
        load_text_encoder("google-bert/bert-base-uncased")


# ---- released checkpoints: the original DETR, from torch.nn and torchvision, under its names


class Layer(nn.Module):
    """DETR's encoder layer: q = k = x + position, v = x; key padding mask True = padding."""

    def __init__(self) -> None:
        super().__init__()
        self.self_attn = nn.MultiheadAttention(24, 3, batch_first=True)
        self.linear1, self.linear2 = nn.Linear(24, 32), nn.Linear(32, 24)
        self.norm1, self.norm2 = nn.LayerNorm(24), nn.LayerNorm(24)

    def forward(self, x: Tensor, position: Tensor, padded: Tensor) -> Tensor:
        x = self.norm1(x + self.self_attn(x + position, x + position, x, key_padding_mask=padded)[0])
        return self.norm2(x + self.linear2(F.relu(self.linear1(x))))


class OriginalDETR(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Module())
        self.backbone[0].body = resnet18(norm_layer=FrozenBatchNorm2d)
        self.backbone[0].body.fc = nn.Identity()
        self.input_proj = nn.Conv2d(512, 24, 1)
        self.transformer = nn.Module()
        self.transformer.encoder, self.transformer.decoder = nn.Module(), nn.Module()
        self.transformer.encoder.layers = nn.ModuleList(Layer() for _ in range(2))
        self.transformer.decoder.layers = nn.ModuleList([Layer()])  # this and what follows is to be ignored
        self.transformer.decoder.norm = nn.LayerNorm(24)
        self.query_embed, self.class_embed = nn.Embedding(3, 24), nn.Linear(24, 92)
        with torch.no_grad():
            for name, t in [*self.named_parameters(), *self.named_buffers()]:
                if t.ndim == 1:
                    t.uniform_(0.8, 1.2) if name.endswith(("weight", "var")) else t.normal_(0, 0.1)

    def forward(self, images: Tensor, seen: Tensor) -> Tensor:
        body = self.backbone[0].body
        x = body.maxpool(body.relu(body.bn1(body.conv1(images))))
        features = body.layer4(body.layer3(body.layer2(body.layer1(x))))
        mask = F.interpolate((~seen)[None].float(), size=features.shape[-2:]).bool()[0]  # True = padding
        codes = []  # sine codes: rows first, coordinates count unpadded tokens and end at 2π
        for axis in (1, 2):
            at = (~mask).cumsum(axis, dtype=torch.float32)
            at = at / (at.select(axis, -1).unsqueeze(axis) + 1e-6) * 2 * torch.pi
            i = torch.arange(12)
            angle = at[..., None] / 10000 ** (2 * (i // 2) / 12)
            codes.append(torch.where(i % 2 == 0, angle.sin(), angle.cos()))
        position, x = torch.cat(codes, -1).flatten(1, 2), self.input_proj(features).flatten(2).mT
        for layer in self.transformer.encoder.layers:
            x = layer(x, position, mask.flatten(1))
        return x


def fresh() -> DetrImageEncoder:
    """petl's DETR encoder for these sizes, with timm's ResNet as in `DetrConfig()`; other random weights."""
    from transformers import DetrConfig, DetrModel, TimmBackboneConfig

    stem = TimmBackboneConfig(backbone="resnet18", out_indices=[4], use_pretrained_backbone=False)
    sizes = {f"{side}_{what}": n for side in ("encoder", "decoder")
             for what, n in (("layers", 2), ("attention_heads", 3), ("ffn_dim", 32))}  # fmt: skip
    return DetrImageEncoder(DetrModel(DetrConfig(backbone_config=stem, d_model=24, num_queries=3, **sizes))).eval()


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> tuple[OriginalDETR, Path]:
    torch.manual_seed(0)
    original = OriginalDETR().eval()
    path = tmp_path_factory.mktemp("released") / "detr-r18.pth"
    state = {"backbone.0.body.bn1.num_batches_tracked": torch.tensor(7), **original.state_dict()}
    torch.save({"model": state, "epoch": 3, "args": argparse.Namespace(lr=1e-4, masks=False, device="cuda")}, path)
    return original, path


@torch.no_grad()
def test_a_released_checkpoint_computes_what_the_original_code_does(released: tuple[OriginalDETR, Path]) -> None:
    original, path = released
    encoder = fresh()
    found = read_released(path)
    assert found.keys() == encoder.state_dict().keys()
    petl.backbones._load_weights(encoder, path)
    images, seen, *_ = batch()
    torch.testing.assert_close(encoder(images, seen), original(images, seen), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(encoder(images, ~seen), original(images, seen), atol=1e-3)
    assert argparse.Namespace not in torch.serialization.get_safe_globals()
    found["input_projection.bias"] += 1
    save_file({k: v.contiguous() for k, v in found.items()}, path.with_suffix(".safetensors"))
    petl.backbones._load_weights(encoder, path.with_suffix(".safetensors"))
    assert not torch.allclose(encoder(images, seen), original(images, seen), atol=1e-3)


@pytest.mark.parametrize("shape", ["bare", "ddp"])
def test_other_wrappings_of_a_release(released: tuple[OriginalDETR, Path], shape: str, tmp_path: Path) -> None:
    state = torch.load(released[1], weights_only=False)["model"]
    content = state if shape == "bare" else {"model": {f"module.{k}": v for k, v in state.items()}}
    torch.save(content, tmp_path / "x.pth")
    assert read_released(tmp_path / "x.pth").keys() == fresh().state_dict().keys()


def test_checkpoints_that_do_not_fit(released: tuple[OriginalDETR, Path], tmp_path: Path) -> None:
    path, encoder = tmp_path / "x.pth", fresh()
    before = {k: v.clone() for k, v in encoder.state_dict().items()}

    class Evil:
        def __reduce__(self) -> tuple:
            return (Path.touch, (tmp_path / "pwned",))

    state = torch.load(released[1], weights_only=False)["model"]
    cases: list[tuple[Any, str]] = [
        ({"model": state, "args": Evil()}, "cannot be read as a checkpoint of tensors"),
        ({"model": state, "args": argparse.Namespace(hook=Evil())}, "cannot be read as a checkpoint of tensors"),
        ({k: v for k, v in state.items() if "encoder.layers.1.norm1" not in k}, "does not fit the backbone: 2 tensors"),
        ({**state, "input_proj.weight": torch.zeros(24, 256, 1, 1)}, r"1 of another shape \['input_projection.weight"),
        ({"model": {"fc.weight": torch.zeros(2, 2)}}, "is no DETR checkpoint"),
        ([1, 2], "is no DETR checkpoint"),
    ]
    for content, message in cases:
        torch.save(content, path)
        with pytest.raises(petl.PetlError, match=message):
            petl.backbones._load_weights(encoder, path)
    for data in (b"", b"not a checkpoint", released[1].read_bytes()[:5000]):
        path.write_bytes(data)
        with pytest.raises(petl.PetlError, match="cannot be read as a checkpoint of tensors"):
            petl.backbones._load_weights(encoder, path)
    with pytest.raises(petl.PetlError, match="does not exist"):
        petl.backbones._load_weights(encoder, tmp_path / "none.pth")
    assert not (tmp_path / "pwned").exists()
    assert all(torch.equal(v, before[k]) for k, v in encoder.state_dict().items())


@pytest.mark.parametrize(("key", "value"), [("self_attn.in_proj_weight", 5), ("norm1.weight", "x"), (3, 4),
                                            ("self_attn.in_proj_weight", torch.zeros(2, 24))])  # fmt: skip
def test_entries_that_are_no_tensors_of_detr(released: tuple, key: Any, value: Any, tmp_path: Path) -> None:
    key = f"transformer.encoder.layers.0.{key}" if isinstance(key, str) else key
    torch.save({**released[0].state_dict(), key: value}, tmp_path / "x.pth")
    with pytest.raises(petl.PetlError):
        petl.backbones._load_weights(fresh(), tmp_path / "x.pth")
