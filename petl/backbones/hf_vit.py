"""Views of Hugging Face vision transformers: CLIP vision towers and ViT."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import CLIPVisionModel, CLIPVisionModelWithProjection, ViTForImageClassification, ViTModel
from transformers.models.clip.modeling_clip import CLIPAttention, CLIPEncoderLayer
from transformers.models.vit.modeling_vit import ViTAttention, ViTLayer

from petl.backbones.base import BackboneView, Call, EncoderView, Part, RankingBlock, named_weights, unsupported_block

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def _parts(*layers: nn.Module) -> dict[str, Part]:
    return dict(zip(("norm1", "q", "k", "v", "out", "norm2", "fc1", "fc2"), map(Part, layers), strict=True))


class _SplitProjections(RankingBlock):
    """Attention with separate query and key projections, and no norm on either."""

    @abstractmethod
    def _attn(self) -> CLIPAttention | ViTAttention: ...

    def _query_key_modules(self) -> list[nn.Module]:
        attn = self._attn()
        return [attn.q_proj, attn.k_proj]

    def _cls_query_and_keys(self, outputs: list[Tensor]) -> tuple[Tensor, Tensor, float]:
        d = self._attn().head_dim
        query, key = (t.unflatten(-1, (-1, d)).transpose(1, 2) for t in (outputs[0][:, :1], outputs[1]))
        return query, key, d**-0.5


class CLIPBlock(_SplitProjections):
    module: CLIPEncoderLayer

    def _attn(self) -> CLIPAttention:
        return self.module.self_attn

    def attention_input(self, x: Tensor) -> Tensor:
        return self.module.layer_norm1(x)

    def attend(self, n: Tensor, call: Call) -> Tensor:
        mask, *rest = call.args or (call.kwargs.get("attention_mask"),)
        kwargs = {k: v for k, v in call.kwargs.items() if k != "attention_mask"}
        return self.module.self_attn(n, mask, *rest, **kwargs)[0]

    def ffn_input(self, y: Tensor) -> Tensor:
        return self.module.layer_norm2(y)

    def ffn_output(self, u: Tensor) -> Tensor:
        return self.module.mlp(u)

    def parts(self) -> dict[str, Part]:
        block, attn, mlp = self.module, self.module.self_attn, self.module.mlp
        return _parts(block.layer_norm1, attn.q_proj, attn.k_proj, attn.v_proj, attn.out_proj, block.layer_norm2,
                      mlp.fc1, mlp.fc2)  # fmt: skip

    def block_weights(self) -> dict[str, Tensor]:
        block, attn, mlp = self.module, self.module.self_attn, self.module.mlp
        return named_weights(
            q=attn.q_proj, k=attn.k_proj, v=attn.v_proj, out=attn.out_proj, fc1=mlp.fc1, fc2=mlp.fc2,
            norm1=block.layer_norm1, norm2=block.layer_norm2,
        )  # fmt: skip


class ViTBlock(_SplitProjections):
    module: ViTLayer

    def _attn(self) -> ViTAttention:
        return self.module.attention

    def attention_input(self, x: Tensor) -> Tensor:
        return self.module.layernorm_before(x)

    def attend(self, n: Tensor, call: Call) -> Tensor:
        return self.module.attention(n, *call.args, **call.kwargs)[0]

    def attention_branch(self, a: Tensor) -> Tensor:
        return self.module.dropout(a)

    def ffn_input(self, y: Tensor) -> Tensor:
        return self.module.layernorm_after(y)

    def ffn_output(self, u: Tensor) -> Tensor:
        return self.module.mlp(u)

    def ffn_branch(self, f: Tensor) -> Tensor:
        return self.module.dropout(f)

    def parts(self) -> dict[str, Part]:
        block, attn, mlp = self.module, self.module.attention, self.module.mlp
        return _parts(block.layernorm_before, attn.q_proj, attn.k_proj, attn.v_proj, attn.o_proj, block.layernorm_after,
                      mlp.fc1, mlp.fc2)  # fmt: skip

    def block_weights(self) -> dict[str, Tensor]:
        block, attn, mlp = self.module, self.module.attention, self.module.mlp
        return named_weights(
            q=attn.q_proj, k=attn.k_proj, v=attn.v_proj, out=attn.o_proj, fc1=mlp.fc1, fc2=mlp.fc2,
            norm1=block.layernorm_before, norm2=block.layernorm_after,
        )  # fmt: skip


class HFMasks(EncoderView):
    """How Hugging Face's attention takes a key mask."""

    def masking_obstacle(self) -> str | None:
        kind = cast(Any, self.model).config._attn_implementation
        if kind in ("sdpa", "eager"):
            return None
        return f"its attention implementation is {kind!r}; model.set_attn_implementation('sdpa') takes key masks"

    def key_mask(self, keep: Tensor, dtype: torch.dtype) -> Tensor:
        mask = super().key_mask(keep, dtype)
        if cast(Any, self.model).config._attn_implementation == "sdpa":
            return mask
        return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, -torch.inf)  # eager attention adds it


