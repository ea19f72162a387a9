"""View of every timm `VisionTransformer`: ViT, DeiT, DINOv2 (registers, LayerScale), CLIP and SigLIP towers."""

from __future__ import annotations

from typing import Any, cast

from timm.layers import Mlp, PatchEmbed
from timm.layers.attention import Attention
from timm.models.vision_transformer import Block, LayerScale, VisionTransformer
from torch import Tensor, nn

from petl.backbones.base import BackboneView, Call, Part, RankingBlock, named_weights, unsupported_block
from petl.errors import PetlError


class TimmBlock(RankingBlock):
    module: Block

    def attention_input(self, x: Tensor) -> Tensor:
        return self.module.norm1(x)

    def attend(self, n: Tensor, call: Call) -> Tensor:
        return self.module.attn(n, *call.args, **call.kwargs)

    def attention_branch(self, a: Tensor) -> Tensor:
        return self.module.drop_path1(self.module.ls1(a))

    def ffn_input(self, y: Tensor) -> Tensor:
        return self.module.norm2(y)

    def ffn_output(self, u: Tensor) -> Tensor:
        return self.module.mlp(u)

    def ffn_branch(self, f: Tensor) -> Tensor:
        return self.module.drop_path2(self.module.ls2(f))

    def parts(self) -> dict[str, Part]:
        block, attn, mlp = self.module, self._attn, self.module.mlp
        if type(mlp) is not Mlp or attn.gate is not None:
            return super().parts()  # raises: a gate is a layer that no part names
        qkv = {part: Part(attn.qkv, i, 3) for i, part in enumerate("qkv")}
        norm2, fc1, fc2 = (Part(cast(nn.Module, m)) for m in (block.norm2, mlp.fc1, mlp.fc2))
        return {"norm1": Part(block.norm1), **qkv, "out": Part(attn.proj), "norm2": norm2, "fc1": fc1, "fc2": fc2}

    def block_weights(self) -> dict[str, Tensor]:
        block, attn, mlp = self.module, self._attn, self.module.mlp
        norms = [m for m in (attn.q_norm, attn.k_norm, attn.norm, getattr(mlp, "norm", None)) if _computes(m)]
        if type(mlp) is not Mlp or norms or attn.gate is not None:
            what = "a gate or norms inside its attention or FFN" if type(mlp) is Mlp else f"a {type(mlp).__name__} FFN"
            raise PetlError(
                f"this timm block has {what}, which no side block has, so it cannot be pruned from it (init='prune'). "
                "Start it at random."
            )
        found = named_weights(
            out=attn.proj, fc1=cast(nn.Module, mlp.fc1), fc2=cast(nn.Module, mlp.fc2), norm1=block.norm1,
            norm2=block.norm2,
        )  # fmt: skip
        for name, fused in named_weights(qkv=attn.qkv).items():
            found |= {name.replace("qkv", part): t for part, t in zip("qkv", fused.chunk(3), strict=True)}
        for part, scale in (("out", block.ls1), ("fc2", block.ls2)):
            if isinstance(scale, LayerScale):
                for name in {f"{part}.weight", f"{part}.bias"} & found.keys():
                    gamma = scale.gamma.detach()
                    found[name] = found[name] * (gamma[:, None] if found[name].ndim == 2 else gamma)
        return found

    @property
    def _attn(self) -> Attention:
        return cast(Attention, self.module.attn)  # `TimmViT.block_view` takes no other

    def _query_key_modules(self) -> list[nn.Module]:
        return [self._attn.qkv]

    def _cls_query_and_keys(self, outputs: list[Tensor]) -> tuple[Tensor, Tensor, float]:
        attn = self._attn
        qkv = outputs[0].unflatten(-1, (3, attn.num_heads, attn.head_dim))  # (B, N, 3, H, D)
        query, key = qkv[:, :1, 0].transpose(1, 2), qkv[:, :, 1].transpose(1, 2)
        return attn.q_norm(query), attn.k_norm(key), attn.scale


