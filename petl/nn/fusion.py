"""Vision-language encoder and box head of TransVG (arXiv 2104.08541, section 3): what every grounding model trains."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.ops import MLP

from petl.errors import PetlError


class FusionLayer(nn.Module):
    """Encoder layer; ``position`` (N, D) goes to queries and keys, not to values; ``mask`` is True = seen."""

    def __init__(self, width: int, heads: int, hidden: int, dropout: float, norm_first: bool = False) -> None:
        super().__init__()
        self.heads, self.dropout, self.norm_first = heads, dropout, norm_first
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, z: Tensor, position: Tensor, mask: Tensor, rows: int | None = None) -> Tensor:
        """(B, N, D) -> (B, N, D), or only the first ``rows`` tokens of it where no other will be read."""
        kept, z = z[:, :rows], self.norm1(z) if self.norm_first else z
        x = z + position
        parts = self.query(x[:, :rows]), self.key(x), self.value(z)
        query, key, value = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in parts)  # (B, H, N, D / H)
        p = self.dropout if self.training else 0.0
        attend = partial(F.scaled_dot_product_attention, attn_mask=mask[:, None, None], dropout_p=p)
        if p and query.device.type == "cpu":  # no fused kernel there with dropout: it would keep maps of N x N per head
            attended = checkpoint(attend, query, key, value, use_reentrant=False)
        else:
            attended = attend(query, key, value)
        y = kept + F.dropout(self.out(attended.transpose(1, 2).flatten(2)), p)
        if self.norm_first:
            return y + self.ffn(self.norm2(y), p)
        y = self.norm1(y)
        return self.norm2(y + self.ffn(y, p))

    def ffn(self, y: Tensor, p: float) -> Tensor:
        hidden = F.relu(F.dropout(self.fc1(y), p))  # in this order one tensor is kept for backward, not two; same value
        return F.dropout(self.fc2(hidden), p)


class GroundingHead(nn.Module):
    """[REG] + text + visual tokens -> vision-language encoder -> box.

    Args:
        vision_width, text_width: channels of the two encoders.
        grid: rows and columns of visual tokens, N_v in all; one learned position each.
        query_length: text tokens L; one learned position each.
        fusion_dim, fusion_layers, fusion_heads, fusion_hidden: size of the encoder.
        dropout: in attention, FFN and residual branches of the encoder.
        norm_first: LayerNorm before attention and FFN instead of after, and once more at the end; takes larger steps.
    """

    def __init__(
        self,
        vision_width: int,
        text_width: int,
        grid: tuple[int, int],
        query_length: int = 20,
        fusion_dim: int = 256,
        fusion_layers: int = 6,
        fusion_heads: int = 8,
        fusion_hidden: int = 2048,
        dropout: float = 0.1,
        norm_first: bool = False,
    ) -> None:
        super().__init__()
        sizes = {"fusion_dim": fusion_dim, "fusion_layers": fusion_layers, "fusion_heads": fusion_heads}
        for name, value in (sizes | {"fusion_hidden": fusion_hidden}).items():
            if value < 1:
                raise PetlError(f"{name}={value}: it is at least 1.")
        if not 0 <= dropout < 1:
            raise PetlError(f"dropout={dropout}: it lies in [0, 1).")
        if fusion_dim % fusion_heads:
            raise PetlError(f"fusion_dim {fusion_dim} does not divide into fusion_heads {fusion_heads}.")
        self.sizes = {
            "vision_width": vision_width, "text_width": text_width, "grid": list(grid),
            "query_length": query_length, "fusion_dim": fusion_dim, "fusion_layers": fusion_layers,
            "fusion_heads": fusion_heads, "fusion_hidden": fusion_hidden, "dropout": dropout,
            "norm_first": norm_first,
        }  # fmt: skip
        self.visual_tokens, self.query_length = grid[0] * grid[1], query_length
        self.visual_projection, self.text_projection = (nn.Linear(w, fusion_dim) for w in (vision_width, text_width))
        self.reg_token = nn.Embedding(1, fusion_dim)
        self.position = nn.Embedding(1 + query_length + grid[0] * grid[1], fusion_dim)
        self.layers = nn.ModuleList(
            FusionLayer(fusion_dim, fusion_heads, fusion_hidden, dropout, norm_first) for _ in range(fusion_layers)
        )
        for parameter in self.layers.parameters():
            if parameter.ndim > 1:
                nn.init.xavier_uniform_(parameter)
        self.norm = nn.LayerNorm(fusion_dim) if norm_first else nn.Identity()
        self.box = MLP(fusion_dim, [fusion_dim, fusion_dim, 4], inplace=None)
        self.checkpointing = False  # recompute each layer in the backward pass instead of keeping its activations

    def forward(self, visual: Tensor, visual_mask: Tensor, text: Tensor, text_mask: Tensor) -> Tensor:
        """Visual tokens (B, N_v, C_v) and text states (B, L, C_l) -> boxes (B, 4), cxcywh in [0, 1], fp32.

        Masks (B, N_v) and (B, L): True on the picture and on words.
        """
        for name, x, count in (("visual", visual, self.visual_tokens), ("text", text, self.query_length)):
            if x.shape[1] != count:
                raise PetlError(
                    f"{x.shape[1]} {name} tokens for a grounding model built for {count}: "
                    + ("images must have the size it was built for (image_size)." if name == "visual"
                       else f"pad or cut the token ids to query_length={count}.")
                )  # fmt: skip
        dtype = self.reg_token.weight.dtype
        reg = self.reg_token.weight[None].expand(len(visual), -1, -1)
        z = torch.cat([reg, self.text_projection(text.to(dtype)), self.visual_projection(visual.to(dtype))], 1)
        seen = F.pad(torch.cat([text_mask, visual_mask], 1).bool(), (1, 0), value=True)  # [REG] is never masked
        position = self.position.weight
        for i, layer in enumerate(self.layers, 1):
            rows = 1 if i == len(self.layers) else None  # the box is read from [REG] alone
            if self.checkpointing and self.training:
                z = checkpoint(layer, z, position, seen, rows, use_reentrant=False)
            else:
                z = layer(z, position, seen, rows)
        return self.box(self.norm(z[:, 0])).float().sigmoid()
