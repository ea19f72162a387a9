"""FacT (Jie & Deng, arXiv 2212.03145): the changes to all weight matrices of the backbone, factorised as one tensor.

Every linear layer of a block is made of C x C matrices: q, k, v, o, and F / C each in fc1 (below one another) and fc2
(beside one another), 12 for F = 4 C. Matrix i of all of them changes by

    ΔW_i = s V Σ_i Uᵀ,    Σ_i = S_i (TT) or Σ_k P_ik C_k (TK),    y = W x + b + s V drop(Σ_i Uᵀ x)

U, V (C x r) belong to all matrices of all blocks together; TT has an own S_i (r x r) for each, TK a core (r x r x r) in
common and r mixing weights P_i for each. On ViT-B/16 that is 61,440 for TT with r = 16 and 86,528 for TK with r = 32.

V is zero at the start, so that the network starts at the frozen one; U, S and P are Kaiming-uniform, the core Xavier-
uniform. Deviation: U and V are handed to the layers by reference and registered in one place, where the released code
finds them through a global variable.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from petl.backbones.base import BackboneView
from petl.errors import PetlError
from petl.methods.base import Method, register
from petl.methods.layers import LayerPart, LayersModule, parts_of, plain

VARIANTS = ("tt", "tk")


class Factors(nn.Module):
    """What all matrices have in common: U, here as Uᵀ (r, C), V (C, r) and, for TK, the core (r, r, r)."""

    core: nn.Parameter | None

    def __init__(self, width: int, rank: int, variant: str) -> None:
        super().__init__()
        self.u, self.v = nn.Parameter(torch.empty(rank, width)), nn.Parameter(torch.zeros(width, rank))
        nn.init.kaiming_uniform_(self.u, a=math.sqrt(5))
        self.core = None
        if variant == "tk":
            self.core = nn.Parameter(torch.empty(rank, rank, rank))
            nn.init.xavier_uniform_(self.core)


class Factorised(LayerPart):
    """s (I ⊗ V) drop(Σ (I ⊗ Uᵀ) x) beside a layer of ``rows`` x ``columns`` matrices of C x C."""

    def __init__(self, factors: Factors, rows: int, columns: int, method: FacT) -> None:
        super().__init__()
        self._factors = (factors,)  # in a tuple, so that they are not registered here once more
        self.rows, self.columns, self.scale, self.dropout = rows, columns, method.scale, method.dropout
        r = method.rank
        own = (rows * r, columns * r) if method.variant == "tt" else (rows * columns, r)  # S_i, or P_i
        self.own = nn.Parameter(torch.empty(own))
        nn.init.kaiming_uniform_(self.own, a=math.sqrt(5))

    def sigma(self) -> Tensor:
        """The matrices Σ_i in their places: (rows · r, columns · r)."""
        core = self._factors[0].core
        if core is None:
            return self.own
        r = len(core)
        mixed = self.own @ core.flatten(1)  # (rows · columns, r · r)
        return mixed.view(self.rows, self.columns, r, r).transpose(1, 2).reshape(self.rows * r, self.columns * r)

    def merged(self, layer: Any) -> tuple[Tensor, Tensor | None]:
        u, v = self._factors[0].u, self._factors[0].v
        blocks = torch.kron(torch.eye(self.rows, device=v.device), v) @ self.sigma()
        change = blocks @ torch.kron(torch.eye(self.columns, device=u.device), u)
        return layer.weight + self.scale * change, layer.bias

    def forward(self, layer: nn.Module, x: Tensor) -> Tensor:
        u, v, sigma = (t.to(x.dtype) for t in (self._factors[0].u, self._factors[0].v, self.sigma()))
        z = F.linear(x.unflatten(-1, (self.columns, -1)), u).flatten(-2)  # (…, columns · r)
        z = F.dropout(F.linear(z, sigma), self.dropout, self.training)  # (…, rows · r)
        change = F.linear(z.unflatten(-1, (self.rows, -1)), v).flatten(-2)  # (…, rows · C)
        return torch.add(plain(layer, x), change, alpha=self.scale)

    def macs(self, layer: Any, positions: int) -> int:
        c, r = self._factors[0].v.shape
        cells = self.rows * self.columns
        mixing = 0 if self._factors[0].core is None else cells * r**3
        return mixing + positions * ((self.rows + self.columns) * c * r + cells * r * r)


class FacTModule(LayersModule):
    """``factors``: what all layers share, registered here alone."""

    def __init__(self, method: FacT, view: BackboneView) -> None:
        super().__init__(method, view)
        self.factors = Factors(view.width, method.rank, method.variant)
        for place, _ in parts_of(view, "q", "k", "v", "out", "fc1", "fc2", blocks=method.blocks(view)):
            outputs, inputs = place.layer.weight.shape
            if outputs % view.width or inputs % view.width:
                raise PetlError(
                    f"'fact' cuts every layer into {view.width} x {view.width} matrices, and {place.name} of block "
                    f"{place.block} is {outputs} x {inputs}. Use a method without this condition, e.g. 'rep_adapter'."
                )
            self.add(place, Factorised(self.factors, outputs // view.width, inputs // view.width, method))


@register("fact")
@dataclass(frozen=True)
class FacT(Method):
    """FacT: factorise the changes to all weight matrices together, as a tensor train or a Tucker decomposition.

    Args:
        variant: "tt" (tensor train) or "tk" (Tucker).
        rank: r, the width of the factors; the paper takes 16 for "tt" and 32 for "tk".
        scale: s, the factor on the change; the paper searches it from 0.01 to 100 for each task.
        dropout: share of the r-dimensional activations that is dropped in training.
        layers: blocks whose weights change, from 0 or, backwards, from -1; None = all.
    """

    mergeable: ClassVar[bool] = True

    variant: str = "tt"
    rank: int = 16
    scale: float = 1.0
    dropout: float = 0.1
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        self.choose("variant", VARIANTS)
        self.require("rank", self.rank, 1)
        self.require("scale", self.scale, 0, integer=False)
        self.require("dropout", self.dropout, 0, integer=False, below=1)
        self.check_layers()

    def build(self, view: BackboneView) -> FacTModule:
        return FacTModule(self, view)

    def parameter_count(self, view: BackboneView) -> int:
        r, matrices = self.rank, len(self.blocks(view)) * (4 + 2 * (view.hidden // view.width))
        own = matrices * r * r if self.variant == "tt" else r**3 + matrices * r
        return 2 * view.width * r + own
