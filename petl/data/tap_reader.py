"""Batches of taps out of the shards of a `TapStore`."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from petl.data.tap_shards import DamagedError, Shard

CPU = torch.device("cpu")
Taps = dict[str, Tensor]
Spec = dict[str, tuple[tuple[int, ...], torch.dtype]]  # shape and type of every tap of a sample


def sample_bytes(spec: Spec) -> int:
    """Bytes of the taps of one sample."""
    return sum(prod(shape) * dtype.itemsize for shape, dtype in spec.values())


class TapReader:
    """Taps by position in the digests it was made for. A copy in another process maps the files again.

    Args:
        shards: with the taps.
        shard, row: (positions,), where a position's taps are; shard -1 = nowhere.
        spec: shape and type of every tap of a sample.
        place: where they are kept; held against eviction as long as the reader lives in this process.
        device: of the taps; another than the CPU has them all in one shard.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        shard: Tensor,
        row: Tensor,
        spec: Spec,
        place: object = None,
        device: torch.device = CPU,
    ) -> None:
        self._shards, self._shard, self._row, self._place = list(shards), shard, row, place
        self.spec, self.device = dict(spec), device

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_place": None}

    def __len__(self) -> int:
        return len(self._shard)

    def __contains__(self, index: int) -> bool:
        return bool(self._shard[index] >= 0)

    @property
    def complete(self) -> bool:
        """Whether there are taps for every position."""
        return bool((self._shard >= 0).all())

    @property
    def nbytes(self) -> int:
        """Bytes of the taps, those of equal samples counted once."""
        return len(self._distinct()[0]) * sample_bytes(self.spec)

    def read(self, indices: Sequence[int]) -> tuple[Taps, list[int]]:
        """Taps of a batch, each (B, …), and the places in it that are not there: their rows are zero."""
        at = torch.as_tensor(indices, dtype=torch.long)
        shard, row = self._present(self._shard[at]), self._row[at]
        missing = (shard < 0).nonzero()[:, 0].tolist()
        if self.device.type == "cpu":
            pairs = list(zip(shard.tolist(), row.tolist()))
            return {name: self._gather(name, pairs) for name in self.spec}, missing
        row = row.to(self.device)
        return {n: t.index_select(0, row) for n, t in self._shards[0].tensors.items()}, missing  # all there, see `to`

    def _gather(self, name: str, pairs: Sequence[tuple[int, int]]) -> Tensor:
        shape, dtype = self.spec[name]
        if not pairs:
            return torch.empty((0, *shape), dtype=dtype)
        tensors = {s: self._shards[s].tensors[name] for s, _ in pairs if s >= 0}
        zero = torch.zeros((), dtype=dtype).expand(shape)
        # twice as fast as index_select per shard: a row is copied once, from the mapped file to its place
        return torch.stack([tensors[s][r] if s >= 0 else zero for s, r in pairs])

    def _present(self, shards: Tensor) -> Tensor:
        """The numbers of these shards, -1 for one that another process has removed or damaged since."""
        for s in shards.unique().tolist():
            if s < 0:
                continue
            try:
                _ = self._shards[s].tensors
            except (OSError, DamagedError):
                self._shard[self._shard == s] = -1
                shards = shards.masked_fill(shards == s, -1)
        return shards

    def _distinct(self) -> tuple[Tensor, Tensor]:
        """Distinct (shard, row) that are there, (n, 2) in order; and for every position which of them, or -1."""
        there = self._present(self._shard) >= 0
        numbers, which = ((self._shard << 32) + self._row)[there].unique(return_inverse=True)
        places = torch.full_like(self._shard, -1)
        places[there] = which
        return torch.stack([numbers >> 32, numbers & 0xFFFFFFFF], dim=1), places

    def fits(self, device: torch.device | str) -> bool:
        """Whether the taps take at most half of the free memory of a CUDA device; False for others."""
        device = torch.device(device)
        return device.type == "cuda" and self.nbytes <= torch.cuda.mem_get_info(device)[0] // 2

    def to(self, device: torch.device | str) -> TapReader:
        """A reader of the same taps that holds all of them in one tensor each on ``device``."""
        pairs, places = self._distinct()
        last = len(pairs)  # a row of zeros, for what is missing
        held = {n: torch.empty((last + 1, *shape), dtype=t, device=device) for n, (shape, t) in self.spec.items()}
        for s in pairs[:, 0].unique().tolist():
            here = (pairs[:, 0] == s).nonzero()[:, 0]
            start, stop, rows = int(here[0]), int(here[-1]) + 1, pairs[here, 1]
            for name, tensor in held.items():
                tensor[start:stop].copy_(self._shards[s].tensors[name].index_select(0, rows))
        for tensor in held.values():
            tensor[last] = 0
        row = places.where(places >= 0, last)
        return TapReader([Shard((), held)], places.clamp(max=0), row, self.spec, device=torch.device(device))
