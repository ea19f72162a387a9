"""Convolution over tokens that lie on a grid."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class GridConv(nn.Conv2d):
    """3 x 3 convolution with zero padding over patches (B, R · S, C), row by row.

    Weights stay fp32, arithmetic runs in the dtype of the input.
    """

    def __init__(self, channels: int, depthwise: bool = False, bias: bool = True) -> None:
        super().__init__(channels, channels, 3, padding=1, groups=channels if depthwise else 1, bias=bias)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:  # type: ignore[override]
        picture = x.transpose(1, 2).unflatten(2, grid)  # (B, C, R, S)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        picture = F.conv2d(picture, self.weight.to(x.dtype), bias, padding=1, groups=self.groups)
        return picture.flatten(2).transpose(1, 2)

    def single(self, x: Tensor) -> Tensor:
        """Each token of (B, T, C) as a picture of one pixel: of the kernel only the centre meets it. Not depthwise."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight[:, :, 1, 1].to(x.dtype), bias)
