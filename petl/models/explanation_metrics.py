"""How good the attributions of an explained classifier are, per input and with one evaluator for all of them.

Every metric is about the class that the classifier predicts, and measured on one game, the surrogate's v(S), so that no
attribution is judged by an evaluator of its own (sheet autognothi.md, section 4, and section 9, item 25).

    insertion, deletion     area under v along the ranking, all n + 1 points, k / n; ties in random order
    faithfulness            Spearman of sum_{i in S} phi_i and v(S), coalitions of uniform size
    sensitivity_n           the same at fixed sizes, mean over the sizes
    prediction_preserved    1 where the logits beside the explanation equal those of the classifier alone, bit for bit

and of those that estimate Shapley values (`petl.models.attributions.SHAPLEY`), against the true ones:

    pearson, spearman       over players
    squared_error           |phi - phi*|²; relative L2 over a data set is sqrt(sum of it / sum of squared_truth)
    squared_truth           |phi*|²
    squared_noise           |phi* - the values it stands for|², an estimate; 0 where phi* is exact
    efficiency_gap          |sum phi - (v(all) - v(none))|; of AutoGnothi(grand="main") the prediction for v(all)
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from petl.errors import PetlError
from petl.models.attributions import (
    ATTRIBUTIONS,
    SHAPLEY,
    Attribution,
    Inapplicable,
    by_count,
    class_values,
    find,
)
from petl.models.explained import ExplainedClassifier, Inputs, select
from petl.nn.attribution_metrics import area, curve_masks, faithfulness, pearson, rank, spearman
from petl.nn.shapley import coalitions, exact_shapley, kernel_masks, kernel_shap, random_subsets, uniform_size_masks

ENUMERATED = 12  # up to so many players all coalitions are evaluated, and every other metric is looked up among them
RANKED = ("insertion", "deletion", "faithfulness", "sensitivity_n")
COMPARED = ("pearson", "spearman", "squared_error", "squared_truth", "squared_noise", "efficiency_gap")


@torch.no_grad()
def evaluate(
    model: ExplainedClassifier,
    x: Inputs,
    names: Sequence[str] = tuple(ATTRIBUTIONS),
    generator: torch.Generator | None = None,
    *,
    subsets_truth: int | None = None,
    masks: int = 200,
    sizes: Sequence[float] = (0.25, 0.5, 0.75),
    attributions: Mapping[str, Attribution] = ATTRIBUTIONS,
) -> dict[str, dict[str, Tensor]]:
    """``{attribution: {metric: (B,)}}``, fp32, for a batch; metrics as in the module docstring.

    A metric that an input does not define is nan: everything without players, correlations of constants, of a single
    player. So are all metrics of an attribution that does not apply to this classifier, with a warning that says why.
    A seed gives the same numbers for the same batch.

    Args:
        model: with trained side networks.
        x: images (B, 3, H, W), or a mapping with input_ids and attention_mask (B, T).
        names: of ``attributions``.
        generator: of all draws, on the CPU; None = torch's own.
        subsets_truth: paired evaluations for the true values of an input with more than 12 players (KernelSHAP); None =
            50 per player, 0 = do without: nan. Up to 12 players all coalitions are evaluated.
        masks: coalitions per input for faithfulness, and for each size of sensitivity-n.
        sizes: of sensitivity-n, as shares of the players.
        attributions: to choose from; for other options or functions of your own.

    Raises:
        PetlError: an unknown name, an odd ``subsets_truth``, or options that an attribution does not take.
    """
    chosen = {name: find(name, attributions) for name in names}
    if subsets_truth is not None and (subsets_truth < 0 or subsets_truth % 2):
        raise PetlError(f"subsets_truth={subsets_truth}: coalitions are drawn in pairs, so it is even; 0 does without.")
    logits, players = model.logits(x), model.players(x)
    classes = logits.argmax(-1)
    batch, device = len(logits), logits.device
    phi = {}
    for name, attribution in chosen.items():
        try:
            phi[name] = attribution(model, x, classes, generator)
        except Inapplicable as reason:
            warnings.warn(f"{name}: not a number. {reason}", stacklevel=2)
    found = {
        name: {metric: torch.full((batch,), torch.nan, device=device) for metric in _metrics(name)} for name in chosen
    }
    main = model.link(logits).gather(1, classes[:, None])[:, 0]
    for n, rows in by_count(players):
        if n == 0:
            continue
        game = _Game(model, select(x, rows), classes[rows], n)
        truth = _truth(game, generator, subsets_truth) if set(SHAPLEY) & chosen.keys() else None
        tests = _test_masks(game, masks, sizes, generator)
        for name, everywhere in phi.items():
            mine = everywhere[rows, :n]
            numbers = _ranked(game, mine, tests, generator)
            if truth is not None and name in SHAPLEY:
                exact, noise, null, grand = truth
                ends = (main[rows] if name == "autognothi" and model.method.grand == "main" else grand) - null
                numbers |= _compared(mine, exact, noise, ends)
            for metric, value in numbers.items():
                found[name][metric][rows] = value.to(found[name][metric])
    if "autognothi" in chosen:
        found["autognothi"]["prediction_preserved"] = (model.explain(x).logits == logits).all(1).float()
    return found


def _metrics(name: str) -> tuple[str, ...]:
    return (*RANKED, *(COMPARED if name in SHAPLEY else ()))


class _Game:
    """v_c of some inputs with n >= 1 players each; a table of all coalitions once it was asked for."""

    def __init__(self, model: ExplainedClassifier, x: Inputs, classes: Tensor, n: int) -> None:
        self.model, self.x, self.classes, self.n = model, x, classes, n
        self.players = model.players(x)
        self.inputs, self.device = len(classes), classes.device
        self.table: Tensor | None = None  # (B, 2^n)

    def __call__(self, masks: Tensor) -> Tensor:
        """Coalitions bool (B, K, n) -> (B, K)."""
        if self.table is None:
            return class_values(self.model, self.x, masks, self.classes, self.players)
        return self.table.gather(1, (masks.long() << torch.arange(self.n, device=self.device)).sum(-1))

    def enumerate(self) -> Tensor:
        self.table = self(coalitions(self.n, self.device).expand(self.inputs, -1, -1))
        return self.table


def _truth(game: _Game, generator: torch.Generator | None, subsets: int | None) -> tuple[Tensor, ...]:
    """phi* (B, n), |error of phi*|² (B,), v(none) (B,) and v(all) (B,)."""
    if game.n <= ENUMERATED:
        table = game.enumerate()
        return exact_shapley(table[..., None])[..., 0], table.new_zeros(len(table)), table[:, 0], table[:, -1]
    ends = torch.tensor([False, True], device=game.device)[:, None]
    null, grand = game(ends.expand(game.inputs, 2, game.n)).unbind(1)
    budget = 50 * game.n if subsets is None else subsets
    if budget == 0:
        nothing = torch.full((game.inputs, game.n), torch.nan, device=game.device)
        return nothing, nothing[:, 0], null, grand
    drawn = kernel_masks(torch.full((game.inputs,), game.n, device=game.device), budget, generator)
    values = game(drawn)

    def solve(part: slice) -> Tensor:
        found = kernel_shap(drawn[:, part], values[:, part, None], null[:, None], grand[:, None])
        return found[..., 0]

    middle = budget // 4 * 2  # pairs stay together
    halves = solve(slice(0, middle)) - solve(slice(middle, None))  # each with twice the variance of both together
    return solve(slice(None)), halves.square().sum(1) / 4, null, grand


def _test_masks(
    game: _Game, masks: int, sizes: Sequence[float], generator: torch.Generator | None
) -> list[tuple[Tensor, Tensor]]:
    """Coalitions (B, K, n) and their values (B, K): of uniform size, then of each fixed size."""
    counts = torch.full((game.inputs,), game.n)
    uniform = uniform_size_masks(counts.repeat_interleave(masks), generator).unflatten(0, (game.inputs, masks))
    size = [min(max(round(share * game.n), 1), max(game.n - 1, 1)) for share in sizes]
    fixed = [random_subsets(torch.full((game.inputs, masks), s), counts, game.n, generator) for s in size]
    drawn = torch.cat([uniform, *fixed], 1).to(game.device)
    return list(zip(drawn.split(masks, 1), game(drawn).split(masks, 1), strict=True))


def _ranked(
    game: _Game, phi: Tensor, tests: list[tuple[Tensor, Tensor]], generator: torch.Generator | None
) -> dict[str, Tensor]:
    order = rank(phi, generator)
    steps = torch.cat([curve_masks(order, insertion=True), curve_masks(order, insertion=False)], 1)
    insertion, deletion = game(steps).split(game.n + 1, 1)
    uniform, *fixed = (faithfulness(phi, masks, values) for masks, values in tests)
    numbers = {"insertion": area(insertion), "deletion": area(deletion), "faithfulness": uniform}
    return numbers | ({"sensitivity_n": torch.stack(fixed).nanmean(0)} if fixed else {})


def _compared(phi: Tensor, truth: Tensor, noise: Tensor, total: Tensor) -> dict[str, Tensor]:
    return {
        "pearson": pearson(phi, truth),
        "spearman": spearman(phi, truth),
        "squared_error": (phi - truth).double().square().sum(1),
        "squared_truth": truth.double().square().sum(1),
        "squared_noise": noise,
        "efficiency_gap": (phi.double().sum(1) - total).abs(),
    }
