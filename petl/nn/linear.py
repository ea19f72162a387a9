"""The linear layer of trained parts: weights stay fp32, arithmetic runs in the dtype of the frozen backbone."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Linear):
    """`nn.Linear` that computes in the dtype of its input.

    Casting the small weight instead of the large activation keeps a bf16 backbone at bf16 memory (an fp32 branch
    would keep 50 % more bytes for backward) while the optimiser still sees fp32 weights.
    """

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)
