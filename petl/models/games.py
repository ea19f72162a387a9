"""Games of inputs that are the same in every epoch, played once: v(S) of all coalitions, or of a bank of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from petl.backbones.players import Players
from petl.errors import PetlError
from petl.models.explained import ExplainedClassifier, Inputs, ShapleyExplanation
from petl.nn.shapley import (
    MAX_PLAYERS,
    coalitions,
    divergence,
    exact_shapley,
    expected_loss,
    kernel_masks,
    residual_loss,
    shapley_loss,
    threshold_masks,
    uniform_size_masks,
)

Play = Callable[[ExplainedClassifier, Inputs, Tensor], dict[str, Tensor]]
LAWS = {"kernel": kernel_masks, "vitshapley": threshold_masks}


class Game(Protocol):
    """What is kept of the game of an input, and the explainer's loss from it; as a string, which coalitions."""

    def key(self) -> dict[str, Any]:
        """What tells it from other games of the same model, as JSON values."""

    def play(self, model: ExplainedClassifier, x: Inputs, indices: Tensor) -> dict[str, Tensor]:
        """What is kept of inputs with these numbers (B,), each (B, …), with ``null`` and ``grand`` (B, C)."""

    def loss(self, found: ShapleyExplanation, kept: Mapping[str, Tensor]) -> Tensor:
        """Of explanations with the kept ``null`` and ``grand``."""


class WholeGame:
    """Every coalition: the expected loss, without a draw. ``exact`` Shapley values (B, n, C), ``residual`` (B, C) = the
    loss at them.

    Args:
        players: of every input, n.
    """

    def __init__(self, players: int) -> None:
        self.players = players

    def __str__(self) -> str:
        return f"{2**self.players} coalitions of {self.players} players"

    def key(self) -> dict[str, Any]:
        return {"coalitions": "all"}

    @torch.no_grad()
    def play(self, model: ExplainedClassifier, x: Inputs, indices: Tensor) -> dict[str, Tensor]:
        table = value_table(model, x)
        grand = model.link(model.logits(x)) if model.method.grand == "main" else table[:, -1]
        return {"exact": exact_shapley(table), "residual": residual_loss(table), "null": table[:, 0], "grand": grand}

    def loss(self, found: ShapleyExplanation, kept: Mapping[str, Tensor]) -> Tensor:
        return expected_loss(found.values, kept["exact"], kept["residual"])


class Bank:
    """A fixed bank of coalitions for every input, in complementary pairs, from the law of the method: ``masks``
    (B, M, n) and ``values`` (B, M, C). A step draws ``subsets`` of them, pairs at random without repetition.

    The bank of an input follows from its number alone. Over banks the loss is unbiased, like that of fresh coalitions;
    over the steps of one training it is the mean over the bank, whose minimiser for a single input is not its Shapley
    values but KernelSHAP's estimate from M coalitions, which is off by about M^-1/2. The explainer fits all inputs at
    once, whose errors are independent, so that what is left of this is less.

    Args:
        size: M, an even number.
        subsets: drawn in each step.
        sampler: law of the coalitions, see `petl.AutoGnothi`.
        width: players of an input at most.
    """

    def __init__(self, size: int, subsets: int, sampler: str, width: int) -> None:
        self.size, self.subsets, self.sampler, self.width = size, subsets, sampler, width

    def __str__(self) -> str:
        return f"{self.size} coalitions of up to {self.width} players"

    def key(self) -> dict[str, Any]:
        return {"coalitions": self.size, "sampler": self.sampler, "width": self.width}

    @torch.no_grad()
    def play(self, model: ExplainedClassifier, x: Inputs, indices: Tensor) -> dict[str, Tensor]:
        players, law = model.players(x), LAWS[self.sampler]
        masks = fixed_masks(players, indices, lambda n, generator: law(n, self.size, generator))
        values = model.values(x, torch.cat([masks, players.valid[:, None]], 1), players)
        grand = model.link(model.logits(x)) if model.method.grand == "main" else values[:, -1]
        wide = F.pad(masks, (0, self.width - players.most))
        return {"masks": wide, "values": values[:, :-1], "null": model.null(x, players), "grand": grand}

    def loss(self, found: ShapleyExplanation, kept: Mapping[str, Tensor]) -> Tensor:
        pairs = torch.rand(len(found.values), self.size // 2).argsort(1)[:, : self.subsets // 2]
        rows = torch.stack([2 * pairs, 2 * pairs + 1], 2).flatten(1).to(found.values.device)  # (B, subsets)
        masks, values = (
            t.gather(1, rows[:, :, None].expand(-1, -1, t.shape[2])) for t in (kept["masks"], kept["values"])
        )
        players = found.players
        return shapley_loss(found.values, masks[..., : players.most], values, found.null, players.counts)


def surrogate_loss(model: ExplainedClassifier, x: Inputs, logits: Tensor, coalition: Tensor) -> Tensor:
    """KL of the classifier's ``logits`` and the surrogate's on one coalition per input, (B,)."""
    return divergence(logits.detach(), model.surrogate_logits(x, coalition), model.method.link)


@torch.no_grad()
def surrogate_errors(model: ExplainedClassifier, x: Inputs, logits: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """KL on one coalition per input, the same at every call, and agreement on the full input, (B,) each."""
    players = model.players(x)
    full = model.surrogate_logits(x, players.valid)
    if model.method.link == "softmax":
        same = full.argmax(-1) == logits.argmax(-1)
    else:
        same = ((full > 0) == (logits > 0)).all(-1)
    return surrogate_loss(model, x, logits, fixed_masks(players, indices, uniform_size_masks)), same.float()


@torch.no_grad()
def trial(model: ExplainedClassifier, x: Inputs, indices: Tensor, width: int) -> dict[str, Tensor]:
    """What the explainer's validation goes by: errors of the surrogate, and v(S) of coalitions, which are the same at
    every call. Masks of texts are ``width`` wide."""
    players = model.players(x)
    masks = fixed_masks(players, indices, lambda n, g: kernel_masks(n, model.method.subsets, g))
    kl, agrees = surrogate_errors(model, x, model.logits(x), indices)
    wide = F.pad(masks, (0, max(0, width - players.most)))
    return {"kl": kl, "agrees": agrees, "masks": wide, "values": model.values(x, masks, players)}


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


def fixed_masks(players: Players, indices: Tensor, draw: Callable[[Tensor, torch.Generator], Tensor]) -> Tensor:
    """Coalitions that depend on an input's index and its number of players alone, for all inputs of a batch."""
    drawn = [draw(n[None], torch.Generator().manual_seed(i)) for n, i in zip(players.counts.cpu(), indices.tolist())]
    return torch.cat([F.pad(masks, (0, players.most - masks.shape[-1])) for masks in drawn]).to(players.of.device)
