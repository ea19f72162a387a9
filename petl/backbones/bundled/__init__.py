"""The bundled small CLIP: an ordinary timm ViT (vision) and an ordinary HF CLIP text tower, weights in the package.

Trained from scratch by ``recipes/pretrain_tiny_clip.py``; ``MODEL.json`` beside this file holds seed, data and figures.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from timm.models.vision_transformer import VisionTransformer
    from transformers import CLIPTextModelWithProjection, PreTrainedTokenizerFast

ROOT = Path(__file__).parent
IMAGE_SIZE, PATCH_SIZE, WIDTH, DEPTH, HEADS, EMBED_DIM, CONTEXT = 64, 8, 128, 12, 4, 128, 32
MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


def info() -> dict[str, Any]:
    """Seed, data version, steps and held-out figures of the bundled weights."""
    return json.loads((ROOT / "MODEL.json").read_text())


def vision(pretrained: bool = True, num_classes: int = 0, **overrides: Any) -> VisionTransformer:
    """The vision tower: 12 blocks, width 128, patch 8, 64 x 64 pixels, class token; 2.4 M parameters.

    With ``num_classes=0`` it returns pooled features (B, 128); with ``num_classes=128`` and ``pretrained`` the head is
    the projection into the joint space of the two towers.
    """
    from safetensors.torch import load_file
    from timm.layers import resample_abs_pos_embed
    from timm.models.vision_transformer import VisionTransformer

    shape = {"img_size": IMAGE_SIZE, "patch_size": PATCH_SIZE, "embed_dim": WIDTH, "depth": DEPTH, "num_heads": HEADS}
    model = VisionTransformer(num_classes=num_classes, **(shape | overrides))
    cfg: Any = {"input_size": (3, IMAGE_SIZE, IMAGE_SIZE), "mean": MEAN, "std": STD, "interpolation": "bicubic"}
    model.pretrained_cfg = cfg | {"crop_pct": 1.0, "num_classes": num_classes}
    if pretrained:
        state = {k: v.float() for k, v in load_file(ROOT / "vision.safetensors").items()}
        if num_classes != EMBED_DIM:
            state = {k: v for k, v in state.items() if not k.startswith("head.")} | {
                k: v for k, v in model.state_dict().items() if k.startswith("head.")
            }
        state["pos_embed"] = resample_abs_pos_embed(state["pos_embed"], model.patch_embed.grid_size)
        model.load_state_dict(state, strict=True)
    return model


def text(pretrained: bool = True) -> CLIPTextModelWithProjection:
    """The text tower: 4 layers, width 128, 32 tokens at most, word-level vocabulary; below 1 M parameters."""
    from safetensors.torch import load_file
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    words = tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(words), hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=4,
        num_attention_heads=HEADS, max_position_embeddings=CONTEXT, projection_dim=EMBED_DIM,
        pad_token_id=words.pad_token_id, bos_token_id=words.bos_token_id, eos_token_id=words.eos_token_id,
    )  # fmt: skip
    model = CLIPTextModelWithProjection(config)
    if pretrained:
        model.load_state_dict({k: v.float() for k, v in load_file(ROOT / "text.safetensors").items()}, strict=True)
    return model.eval()


def tokenizer() -> PreTrainedTokenizerFast:
    """Lower-cased words; what is not in the vocabulary becomes ``[UNK]``; ``[BOS]`` and ``[EOS]`` are added."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_file=str(ROOT / "tokenizer.json"), bos_token="[BOS]", eos_token="[EOS]", pad_token="[PAD]",
        unk_token="[UNK]", model_max_length=CONTEXT,
    )  # fmt: skip
