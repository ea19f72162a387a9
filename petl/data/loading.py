"""Data order as a pure function of (seed, epoch), resumable at any step and correct over several processes.

Lightning resumes in the middle of an epoch by counting on, but starts the data over. Here the loader keeps (epoch,
batches handed out) in the checkpoint and starts behind them; nothing else needs to be stored, because order and
augmentation depend on (seed, epoch, sample) alone and not on workers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sized
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
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
    """Shuffled order as keys (epoch, index), the same global batches for any number of processes.

    Global batch k is ``order[k B : (k + 1) B]``; each rank takes its contiguous part. What is left of the epoch behind
    the last whole batch is dropped. A `DistributedSampler`, so that Lightning uses it as it is and calls `set_epoch`.

    Args:
        data: anything with a length.
        global_batch: samples per step over all processes, B.
        world, rank: number of processes, and which of them this is.
        seed: of the order.
        group: this many samples in a row stay together, in order.

    Raises `PetlError` if B is not a multiple of ``world``, or if ``data`` is smaller than one batch.
    """

    def __init__(self, data: Sized, global_batch: int, world: int, rank: int, seed: int, group: int = 1) -> None:
        if global_batch < 1 or global_batch % world:
            low = max(world, global_batch // world * world)
            raise PetlError(
                f"batch_size {global_batch} is the global batch and must be a positive multiple of the {world} "
                f"processes; nearest: {low} or {low + world}."
            )
        if len(data) < global_batch:
            raise PetlError(
                f"the training set has {len(data)} samples, fewer than one batch of {global_batch}; "
                f"use a batch_size of at most {len(data) // world * world}."
            )
        super().__init__(data, num_replicas=world, rank=rank, shuffle=True, seed=seed)  # type: ignore[arg-type]
        self.count, self.global_batch, self.group = len(data), global_batch, group
        self.skip = 0  # batches left out at the start of the next pass, once
        self.ahead = 0  # `set_epoch` counts this many epochs too many (see `ResumableLoader`)

    def __iter__(self) -> Iterator[Any]:
        skip, self.skip = self.skip, 0
        epoch, part = self.epoch - self.ahead, self.global_batch // self.num_replicas
        blocks = order(-(-self.count // self.group), self.seed, epoch)
        indices = [i for b in blocks for i in range(b * self.group, min((b + 1) * self.group, self.count))]
        for batch in range(skip, self.count // self.global_batch):
            start = batch * self.global_batch + self.rank * part
            for index in indices[start : start + part]:
                yield epoch, index

    def __len__(self) -> int:
        """Samples of this rank in a whole epoch, whatever is skipped."""
        return self.count // self.global_batch * self.global_batch // self.num_replicas


class EvalSampler(DistributedSampler):
    """Keys (0, index), every sample exactly once over all processes: no padding, no duplicates."""

    def __init__(self, data: Sized, world: int, rank: int) -> None:
        super().__init__(data, num_replicas=world, rank=rank, shuffle=False)  # type: ignore[arg-type]
        self.indices = range(rank, len(data), world)

    def __iter__(self) -> Iterator[Any]:
        return iter([(0, i) for i in self.indices])

    def __len__(self) -> int:
        return len(self.indices)


class KeyedDataset(Dataset):
    """Entries of batches by (epoch, index): what ``transform`` makes of ``source[index]``, and ``"index"``.

    A random ``transform`` draws from torch's generator, which is seeded from (seed, epoch, index) for it; the caller's
    random state is left as it was. A source whose samples change with the epoch has a method ``at(epoch, index)``.

    Args:
        source: a sequence of samples.
        transform: maps a sample to a dict of tensors, numbers and strings.
        seed: of the transform.
    """

    def __init__(self, source: Any, transform: Callable[[Any], dict[str, Any]], seed: int) -> None:
        self.source, self.transform, self.seed = source, transform, seed

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: Key) -> dict[str, Any]:
        epoch, index = key
        sample = self.source.at(epoch, index) if hasattr(self.source, "at") else self.source[index]
        with torch.random.fork_rng(devices=[]):
            # not torch.manual_seed: before CUDA is up, each call there formats and keeps a stack trace, 0.4 ms
            torch.default_generator.manual_seed(stable_hash(self.seed, epoch, index))
            return {**self.transform(sample), "index": index}


def one_ahead(batches: Iterator[Any]) -> Iterator[Any]:
    """The same batches; while one is used, a thread makes the next."""
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, batches, None)
        while (batch := coming.result()) is not None:
            coming = thread.submit(next, batches, None)
            yield batch


class ResumableLoader(DataLoader):
    """A DataLoader over a `TrainSampler` that continues behind the batches handed out before the checkpoint.

    A pass begins with its first batch and not with ``iter()``: Lightning calls ``iter()`` before it tells the sampler
    the epoch, and workers would prefetch from another epoch's order.

    Args:
        data: takes the sampler's keys.
        sampler: decides batch size, order and epoch.
        num_workers: loader processes; they live as long as the loader.
        pin_memory: as in `DataLoader`.
        limit: how much of an epoch is used, as in ``Trainer(limit_train_batches)``: a number of batches, or a share.
        collate: as ``collate_fn`` of `DataLoader`.
        ahead: make the next batch in a thread meanwhile, where there are no workers; for data that draws no numbers.
    """

    sampler: TrainSampler

    def __init__(
        self,
        data: Dataset,
        sampler: TrainSampler,
        num_workers: int = 0,
        pin_memory: bool = False,
        limit: int | float = 1.0,
        collate: Callable[[Any], Any] | None = None,
        ahead: bool = False,
    ) -> None:
        super().__init__(
            data,
            batch_size=sampler.global_batch // sampler.num_replicas,
            sampler=sampler,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            pin_memory=pin_memory,
            generator=torch.Generator(),  # an iterator draws a seed when it is made: not from the global state
            collate_fn=collate,
        )
        self._ahead = ahead
        whole = len(self)
        self._used = min(whole, limit) if isinstance(limit, int) else int(whole * limit)
        self._epoch, self._handed_out = 0, 0
        self._resume: tuple[int, int] | None = None  # epoch and batches to skip, for the next pass

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        return self._pass()

    def _pass(self) -> Iterator[Any]:
        sampler = self.sampler
        if self._resume is not None:
            # The checkpoint knows the epoch. Lightning does not always: with max_steps, it counts an epoch twice when
            # it resumes from the end of one, and stays ahead by it.
            self._epoch, self._handed_out = self._resume
            sampler.ahead, sampler.skip, self._resume = sampler.epoch - self._epoch, self._handed_out, None
        else:
            self._epoch, self._handed_out = sampler.epoch - sampler.ahead, 0
        batches = super().__iter__()
        for batch in one_ahead(batches) if self._ahead and not self.num_workers else batches:
            self._handed_out += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Epoch, and batches of it that were handed out (a batch in flight counts as handed out)."""
        epoch, batches = self._resume or (self._epoch, self._handed_out)
        return {"epoch": epoch, "batches": batches}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Start the next pass behind what ``state`` says was handed out; a finished epoch is followed by the next."""
        epoch, batches = int(state["epoch"]), int(state["batches"])
        self._resume = (epoch + 1, 0) if batches >= self._used else (epoch, batches)
        self.sampler.set_epoch(self._resume[0])