class _HFVision(HFMasks, BackboneView):
    head_names = ("classifier",)
    _mean: tuple[float, float, float]
    _std: tuple[float, float, float]

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        config: Any = model.config
        self.width, self.depth, self.heads = config.hidden_size, config.num_hidden_layers, config.num_attention_heads
        self.hidden, self.prefix_tokens = config.intermediate_size, 1
        self.patch_size, self._image_size = (config.patch_size, config.patch_size), config.image_size

    @property
    def preprocessing(self) -> dict[str, Any]:
        size = (3, self._image_size, self._image_size)
        return {"input_size": size, "mean": self._mean, "std": self._std, "interpolation": "bicubic"}

    def block_modules(self) -> list[nn.Module]:
        return list(cast(nn.ModuleList, self.model.get_submodule(self.block_path)))

    def reduction_obstacle(self) -> str | None:
        return None  # class token first, learned absolute positions, pooled from the class token


class HFCLIPVision(_HFVision):
    family = "hf_clip_vision"
    _mean, _std = CLIP_MEAN, CLIP_STD

    def __init__(self, model: CLIPVisionModel | CLIPVisionModelWithProjection) -> None:
        super().__init__(model)
        self.block_path = "encoder.layers" if isinstance(model, CLIPVisionModel) else "vision_model.encoder.layers"

    def block_view(self, module: nn.Module) -> RankingBlock:
        if type(module) is not CLIPEncoderLayer:
            raise unsupported_block(module, "a layer of this CLIP tower")
        return CLIPBlock(module)

    @property
    def _tower(self) -> CLIPVisionModel:
        return self.model if isinstance(self.model, CLIPVisionModel) else cast(Any, self.model).vision_model

    def outer_layers(self) -> dict[str, nn.Module]:
        tower = self._tower
        return {
            "patch_embedding": tower.embeddings.patch_embedding,
            "pre_norm": tower.pre_layrnorm,
            "final_norm": tower.post_layernorm,
        }

    def features(self, x: Tensor) -> Tensor:
        return self._tower(pixel_values=x).pooler_output

    def pool(self, tokens: Tensor) -> Tensor:
        return self._tower.post_layernorm(tokens[:, 0])

    def encode(self, pixel_values: Tensor, pixel_mask: Tensor) -> Tensor:
        return self.after_blocks(self._tower(pixel_values=pixel_values).last_hidden_state)

    def after_blocks(self, tokens: Tensor) -> Tensor:
        return self._tower.post_layernorm(tokens)

    def fine_tuned(self, name: str) -> bool:
        return not name.startswith("visual_projection.")  # maps into CLIP's joint space, which nothing here uses


class HFViT(_HFVision):
    family = "hf_vit"
    _mean = _std = (0.5, 0.5, 0.5)

    def __init__(self, model: ViTModel | ViTForImageClassification) -> None:
        super().__init__(model)
        self.block_path = "layers" if isinstance(model, ViTModel) else "vit.layers"

    def block_view(self, module: nn.Module) -> RankingBlock:
        if type(module) is not ViTLayer:
            raise unsupported_block(module, "a layer of this ViT")
        return ViTBlock(module)

    @property
    def _trunk(self) -> Any:
        return self.model if isinstance(self.model, ViTModel) else cast(Any, self.model).vit

    def outer_layers(self) -> dict[str, nn.Module]:
        trunk = self._trunk
        return {"patch_embedding": trunk.embeddings.patch_embeddings.projection, "final_norm": trunk.layernorm}

    def features(self, x: Tensor) -> Tensor:
        return self.encode(x)[:, 0]

    def pool(self, tokens: Tensor) -> Tensor:
        return self._trunk.layernorm(tokens[:, 0])

    def encode(self, pixel_values: Tensor, pixel_mask: Tensor | None = None) -> Tensor:
        return self._trunk(pixel_values=pixel_values).last_hidden_state

    def after_blocks(self, tokens: Tensor) -> Tensor:
        return self._trunk.layernorm(tokens)

    def fine_tuned(self, name: str) -> bool:
        return not name.startswith("pooler.")  # of ViTModel: a pre-training head that features do not pass