def _computes(module: nn.Module | None) -> bool:
    return not (module is None or isinstance(module, nn.Identity))


class TimmViT(BackboneView):
    family = "timm_vit"
    block_path = "blocks"
    mask_argument = "attn_mask"
    head_names = ("head", "head_dist")

    def __init__(self, model: VisionTransformer) -> None:
        self.model: VisionTransformer = model
        self.width, self.depth = model.embed_dim, len(model.blocks)
        first = model.blocks[0]
        self.heads = getattr(getattr(first, "attn", None), "num_heads", 0)
        self.hidden = getattr(getattr(getattr(first, "mlp", None), "fc1", None), "out_features", 4 * self.width)
        self.prefix_tokens = model.num_prefix_tokens
        self.patch_size = tuple(model.patch_embed.patch_size)

    @property
    def preprocessing(self) -> dict[str, Any]:
        cfg: Any = getattr(self.model, "pretrained_cfg", None)
        cfg = cfg if isinstance(cfg, dict) else {}
        size = getattr(self.model.patch_embed, "img_size", None) or cfg.get("input_size", (3, 224, 224))[-2:]
        return {
            "input_size": (3, *size),
            "mean": tuple(cfg.get("mean") or (0.5, 0.5, 0.5)),
            "std": tuple(cfg.get("std") or (0.5, 0.5, 0.5)),
            "interpolation": cfg.get("interpolation") or "bicubic",
        }

    def block_modules(self) -> list[nn.Module]:
        return list(self.model.blocks)

    def block_view(self, module: nn.Module) -> RankingBlock:
        if type(module) is not Block or type(module.attn) is not Attention:
            raise unsupported_block(module if type(module) is not Block else module.attn, "a block of this timm model")
        return TimmBlock(module)

    def outer_layers(self) -> dict[str, nn.Module]:
        embed = getattr(self.model.patch_embed, "proj", None)
        if not isinstance(embed, nn.Conv2d):
            raise PetlError(f"the {type(self.model.patch_embed).__name__} of this timm model is no single convolution.")
        final = self.model.norm if _computes(self.model.norm) else self.model.fc_norm
        layers = {"patch_embedding": embed, "pre_norm": self.model.norm_pre, "final_norm": final}
        return {name: layer for name, layer in layers.items() if _computes(layer)}

    def masking_obstacle(self) -> str | None:
        other = next((b for b in self.model.blocks if type(b) is not Block or type(b.attn) is not Attention), None)
        return None if other is None else f"its blocks are {type(other).__name__}, whose attention takes no key mask"

    def features(self, x: Tensor) -> Tensor:
        return self.model.forward_head(self.model.forward_features(x), pre_logits=True)

    @property
    def pooled_tokens(self) -> int | None:
        return self.prefix_tokens if self.model.global_pool == "token" and self.prefix_tokens else None

    def pool(self, tokens: Tensor) -> Tensor:
        return self.model.forward_head(self.model.norm(tokens), pre_logits=True)

    def accepts(self, size: int) -> bool:
        return super().accepts(size) or not getattr(self.model.patch_embed, "strict_img_size", True)

    def encode(self, pixel_values: Tensor, pixel_mask: Tensor) -> Tensor:
        return self.model.forward_features(pixel_values)

    def after_blocks(self, tokens: Tensor) -> Tensor:
        return self.model.norm(tokens)

    def reduction_obstacle(self) -> str | None:
        model = self.model
        if model.cls_token is None:
            return "it has no class token, whose attention ranks the patches"
        if model.global_pool != "token":
            return f"it pools over patches (global_pool={model.global_pool!r}), and the pooled set would change"
        if not isinstance(model.patch_embed, PatchEmbed):
            return f"its {type(model.patch_embed).__name__} is not a plain patch embedding"
        return None

    def library_checkpointing(self) -> bool:
        return bool(self.model.grad_checkpointing)
