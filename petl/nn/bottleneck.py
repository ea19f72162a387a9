"""Bottleneck adapters: down, ReLU or GELU, up. Both projections have a bias; there is no skip inside."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from petl.nn.linear import Linear


def down_projection(width: int, hidden: int) -> Linear:
    """Kaiming-uniform weight, zero bias."""
    layer = Linear(width, hidden)
    nn.init.kaiming_uniform_(layer.weight, a=math.sqrt(5))
    nn.init.zeros_(layer.bias)
    return layer


def up_projection(hidden: int, width: int, zero: bool = True) -> Linear:
    """All zero, so that the adapter starts silent; with ``zero=False`` as `down_projection`."""
    layer = down_projection(hidden, width)
    if zero:
        nn.init.zeros_(layer.weight)
    return layer


ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU}


class Bottleneck(nn.Module):
    """``scale · W_up σ(W_down x + b) + scale · b'`` on (…, C), with dropout after σ; parameters 2 C b + b + C."""

    def __init__(
        self,
        width: int,
        hidden: int,
        scale: float = 1.0,
        zero_up: bool = True,
        activation: str = "relu",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.activation, self.dropout = ACTIVATIONS[activation](), nn.Dropout(dropout)
        self.down, self.up = down_projection(width, hidden), up_projection(hidden, width, zero_up)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        a = self.up(self.dropout(self.activation(self.down(x))))
        return a if self.scale == 1.0 else self.scale * a


class SharedUpBottleneck(nn.Module):
    """One modality's part of a bottleneck whose last ``shared_dim`` output channels come from a map of both modalities.

    ``[U z ‖ S z]`` with z = ReLU(D x): ``D`` (C -> d) and ``U`` (d -> C - shared_dim) are here, ``S`` is handed in at
    each call, so that it is registered in one place. ``U`` is left out where it would have no rows.
    """

    def __init__(self, width: int, hidden: int, shared_dim: int) -> None:
        super().__init__()
        self.down = down_projection(width, hidden)
        self.up = up_projection(hidden, width - shared_dim) if width > shared_dim else None

    def forward(self, x: Tensor, shared: Linear) -> Tensor:
        z = F.relu(self.down(x))
        if self.up is None:
            return shared(z)
        # one product with the stacked weights: nothing is concatenated per token
        weight, bias = (torch.cat([a, b]).to(z.dtype) for a, b in
                        ((self.up.weight, shared.weight), (self.up.bias, shared.bias)))  # fmt: skip
        return F.linear(z, weight, bias)
