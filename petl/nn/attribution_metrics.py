"""How good an attribution is: insertion and deletion curves, faithfulness, correlation and distance to exact values.

Sources: the benchmark of ViT-Shapley (arXiv 2206.05282) and its code. Pure functions; the caller evaluates the game on
the masks. B inputs, n players (n_i of input i, the first columns), K coalitions per input. Correlations are nan where
one side is constant, or has fewer than two entries: there is none, and 0 would be a silent verdict. torchmetrics takes
no rows with padding, warns for constants, and ranks row after row, hence own correlations, in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from petl.errors import PetlError
from petl.nn.shapley import random_subsets


def rank(phi: Tensor, generator: torch.Generator | None = None, valid: Tensor | None = None) -> Tensor:
    """Players by descending attribution: ``phi`` (B, n) -> long (B, n); ties in random order, drawn on the CPU.

    ``valid`` bool (B, n): players that are not valid come last, as `curve_masks` with counts expects.
    """
    shuffle = torch.rand(phi.shape, generator=generator).argsort(1).to(phi.device)
    scores = phi if valid is None else phi.masked_fill(~valid, -torch.inf)
    return shuffle.gather(1, scores.gather(1, shuffle).argsort(dim=1, descending=True, stable=True))


def curve_masks(order: Tensor, insertion: bool, counts: Tensor | None = None) -> Tensor:
    """Coalitions along a ranking: ``order`` (B, n) from `rank` -> bool (B, n + 1, n), k = 0..n players moved.

    Insertion starts empty and adds players in order; deletion starts full and removes them in order. ``counts`` (B):
    only the first n_i of the order are players; beyond row n_i nothing changes any more.
    """
    n = order.shape[1]
    position = order.argsort(1)[:, None]  # (B, 1, n), where each player stands
    step = torch.arange(n + 1, device=order.device)[:, None]  # (n + 1, 1)
    masks = position < step if insertion else position >= step
    return masks if counts is None else masks & (position < counts.to(order.device)[:, None, None])


def area(curve: Tensor, counts: Tensor | None = None) -> Tensor:
    """Area under a curve over k / n by trapezoids: (B, n + 1) -> (B), in float64, returned as fp32 (float64 kept).

    ``counts`` (B): the curve of input i has n_i + 1 points, the others are ignored. nan for n_i = 0, a single point.
    """
    strips = (curve[:, 1:].double() + curve[:, :-1].double()) / 2  # (B, n)
    n = curve.new_full((len(curve),), strips.shape[1]) if counts is None else counts.to(curve.device)
    ignored = torch.arange(strips.shape[1], device=curve.device) >= n[:, None]
    return (strips.masked_fill(ignored, 0.0).sum(1) / n).to(torch.promote_types(curve.dtype, torch.float32))


def pearson(a: Tensor, b: Tensor, valid: Tensor | None = None) -> Tensor:
    """Pearson's r of each row over its valid entries: (B, n), (B, n), bool (B, n) or None -> float64 (B).

    nan where a row is constant, has fewer than two valid entries, or holds a nan.
    """
    kept = torch.ones_like(a, dtype=torch.bool) if valid is None else valid
    count = kept.sum(1, keepdim=True)
    centred, constant = [], torch.zeros(len(a), dtype=torch.bool, device=a.device)
    for x in (a.double(), b.double()):
        rest = x.masked_fill(~kept, 0.0)
        centred.append((rest - rest.sum(1, keepdim=True) / count).masked_fill(~kept, 0.0))
        first = x.gather(1, kept.int().argmax(1, keepdim=True)) if x.shape[1] else x.new_zeros(len(x), 1)
        constant |= ((x == first) | ~kept).all(1)  # rounding of the mean would hide it
    one, two = centred
    r = (one * two).sum(1) / (one.square().sum(1) * two.square().sum(1)).sqrt()
    return r.clamp(-1, 1).masked_fill(constant, torch.nan)


def average_ranks(x: Tensor, valid: Tensor | None = None) -> Tensor:
    """Ascending ranks from 0 in each row, ties share their mean: (B, n) -> float64 (B, n); nan stays nan.

    Entries that are not ``valid`` have no influence on the others and no meaningful rank.
    """
    x = (x if valid is None else x.masked_fill(~valid, torch.inf)).double().contiguous()
    ascending = x.sort(1).values
    below, up_to = (torch.searchsorted(ascending, x, right=right) for right in (False, True))
    return ((below + up_to - 1).double() / 2).masked_fill(x.isnan(), torch.nan)


def spearman(a: Tensor, b: Tensor, valid: Tensor | None = None) -> Tensor:
    """Spearman's rho of each row, average ranks for ties: (B, n), (B, n), bool (B, n) or None -> float64 (B).

    nan as for `pearson`.
    """
    return pearson(average_ranks(a, valid), average_ranks(b, valid), valid)


def faithfulness(phi: Tensor, masks: Tensor, values: Tensor) -> Tensor:
    """Spearman's rho over coalitions between sum of phi in S and v(S): float64 (B) (ViT-Shapley, "Faith.").

    ``phi`` (B, n) of one class, ``masks`` bool (B, K, n) of uniform size (faithfulness) or fixed size (sensitivity-n),
    ``values`` (B, K). nan where all sums or all values are equal. float64: sums of fp32 come out exact, so equal
    coalitions tie.
    """
    return spearman((masks.double() @ phi.double()[..., None]).squeeze(-1), values)


def relative_l2(estimate: Tensor, truth: Tensor) -> Tensor:
    """|estimate - truth| / |truth|, norms over all entries (B, n, ...) at once: scalar, float64.

    Not finite where the truth is zero all over.
    """
    truth = truth.double()
    return (estimate.double() - truth).norm() / truth.norm()


def fixed_size_masks(
    counts: Tensor, size: int, subsets: int, generator: torch.Generator | None = None, players: int | None = None
) -> Tensor:
    """K = ``subsets`` uniform coalitions of ``size`` players for each input: bool (B, K, n), for sensitivity-n.

    ``counts`` (B) long, n_i; columns >= n_i are False. n = ``players``, or the largest n_i. Drawn on the CPU, moved to
    the device of ``counts``. Raises PetlError where an input has fewer players, or more than ``players``.
    """
    n = counts.cpu()
    low, high = (int(n.min()), int(n.max())) if len(n) else (size, size)
    columns = high if players is None else players
    if not 0 <= size <= low or high > columns:
        raise PetlError(
            f"coalitions of {size} players in {columns} columns, and the inputs have {low} to {high} players: take a "
            f"size in 0..{low} and at least {high} columns, or leave such inputs out."
        )
    return random_subsets(torch.full((len(n), subsets), size), n, columns, generator).to(counts.device)
