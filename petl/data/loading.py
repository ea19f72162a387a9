"""Data order as a pure function of (seed, epoch), resumable at any step and correct over several processes.

Lightning resumes in the middle of an epoch by counting on, but starts the data over. Here the loader keeps (epoch,
batches handed out) in the checkpoint and starts behind them; nothing else needs to be stored, because order and
augmentation depend on (seed, epoch, sample) alone and not on workers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sized
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from petl.errors import PetlError

Key = tuple[int, int]  # (epoch, index)


def order(count: int, seed: int, epoch: int) -> list[int]:
    """A permutation of ``range(count)`` for this epoch."""
    generator = torch.Generator().manual_seed(stable_hash(seed, epoch))
    return torch.randperm(count, generator=generator).tolist()


def stable_hash(*parts: int) -> int:
    """A 63-bit number from integers, the same on every machine."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "little") >> 1


class TrainSampler(DistributedSampler):
    """Shuffled order, the same global batches for any number of processes.

    Global batch k is ``order[k B : (k + 1) B]``; each rank takes its contiguous part. What is left of the epoch behind
    the last whole batch is dropped. A `DistributedSampler`, so that Lightning uses it as it is.
    """

    def __init__(self, data: Sized, global_batch: int, world: int, rank: int, seed: int) -> None:
        if global_batch < 1 or global_batch % world:
            near = max(world, global_batch // world * world)
            raise PetlError(
                f"batch_size {global_batch} is the global batch and must be a positive multiple of the {world} processes; "
                f"nearest: {near} or {near + world}."
            )
        if len(data) < global_batch:
            raise PetlError(f"the training set has {len(data)} samples, fewer than one batch of {global_batch}.")
        super().__init__(data, num_replicas=world, rank=rank, shuffle=True, seed=seed)  # type: ignore[arg-type]
        self.count, self.global_batch = len(data), global_batch
        self.skip = 0  # batches left out at the start of the next pass, once

    def __iter__(self) -> Iterator[Any]:
        skip, self.skip = self.skip, 0
        indices, part = order(self.count, self.seed, self.epoch), self.global_batch // self.num_replicas
        for batch in range(skip, self.count // self.global_batch):
            start = batch * self.global_batch + self.rank * part
            for index in indices[start : start + part]:
                yield self.epoch, index

    def __len__(self) -> int:
        return self.count // self.global_batch * self.global_batch // self.num_replicas


class EvalSampler(DistributedSampler):
    """Every sample exactly once over all processes: no padding, no duplicates."""

    def __init__(self, data: Sized, world: int, rank: int) -> None:
        super().__init__(data, num_replicas=world, rank=rank, shuffle=False)  # type: ignore[arg-type]
        self.indices = range(rank, len(data), world)

    def __iter__(self) -> Iterator[Any]:
        return iter([(0, i) for i in self.indices])

    def __len__(self) -> int:
        return len(self.indices)


class KeyedDataset(Dataset):
    """Samples by (epoch, index): ``{"image", "label", "index"}``. ``source[i]`` gives (PIL image, label)."""

    def __init__(self, source: Any, transform: Callable[[Any], Tensor], seed: int) -> None:
        self.source, self.transform, self.seed = source, transform, seed

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: Key) -> dict[str, Any]:
        epoch, index = key
        image, label = self.source[index]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(stable_hash(self.seed, epoch, index))
            return {"image": self.transform(image), "label": label, "index": index}


class ResumableLoader(DataLoader):
    """A DataLoader over a `TrainSampler` that continues behind the batches handed out before the checkpoint."""

    sampler: TrainSampler

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._epoch, self._handed_out, self._resume_epoch = 0, 0, -1

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        if self._resume_epoch >= 0:
            self.sampler.set_epoch(self._resume_epoch)
            self.sampler.skip, self._resume_epoch = self._handed_out, -1
        else:
            self._handed_out = 0
        inner = super().__iter__()  # at once, so that workers start before the first batch is asked for
        return self._count(inner)

    def _count(self, inner: Iterator[Any]) -> Iterator[Any]:
        for batch in inner:
            self._handed_out += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Epoch and batches handed out in it."""
        return {"epoch": self.sampler.epoch, "batches": self._handed_out}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Start the next pass behind what ``state`` says was handed out; a finished epoch is followed by the next."""
        epoch, batches = int(state["epoch"]), int(state["batches"])
        if batches >= len(self):
            epoch, batches = epoch + 1, 0
        self._resume_epoch, self._handed_out = epoch, batches
