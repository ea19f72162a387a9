"""Shapley values of a game that is given by its values: oracles, the Shapley kernel, the losses of an explainer.

Sources: KernelSHAP (arXiv 1705.07874), FastSHAP (arXiv 2107.07436), ViT-Shapley (arXiv 2206.05282), AutoGnothi (arXiv
2410.21815). B inputs, n players (n_i of input i, the first columns), C classes, K coalitions per input. S in {0, 1}^n
is a coalition and v(S) its C values; v0 = v(empty) is ``null``, v1 = v(all) is ``grand``. A value table (2^n, C) has
the rows of `coalitions`. q(S) is the Shapley kernel (`kernel_weights`), H_m the harmonic number.

Kernel of FastSHAP: a size k from p, then a uniform coalition of that size. ViT-Shapley and AutoGnothi draw a threshold
instead (`threshold_masks`): another law, whose minimiser is not the Shapley value for interactions of order >= 3.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from petl.errors import PetlError

MAX_PLAYERS = 16  # 2^16 coalitions, the largest table that is worth a full enumeration


def harmonic(m: int) -> float:
    """H_m = 1 + 1/2 + ... + 1/m; 0 for m < 1."""
    return math.fsum(1 / k for k in range(1, m + 1))


def coalitions(n: int, device: torch.device | str | None = None) -> Tensor:
    """All coalitions of n players, bool (2^n, n): row r holds the binary digits of r, player i is bit i.

    Raises PetlError unless 0 <= n <= 16.
    """
    if not 0 <= n <= MAX_PLAYERS:
        raise PetlError(
            f"{n} players have 2^{n} coalitions: all of them are enumerated for 0 to {MAX_PLAYERS} players only; "
            "group the players, or estimate from sampled coalitions (kernel_masks with kernel_shap or closed_form)."
        )
    rows = torch.arange(2**n, device=device)
    return (rows[:, None] >> torch.arange(n, device=device)) % 2 == 1


def _players_of(table: Tensor) -> int:
    """n of a value table (..., 2^n, C). Raises PetlError where the rows are no power of two."""
    rows = table.shape[-2] if table.ndim > 1 else 0
    n = rows.bit_length() - 1
    if rows < 1 or rows != 2**n:
        raise PetlError(
            f"value table of shape {tuple(table.shape)}: its last dimensions are (2^n, C), one row for each coalition "
            "of n players in the order of coalitions(n), one column for each class."
        )
    return n


def shapley_matrix(n: int) -> Tensor:
    """M (n, 2^n), float64, with phi = M v: +(s-1)!(n-s)!/n! where i is in S, -s!(n-s-1)!/n! where not; s = |S|.

    Raises PetlError for n > 16.
    """
    members = coalitions(n).T  # (n, 2^n)
    joins = torch.tensor([1 / (s * math.comb(n, s)) if s else 0.0 for s in range(n + 1)], dtype=torch.float64)
    sizes = members.sum(0)
    return torch.where(members, joins[sizes], -joins[n - sizes])  # s!(n-s-1)!/n! is the same function of n - s


def exact_shapley(table: Tensor) -> Tensor:
    """Shapley values by enumeration: value table (..., 2^n, C) -> (..., n, C), in float64, returned in its dtype.

    phi_i = sum over S without i of |S|! (n-|S|-1)! / n! * (v(S + i) - v(S)). Raises PetlError for another shape or
    n > 16.
    """
    matrix = shapley_matrix(_players_of(table)).to(table.device)
    return (matrix @ table.double()).to(table.dtype)


def moebius(table: Tensor) -> Tensor:
    """Harsanyi dividends m(T) of a value table (..., 2^n, C), same shape: v(S) = sum over T within S of m(T).

    m(T) = sum over S within T of (-1)^(|T|-|S|) v(S), by the subset transform in n 2^n steps and float64. Raises
    PetlError where the rows are no power of two.
    """
    n, m = _players_of(table), table.double()
    for i in range(n):
        without, with_i = m.unflatten(-2, (2 ** (n - 1 - i), 2, 2**i)).unbind(-3)
        m = torch.stack([without, with_i - without], -3).flatten(-4, -2)
    return m.to(table.dtype)


def moebius_shapley(table: Tensor) -> Tensor:
    """Shapley values from the dividends, phi_i = sum over T with i of m(T) / |T|: (..., 2^n, C) -> (..., n, C).

    A second way that shares no weight with `exact_shapley`. Raises PetlError like it.
    """
    members = coalitions(_players_of(table), table.device).T.double()  # (n, 2^n)
    return (members / members.sum(0).clamp(min=1) @ moebius(table.double())).to(table.dtype)


def kernel_sizes(n: int) -> Tensor:
    """p(k), k = 1..n-1, of the Shapley kernel, float64 (n - 1): proportional to 1 / (k (n - k)); empty for n < 2."""
    k = torch.arange(1, max(n, 1), dtype=torch.float64)
    weights = 1 / (k * (n - k))
    return weights / weights.sum()


def kernel_weights(n: int) -> Tensor:
    """q(S) = p(|S|) / binom(n, |S|) of all coalitions, float64 (2^n); 0 for the empty and the full one.

    Sums to 1 for n > 1, to 0 for n < 2, where there is no proper coalition. Raises PetlError for n > 16.
    """
    sizes = coalitions(n).sum(1)
    weights = torch.zeros(n + 1, dtype=torch.float64)
    for k, p in enumerate(kernel_sizes(n).tolist(), 1):
        weights[k] = p / math.comb(n, k)
    return weights[sizes]


def _checked(counts: Tensor, players: int | None) -> tuple[Tensor, int]:
    """``counts`` on the CPU and the number of columns. Raises PetlError where a count does not fit the columns."""
    counts = counts.cpu()
    low, high = (int(counts.min()), int(counts.max())) if len(counts) else (0, 0)
    columns = high if players is None else players
    if low < 0 or high > columns:
        raise PetlError(
            f"players are counted {low} to {high} per input, and the masks have {columns} columns: a count lies in "
            "0..columns; leave out players= to take the largest count."
        )
    return counts, columns


def random_subsets(sizes: Tensor, counts: Tensor, players: int, generator: torch.Generator | None = None) -> Tensor:
    """Uniform coalitions of given ``sizes`` (B, K) among the first ``counts`` (B) players: bool (B, K, players).

    All on the CPU; a size beyond its count is not checked. One sort: the players in random order, the first k stay.
    """
    u = torch.rand(*sizes.shape, players, generator=generator)
    column = torch.arange(players)
    u.masked_fill_((column >= counts[:, None])[:, None], 2.0)  # padding comes after every player
    return torch.zeros_like(u, dtype=torch.bool).scatter(-1, u.argsort(-1), column < sizes[..., None])


def _draw_sizes(counts: Tensor, draws: int, players: int, generator: torch.Generator | None) -> Tensor:
    """Sizes (B, draws) from p(k) of each n_i; 0 where n_i < 2."""
    k, n = torch.arange(players + 1, dtype=torch.float64), counts[:, None].double()
    weights = torch.where((k > 0) & (k < n), 1 / (k * (n - k)), 0.0)  # (B, players + 1); 1 / 0 is not taken
    weights[:, 0] = (counts < 2).double()
    return torch.multinomial(weights, draws, replacement=True, generator=generator)


def _draws(subsets: int, paired: bool) -> int:
    """Independent draws for K ``subsets``. Raises PetlError for K odd or < 2 with pairing, < 1 without."""
    if paired and (subsets < 2 or subsets % 2):
        raise PetlError(f"{subsets} coalitions per input: pairs need an even number from 2 on, or set paired=False.")
    if subsets < 1:
        raise PetlError(f"{subsets} coalitions per input: the loss needs at least 1.")
    return subsets // 2 if paired else subsets


def _with_complements(masks: Tensor, counts: Tensor, paired: bool) -> Tensor:
    """(B, K / 2, n) -> (B, K, n), odd rows the complements of the even ones among the players; rows of n_i < 2 empty.

    Without ``paired`` (B, K, n) stays as long as it is.
    """
    valid = torch.arange(masks.shape[-1]) < counts[:, None]
    valid = (valid & (counts > 1)[:, None])[:, None]  # (B, 1, n)
    if paired:
        masks = torch.stack([masks, ~masks], 2).flatten(1, 2)
    return masks & valid


def kernel_masks(
    counts: Tensor,
    subsets: int,
    generator: torch.Generator | None = None,
    paired: bool = True,
    players: int | None = None,
) -> Tensor:
    """Coalitions from the Shapley kernel q, exactly: bool (B, K, n), K = ``subsets``; q(S) = p(|S|) / binom(n, |S|).

    ``counts`` (B) long holds n_i; columns >= n_i are False. n = ``players``, or the largest n_i. ``paired``: row 2j + 1
    is the complement of row 2j (q is symmetric, the variance falls). Rows of n_i < 2 are empty: there is no proper
    coalition, and efficiency alone gives phi = v1 - v0. Drawn on the CPU and moved to the device of ``counts``, so
    that a seed gives the same masks everywhere. Raises PetlError for an odd K or K < 2 with pairing, K < 1 without,
    counts beyond ``players``.
    """
    draws, (n, columns) = _draws(subsets, paired), _checked(counts, players)
    masks = random_subsets(_draw_sizes(n, draws, columns, generator), n, columns, generator)
    return _with_complements(masks, n, paired).to(counts.device)


def threshold_masks(
    counts: Tensor,
    subsets: int,
    generator: torch.Generator | None = None,
    paired: bool = True,
    players: int | None = None,
) -> Tensor:
    """Coalitions as in the code of ViT-Shapley and AutoGnothi, for comparison only; arguments as of `kernel_masks`.

    A threshold k / n, k in 0..n-2 drawn with probability p(k + 1), and S_i = [u_i > k / n]. The published code is off
    by one in k, draws empty and full coalitions too, and biases the minimiser.
    """
    draws, (n, columns) = _draws(subsets, paired), _checked(counts, players)
    k = _draw_sizes(n, draws, columns, generator) - 1
    threshold = k / n.clamp(min=1)[:, None]  # (B, draws)
    masks = torch.rand(len(n), draws, columns, generator=generator) > threshold[..., None]
    return _with_complements(masks, n, paired).to(counts.device)


def uniform_size_masks(counts: Tensor, generator: torch.Generator | None = None, players: int | None = None) -> Tensor:
    """One coalition per input, its size uniform on 0..n_i, then uniform among its size: bool (B, n).

    S_i = [u_i > t], t ~ U(0, 1) per input: the law of the surrogate's training. Columns >= n_i are False; drawn on the
    CPU, moved to the device of ``counts``. Raises PetlError for counts beyond ``players``.
    """
    n, columns = _checked(counts, players)
    masks = torch.rand(len(n), columns, generator=generator) > torch.rand(len(n), 1, generator=generator)
    return (masks & (torch.arange(columns) < n[:, None])).to(counts.device)


def _wide(x: Tensor) -> Tensor:
    """At least fp32: differences of probabilities are 1e-3 to 1e-6, too small for half precision."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def efficient_normalise(raw: Tensor, grand: Tensor, null: Tensor, valid: Tensor | None = None) -> Tensor:
    """phi = raw + (v1 - v0 - sum_i raw_i) / n over the valid players, zero elsewhere: (B, n, C) -> (B, n, C), fp32.

    ``grand`` and ``null`` (B, C) or (C), ``valid`` bool (B, n) or None for all. The gap is not detached. Whatever
    stands in rows that are not valid has no influence. Inputs without a player get zeros. Keeps float64.
    """
    raw = _wide(raw)
    kept = torch.ones(raw.shape[:-1], dtype=torch.bool, device=raw.device) if valid is None else valid.bool()
    raw = raw.masked_fill(~kept[..., None], 0.0)
    gap = _wide(grand) - _wide(null) - raw.sum(-2)  # (B, C)
    share = gap / kept.sum(-1, keepdim=True).clamp(min=1)
    return (raw + share.unsqueeze(-2)).masked_fill(~kept[..., None], 0.0)


