"""Four oracles on games with known values, the laws of the samplers, and the identities that tie loss to error."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from petl.errors import PetlError
from petl.nn import shapley as sh

THIRD, HALF = 1 / 3, 1 / 2


class Game(NamedTuple):
    """v(S) of the columns s (2^n) of all coalitions, and its Shapley values."""

    n: int
    value: Callable[[Tensor], Tensor]
    phi: list
    atol: float = 1e-12


def softmax_game(s: Tensor) -> Tensor:
    weight = s.new_tensor([[1, -0.5, 0], [0.5, 0.5, -1], [-1, 0.25, 0.75], [0, 1, -1]])
    logits = s.new_tensor([0.1, 0, -0.1]) + s.T @ weight
    logits[:, 0] += 1.5 * s[0] * s[1] * s[2]
    return logits.softmax(1)


GAMES = {
    "additive": Game(3, lambda s: 0.7 + s[0] - 2 * s[1] + 0.25 * s[2], [1, -2, 0.25]),
    "unanimity": Game(4, lambda s: s[0] * s[3], [HALF, 0, 0, HALF]),
    "size": Game(5, lambda s: s.sum(0) ** 3, [25] * 5),  # all players tie
    "pairwise": Game(3, lambda s: s[0] + 2 * s[0] * s[1] - s[1] * s[2], [1 + 1, 1 - HALF, -HALF]),
    "glove": Game(3, lambda s: s[0] * s[1].maximum(s[2]), [2 / 3, 1 / 6, 1 / 6]),
    "airport": Game(3, lambda s: s[0].maximum(2 * s[1]).maximum(4 * s[2]), [1 / 3, 5 / 6, 17 / 6]),
    "majority": Game(4, lambda s: (4 * s[0] + 2 * s[1] + s[2] + s[3] >= 5).double(), [3 / 4, *[1 / 12] * 3]),
    "polynomial": Game(3, lambda s: 0.3 + s[0] - 2 * s[1] + 0.5 * s[2] + 1.2 * s[0] * s[1] - 0.8 * s[1] * s[2],
                       [1.6, -1.8, 0.1]),
    "cubic": Game(4, lambda s: s[0] * s[1] * s[2], [THIRD, THIRD, THIRD, 0]),
    "logistic": Game(4, lambda s: (-1 + 2 * s[0] - 1.5 * s[1] + 0.5 * s[2] + s[0] * s[2]).sigmoid(),
                     [0.499372, -0.230698, 0.193444, 0], 1e-6),
    "softmax": Game(4, softmax_game, [[0.385872, -0.341196, -0.044676], [0.193748, -0.006215, -0.187533],
                                      [-0.161753, 0.049267, 0.112487], [-0.099707, 0.258838, -0.159130]], 1e-6),
}  # fmt: skip


def table_of(game: Game) -> Tensor:
    """Value table (2^n, C), float64."""
    values = game.value(sh.coalitions(game.n).double().T)
    return values if values.ndim > 1 else values[:, None]


def from_all(table: Tensor, weights: Tensor | None = None) -> dict[str, Tensor]:
    """Arguments of an estimator for all coalitions, weighted by the kernel or ``weights``."""
    n = table.shape[-2].bit_length() - 1
    weights = sh.kernel_weights(n) if weights is None else weights
    ends = {"null": table[..., 0, :], "grand": table[..., -1, :]}
    return {"masks": sh.coalitions(n), "values": table, "weights": weights, **ends}


def by_closed_form(table: Tensor) -> Tensor:
    return sh.closed_form(**from_all(table))


def by_kernel_shap(table: Tensor, weights: Tensor | None = None) -> Tensor:
    return sh.kernel_shap(**from_all(table, weights), ridge=0.0)


ORACLES = [sh.exact_shapley, sh.moebius_shapley, by_closed_form, by_kernel_shap]


def rows_of(masks: Tensor) -> Tensor:
    """Row of the value table of each coalition: (..., n) -> (...)."""
    return (masks * 2 ** torch.arange(masks.shape[-1])).sum(-1)


def random_tables(n: int, count: int = 3, classes: int = 2) -> Tensor:
    return torch.rand(count, 2**n, classes, dtype=torch.float64)


def random_efficient(table: Tensor) -> Tensor:
    return sh.efficient_normalise(torch.randn_like(sh.exact_shapley(table)), table[:, -1], table[:, 0])


def threshold_law(n: int) -> Tensor:
    """Probability of every coalition (2^n) under the paired threshold sampler, by enumeration."""
    sizes = sh.coalitions(n).sum(1)
    law = torch.zeros(2**n, dtype=torch.float64)
    for k, p in enumerate(sh.kernel_sizes(n).tolist()):
        law += p * (1 - k / n) ** sizes * (k / n) ** (n - sizes)  # kept with probability 1 - k / n each
    return (law + law.flip(0)) / 2  # row 2^n - 1 - r is the complement of row r


@pytest.mark.parametrize("oracle", ORACLES)
@pytest.mark.parametrize("name", GAMES)
def test_known_games(name: str, oracle: Callable) -> None:
    game = GAMES[name]
    expected = torch.tensor(game.phi, dtype=torch.float64).reshape(game.n, -1)
    torch.testing.assert_close(oracle(table_of(game)), expected, atol=game.atol, rtol=0)


def test_ends_of_the_known_games() -> None:
    logistic, softmax = table_of(GAMES["logistic"]), table_of(GAMES["softmax"])
    assert logistic[[0, -1], 0].tolist() == pytest.approx([0.268941, 0.731059], abs=1e-6)
    assert (softmax[-1] - softmax[0]).tolist() == pytest.approx([0.318160, -0.039307, -0.278854], abs=1e-6)
    assert sh.exact_shapley(softmax).sum(1).abs().max() < 1e-12, "a softmax game sums to 0 over the classes"


@pytest.mark.parametrize("n", [0, 1, 2, 3, 6, 9])
def test_oracles_agree(n: int) -> None:
    table = random_tables(n)
    found = [oracle(table) for oracle in ORACLES]
    assert {(x.shape, x.dtype) for x in found} == {((3, n, 2), torch.float64)}
    for x in found[1:]:
        torch.testing.assert_close(x, found[0], atol=1e-12, rtol=0)


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_axioms(dtype: torch.dtype, atol: float) -> None:
    table = random_tables(5).to(dtype)
    phi, member = sh.exact_shapley(table), sh.coalitions(5)
    close = {"atol": atol, "rtol": 0}
    torch.testing.assert_close(phi.sum(1), table[:, -1] - table[:, 0], **close)
    without = table[:, torch.arange(2**5) & ~(1 << 2)]  # player 2 changes nothing
    assert sh.exact_shapley(without)[:, 2].abs().max() <= atol
    alike = sh.exact_shapley(table + table[:, rows_of(member[:, [1, 0, 2, 3, 4]])])  # players 0 and 1 may be exchanged
    torch.testing.assert_close(alike[:, 0], alike[:, 1], **close)
    torch.testing.assert_close(sh.exact_shapley(2 * table - table.flip(0)), 2 * phi - phi.flip(0), **close)
    permutation = [3, 0, 4, 1, 2]  # player i was called permutation[i]
    renamed = sh.exact_shapley(table[:, rows_of(member[:, permutation]).argsort()])
    torch.testing.assert_close(renamed, phi[:, permutation], **close)
    assert (renamed - phi).abs().max() > 0.01


def test_order_of_coalitions_and_dividends() -> None:
    assert sh.coalitions(2).tolist() == [[False, False], [True, False], [False, True], [True, True]]
    assert (sh.coalitions(0).shape, sh.coalitions(3)[6].tolist()) == ((1, 0), [False, True, True])
    dividends = sh.moebius(table_of(GAMES["polynomial"]))[:, 0]  # rows: -, 1, 2, 12, 3, 13, 23, 123
    assert dividends.tolist() == pytest.approx([0.3, 1, -2, 1.2, 0.5, 0, -0.8, 0])
    assert sh.moebius(table_of(GAMES["polynomial"]).float()).dtype == torch.float32


def test_kernel_is_that_of_kernel_shap() -> None:
    assert sh.kernel_sizes(4).tolist() == pytest.approx([4 / 11, 3 / 11, 4 / 11])
    assert [sh.kernel_sizes(n).tolist() for n in (0, 1, 2)] == [[], [], [1]]
    assert sh.kernel_weights(2).tolist() == [0, HALF, HALF, 0]
    assert [sh.kernel_weights(n).tolist() for n in (0, 1)] == [[0], [0, 0]]
    for n in (3, 7):
        sizes = sh.coalitions(n).sum(1).tolist()
        raw = torch.tensor([(n - 1) / (math.comb(n, k) * k * (n - k)) if 0 < k < n else 0 for k in sizes])
        torch.testing.assert_close(sh.kernel_weights(n), (raw / raw.sum()).double(), atol=1e-7, rtol=0)
    assert [sh.harmonic(m) for m in (-1, 0, 1, 3)] == [0, 0, 1, pytest.approx(11 / 6)]
    assert 2 * sh.harmonic(195) == pytest.approx(11.71, abs=0.01)


@pytest.mark.parametrize("n", [2, 3, 5, 9])
def test_second_moments_of_the_kernel(n: int) -> None:
    """E[S Sᵀ] = lambda I + (1/2 - lambda) 1 1ᵀ with lambda = 1 / (2 H_{n-1})."""
    s, q, share = sh.coalitions(n).double(), sh.kernel_weights(n), HALF / sh.harmonic(n - 1)
    moments = share * torch.eye(n).double() + (HALF - share)
    torch.testing.assert_close(s.T @ (q[:, None] * s), moments, atol=1e-12, rtol=0)
    drawn = sh.kernel_masks(torch.full((200,), n), 100).flatten(0, 1).double()
    torch.testing.assert_close(drawn.T @ drawn / len(drawn), moments, atol=0.015, rtol=0)


@pytest.mark.parametrize("n", [2, 3, 6])
def test_error_identity(n: int) -> None:
    """|phi - phi*|² = 2 H_{n-1} (L(phi) - L*), so the loss over all coalitions is known without any."""
    table = random_tables(n)
    exact, residual = sh.exact_shapley(table), sh.residual_loss(table)
    phi = random_efficient(table).requires_grad_()

    def loss(x: Tensor) -> Tensor:  # (B, C)
        predicted = table[:, :1] + sh.coalitions(n).double() @ x
        return sh.kernel_weights(n) @ (predicted - table).square()

    torch.testing.assert_close(residual, loss(exact), atol=1e-14, rtol=0)
    error = (phi - exact).square().sum(1)
    torch.testing.assert_close(error, 2 * sh.harmonic(n - 1) * (loss(phi) - residual), atol=1e-12, rtol=0)
    expected, brute = sh.expected_loss(phi, exact, residual), n * loss(phi).mean()
    torch.testing.assert_close(expected, brute, atol=1e-12, rtol=0)
    one, two = (torch.autograd.grad(x, phi)[0] for x in (expected, brute))
    centred = [g - g.mean(1, keepdim=True) for g in (one, two)]  # efficiency leaves these directions
    torch.testing.assert_close(*centred, atol=1e-12, rtol=0)


def test_sampled_loss_tends_to_the_expected_one() -> None:
    table = random_tables(5)
    exact, masks = sh.exact_shapley(table), sh.kernel_masks(torch.full((3,), 5), 20_000)
    phi, rows = random_efficient(table), rows_of(masks)
    values = table.gather(1, rows[..., None].expand(-1, -1, 2))
    expected = sh.expected_loss(phi, exact, sh.residual_loss(table)).item()
    assert sh.shapley_loss(phi, masks, values, table[:, 0]).item() == pytest.approx(expected, rel=0.02)
    estimate = sh.closed_form(masks, values, table[:, 0], table[:, -1])
    torch.testing.assert_close(estimate, exact, atol=0.02, rtol=0)
    torch.testing.assert_close(estimate.sum(1), table[:, -1] - table[:, 0])
    torch.testing.assert_close(sh.closed_form(masks[0], values[0], table[0, 0], table[0, -1]), estimate[0])
    torch.testing.assert_close(sh.kernel_shap(masks, values, table[:, 0], table[:, -1]), exact, atol=0.02, rtol=0)


def test_closed_form_is_unbiased() -> None:
    """The mean of the estimates from each single coalition, weighted by q, is the exact value."""
    table = random_tables(4, 1)[0]
    masks, q = sh.coalitions(4), sh.kernel_weights(4)
    single = sh.closed_form(masks[:, None], table[:, None], table[0], table[-1])  # (2^n, n, C)
    torch.testing.assert_close((q[:, None, None] * single).sum(0), sh.exact_shapley(table), atol=1e-12, rtol=0)


def test_residual_vanishes_for_additive_games_alone() -> None:
    assert sh.residual_loss(table_of(GAMES["additive"])).abs().max() < 1e-14
    assert sh.residual_loss(table_of(GAMES["glove"])).min() > 1e-3
    assert sh.residual_loss(torch.rand(2, 2, 3)).tolist() == [[0] * 3] * 2, "n = 1"
    assert sh.residual_loss(torch.rand(1, 3)).tolist() == [0] * 3, "n = 0"
    phi = torch.rand(2, 1, 3, requires_grad=True)
    loss = sh.expected_loss(phi, torch.rand(2, 1, 3), torch.zeros(2, 3))
    assert loss == 0
    assert (torch.autograd.grad(loss, phi)[0] == 0).all()


def test_limit_of_the_threshold_sampler() -> None:
    """It gives a player that changes nothing a share; the kernel does not (test_known_games)."""
    limits = {"cubic": [*[0.318125] * 3, 0.045625], "majority": [0.795625, *[0.068125] * 3]}
    limits["logistic"] = [0.495939, -0.234130, 0.190011, 0.010297]
    for name, limit in limits.items():
        found = by_kernel_shap(table_of(GAMES[name]), threshold_law(4))[:, 0]
        assert found.tolist() == pytest.approx(limit, abs=1e-6), name
    pairwise = table_of(GAMES["polynomial"])
    exact = sh.exact_shapley(pairwise)
    torch.testing.assert_close(by_kernel_shap(pairwise, threshold_law(3)), exact, atol=1e-12, rtol=0)


def chi_square(masks: Tensor, law: Tensor) -> float:
    """Of independent coalitions (N, n) against their law (2^n), per degree of freedom."""
    counts = rows_of(masks).bincount(minlength=len(law)).double()
    assert counts[law == 0].sum() == 0
    counts, expected = counts[law > 0], law[law > 0] * len(masks)
    return ((counts - expected).square() / expected).sum().item() / (len(counts) - 1)


@pytest.mark.parametrize("n", [2, 3, 5])
def test_kernel_sampler_has_the_law_of_the_kernel(n: int) -> None:
    counts = torch.tensor([n, 0, n + 2, 1]).repeat(100)
    masks = sh.kernel_masks(counts, 200, torch.Generator().manual_seed(1))
    own = masks[::4, :, :n]
    for half in (own[:, ::2], own[:, 1::2]):
        assert chi_square(half.flatten(0, 1), sh.kernel_weights(n)) < 2
    free = sh.kernel_masks(counts[::4], 100, torch.Generator().manual_seed(2), paired=False)
    assert chi_square(free.flatten(0, 1), sh.kernel_weights(n)) < 2


def test_threshold_sampler_has_the_enumerated_law() -> None:
    masks = sh.threshold_masks(torch.full((100,), 4), 200, torch.Generator().manual_seed(1))
    assert torch.equal(masks[:, 1::2], ~masks[:, ::2])
    assert chi_square(masks[:, ::2].flatten(0, 1), threshold_law(4)) > 2, "before pairing it is not symmetric"
    for n, mass in ((4, 0.496), (6, 0.359), (8, 0.303), (10, 0.271), (12, 0.250)):  # of no information
        assert threshold_law(n)[[0, -1]].sum().item() == pytest.approx(mass, abs=6e-4)
    frequency = rows_of(masks).flatten().bincount(minlength=16) / 20_000
    torch.testing.assert_close(frequency.double(), threshold_law(4), atol=0.01, rtol=0)


@pytest.mark.parametrize("sampler", [sh.kernel_masks, sh.threshold_masks])
def test_pairs_padding_and_few_players(sampler: Callable) -> None:
    counts = torch.tensor([0, 1, 2, 7, 4])
    masks = sampler(counts, 64)
    assert (masks.shape, masks.dtype) == ((5, 64, 7), torch.bool)
    valid = torch.arange(7) < counts[:, None]
    assert not (masks & ~valid[:, None]).any()
    assert not masks[:2].any(), "no proper coalition of fewer than two players"
    even, odd = masks[2:, ::2], masks[2:, 1::2]
    assert torch.equal(odd, ~even & valid[2:, None])
    if sampler is sh.kernel_masks:
        sizes = masks.sum(-1)
        assert (sizes[2] == 1).all(), "only singletons of two players"
        assert all(sizes[b].min() > 0 and sizes[b].max() < counts[b] for b in (2, 3, 4))
    assert sampler(counts, 3, paired=False, players=9).shape == (5, 3, 9)
    assert [sampler(counts[:b], 2).shape for b in (0, 1)] == [(0, 2, 0), (1, 2, 0)]


@pytest.mark.parametrize("sampler", [sh.kernel_masks, sh.threshold_masks, sh.uniform_size_masks])
def test_samplers_repeat_by_generator(sampler: Callable) -> None:
    options = {} if sampler is sh.uniform_size_masks else {"subsets": 8}
    counts, before = torch.tensor([9, 5]), torch.get_rng_state()
    one, two, other = (sampler(counts, generator=torch.Generator().manual_seed(i), **options) for i in (3, 3, 4))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), before)


def test_bad_numbers() -> None:
    counts = torch.tensor([3, 4])
    for sampler in (sh.kernel_masks, sh.threshold_masks):
        for subsets in (0, 1, 3):
            with pytest.raises(PetlError, match=f"{subsets} coalitions per input: pairs need an even number"):
                sampler(counts, subsets)
        with pytest.raises(PetlError, match="0 coalitions per input: the loss needs at least 1"):
            sampler(counts, 0, paired=False)
        with pytest.raises(PetlError, match="counted 3 to 4 per input, and the masks have 3 columns"):
            sampler(counts, 2, players=3)
    with pytest.raises(PetlError, match="counted -1 to 4"):
        sh.uniform_size_masks(torch.tensor([-1, 4]))
    for call in (sh.coalitions, sh.shapley_matrix, sh.kernel_weights):
        with pytest.raises(PetlError, match=r"17 players have 2\^17 coalitions"):
            call(17)
    for call in (sh.exact_shapley, sh.moebius_shapley, sh.moebius, sh.residual_loss):
        for shape in ((6, 2), (8,), (0, 2)):
            with pytest.raises(PetlError, match=r"its last dimensions are \(2\^n, C\)"):
                call(torch.rand(shape))


def test_normalisation_is_efficient_over_the_valid_players() -> None:
    raw, grand, null = torch.randn(4, 9, 3, requires_grad=True), torch.rand(4, 3), torch.rand(4, 3)
    phi = sh.efficient_normalise(raw, grand, null)
    (gradient,) = torch.autograd.grad(phi.square().sum(), raw, retain_graph=True)
    assert gradient.sum(1).abs().max() < 1e-5 < gradient.abs().max(), "it passes through the gap"
    torch.testing.assert_close(phi.sum(1), grand - null, atol=1e-6, rtol=0)
    torch.testing.assert_close(phi - phi.mean(1, keepdim=True), raw - raw.mean(1, keepdim=True))
    counts = torch.tensor([9, 4, 1, 0])
    valid = torch.arange(9) < counts[:, None]
    raw = raw.masked_fill(~valid[..., None], torch.nan)  # what stands in padding does not count
    phi = sh.efficient_normalise(raw, grand, null[0], valid)
    assert (phi[~valid] == 0).all()
    torch.testing.assert_close(phi.sum(1)[:3], (grand - null[0])[:3], atol=1e-6, rtol=0)
    torch.testing.assert_close(phi[2, 0], grand[2] - null[0])
    torch.testing.assert_close(phi[1, :4], raw[1, :4] + (grand[1] - null[0] - raw[1, :4].sum(0)) / 4)
    assert sh.efficient_normalise(raw[:, :0], grand, null).shape == (4, 0, 3)


def test_normalisation_in_low_precision_and_with_many_players() -> None:
    raw, grand, null = 1e3 * torch.randn(2, 196, 10), torch.rand(2, 10), torch.rand(1, 10)
    phi = sh.efficient_normalise(raw, grand, null)
    assert (phi.sum(1) - (grand - null)).abs().max() <= 1e-5 * (1 + raw.abs().max())
    with torch.autocast("cpu", torch.bfloat16):
        half = sh.efficient_normalise(raw.bfloat16(), grand.bfloat16(), null.bfloat16())
    assert half.dtype == torch.float32
    assert sh.efficient_normalise(raw.double(), grand, null).dtype == torch.float64


def test_loss_by_hand() -> None:
    counts = torch.tensor([4, 2, 1, 0])
    masks = sh.kernel_masks(counts, 6)
    phi, values, null = torch.randn(4, 4, 3), torch.rand(4, 6, 3), torch.rand(4, 3)
    total = 0.0
    for b in (0, 1):
        predicted = torch.stack([null[b] + phi[b][masks[b, k]].sum(0) for k in range(6)])
        total += counts[b].item() * (predicted - values[b]).pow(2).mean().item()
    found = sh.shapley_loss(phi, masks, values, null, counts)
    assert (found.dtype, found.shape) == (torch.float32, ())
    assert found.item() == pytest.approx(total / 4, rel=1e-5), "n_b < 2 add 0 and count in the mean"
    assert torch.equal(*(sh.shapley_loss(phi, masks, values, null, n) for n in (None, torch.full((4,), 4))))
    assert torch.equal(*(sh.shapley_loss(phi, masks, values, x) for x in (null[0], null[:1].expand(4, -1))))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(sh.shapley_loss(phi, masks, values, null, counts), found)
    assert sh.shapley_loss(phi.bfloat16(), masks, values.bfloat16(), null.bfloat16()).dtype == torch.float32


def test_gradient_descent_on_the_loss_finds_the_shapley_values() -> None:
    """All coalitions once, drawn as often as q says: n = 4 has q = 1/11 for 1 and 3 players, 1/22 for 2."""
    q = (sh.kernel_weights(4) * 22).round().long()
    masks = sh.coalitions(4).repeat_interleave(q, 0)[None]
    values = (table := table_of(GAMES["softmax"])).repeat_interleave(q, 0)[None]
    raw = torch.zeros(1, 4, 3, dtype=torch.float64, requires_grad=True)
    for _ in range(200):
        phi = sh.efficient_normalise(raw, table[-1], table[0])
        (gradient,) = torch.autograd.grad(sh.shapley_loss(phi, masks, values, table[0]), raw)
        raw.data -= 0.5 * gradient
    torch.testing.assert_close(phi[0], sh.exact_shapley(table), atol=1e-8, rtol=0)
    least = sh.shapley_loss(phi, masks, values, table[0]).item()
    assert least == pytest.approx(4 * sh.residual_loss(table).mean().item())


@pytest.mark.parametrize("ridge", [0.0, 1e-6])
@pytest.mark.parametrize("subsets", [2, 4, 32])
def test_kernel_shap_from_few_coalitions(subsets: int, ridge: float) -> None:
    """Too few to determine 9 values: finite, efficient, and the equal share where nothing is known."""
    masks = sh.kernel_masks(torch.full((3,), 9), subsets)
    weight, null = torch.randn(3, 9, 2), torch.rand(3, 2)
    values, grand = null[:, None] + masks.float() @ weight, null + weight.sum(1)
    phi = sh.kernel_shap(masks, values, null, grand, ridge)
    torch.testing.assert_close(phi.sum(1), grand - null, atol=1e-5, rtol=0)
    predicted = null[:, None] + masks.float() @ phi  # an additive game can be fitted exactly
    torch.testing.assert_close(predicted, values, atol=1e-4, rtol=0)
    many = sh.kernel_masks(torch.full((3,), 9), 100)
    phi = sh.kernel_shap(many, null[:, None] + many.float() @ weight, null, grand, ridge)
    torch.testing.assert_close(phi, weight, atol=1e-4, rtol=0)


def test_kernel_shap_without_information_gives_equal_shares() -> None:
    null, grand = torch.rand(2, 2, 3)
    share = ((grand - null) / 4)[:, None].expand(-1, 4, -1)
    masks = torch.tensor([[False] * 4, [True] * 4]).expand(2, -1, -1)
    torch.testing.assert_close(sh.kernel_shap(masks, torch.stack([null, grand], 1), null, grand), share)
    one = sh.kernel_shap(masks[..., :1] & False, null[:, None].expand(-1, 2, -1), null, grand)
    torch.testing.assert_close(one, (grand - null)[:, None])
    assert sh.kernel_shap(masks[..., :0], null[:, None].expand(-1, 2, -1), null, grand).shape == (2, 0, 3)
