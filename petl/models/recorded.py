"""Readers of a frozen classifier's blocks, and reading what was recorded of a pass in place of the pass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from petl.backbones.taps import Reader


@dataclass(frozen=True)
class Recorded:
    """What a frozen classifier made of images (B, 3, H, W).

    ``logits`` (B, C). ``taps`` (B, T, C) each, by name: those that `ExplainedClassifier.reads` names. ``size``: (H, W).
    """

    logits: Tensor
    taps: Mapping[str, Tensor]
    size: tuple[int, int]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the images."""
        return len(self.logits), 3, *self.size

    @property
    def device(self) -> torch.device:
        return self.logits.device

    def blank(self, dtype: torch.dtype) -> Tensor:
        """An image of this size (1, 3, H, W)."""
        return torch.zeros(1, *self.shape[1:], dtype=dtype, device=self.device)

    def replay(self, reader: Reader, depth: int) -> Tensor:
        """The state of ``reader`` after the last of ``depth`` blocks."""
        z = reader.begin(self.taps.get("embedded", self.logits))  # a reader without that tap begins with zeros
        for index in range(depth):
            if (h := self.taps.get(f"block.{index}")) is not None:
                z = reader.step(index, z, h)
        return z


class Keeper:
    """A reader that keeps the taps ``names``."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names, self.taps = names, dict[str, Tensor]()

    def begin(self, h0: Tensor) -> Tensor:
        return self._keep("embedded", h0)

    def step(self, index: int, z: Tensor, h: Tensor, keep: Tensor | None = None) -> Tensor:
        return self._keep(f"block.{index}", h)

    def _keep(self, name: str, h: Tensor) -> Tensor:
        if name in self.names:
            self.taps[name] = h
        return h


class Untrained:
    """A reader without gradient."""

    def __init__(self, reader: Reader) -> None:
        self.reader = reader

    @torch.no_grad()
    def begin(self, h0: Tensor) -> Tensor:
        return self.reader.begin(h0)

    @torch.no_grad()
    def step(self, index: int, z: Tensor, h: Tensor, keep: Tensor | None = None) -> Tensor:
        return self.reader.step(index, z, h, keep)


class Recomputed:
    """A reader that keeps block outputs and its states for the backward pass, and nothing from inside its blocks."""

    def __init__(self, reader: Reader) -> None:
        self.reader = reader

    def begin(self, h0: Tensor) -> Tensor:
        return self.reader.begin(h0)

    def step(self, index: int, z: Tensor, h: Tensor, keep: Tensor | None = None) -> Tensor:
        if not torch.is_grad_enabled():
            return self.reader.step(index, z, h, keep)
        return checkpoint(self.reader.step, index, z, h, keep, use_reentrant=False, preserve_rng_state=False)