def shapley_loss(phi: Tensor, masks: Tensor, values: Tensor, null: Tensor, counts: Tensor | None = None) -> Tensor:
    """Mean over b of n_b * mean over k, c of (v0 + S . phi - v(S))², fp32 scalar (FastSHAP, ViT-Shapley).

    ``phi`` (B, n, C) after `efficient_normalise`, ``masks`` (B, K, n) from `kernel_masks`, ``values`` (B, K, C),
    ``null`` (B, C) or (C), ``counts`` (B) the n_b or None for n. Inputs with n_b < 2 add 0: they have no proper
    coalition. The minimum over phi is above 0 for every game that is not additive (`residual_loss`). Keeps float64.
    """
    phi = _wide(phi)
    with torch.autocast(phi.device.type, enabled=False):
        predicted = _wide(null).unsqueeze(-2) + masks.to(phi.dtype) @ phi  # (B, K, C)
    error = (predicted - values).square().mean((-2, -1))  # (B)
    n = phi.new_full(error.shape, phi.shape[-2]) if counts is None else counts.to(error)
    return (error * n.where(n > 1, 0.0)).mean()


def residual_loss(table: Tensor) -> Tensor:
    """L* = E_q (v0 + S . phi* - v(S))² of the exact Shapley values phi*: value table (..., 2^n, C) -> (..., C).

    No explainer gets below n L*; 0 for additive games and n < 2. In float64, returned in the table's dtype. Raises
    PetlError like `exact_shapley`.
    """
    n, v = _players_of(table), table.double()
    predicted = v[..., :1, :] + coalitions(n, table.device).double() @ exact_shapley(v)
    return (kernel_weights(n).to(table.device) @ (predicted - v).square()).to(table.dtype)


