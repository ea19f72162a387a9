"""Rankings, curves and areas of games that can be computed by hand; correlations against scipy-free definitions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torchmetrics.functional import pearson_corrcoef, spearman_corrcoef

from petl.errors import PetlError
from petl.nn import attribution_metrics as am
from petl.nn.shapley import coalitions, kernel_masks, random_subsets, uniform_size_masks


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def curve(weight: Tensor, order: Tensor, insertion: bool) -> Tensor:
    """Of the additive game v(S) = S . weight: (B, n + 1)."""
    return (am.curve_masks(order, insertion).float() @ weight[..., None]).squeeze(-1)


def test_rank_is_descending_and_breaks_ties_at_random() -> None:
    phi = torch.tensor([[0.1, 0.5, -1, 0.3], [2, 2, 2, 2]])
    assert am.rank(phi, seeded())[0].tolist() == [1, 3, 0, 2]
    assert torch.equal(am.rank(phi, seeded(5)), am.rank(phi, seeded(5)))
    first = am.rank(torch.zeros(8000, 4), seeded())[:, 0].bincount() / 8000
    torch.testing.assert_close(first, torch.full((4,), 0.25), atol=0.02, rtol=0)
    half = am.rank(torch.tensor([[0.0, 1, 1]]).repeat(4000, 1), seeded())
    assert (half[:, 2] == 0).all()
    assert (half[:, 0] == 1).float().mean().item() == pytest.approx(0.5, abs=0.03)
    before = torch.get_rng_state()
    am.rank(phi, seeded())
    assert torch.equal(torch.get_rng_state(), before)


def test_padding_ranks_last() -> None:
    valid = torch.tensor([[True, True, False, False], [True] * 4])
    order = am.rank(torch.tensor([[-3.0, -2, 9, torch.nan], [0, 1, 2, 3]]), seeded(), valid)
    assert order[0, :2].tolist() == [1, 0]
    assert order[1].tolist() == [3, 2, 1, 0]


def test_masks_along_a_ranking() -> None:
    order = torch.tensor([[2, 0, 1]])
    added = [[0, 0, 0], [0, 0, 1], [1, 0, 1], [1, 1, 1]]
    assert am.curve_masks(order, True).int().tolist() == [added]
    assert am.curve_masks(order, False).int().tolist() == [[[1 - x for x in row] for row in added]]
    order, counts = torch.tensor([[1, 0, 2], [2, 1, 0]]), torch.tensor([2, 3])
    inserted, deleted = (am.curve_masks(order, insertion, counts) for insertion in (True, False))
    assert inserted[0].int().tolist() == [[0, 0, 0], [0, 1, 0], [1, 1, 0], [1, 1, 0]]
    assert deleted[0].int().tolist() == [[1, 1, 0], [1, 0, 0], [0, 0, 0], [0, 0, 0]]
    assert torch.equal(deleted[1], ~inserted[1])


def test_areas_of_a_known_game() -> None:
    """v = 3 a + 2 b + c: the curves of the best order are 0, 3, 5, 6 and 6, 3, 1, 0."""
    weight = torch.tensor([[2.0, 1, 3]])
    order = am.rank(weight, seeded())
    inserted, deleted = curve(weight, order, True), curve(weight, order, False)
    assert (inserted.tolist(), deleted.tolist()) == ([[0, 3, 5, 6]], [[6, 3, 1, 0]])
    assert am.area(inserted).item() == pytest.approx((1.5 + 4 + 5.5) / 3)
    assert am.area(deleted).item() == pytest.approx((4.5 + 2 + 0.5) / 3)
    worst = order.flip(1)
    assert am.area(curve(weight, worst, True)).item() == pytest.approx(7 / 3)
    assert am.area(curve(weight, worst, False)).item() == pytest.approx(11 / 3)
    assert am.area(torch.tensor([[0.0, 0.5, 1]])).dtype == torch.float32
    torch.testing.assert_close(am.area(torch.full((2, 8), 0.7)), torch.full((2,), 0.7))


def test_area_of_variable_length() -> None:
    """Points beyond n_i do not count, whatever they are; a single point spans no area."""
    points = torch.tensor([[0, 1, 2, torch.nan], [0, 1, 2, 3], [5, torch.nan, 0, 0], [2, 4, 0, 0]])
    areas = am.area(points, torch.tensor([2, 3, 0, 1]))
    assert areas[[0, 1, 3]].tolist() == [1, 1.5, 3]
    assert areas[2].isnan()


def test_symmetric_game_gives_the_same_area_in_any_order() -> None:
    phi = torch.full((50, 6), 0.5)
    orders = am.rank(phi, seeded())
    assert len(orders.unique(dim=0)) > 40
    assert am.area(am.curve_masks(orders, True).sum(2).float().sqrt()).unique().numel() == 1


def test_correlations_agree_with_torchmetrics() -> None:
    a, b = torch.randn(5, 30), torch.randn(5, 30)
    torch.testing.assert_close(am.pearson(a, b).float(), pearson_corrcoef(a.T, b.T))
    tied = (2 * a).round()
    torch.testing.assert_close(am.spearman(tied, b).float(), spearman_corrcoef(tied.T, b.T), atol=1e-4, rtol=0)
    assert am.average_ranks(torch.tensor([[3.0, 1, 3, 0, 3]])).tolist() == [[3, 1, 3, 0, 3]]
    counts = torch.tensor([30, 7, 2, 19, 3])
    valid = torch.arange(30) < counts[:, None]
    for metric in (am.pearson, am.spearman):
        expected = [metric(a[i : i + 1, :n], b[i : i + 1, :n]).item() for i, n in enumerate(counts.tolist())]
        noisy = a.masked_fill(~valid, torch.nan)
        assert metric(noisy, b.masked_fill(~valid, 1e9), valid).tolist() == pytest.approx(expected)
    assert am.spearman(a, a.exp()).tolist() == pytest.approx([1] * 5)
    assert am.pearson(a, 3 - 2 * a).tolist() == pytest.approx([-1] * 5)


@pytest.mark.parametrize("metric", [am.pearson, am.spearman])
def test_no_correlation_is_nan(metric: object) -> None:
    a = torch.tensor([[0.1] * 3, [1, 2, 3], [1, torch.nan, 3], [0.1, 0.1, 7], [4, 5, 6], [4, 5, 6]])
    b = torch.tensor([[1.0, 2, 4], [1e-3] * 3, [1, 2, 4], [1, 2, 4], [1, 2, 4], [4, 5, 6]])
    valid = torch.ones(6, 3, dtype=torch.bool)
    valid[3, 2] = valid[4, 1:] = False
    found = metric(a, b, valid)
    assert found[:5].isnan().all()
    assert found[5].item() == pytest.approx(1)
    assert metric(a[:2, :0], b[:2, :0]).isnan().tolist() == [True, True]
    assert metric(a, b, valid & False).isnan().all()
    tenths = torch.full((1, 3), 0.1, dtype=torch.float64)  # the mean of three is not 0.1
    assert metric(tenths, b[:1]).isnan()
    assert metric(b[:1], tenths).isnan()


def test_faithfulness_of_an_additive_game() -> None:
    weight = torch.randn(4, 5)
    masks = torch.stack([uniform_size_masks(torch.full((300,), 5), seeded(i)) for i in range(4)])
    values = 0.3 + (masks.double() @ weight.double()[..., None]).squeeze(-1)
    torch.testing.assert_close(am.faithfulness(weight, masks, values), torch.ones(4, dtype=torch.float64))
    torch.testing.assert_close(am.faithfulness(-weight, masks, values), -torch.ones(4, dtype=torch.float64))
    other = am.faithfulness(torch.randn(4, 5), masks, values)
    assert other.abs().max() < 0.99
    assert am.faithfulness(torch.zeros(4, 5), masks, values).isnan().all()
    assert am.faithfulness(weight, masks, torch.ones(4, 300)).isnan().all()


@pytest.mark.parametrize("n", [9, 50, 199])
def test_equal_coalitions_tie(n: int) -> None:
    """However a sum is ordered in the matrix product: only one coalition here, so no rho, or the tie was broken."""
    for draws in (3, 5, 13, 101, 301, 602, 1001) * 5:
        masks = kernel_masks(torch.tensor([n]), 1, paired=False).repeat(1, draws, 1)
        assert am.faithfulness(torch.rand(1, n), masks, torch.rand(1, draws)).isnan()


def test_relative_l2_pools_all_entries() -> None:
    truth = torch.tensor([[[3.0], [0]], [[0], [4]]])
    assert am.relative_l2(truth, truth).item() == 0
    assert am.relative_l2(truth + torch.tensor([1.0, 0])[:, None, None], truth).item() == pytest.approx(2**0.5 / 5)
    assert am.relative_l2(0 * truth, truth).item() == 1
    assert not am.relative_l2(truth, 0 * truth).isfinite()


def test_coalitions_of_one_size() -> None:
    counts = torch.tensor([5, 3])
    masks = am.fixed_size_masks(counts, 2, 4000, seeded(), players=6)
    assert (masks.shape, masks.dtype) == ((2, 4000, 6), torch.bool)
    assert (masks.sum(2) == 2).all()
    assert not masks[1, :, 3:].any()
    torch.testing.assert_close(masks[0].float().mean(0), torch.tensor([0.4] * 5 + [0.0]), atol=0.03, rtol=0)
    assert torch.equal(masks, am.fixed_size_masks(counts, 2, 4000, seeded(), players=6))
    assert am.fixed_size_masks(counts, 0, 3).sum() == 0
    assert am.fixed_size_masks(counts[:0], 4, 3).shape == (0, 3, 4)
    for size, players in ((4, None), (-1, None), (2, 4)):
        with pytest.raises(PetlError, match=rf"coalitions of {size} players .* have 3 to 5 players"):
            am.fixed_size_masks(counts, size, 2, players=players)


def test_sizes_of_the_uniform_sampler() -> None:
    """Each size as often as any other, and each coalition as often as any of its size."""
    masks = uniform_size_masks(torch.tensor([4, 2]).repeat(10_000), seeded())
    sizes = masks[::2].sum(1).bincount(minlength=5) / 10_000
    torch.testing.assert_close(sizes, torch.full((5,), 0.2), atol=0.015, rtol=0)
    found = (masks[::2] * 2 ** torch.arange(4)).sum(1).bincount(minlength=16) / 10_000
    law = (1 / torch.tensor([5.0, 20, 30, 20, 5]))[coalitions(4).sum(1)]
    torch.testing.assert_close(found, law, atol=0.01, rtol=0)
    assert not masks[1::2, 2:].any()


def test_subsets_of_given_sizes() -> None:
    counts = torch.tensor([3, 6])
    masks = random_subsets(torch.tensor([[0, 1, 2, 3], [0, 6, 5, 1]]), counts, 6)
    assert masks.sum(-1).tolist() == [[0, 1, 2, 3], [0, 6, 5, 1]]
    assert not masks[0, :, 3:].any()
