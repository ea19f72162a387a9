"""Taps of samples, computed once: kept on disk or in memory, and read as batches.

A *tap* is a tensor of a frozen network for one sample. The store knows nothing of networks: it keeps what a function
computes, under a key that says all the values depend on, and the digest of the sample. A miss is possible at any time
(the disk is full, a file is damaged); a wrong value is not.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from petl.data.tap_places import Folder, Memory, Place, reason
from petl.data.tap_reader import Spec, TapReader, Taps, sample_bytes
from petl.data.tap_shards import Shard
from petl.errors import PetlError

FORMAT = 1
SHARD = 64 << 20  # most bytes of taps in a shard
WAITING, SECONDS = 32 << 20, 10.0  # computed taps are written when they are as many, or as old
SAMPLE, HEADER = 128, 8192  # bytes of a shard beside the taps, at most: for a sample, and once

Compute = Callable[[list[int]], Mapping[str, Tensor]]


@dataclass(frozen=True)
class Filling:
    """What a call of `TapStore.fill` did, in distinct samples.

    Args:
        found: were there already, or came from another process meanwhile.
        computed: were computed and kept by this call.
        left_out: are not in the store.
        nbytes: of the taps of those that are.
        reason: why some are left out: ``"limit"``, ``"disk full: …"``, ``"cannot write: …"``; else None.
        damaged: shards that this store met so far and removed.
    """

    found: int
    computed: int
    left_out: int
    nbytes: int
    reason: str | None
    damaged: int


class TapStore:
    """Taps by sample on disk, or in memory alone.

    Args:
        key: all that the taps depend on beside the sample, as JSON values.
        dtype: floating-point taps are kept in it; others stay as they are.
        directory: has a directory per key, with safetensors shards; many processes may use it at once. None = memory.
        limit: most bytes on disk of all keys below ``directory`` together, or in memory. On disk, the least recently
            used of the other keys that no process has open make room.
    """

    def __init__(
        self, key: Mapping[str, Any], dtype: torch.dtype, directory: Path | None = None, limit: int | None = None
    ) -> None:
        about = {"format": FORMAT, "dtype": str(dtype).removeprefix("torch."), "key": dict(key)}
        try:
            text = json.dumps(about, sort_keys=True, separators=(",", ":"))
        except (TypeError, ValueError) as error:
            raise PetlError(f"the key of a tap store consists of JSON values, this one does not: {error}.") from error
        if not dtype.is_floating_point:
            raise PetlError(f"TapStore(dtype={dtype}): give a floating-point type, e.g. torch.bfloat16.")
        if limit is not None and limit < 1:
            raise PetlError(f"TapStore(limit={limit}): give a positive number of bytes, or None for no limit.")
        self.dtype = dtype
        self.digest = hashlib.sha256(text.encode()).hexdigest()[:32]
        self.place: Place = Memory(limit)
        if directory is not None:
            self.place = Folder(Path(directory).expanduser().absolute(), self.digest, about, limit)
        self.spec: Spec = {}  # shape and type of every tap of a sample; empty until the first is known
        self._shards: list[Shard] = []
        self._at: dict[str, tuple[int, int]] = {}  # digest -> shard and row
        self._damaged = 0
        self.scan()

    @property
    def sample_bytes(self) -> int:
        """Bytes of the taps of one sample; 0 until the first is known."""
        return sample_bytes(self.spec)

    def fill(self, digests: Sequence[str], compute: Compute, chunk: int) -> Filling:
        """Compute what is missing. A second process that fills the same takes other chunks; it may die.

        Args:
            digests: of the samples; one that occurs twice is computed once.
            compute: gives for positions in ``digests`` the taps by name, each (positions, …). Names, shapes and types
                are always the same. What it raises comes through, and what it gave before is kept.
            chunk: most samples in a call of ``compute``. Chunks are cut from all samples, missing or not, and computed
                without those that are there; every process and a later run thus cut the same.
        """
        if chunk < 1:
            raise PetlError(f"TapStore.fill(chunk={chunk}): it is at least 1.")
        first: dict[str, int] = {}
        for i, digest in enumerate(digests):
            first.setdefault(digest, i)
        self.scan()
        work = _Work(self, first, compute)
        if self.missing(first):
            work.run(chunk)
        there = len(first) - len(self.missing(first))
        return Filling(
            found=there - work.computed,
            computed=work.computed,
            left_out=len(first) - there,
            nbytes=there * self.sample_bytes,
            reason=work.reason if there < len(first) else None,
            damaged=self._damaged,
        )

    def reader(self, digests: Sequence[str]) -> TapReader:
        """Taps by position in ``digests``, of what is in the store now."""
        at = torch.tensor([self._at.get(d, (-1, 0)) for d in digests], dtype=torch.long).view(-1, 2)
        return TapReader(self._shards, at[:, 0].clone(), at[:, 1].clone(), self.spec, self.place)

    def missing(self, digests: Sequence[str] | Mapping[str, int]) -> list[str]:
        return [d for d in digests if d not in self._at]

    def scan(self) -> None:
        """Take in what other processes wrote."""
        shards, damaged = self.place.scan()
        self._damaged += damaged
        for shard in shards:
            if self.accepts(shard.tensors):
                self.add(shard)
            else:
                self._damaged += 1

    def accepts(self, tensors: Mapping[str, Tensor]) -> bool:
        """Whether these are the taps of this store; the first ever seen decide."""
        spec = {name: (tuple(t.shape[1:]), t.dtype) for name, t in sorted(tensors.items())}
        self.spec = self.spec or spec
        return spec == self.spec

    def add(self, shard: Shard) -> None:
        for row, digest in enumerate(shard.digests):
            self._at.setdefault(digest, (len(self._shards), row))
        self._shards.append(shard)


class _Work:
    """A call of `TapStore.fill` under way.

    Args:
        store: to be filled.
        first: position by digest.
        compute: gives taps for positions.
    """

    def __init__(self, store: TapStore, first: Mapping[str, int], compute: Compute) -> None:
        self.store, self.place, self.first, self.compute = store, store.place, first, compute
        self.reason = store.place.problem
        self.computed = 0  # and kept
        self._waiting: list[tuple[list[str], Taps]] = []  # computed and not yet written
        self._since = 0.0  # when the oldest of them was computed

    def run(self, chunk: int) -> None:
        wanted = list(self.first)
        queue = deque((wanted[i : i + chunk], False) for i in range(0, len(wanted), chunk))
        try:
            while queue and self.reason is None:
                samples, wait = queue.popleft()
                if not self._chunk(samples, wait):
                    queue.append((samples, True))  # another process has it: look again when all else is done
                if self._due() or (queue and queue[0][1]):  # never wait for somebody who may wait for us
                    self._write()
        finally:
            self._write()

    def _chunk(self, samples: list[str], wait: bool) -> bool:
        """Compute what is missing of a chunk; False if another process is at it."""
        if not self.store.missing(samples):
            return True
        if not self.place.take(samples, wait):
            return False
        self.store.scan()
        missing = self.store.missing(samples)
        fitting = self._fitting(sum(len(d) for d, _ in self._waiting), len(missing))
        if fitting < len(missing):
            self.reason = "limit"
        if fitting:
            self._since = self._since if self._waiting else time.monotonic()
            self._waiting.append((missing[:fitting], self._taps(missing[:fitting])))
        return True

    def _taps(self, samples: list[str]) -> Taps:
        taps = self.compute([self.first[d] for d in samples])
        kept = {
            name: t.detach().to("cpu", self.store.dtype if t.is_floating_point() else t.dtype, copy=True)
            for name, t in taps.items()
        }
        shapes = {name: tuple(t.shape) for name, t in kept.items()}
        if not kept or any(shape[:1] != (len(samples),) for shape in shapes.values()):
            raise PetlError(f"taps of {len(samples)} samples were asked for, their shapes are: {shapes or 'no taps'}.")
        if not self.store.accepts(kept):
            raise PetlError(
                f"taps of one key are always the same: a sample's were {self.store.spec} at first, and now those of "
                f"{len(samples)} samples are {shapes}, {[t.dtype for t in kept.values()]}. What differs belongs into "
                "the key."
            )
        return kept

    def _due(self) -> bool:
        waiting = sum(len(digests) for digests, _ in self._waiting) * self.store.sample_bytes
        return waiting >= WAITING or (bool(waiting) and time.monotonic() - self._since >= SECONDS)

    def _fitting(self, before: int, count: int) -> int:
        """How many of ``count`` samples have room behind ``before`` others; all while their size is not known."""
        if not self.store.spec:
            return count
        size = self.store.sample_bytes + SAMPLE
        room = self.place.room(HEADER + (before + count) * size) - HEADER
        return max(0, min(count, room // size - before))

    def _write(self) -> None:
        """Put what is waiting into shards, and let others have the rest."""
        waiting, self._waiting = self._waiting, []
        if waiting:
            digests = [d for part, _ in waiting for d in part]
            taps = {name: torch.cat([t[name] for _, t in waiting]) for name in self.store.spec}
            try:
                self._put(digests, taps)
            except OSError as error:
                self.reason = reason(error)
        self.place.release()

    def _put(self, digests: list[str], taps: Taps) -> None:
        most = max(1, SHARD // max(1, self.store.sample_bytes))
        start = 0
        while start < len(digests):
            with self.place.turn():
                stop = start + self._fitting(0, min(most, len(digests) - start))
                if stop == start:
                    self.reason = "limit"
                    return
                shard = self.place.put(digests[start:stop], {name: t[start:stop] for name, t in taps.items()})
            self.store.add(shard)
            self.computed += stop - start
            start = stop
