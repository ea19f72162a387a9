"""Methods that add to, scale or rotate the weights of single layers, all computed by Hugging Face `peft`.

For a frozen layer W (d x k) with input x:

    IA3        l * (W x), in the FFN W (l * x)             Liu et al., arXiv 2205.05638
    VeRA       W x + Λ_b B Λ_d A x, A and B random, shared Kopiczko et al., arXiv 2310.11454
    OFT        W R x, R block-diagonal and orthogonal      Qiu et al., arXiv 2306.07280
    LoHa       W x + (alpha / r) (B₁ A₁ * B₂ A₂) x         Hyeon-Woo et al., arXiv 2108.06098
    LoKr       W x + (alpha / r) (C ⊗ B A) x               Yeh et al., arXiv 2309.14859
    FourierFT  W x + alpha Re(IDFT(F)) x, n entries of F   Gao et al., arXiv 2405.03003

LoRA, DoRA and AdaLoRA have files of their own. Deviations are peft's: OFT takes five terms of a Neumann series for the
inverse in Cayley's formula, so R is orthogonal only up to a remainder; VeRA's A and B have the size of the largest
layer and are cut for the others; LoKr divides by r only where its second factor has low rank. By default the attention
projections are changed as the network has them, of a fused one all three together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from petl.backbones.base import BackboneView
from petl.errors import PetlError
from petl.methods.base import register
from petl.methods.peft_targets import Target, find_targets
from petl.methods.peft_tuner import PeftMethod


def names(targets: list[Target]) -> list[str]:
    return [t.name for t in targets]


@register("ia3")
@dataclass(frozen=True)
class IA3(PeftMethod):
    """IA3: scale the outputs of attention projections and the inputs of an FFN layer by trained vectors.

    Args:
        targets: layers, each as a whole (see petl.LoRA).
        feedforward: those among them whose inputs are scaled instead of their outputs.
        layers: blocks (see petl.LoRA).
    """

    targets: tuple[str, ...] = ("qkv", "fc2")
    feedforward: tuple[str, ...] = ("fc2",)
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "feedforward", tuple(self.feedforward))
        if other := [f for f in self.feedforward if f not in self.targets]:
            raise PetlError(f"IA3(feedforward={list(self.feedforward)}): {other[0]!r} is none of the targets.")

    def _inner(self, view: BackboneView, targets: list[Target]) -> list[str]:
        named = names(find_targets(view, self.feedforward, self.name)) if self.feedforward else []
        return [t.name for t in targets if t.name in named]

    def peft_config(self, view: BackboneView, targets: list[Target]) -> Any:
        from peft import IA3Config

        return IA3Config(target_modules=names(targets), feedforward_modules=self._inner(view, targets))

    def parameter_count(self, view: BackboneView) -> int:
        targets = self.find(view)
        inner = self._inner(view, targets)
        return sum(t.fan_in if t.name in inner else t.fan_out for t in targets)

    def layer_parameters(self, target: Target) -> int:
        return target.fan_out

    def layer_macs(self, target: Target, positions: int) -> int | None:
        return 0


@register("vera")
@dataclass(frozen=True)
class VeRA(PeftMethod):
    """VeRA: LoRA with two frozen random matrices for all layers, and trained scales of each layer.

    Args:
        r: rank of the random matrices.
        d_initial: start of the scales between them.
        targets: layers, each as a whole (see petl.LoRA).
        dropout: on the input of the product.
        seed: of the random matrices, which are saved with the adapter all the same.
        layers: blocks (see petl.LoRA).
    """

    r: int = 256
    d_initial: float = 0.1
    targets: tuple[str, ...] = ("qkv",)
    dropout: float = 0.0
    seed: int = 0
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("r", self.r, 1)
        self.require("seed", self.seed, 0)
        self.require("dropout", self.dropout, 0, integer=False, below=1)

    def peft_config(self, view: BackboneView, targets: list[Target]) -> Any:
        from peft import VeraConfig

        return VeraConfig(
            r=self.r,
            d_initial=self.d_initial,
            vera_dropout=self.dropout,
            projection_prng_key=self.seed,
            target_modules=names(targets),
        )

    def layer_parameters(self, target: Target) -> int:
        return self.r + target.fan_out

    def layer_macs(self, target: Target, positions: int) -> int | None:
        return positions * self.r * (target.fan_in + target.fan_out)


@register("oft")
@dataclass(frozen=True)
class OFT(PeftMethod):
    """OFT: rotate the inputs of single layers, block by block, by trained orthogonal matrices.

    Args:
        block_size: channels in a block; it divides the inputs of every target.
        targets: layers, each as a whole (see petl.LoRA).
        dropout: share of blocks that are not rotated, in training.
        layers: blocks (see petl.LoRA).
    """

    block_size: int = 32
    targets: tuple[str, ...] = ("qkv",)
    dropout: float = 0.0
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("block_size", self.block_size, 2)
        self.require("dropout", self.dropout, 0, integer=False, below=1)

    def find(self, view: BackboneView) -> list[Target]:
        found = super().find(view)
        for target in found:
            if target.fan_in % self.block_size:
                raise PetlError(
                    f"oft: block_size={self.block_size} does not divide the {target.fan_in} inputs of {target.name!r}."
                )
        return found

    def peft_config(self, view: BackboneView, targets: list[Target]) -> Any:
        from peft import OFTConfig

        return OFTConfig(
            r=0, oft_block_size=self.block_size, module_dropout=self.dropout, target_modules=names(targets)
        )

    def layer_parameters(self, target: Target) -> int:
        return target.fan_in // self.block_size * (self.block_size * (self.block_size - 1) // 2)


class _Lycoris(PeftMethod):
    """LoHa and LoKr: ``r``, ``alpha``, ``rank_dropout``."""

    r: int
    alpha: float
    rank_dropout: float

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("r", self.r, 1)
        self.require("alpha", self.alpha, 0, integer=False)
        self.require("rank_dropout", self.rank_dropout, 0, integer=False, below=1)

    def peft_config(self, view: BackboneView, targets: list[Target]) -> Any:
        import peft

        config = getattr(peft, f"{type(self).__name__}Config")
        return config(r=self.r, alpha=self.alpha, rank_dropout=self.rank_dropout, target_modules=names(targets))


@register("loha")
@dataclass(frozen=True)
class LoHa(_Lycoris):
    """LoHa: add the elementwise product of two low-rank matrices to the weights of single layers.

    Args:
        r: rank of both factors; their product has up to its square.
        alpha: the product is scaled by alpha / r.
        targets: layers, each as a whole (see petl.LoRA).
        rank_dropout: share of the rows of the change that are dropped, in training.
        layers: blocks (see petl.LoRA).
    """

    r: int = 8
    alpha: float = 8
    targets: tuple[str, ...] = ("qkv",)
    rank_dropout: float = 0.0
    layers: tuple[int, ...] | None = None

    def layer_parameters(self, target: Target) -> int:
        return 2 * self.r * (target.fan_in + target.fan_out)

    def layer_macs(self, target: Target, positions: int) -> int | None:
        return (2 * self.r + positions) * target.fan_in * target.fan_out


@register("lokr")
@dataclass(frozen=True)
class LoKr(_Lycoris):
    """LoKr: add the Kronecker product of a small matrix and a low-rank one to the weights of single layers.

    Args:
        r: rank of the second factor; from half its longer side on it is a full matrix.
        alpha: the product is scaled by alpha / r where the second factor has low rank.
        targets: layers, each as a whole (see petl.LoRA).
        rank_dropout: share of the rows of the change that are dropped, in training.
        layers: blocks (see petl.LoRA).
    """

    r: int = 8
    alpha: float = 8
    targets: tuple[str, ...] = ("qkv",)
    rank_dropout: float = 0.0
    layers: tuple[int, ...] | None = None

    def layer_parameters(self, target: Target) -> int:
        from peft.tuners.lokr.layer import factorization

        (m, n), (o, p) = factorization(target.fan_in), factorization(target.fan_out)  # in = m n, out = o p
        second = self.r * (p + n) if self.r < max(p, n) / 2 else p * n
        return o * m + second


@register("fourierft")
@dataclass(frozen=True)
class FourierFT(PeftMethod):
    """FourierFT: add the inverse Fourier transform of a few trained coefficients to the weights of single layers.

    Args:
        n: trained coefficients of each layer.
        scale: of the transform.
        targets: layers, each as a whole (see petl.LoRA).
        seed: of the places of the coefficients in the spectrum.
        layers: blocks (see petl.LoRA).
    """

    n: int = 1000
    scale: float = 150.0
    targets: tuple[str, ...] = ("qkv",)
    seed: int = 777
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("n", self.n, 1)
        self.require("scale", self.scale, 0, integer=False)
        self.require("seed", self.seed, 0)

    @property
    def identity_at_start(self) -> bool:
        return False  # the coefficients start as normal numbers

    def find(self, view: BackboneView) -> list[Target]:
        found = super().find(view)
        for target in found:
            if self.n > target.fan_in * target.fan_out:
                raise PetlError(f"fourierft: {target.name!r} has no {self.n} places; take a smaller n.")
        return found

    def peft_config(self, view: BackboneView, targets: list[Target]) -> Any:
        from peft import FourierFTConfig

        return FourierFTConfig(
            n_frequency=self.n, scaling=self.scale, random_loc_seed=self.seed, target_modules=names(targets)
        )

    def layer_parameters(self, target: Target) -> int:
        return self.n

    def layer_macs(self, target: Target, positions: int) -> int | None:
        return positions * target.fan_in * target.fan_out
