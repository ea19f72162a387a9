"""Tiny random backbones of every family, and the private data that some tests need."""

from __future__ import annotations

import os
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

torch.set_num_threads(1)
HF_SHAPE = {
    "hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 3, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """No test reads or writes the user's cache of activations."""
    os.environ["PETL_CACHE"] = str(tmp_path_factory.mktemp("taps"))


def _timm(**options: object) -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 4, "num_heads": 3, "mlp_ratio": 2}
    return VisionTransformer(**({"num_classes": 5} | shape | options))


def _clip() -> nn.Module:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    return CLIPVisionModel(CLIPVisionConfig(**HF_SHAPE))


def _vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(ViTConfig(**HF_SHAPE, num_labels=5))


FAMILIES = {
    "timm_vit": _timm,
    "timm_dinov2": partial(_timm, init_values=0.5, reg_tokens=4, qk_norm=True, dynamic_img_size=True, num_classes=0),
    "timm_clip": partial(_timm, pre_norm=True, drop_path_rate=0.3, proj_drop_rate=0.2),
    "hf_clip_vision": _clip,
    "hf_vit": _vit,
}


def build(family: str) -> nn.Module:
    """A small network with the same random weights at every call; LayerNorms and biases are not trivial."""
    torch.manual_seed(7)
    model = ENCODERS[family]()
    with torch.no_grad():
        for name, p in model.named_parameters() if not family.startswith("bundled") else ():
            p.normal_(1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.15)
    return model.eval()


def _detr() -> nn.Module:
    from transformers import DetrConfig, DetrModel, ResNetConfig

    stem = ResNetConfig(embedding_size=6, hidden_sizes=[6, 8, 8, 8], depths=[1] * 4, layer_type="basic",
                        out_features=["stage4"])  # fmt: skip
    return DetrModel(
        DetrConfig(backbone_config=stem, d_model=24, encoder_layers=3, encoder_attention_heads=3, encoder_ffn_dim=32,
                   decoder_layers=1, decoder_attention_heads=3, decoder_ffn_dim=32, num_queries=3)
    )  # fmt: skip


def _bert() -> nn.Module:
    from transformers import BertConfig, BertModel

    return BertModel(
        BertConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, vocab_size=40,
                   max_position_embeddings=16)
    )  # fmt: skip


def _clip_text() -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(
        CLIPTextConfig(hidden_size=28, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, vocab_size=40,
                       max_position_embeddings=16, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    )  # fmt: skip


def _bundled(tower: str) -> nn.Module:
    from petl.backbones import bundled

    return getattr(bundled, tower)()


ENCODERS = FAMILIES | {
    "detr": _detr,
    "hf_bert": _bert,
    "hf_clip_text": _clip_text,
    "bundled_vision": partial(_bundled, "vision"),
    "bundled_text": partial(_bundled, "text"),
}
PAIRS = {
    "detr+bert": ("detr", "hf_bert"),
    "vit+bert": ("timm_vit", "hf_bert"),
    "clip": ("hf_clip_vision", "hf_clip_text"),
    "bundled": ("bundled_vision", "bundled_text"),
}
IMAGE_SIZES = {"detr": 96, "bundled_vision": 64}
QUERY_LENGTH = 7
SMALL_FUSION = {
    "fusion_dim": 16,
    "fusion_layers": 2,
    "fusion_heads": 2,
    "fusion_hidden": 24,
    "query_length": QUERY_LENGTH,
}


def grounding(pair: str, method: object = None, **options: object) -> nn.Module:
    """A small grounding model with the same random weights at every call."""
    import petl

    vision, text = (build(name) for name in PAIRS[pair])
    torch.manual_seed(3)
    size = IMAGE_SIZES.get(PAIRS[pair][0], 32)
    return petl.GroundingModel(vision, text, method, size, **(SMALL_FUSION | options)).eval()  # type: ignore[arg-type]


def expressions_and_images(model: nn.Module, count: int = 3) -> tuple[torch.Tensor, ...]:
    """Inputs of a grounding model, at most 3: pictures with a padded margin, ids with padding."""
    generator = torch.Generator().manual_seed(5)
    size: int = model.image_size  # type: ignore[assignment]
    images = torch.randn(3, 3, size, size, generator=generator)
    seen = torch.ones(3, size, size, dtype=torch.bool)
    seen[0, size // 2 :], seen[1, :, size // 2 :] = False, False
    ids = torch.randint(3, 39, (3, QUERY_LENGTH), generator=generator)
    words = torch.ones(3, QUERY_LENGTH, dtype=torch.long)
    ids[0, 4:], words[0, 4:] = 0, 0
    return tuple(t[:count] for t in (images * seen[:, None], seen, ids, words))


def outputs(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The tensor that a model returns: logits where it has a head, pooled features otherwise."""
    out = model(x)
    for name in ("logits", "pooler_output"):
        out = getattr(out, name, out) if not isinstance(out, torch.Tensor) else out
    assert isinstance(out, torch.Tensor)
    return out


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def private(*parts: str) -> Path:
    """A file of the private test data, or skip with the reason."""
    root = Path(os.environ.get("PETL_TEST_DATA") or Path(__file__).parents[2] / "shared" / "data")
    path = root.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"private test data is absent: {'/'.join(parts)} (set PETL_TEST_DATA)")
    return path


@cache
def _tiny_bert_words() -> Any:
    from transformers import BertTokenizer

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "fine", "film", "dull", "empty", "and", "with",
             "ending", "##s", "not", "at", "all"]  # fmt: skip
    return BertTokenizer(vocab={w: i for i, w in enumerate(words)}, do_lower_case=True)


def tiny_bert_classifier() -> tuple[nn.Module, Any]:
    """A small BERT with two classes and the same random weights at every call, and its tokenizer."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(7)
    config = BertConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, vocab_size=17,
                        max_position_embeddings=24, num_labels=2)  # fmt: skip
    model = BertForSequenceClassification(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model.eval(), _tiny_bert_words()
