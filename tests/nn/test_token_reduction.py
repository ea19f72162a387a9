"""The token reducer alone: counts, weights, order, linearity, and the way back to the patch grid."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from petl.errors import PetlError
from petl.nn.linear import Linear
from petl.nn.token_reduction import Selection, TokenReducer, cls_attention, kept_masks

# sheet sparse_tuning.md section 2: tokens (class token included) after the events on 14 x 14 patches
COUNTS = {
    (0.9, True): (179, 163, 148), (0.9, False): (178, 161, 145),
    (0.8, True): (159, 129, 105), (0.8, False): (158, 127, 102),
    (0.7, True): (140, 100, 72), (0.7, False): (139, 98, 69),
    (0.6, True): (120, 74, 46), (0.6, False): (119, 72, 44),
    (0.5, True): (100, 52, 28), (0.5, False): (99, 50, 26),
    (1.0, True): (197, 197, 197),
}  # fmt: skip


@pytest.mark.parametrize(("setting", "expected"), COUNTS.items())
def test_token_counts_of_the_sheet(setting, expected) -> None:
    reducer, n, found = TokenReducer(*setting), 196, []
    for _ in range(3):
        n = reducer.after(n)
        found.append(n + 1)
    assert tuple(found) == expected


def test_ceil_is_exact_and_bare_in_the_reference_setting() -> None:
    assert TokenReducer(0.55, fuse=False).count(100) == 55  # 0.55 * 100 is 55.00000000000001 in floats
    assert TokenReducer(0.55, fuse=False, tolerance=0.0).count(100) == 56


def test_single_rejected_token_is_left_alone_only_when_fusing() -> None:
    assert TokenReducer(0.7).count(4) == 4
    assert TokenReducer(0.7, skip_single=False).count(4) == 3
    assert TokenReducer(0.7, fuse=False).count(4) == 3
    assert TokenReducer(0.01, fuse=False).count(4) == 1


@pytest.mark.parametrize("rate", [0.0, -0.1, 1.0001, float("nan")])
def test_rate_outside_the_interval_is_refused(rate: float) -> None:
    with pytest.raises(PetlError, match="keep_rate"):
        TokenReducer(rate)


def test_cls_row_equals_full_attention() -> None:
    q, k = torch.randn(2, 3, 7, 8), torch.randn(2, 3, 7, 8)
    full = (q @ k.transpose(-2, -1) * 8**-0.5).softmax(-1).mean(1)[:, 0]
    row = cls_attention(q[:, :, :1], k, 8**-0.5)
    torch.testing.assert_close(row, full)
    torch.testing.assert_close(row.sum(1), torch.ones(2))


def select(n: int = 10, prefix: int = 2, rate: float = 0.5, **options: bool) -> tuple[Selection, torch.Tensor]:
    scores = torch.rand(3, prefix + n)
    selection = TokenReducer(rate, **options).select(scores, prefix)
    assert selection is not None
    return selection, scores


def test_selection_keeps_the_most_attended_and_merges_the_rest_by_raw_score() -> None:
    selection, scores = select()
    x = torch.randn(3, 12, 4)
    out = selection.apply(x)
    assert out.shape == (3, 2 + 5 + 1, 4)
    torch.testing.assert_close(out[:, :2], x[:, :2])
    for b in range(3):
        order = scores[b, 2:].argsort(descending=True)
        torch.testing.assert_close(out[b, 2:7], x[b, 2:][order[:5]])
        torch.testing.assert_close(out[b, 7], (scores[b, 2:][order[5:], None] * x[b, 2:][order[5:]]).sum(0))


def test_weighing_the_whole_tensor_gives_the_same_tokens() -> None:
    selection, _ = select()
    x = torch.randn(3, 12, 4)
    torch.testing.assert_close(selection.apply(x, kept_anyway=True), selection.apply(x))


def test_selection_commutes_with_a_bias_free_projection() -> None:
    selection, _ = select()
    x, layer = torch.randn(3, 12, 4), Linear(4, 6, bias=False)
    torch.testing.assert_close(layer(selection.apply(x)), selection.apply(layer(x)), atol=1e-6, rtol=1e-5)


def test_gradient_flows_through_the_scores_into_the_merged_token() -> None:
    scores = torch.rand(1, 8, requires_grad=True)
    selection = TokenReducer(0.5).select(scores, 1)
    assert selection is not None
    selection.apply(torch.randn(1, 8, 4))[:, -1].sum().backward()
    assert scores.grad is not None
    assert int((scores.grad != 0).sum()) == 3  # the three rejected ones


def test_index_and_tensor_carry_the_same_patch_at_each_place_through_two_events() -> None:
    n, prefix = 16, 1
    first, _ = select(n, prefix)
    index = torch.arange(n).expand(3, -1)
    x = torch.cat([torch.full((3, prefix, 1), -5.0), index[..., None].float()], 1)
    x, index = first.apply(x), first.apply_to_index(index)
    second = TokenReducer(0.5).select(torch.rand(3, x.shape[1]), prefix)
    assert second is not None
    x, index = second.apply(x), second.apply_to_index(index)
    own = index >= 0
    assert torch.equal(x[:, prefix:, 0][own], index[own].float())


def test_kept_masks_lie_inside_each_other_and_count_right() -> None:
    first, _ = select(16, 1)
    second = TokenReducer(0.5).select(torch.rand(3, 1 + 9), 1)
    assert second is not None
    masks = kept_masks([first, second], 16)
    assert masks[0].sum(1).tolist() == [8, 8, 8]
    assert (masks[1] <= masks[0]).all()
    assert all(c in (4, 5) for c in masks[1].sum(1).tolist())  # the merged token may be among the five kept
    assert kept_masks([], 16) == []


def test_bf16_features_are_merged_in_fp32_and_come_back_in_bf16() -> None:
    selection, _ = select()
    x = torch.randn(3, 12, 4)
    out = selection.apply(x.bfloat16())
    assert out.dtype == torch.bfloat16
    assert F.cosine_similarity(out.float().flatten(), selection.apply(x).flatten(), dim=0) > 0.999
