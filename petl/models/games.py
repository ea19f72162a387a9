"""The whole game of one input: all coalitions at once, where there are few enough players."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from petl.errors import PetlError
from petl.models.explained import ExplainedClassifier, Inputs
from petl.nn.shapley import MAX_PLAYERS, coalitions, exact_shapley, residual_loss


class Game(NamedTuple):
    """Of one input, or stacked: ``exact`` Shapley values (n, C), ``residual`` (C) = the explainer's loss at them,
    ``null`` (C) and ``grand`` (C)."""

    exact: Tensor
    residual: Tensor
    null: Tensor
    grand: Tensor

    @classmethod
    def stack(cls, games: Sequence[Game], device: torch.device | str) -> Game:
        return cls(*(torch.stack(parts).to(device) for parts in zip(*games, strict=True)))


def value_table(model: ExplainedClassifier, x: Inputs) -> Tensor:
    """v(S) of every coalition, (B, 2^n, C), in the order of `petl.nn.shapley.coalitions`.

    Raises:
        PetlError: more than 16 players, or inputs that differ in their number.
    """
    players = model.players(x)
    if players.most > MAX_PLAYERS:
        raise PetlError(
            f"{players.most} players have 2^{players.most} coalitions; up to {MAX_PLAYERS} are enumerated. Group "
            "patches: AutoGnothi(players=(rows, columns))."
        )
    if not bool((players.counts == players.most).all()):
        raise PetlError("these inputs differ in their number of players: tabulate them one by one.")
    everyone = coalitions(players.most, players.of.device)
    return model.values(x, everyone.expand(len(players.counts), -1, -1), players)


def tabulate(model: ExplainedClassifier, x: Inputs) -> list[Game]:
    """The `Game` of each input, on the CPU; raises as `value_table`."""
    table = value_table(model, x)
    grand = model.link(model.read(x)[0]) if model.method.grand == "main" else table[:, -1]
    parts = exact_shapley(table), residual_loss(table), table[:, 0], grand
    return [Game(*(p[i].cpu() for p in parts)) for i in range(len(table))]
