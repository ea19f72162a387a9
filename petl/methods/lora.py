"""LoRA (Hu et al., arXiv 2106.09685) and DoRA (Liu et al., arXiv 2402.09353), computed by Hugging Face `peft`.

    LoRA   W x + (alpha / r) B A x                                   B (d x r) = 0 at the start, A (r x k)
    DoRA   m (W + (alpha / r) B A) x / |W + (alpha / r) B A|         by row; m = |W| at the start

LoRA changes q and v by default, as the paper does. Where the network computes q, k and v in one product (timm's qkv),
peft alone gives that layer one A, shared by all three, and adapts k too: the same count, another method. Here each
part gets matrices of its own, and the product with the fused weight stays one. ``parts=("qkv",)`` is peft's plain way.

Deviations: alpha = r by default, so that A and B enter unscaled. DoRA's norm takes no gradient, as in section 4.3 of
the paper.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from petl.backbones.base import BackboneView
from petl.methods.base import register
from petl.methods.peft_targets import Target
from petl.methods.peft_tuner import PeftMethod


class _LowRank(PeftMethod):
    """LoRA and DoRA: ``r``, ``alpha`` and ``dropout``."""

    layer_types: ClassVar[tuple[type[nn.Module], ...]] = (nn.Linear, nn.Conv2d)
    use_dora: ClassVar[bool] = False
    r: int
    alpha: float
    dropout: float

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("r", self.r, 1)
        self.require("alpha", self.alpha, 0, integer=False)
        self.require("dropout", self.dropout, 0, integer=False, below=1)

    def peft_config(self, view: BackboneView, targets: list[Target]) -> Any:
        from peft import LoraConfig

        return LoraConfig(
            r=self.r,
            lora_alpha=self.alpha,  # type: ignore[arg-type]
            lora_dropout=self.dropout,
            use_dora=self.use_dora,
            target_modules=[t.name for t in targets],
        )

    def layer_parameters(self, target: Target) -> int:
        return self.r * (target.fan_in + target.fan_out)

    def layer_macs(self, target: Target, positions: int) -> int | None:
        return positions * self.r * (target.fan_in + target.fan_out)


@register("lora")
@dataclass(frozen=True)
class LoRA(_LowRank):
    """LoRA: add a product of two thin matrices to the weights of single layers.

    Args:
        r: rank.
        alpha: the product is scaled by alpha / r.
        parts: layers that get one: block parts (q, k, v, out, fc1, fc2; qkv = the attention projections as the network
            has them), ends of module paths, or regular expressions. q, k and v get matrices of their own even where
            the network fuses them.
        dropout: on the input of the product.
        layers: blocks whose layers are changed, from 0 or, backwards, from -1; None = all, and the layers outside the
            blocks that parts name.
    """

    r: int = 8
    alpha: float = 8
    parts: tuple[str, ...] = ("q", "v")
    dropout: float = 0.0
    layers: tuple[int, ...] | None = None

    option: ClassVar[str] = "parts"
    splits: ClassVar[bool] = True


@register("dora")
@dataclass(frozen=True)
class DoRA(_LowRank):
    """DoRA: LoRA for the direction of each row of a weight, and a trained length of the row.

    Args:
        r: rank.
        alpha: the product is scaled by alpha / r.
        targets: layers (see petl.LoRA), each as a whole.
        dropout: on the input of the product.
        layers: blocks (see petl.LoRA).
    """

    r: int = 8
    alpha: float = 8
    targets: tuple[str, ...] = ("qkv",)
    dropout: float = 0.0
    layers: tuple[int, ...] | None = None

    use_dora: ClassVar[bool] = True

    def layer_parameters(self, target: Target) -> int:
        return super().layer_parameters(target) + target.fan_out

    def layer_macs(self, target: Target, positions: int) -> int | None:
        if isinstance(target.layer, nn.Conv2d):
            return None
        # peft forms B A, for the lengths of the rows, by sending the identity through both
        return (positions + target.fan_in) * self.r * (target.fan_in + target.fan_out)