def expected_loss(phi: Tensor, exact: Tensor, residual: Tensor) -> Tensor:
    """The expectation of `shapley_loss` over all coalitions without evaluating any, scalar, fp32 (float64 kept).

    n * mean over b, c of (L* + |phi - phi*|² / (2 H_{n-1})), for ``phi`` and ``exact`` = phi* (B, n, C) and
    ``residual`` = L* (B, C) from `residual_loss`. Holds only where phi satisfies efficiency, as after
    `efficient_normalise`. 0 for n < 2.
    """
    n, error = phi.shape[-2], (_wide(phi) - exact).square().sum(-2)  # (B, C)
    if n < 2:
        return 0 * error.sum()  # H_0 = 0, no proper coalition; stays in the graph
    return n * (residual + error / (2 * harmonic(n - 1))).mean()


def _weighted(masks: Tensor, weights: Tensor | None) -> Tensor:
    """Sᵀ with normalised weights, (..., K, n) -> float64 (..., n, K): times x (..., K, C) it is E[S x]."""
    s = masks.double().transpose(-2, -1)
    if weights is None:
        return s / max(s.shape[-1], 1)
    w = weights.double()
    return s * (w / w.sum(-1, keepdim=True).clamp(min=torch.finfo(w.dtype).tiny)).unsqueeze(-2)


