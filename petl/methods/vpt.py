"""VPT, visual prompt tuning (Jia et al., arXiv 2203.12119): trained tokens beside those of the image.

With P prefix tokens (class, registers), N patches, p prompts, and E_i the tokens that enter block i:

    shallow    E_0 <- [prefix ‖ Z_0 ‖ patches],  Z_0 (p, C) trained; the prompts pass all blocks
    deep       E_i <- [prefix ‖ Z_i ‖ patches],  own Z_i for every block; what block i - 1 made of its own is dropped

Prompts start uniform on ±sqrt(6 / (3 h w + C)) for patches of h x w pixels. It is no identity at the start: attention
sees p more tokens at once.

Deviations. Prompts stand behind all prefix tokens, registers included. They are taken out after the last block, so that
pooling over patches, and heads that do so, see the tokens they always saw (nothing changes for class-token pooling). No
optional projection of the prompts. ``prompts`` is one number, where the paper searches 1 to 200 for each task.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from petl.backbones.base import BackboneView, BlockView, Call
from petl.errors import PetlError
from petl.methods.base import Method, MethodModule, register

VARIANTS = ("deep", "shallow")


class VPTModule(MethodModule):
    method: VPT
    changes_blocks: ClassVar[bool] = True

    def __init__(self, method: VPT, view: BackboneView) -> None:
        super().__init__(method, view)
        height, width = view.patch_size
        bound = math.sqrt(6 / (3 * height * width + view.width))
        self.prompts = nn.Parameter(torch.empty(method.layers(view), method.prompts, view.width))
        nn.init.uniform_(self.prompts, -bound, bound)

    def block(self, index: int, block: BlockView, x: Tensor, call: Call, state: Any) -> tuple[Tensor, Any]:
        if call.mask() is not None:
            raise PetlError("'vpt' adds tokens, so an attention mask over the original tokens cannot be applied.")
        prefix, count = self.view.prefix_tokens, self.method.prompts
        if index < len(self.prompts):
            prompts = self.prompts[index].to(x.dtype).expand(len(x), -1, -1)
            prompts = F.dropout(prompts, self.method.dropout, self.training)
            patches = x[:, prefix + (count if index else 0) :]
            x = torch.cat([x[:, :prefix], prompts, patches], 1)  # (B, P + p + N, C)
        x = block.forward(x, call)
        if index + 1 == self.view.depth:
            x = torch.cat([x[:, :prefix], x[:, prefix + count :]], 1)
        return x, state

    def token_counts(self, patches: int) -> list[tuple[int, int]]:
        return [(patches + self.view.prefix_tokens + self.method.prompts,) * 2] * self.view.depth

    def first_changed(self) -> int:
        return 0

    def first_gradient(self) -> tuple[str, str]:
        return "input of block 0", "the first prompts enter there, and every later token attends to them"


@register("vpt")
@dataclass(frozen=True)
class VPT(Method):
    """Visual prompt tuning: trained tokens beside those of the image, new ones for every block (deep) or not (shallow).

    Args:
        prompts: number p of prompt tokens.
        variant: "deep" (every block has its own) or "shallow" (they enter before block 0).
        dropout: dropout on the prompts while training.
    """

    prompts: int = 50
    variant: str = "deep"
    dropout: float = 0.0

    @property
    def identity_at_start(self) -> bool:
        return False

    def __post_init__(self) -> None:
        self.require("prompts", self.prompts, 1)
        self.choose("variant", VARIANTS)
        self.require("dropout", self.dropout, 0, integer=False, below=1)

    def layers(self, view: BackboneView) -> int:
        """Blocks that get prompts of their own."""
        return view.depth if self.variant == "deep" else 1

    def build(self, view: BackboneView) -> VPTModule:
        return VPTModule(self, view)

    def parameter_count(self, view: BackboneView) -> int:
        """p C, for every block in the deep variant."""
        return self.layers(view) * self.prompts * view.width
