"""DETR without its decoder: a ResNet, a 1 x 1 projection and post-norm encoder layers, as grounding models use it.

`DetrImageEncoder` takes these parts out of an HF `DetrModel`; names of tensors stay those of `DetrModel`.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DetrModel
from transformers.models.detr.modeling_detr import DetrEncoderLayer

from petl.backbones.base import BlockView, Call, ImageEncoder, named_weights, unsupported_block
from petl.errors import PetlError

STRIDE = 32
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class DetrImageEncoder(nn.Module):
    """Images (B, 3, H, W) and masks (B, H, W), True on the picture -> tokens (B, H/32 · W/32, C).

    The parts are those of ``detr``, not copies; its decoder and queries are left out.
    """

    def __init__(self, detr: DetrModel) -> None:
        super().__init__()
        self.config = detr.config
        self.backbone, self.position_embedding = detr.backbone, detr.position_embedding
        self.input_projection, self.encoder = detr.input_projection, detr.encoder

    def forward(self, pixel_values: Tensor, pixel_mask: Tensor | None = None) -> Tensor:
        if pixel_mask is None:
            pixel_mask = pixel_values.new_ones(pixel_values[:, 0].shape, dtype=torch.bool)
        features, mask = self.backbone(pixel_values, pixel_mask)[-1]
        tokens = self.input_projection(features).flatten(2).transpose(1, 2)
        position = self.position_embedding(
            shape=features.shape, device=features.device, dtype=features.dtype, mask=mask
        )
        return self.encoder(
            inputs_embeds=tokens,
            attention_mask=mask.flatten(1),
            spatial_position_embeddings=position.flatten(2).transpose(1, 2),
        ).last_hidden_state


class DetrBlock(BlockView):
    module: DetrEncoderLayer

    def attend(self, n: Tensor, call: Call) -> Tensor:
        mask = call.args[0] if call.args else call.kwargs.get("attention_mask")
        position = call.kwargs.get("spatial_position_embeddings")
        return self.module.self_attn(n, attention_mask=mask, position_embeddings=position)[0]

    def attention_branch(self, a: Tensor) -> Tensor:
        return F.dropout(a, self.module.dropout, self.module.training)

    def after_attention(self, x: Tensor, branch: Tensor) -> Tensor:
        return self.module.self_attn_layer_norm(x + branch)

    def ffn_input(self, y: Tensor) -> Tensor:
        return y

    def ffn_output(self, u: Tensor) -> Tensor:
        return self.module.mlp(u)  # its dropout is inert: a frozen block is in eval

    def after_ffn(self, y: Tensor, branch: Tensor) -> Tensor:
        return self.module.final_layer_norm(y + branch)

    def block_weights(self) -> dict[str, Tensor]:
        block, attn, mlp = self.module, self.module.self_attn, self.module.mlp
        return named_weights(
            q=attn.q_proj, k=attn.k_proj, v=attn.v_proj, out=attn.o_proj, fc1=mlp.fc1, fc2=mlp.fc2,
            norm1=block.self_attn_layer_norm, norm2=block.final_layer_norm,
        )  # fmt: skip


class Detr(ImageEncoder):
    family = "detr"
    block_path = "encoder.layers"
    norm_first = False

    def __init__(self, model: DetrImageEncoder) -> None:
        self.model: DetrImageEncoder = model
        config: Any = model.config
        self.width, self.depth, self.heads = config.d_model, config.encoder_layers, config.encoder_attention_heads
        self.hidden = config.encoder_ffn_dim

    @property
    def preprocessing(self) -> dict[str, Any]:
        return {"input_size": (3, 640, 640), "mean": MEAN, "std": STD, "interpolation": "bilinear"}

    def grid(self, input_size: tuple[int, int, int]) -> tuple[int, int]:
        return -(-input_size[1] // STRIDE), -(-input_size[2] // STRIDE)

    def accepts(self, size: int) -> bool:
        return size >= STRIDE

    def block_modules(self) -> list[nn.Module]:
        return list(cast(nn.ModuleList, self.model.encoder.layers))

    def block_view(self, module: nn.Module) -> BlockView:
        if type(module) is not DetrEncoderLayer:
            raise unsupported_block(module, "a layer of this DETR encoder")
        return DetrBlock(module)

    def encode(self, pixel_values: Tensor, pixel_mask: Tensor) -> Tensor:
        return self.model(pixel_values, pixel_mask)

    def fine_tuned(self, name: str) -> bool:
        """Stem and first stage of the ResNet stay frozen, as in DETR itself."""
        stem = ("backbone.model.conv1", "backbone.model.bn1", "backbone.model.layer1", "backbone.model.embedder",
                "backbone.model.encoder.stages.0")  # fmt: skip
        return not name.startswith(stem)


_RELEASED = (  # names in checkpoints of the original DETR repository (TransVG's among them) -> names here
    (r"^module\.", ""),
    (r"^backbone\.0\.body\.", "backbone.model."),
    (r"^input_proj\.", "input_projection."),
    (r"^transformer\.encoder\.layers\.", "encoder.layers."),
    (r"\.self_attn\.out_proj\.", ".self_attn.o_proj."),
    (r"\.linear(\d)\.", r".mlp.fc\1."),
    (r"\.norm1\.", ".self_attn_layer_norm."),
    (r"\.norm2\.", ".final_layer_norm."),
)


def read_released(path: Path) -> dict[str, Tensor]:
    """Tensors of a released ``.pth`` checkpoint (DETR's layout) under the names of `DetrImageEncoder`.

    Decoder, queries and heads are left out. Only tensors and plain containers are unpickled; `argparse.Namespace`,
    which the release scripts store beside them, is let through as data.

    Raises:
        PetlError: unreadable, or not such a checkpoint.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zip and runtime errors: whatever it is, this file cannot be used
        raise PetlError(f"weights file {path} cannot be read as a checkpoint of tensors: {error}") from error
    state = content.get("model", content) if isinstance(content, dict) else None
    named = isinstance(state, dict) and all(isinstance(k, str) for k in state)
    if not isinstance(state, dict) or not named or not any("transformer.encoder.layers" in k for k in state):
        raise PetlError(f"weights file {path} is no DETR checkpoint: it has no 'transformer.encoder.layers' tensors.")
    odd = [k for k, v in state.items() if not isinstance(v, Tensor) or v.layout is not torch.strided]
    odd += [k for k, v in state.items() if k not in odd and ".in_proj_" in k and v.shape[0] % 3]
    if odd:
        raise PetlError(
            f"weights file {path} is no DETR checkpoint: {odd[:3]} are not the dense tensors they should be."
        )
    found: dict[str, Tensor] = {}
    for key, tensor in state.items():
        name = key
        for pattern, replacement in _RELEASED:
            name = re.sub(pattern, replacement, name)
        if not name.startswith(("backbone.", "input_projection.", "encoder.")) or name.endswith("num_batches_tracked"):
            continue
        if ".self_attn.in_proj_" in name:
            for part, value in zip("qkv", tensor.chunk(3), strict=True):
                found[name.replace("in_proj_", f"{part}_proj.")] = value
        else:
            found[name] = tensor
    return found