def closed_form(masks: Tensor, values: Tensor, null: Tensor, grand: Tensor, weights: Tensor | None = None) -> Tensor:
    """phi_i = 2 H_{n-1} (b_i - mean(b)) + (v1 - v0) / n with b_i = E_q[S_i (v(S) - v0)]: (n, C) or (B, n, C).

    ``masks`` (K, n) or (B, K, n) from `kernel_masks`, ``values`` (K, C) or (B, K, C), ``null`` and ``grand`` (C) or
    (B, C). The mean over masks that were drawn from q is an unbiased estimate. ``weights`` (K) or (B, K): exact for all
    coalitions with `kernel_weights`. All inputs have n players: no padding. fp32, float64 kept.
    """
    n, v0, v1 = masks.shape[-1], null.double().unsqueeze(-2), grand.double().unsqueeze(-2)
    b = _weighted(masks, weights) @ (values.double() - v0)
    phi = 2 * harmonic(n - 1) * (b - b.mean(-2, keepdim=True)) + (v1 - v0) / max(n, 1)
    return phi.to(torch.promote_types(values.dtype, torch.float32))


def kernel_shap(
    masks: Tensor,
    values: Tensor,
    null: Tensor,
    grand: Tensor,
    ridge: float = 1e-6,
    weights: Tensor | None = None,
) -> Tensor:
    """KernelSHAP: least squares of v(S) - v0 on S subject to sum_i phi_i = v1 - v0; (B, n, C), or (n, C) without B.

    Arguments as of `closed_form`: ``masks`` drawn from q count alike, otherwise ``weights`` say how much. phi is the
    equal share (v1 - v0) / n plus a deviation of sum 0, so efficiency holds for few masks too. ``ridge`` pulls the
    deviation to 0, against lambda = 1 / (2 H_{n-1}) of the full kernel; directions that no mask determines stay at the
    equal share, with ``ridge`` = 0 too. In float64; fp32 returned, float64 kept. No padding.
    """
    n, v0, v1 = masks.shape[-1], null.double().unsqueeze(-2), grand.double().unsqueeze(-2)
    s, share = _weighted(masks, weights), (v1 - v0) / max(n, 1)
    a, b = s @ masks.double(), s @ (values.double() - v0)  # E[S Sᵀ] and E[S (v(S) - v0)]
    centre = torch.eye(n, dtype=a.dtype, device=a.device) - 1 / max(n, 1)  # onto vectors of sum 0
    normal = centre @ (a + ridge * centre) @ centre
    inverse = torch.linalg.pinv(normal, rtol=1e-10, hermitian=True)
    deviation = centre @ inverse @ centre @ (b - a.sum(-1, keepdim=True) * share)
    return (share + deviation).to(torch.promote_types(values.dtype, torch.float32))


def divergence(target: Tensor, found: Tensor, link: str) -> Tensor:
    """KL(f || g) of logits (B, C) of f and g: of the softmaxes, or summed over labels of two outcomes each; (B,)."""
    target, found = target.float(), found.float()
    if link == "softmax":
        return F.kl_div(found.log_softmax(-1), target.log_softmax(-1), reduction="none", log_target=True).sum(-1)
    p = target.sigmoid()
    cross, entropy = (F.binary_cross_entropy_with_logits(x, p, reduction="none") for x in (found, target))
    return (cross - entropy).sum(-1)
