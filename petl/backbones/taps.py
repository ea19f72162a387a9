"""Reading the blocks of a network from outside, and running it on part of its tokens.

Hooks stand on the blocks all the time and do nothing unless a pass has been opened in the same thread, so that the
network's own forward computes what it always did. A pass hands the output of every block to its readers as soon as it
is there, so that none is kept, and can run the blocks on coalitions: rows of tokens of which some are removed. A
removed token is no key of any attention; it is either masked there or not computed at all (``tokens``), which gives the
same result for all others.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from petl.backbones.base import EncoderView, ThreadState

CHUNK = {"cpu": 1024, "cuda": 131072}  # tokens that run through the blocks at once


class Rows(NamedTuple):
    """What enters the blocks.

    ``source`` (R,): the input of each row, None = each once. ``tokens`` (R, t): which of its tokens, None = all.
    ``keep`` bool (R, t): tokens that may be attended to, None = all.
    """

    source: Tensor | None = None
    tokens: Tensor | None = None
    keep: Tensor | None = None


class Reader(Protocol):
    """What reads a pass: a state from the embedded tokens (R, t, C), and a new one after each block."""

    def begin(self, h0: Tensor) -> Tensor: ...
    def step(self, index: int, z: Tensor, h: Tensor, keep: Tensor | None = None) -> Tensor: ...


@dataclass
class Recording:
    """``embedded`` (R, t, C): what enters the first block, detached; ``states``: of the readers, so far."""

    rows: Rows
    readers: tuple[Reader, ...]
    gradient: bool  # whether the readers' arithmetic is recorded by autograd; that of the network is not
    keep: Tensor | None = None  # tokens that readers may attend to
    embedded: Tensor | None = None
    states: list[Tensor] = field(default_factory=list)


class Taps:
    """Hooks on the blocks of one network; `record` opens a pass."""

    def __init__(self, view: EncoderView) -> None:
        self.view, self.local = view, ThreadState()
        self.handles = []
        for index, block in enumerate(view.block_modules()):
            tap = _Tap(self, index)
            self.handles.append(block.register_forward_pre_hook(tap.before, with_kwargs=True))
            self.handles.append(block.register_forward_hook(tap.after))

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()

    @contextmanager
    def record(
        self, readers: tuple[Reader, ...] = (), rows: Rows | None = None, keep: Tensor | None = None
    ) -> Iterator[Recording]:
        """Passes of this thread in here run on ``rows`` without a gradient, and are read (the last one counts).

        ``keep`` bool (B, T): tokens that readers may attend to, where ``rows`` does not say.
        """
        rows = rows or Rows()
        recording = Recording(rows, readers, torch.is_grad_enabled(), rows.keep if keep is None else keep)
        self.local.value = recording
        try:
            with torch.no_grad():
                yield recording
        finally:
            self.local.value = None


class _Tap:
    def __init__(self, taps: Taps, index: int) -> None:
        self.taps, self.index = taps, index

    def before(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        recording: Recording | None = self.taps.local.value
        if recording is None:
            return None
        x, *rest = args
        rows = recording.rows
        if self.index == 0:
            if rows.source is not None:
                x = x[rows.source]
            if rows.tokens is not None:
                x = x.gather(1, rows.tokens[:, :, None].expand(-1, -1, x.shape[2]))
            recording.embedded = x.detach()
            with torch.set_grad_enabled(recording.gradient):
                recording.states = [reader.begin(recording.embedded) for reader in recording.readers]
        if any(part is not None for part in rows):
            mask = None
            if rows.keep is not None:  # a row without a visible token sees all of its own: finite, and read by nobody
                visible = rows.keep | ~rows.keep.any(1, keepdim=True)
                mask = self.taps.view.key_mask(visible, x.dtype)
            if rest:
                rest[0] = mask
            else:
                kwargs = kwargs | {self.taps.view.mask_argument: mask}
        return (x, *rest), kwargs

    def after(self, block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        recording: Recording | None = self.taps.local.value
        if recording is None:
            return
        h = (output[0] if isinstance(output, tuple) else output).detach()
        with torch.set_grad_enabled(recording.gradient):
            for i, reader in enumerate(recording.readers):
                recording.states[i] = reader.step(self.index, recording.states[i], h, recording.keep)


def gathered_rows(keep: Tensor, chunk: int | None = None) -> Iterator[tuple[Tensor, Rows]]:
    """Coalitions of tokens (B, K, T) in chunks of rows with about as many tokens each, shorter rows padded.

    Yields (flat positions of the rows in (B, K), rows): only the kept tokens are run. The number of tokens in a chunk
    is ``chunk`` at most, or one row.
    """
    flat = keep.flatten(0, 1)
    counts = flat.sum(1)
    order = counts.argsort(stable=True)
    sizes = counts[order].tolist()
    budget, start = chunk or CHUNK.get(keep.device.type, 1024), 0
    while start < len(sizes):
        stop = start + 1
        while stop < len(sizes) and (stop + 1 - start) * sizes[stop] <= budget:
            stop += 1
        rows, longest = order[start:stop], max(1, sizes[stop - 1])
        kept = flat[rows]
        index = (~kept).int().argsort(dim=1, stable=True)[:, :longest]  # kept tokens first, in their order
        whole = sizes[start] == longest
        yield rows, Rows(rows // keep.shape[1], index, None if whole else kept.gather(1, index))
        start = stop


def chunked_rows(keep: Tensor, chunk: int | None = None) -> Iterator[tuple[Tensor, Rows]]:
    """The same coalitions with all of their tokens and key masks; what `gathered_rows` is measured against."""
    flat = keep.flatten(0, 1)
    step = max(1, (chunk or CHUNK.get(keep.device.type, 1024)) // keep.shape[2])
    for rows in torch.arange(len(flat), device=keep.device).split(step):
        yield rows, Rows(rows // keep.shape[1], None, flat[rows])
