"""Players of a Shapley game on a transformer: which token belongs to which player (autognothi.md, 2.3)."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from petl.errors import PetlError

VISIBLE, HIDDEN = -1, -2  # tokens of no player: always attended to ([CLS], [SEP], registers), never (padding)


@dataclass(frozen=True)
class Players:
    """``of`` (B, T), long: the player of each token, `VISIBLE` or `HIDDEN`; ``counts`` (B,), long: players n_i.

    Players of one input are numbered from 0; ``most`` is the largest number of them, n.
    """

    of: Tensor
    counts: Tensor
    most: int

    @property
    def valid(self) -> Tensor:
        """bool (B, n): which player numbers exist."""
        return torch.arange(self.most, device=self.of.device) < self.counts[:, None]

    def keep(self, coalitions: Tensor) -> Tensor:
        """Coalitions (B, K, n), True = present -> tokens that may be attended to, bool (B, K, T)."""
        if self.most == 0:
            return (self.of == VISIBLE)[:, None].expand(-1, coalitions.shape[1], -1)
        index = self.of.clamp(min=0)[:, None].expand(-1, coalitions.shape[1], -1)
        present = coalitions.gather(2, index)
        return torch.where((self.of >= 0)[:, None], present, (self.of == VISIBLE)[:, None])

    def everyone(self) -> Tensor:
        """Tokens that may be attended to when no player is removed, bool (B, T)."""
        return self.of != HIDDEN

    def total(self, rows: Tensor) -> Tensor:
        """Rows of tokens (B, T, C) -> their sum over the tokens of each player (B, n, C)."""
        out = rows.new_zeros(len(rows), self.most + 1, rows.shape[2])  # the last row takes what belongs to no player
        index = torch.where(self.of >= 0, self.of, self.most)[:, :, None].expand_as(rows)
        return out.scatter_add(1, index, rows)[:, : self.most]

    def select(self, rows: slice | Tensor) -> Players:
        """The players of some of the inputs."""
        return Players(self.of[rows], self.counts[rows], self.most)


def patch_players(batch: int, grid: tuple[int, int], prefix: int, blocks: tuple[int, int] | None) -> Players:
    """Patches as players, or ``blocks`` = (rows, columns) of neighbouring patches; prefix tokens are always visible.

    Raises:
        PetlError: more rows or columns of players than of patches.
    """
    rows, columns = grid
    r, c = blocks or grid
    if not (1 <= r <= rows and 1 <= c <= columns):
        raise PetlError(f"players={blocks}: the picture has {rows} x {columns} patches, and a player is at least one.")
    row, column = torch.arange(rows) * r // rows, torch.arange(columns) * c // columns
    of = torch.cat([torch.full((prefix,), VISIBLE), (row[:, None] * c + column).flatten()])
    return Players(of.expand(batch, -1), torch.full((batch,), r * c), r * c)


def word_players(
    ids: Tensor, attention_mask: Tensor, special: Collection[int], continues: Tensor | None = None
) -> Players:
    """Content tokens as players; ``special`` ids ([CLS], [SEP]) are always visible, padding never.

    Args:
        ids: (B, T).
        attention_mask: (B, T), 0 on padding.
        special: ids that are no players.
        continues: bool (vocabulary,): pieces that belong to the word before; None = every piece is a player.
    """
    real = attention_mask.bool()
    content = real & ~torch.isin(ids, torch.tensor(sorted(special), dtype=ids.dtype, device=ids.device))
    starts = content.clone()
    if continues is not None:
        after_content = torch.nn.functional.pad(content[:, :-1], (1, 0))
        starts &= ~(continues.to(ids.device)[ids] & after_content)
    number = starts.long().cumsum(1) - 1
    of = torch.where(content, number, torch.where(real, VISIBLE, HIDDEN))
    counts = starts.sum(1)
    return Players(of, counts, int(counts.max()) if len(counts) else 0)
