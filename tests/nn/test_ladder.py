"""The ladder: forms, counts, masks, gradients, refusals."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from petl.errors import PetlError
from petl.nn.ladder import FirstTokens, Ladder, SideBlock, ladder_macs, ladder_parameters, side_width

D, L, H, R, T = 24, 4, 3, 4, 9
SHAPES = pytest.mark.parametrize(
    ("form", "layers", "norm_first"),
    [("sum", None, True), ("sum", (1, 2), False), ("gate", None, False), ("gate", (0, 2), True)],
)


def network(batch: int = 2, tokens: int = T) -> tuple[Tensor, list[Tensor]]:
    """Embedded tokens and the outputs of L blocks."""
    h0, *taps = torch.randn(L + 1, batch, tokens, D)
    return h0, taps


def masks() -> list[Tensor | None]:
    keep = torch.rand(2, T) > 0.4
    keep[:, 0] = True
    return [None, keep, keep[:, None] & torch.ones(T, T, dtype=torch.bool).tril()]


@SHAPES
def test_formulas_count_parameters_and_macs(form: str, layers: Sequence[int] | None, norm_first: bool) -> None:
    ladder = Ladder(D, L, H, R, form, layers, norm_first)
    assert sum(p.numel() for p in ladder.parameters()) == ladder_parameters(D, L, R, form, layers, norm_first)
    for keep in masks():
        for mode in (True, False):
            with torch.no_grad(), FlopCounterMode(display=False) as counter:
                ladder.train(mode)(*network(), keep)
            assert counter.get_total_flops() // 2 == 2 * ladder_macs(D, L, R, T, form, layers)  # two samples


def test_counts_of_the_sheet() -> None:
    e = 96
    assert sum(p.numel() for p in SideBlock(e, 12).parameters()) == 12 * e * e + 13 * e
    assert ladder_parameters(768, 12, 8) + e * 10 + 10 == 2_229_130  # ViT-B, r = 8, with a classifier of CLS
    assert ladder_parameters(768, 12, 8) - ladder_parameters(768, 12, 8, norm_first=False) == 2 * e
    assert ladder_parameters(768, 12, 8, "gate") - ladder_parameters(768, 12, 8) == 768 * e + e + 12
    assert Ladder(768, 12, 12).width == e


def by_hand(ladder: Ladder, h0: Tensor, taps: Sequence[Tensor]) -> Tensor:
    """The equations of the module docstring, with torch's own attention."""
    z: Tensor | float = 0.0 if ladder.seed is None else ladder.seed(h0)
    for j, layer in enumerate(ladder.layers):
        u, block = ladder.down[j](taps[layer]), ladder.blocks[j]
        z = z + F.gelu(u) if ladder.alpha is None else (z + u) / 2
        reference = nn.TransformerEncoderLayer(ladder.width, H, 4 * ladder.width, 0.0, F.gelu, block.norm1.eps, True)
        reference.norm_first = block.norm_first
        reference.self_attn.in_proj_weight, reference.self_attn.in_proj_bias = block.qkv.weight, block.qkv.bias
        reference.self_attn.out_proj.load_state_dict(block.out.state_dict())
        reference.linear1, reference.linear2 = block.fc1, block.fc2
        reference.norm1, reference.norm2 = block.norm1, block.norm2
        z = reference.train()(z)
    return ladder.norm(z)


@SHAPES
def test_it_computes_its_equations(form: str, layers: Sequence[int] | None, norm_first: bool) -> None:
    ladder = Ladder(D, L, H, R, form, layers, norm_first)
    inputs = network()
    torch.testing.assert_close(ladder(*inputs), by_hand(ladder, *inputs))  # a gate is the mean at the start
    stepped = ladder.begin(inputs[0])
    for index, h in enumerate(inputs[1]):
        before, stepped = stepped, ladder.step(index, stepped, h)
        assert (stepped is before) == (index not in ladder.layers)
    assert torch.equal(ladder.finish(stepped), ladder(*inputs))


def test_a_closed_gate_forgets_and_an_open_one_ignores_its_tap() -> None:
    ladder = Ladder(D, L, H, R, "gate", (1, 2))
    (h0, taps), (_, others) = network(), network()
    assert ladder.alpha is not None
    with torch.no_grad():
        ladder.alpha.fill_(20.0)  # μ = 1
        assert torch.equal(ladder(h0, taps), ladder(h0, others))
        ladder.alpha.fill_(-20.0)  # μ = 0
        assert torch.equal(ladder(h0, taps), ladder(2 * h0, [*others[:2], *taps[2:]]))


@SHAPES
def test_a_removed_token_does_not_matter(form: str, layers: Sequence[int] | None, norm_first: bool) -> None:
    ladder = Ladder(D, L, H, R, form, layers, norm_first)
    h0, taps = network()
    keep = masks()[1]
    assert keep is not None
    with torch.no_grad():
        found = ladder(h0, taps, keep)
        changed = [torch.where(keep[:, :, None], h, 100 * torch.randn_like(h)) for h in (h0, *taps)]
        assert torch.equal(ladder(changed[0], changed[1:], keep)[keep], found[keep])
        one = [h[:1, keep[0]] for h in (h0, *taps)]  # the token is masked as if it were not there
    torch.testing.assert_close(ladder(one[0], one[1:])[0], found[0, keep[0]], atol=1e-5, rtol=1e-5)


def test_a_causal_mask_looks_back_only() -> None:
    ladder = Ladder(D, L, H, R)
    h0, taps = network()
    causal = torch.ones(1, T, T, dtype=torch.bool).tril()
    later = [torch.cat([h[:, :5], torch.randn(2, T - 5, D)], 1) for h in taps]
    assert torch.equal(ladder(h0, taps, causal)[:, :5], ladder(h0, later, causal)[:, :5])
    assert not torch.equal(ladder(h0, taps)[:, :5], ladder(h0, later)[:, :5])


def test_a_row_that_sees_nothing_is_finite_and_so_are_gradients() -> None:
    ladder = Ladder(D, L, H, R)
    keep = torch.zeros(2, T, dtype=torch.bool)
    keep[0, 0] = True
    z = ladder(*network(), keep)
    z.sum().backward()
    assert z.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in ladder.parameters())


def test_every_parameter_has_a_gradient_and_the_taps_have_none() -> None:
    for form in ("sum", "gate"):
        ladder = Ladder(D, L, H, R, form)
        h0, taps = network()
        for h in (h0, *taps):
            h.requires_grad_()
        ladder(h0, taps).pow(3).sum().backward()
        assert all(p.grad is not None and p.grad.any() for p in ladder.parameters())
        assert all(h.grad is None for h in (h0, *taps))


@pytest.mark.parametrize("form", ["sum", "gate"])
def test_bf16_taps_and_autocast_leave_an_fp32_state(form: str) -> None:
    ladder = Ladder(D, L, H, R, form)
    h0, taps = network()
    rounded = h0.bfloat16(), [h.bfloat16() for h in taps]
    assert torch.equal(ladder(*rounded), ladder(rounded[0].float(), [h.float() for h in rounded[1]]))
    with torch.autocast("cpu", torch.bfloat16):
        z = ladder.step(0, ladder.begin(h0), taps[0])
    assert z.dtype == torch.float32


def test_it_compiles_without_graph_breaks() -> None:
    for form in ("sum", "gate"):
        ladder = Ladder(D, L, H, R, form)
        inputs = network()
        for keep in masks():
            torch.compiler.reset()
            compiled = torch.compile(ladder, fullgraph=True, backend="eager")
            torch.testing.assert_close(compiled(*inputs, keep), ladder(*inputs, keep))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reduction": 5}, r"reduction=5 does not divide the width 24\. Reductions that fit here: 1, 2, 4, 8\."),
        ({"reduction": 3}, r"reduction=3 gives a side width of 8, which does not divide into 3 heads\. .* 1, 2, 4, 8"),
        ({"reduction": 0}, r"reduction=0 does not divide"),
        ({"form": "gated"}, r"form 'gated' is not known: did you mean 'gate'\?"),
        ({"layers": (0, 4)}, r"layers=\[0, 4\]: \[4\] are out of range; this network has blocks 0 to 3"),
        ({"layers": (-5,)}, r"\[-5\] are out of range"),
        ({"layers": (3, -1)}, r"a block stands there twice"),
        ({"layers": ()}, r"it is empty"),
        ({"layers": (1, 1)}, r"a block stands there twice"),
    ],
)
def test_refusals(options: dict, message: str) -> None:
    with pytest.raises(PetlError, match=message):
        Ladder(**({"width": D, "depth": L, "heads": H, "reduction": R} | options))


@SHAPES
def test_only_the_first_tokens_of_the_last_state(form: str, layers: Sequence[int] | None, norm_first: bool) -> None:
    ladder = Ladder(D, L, H, R, form, layers, norm_first)
    h0, taps = network()
    for keep in masks():
        for first in (1, 3, None):
            reader = FirstTokens(ladder, first)
            z = reader.begin(h0)
            for index, h in enumerate(taps):
                z = reader.step(index, z, h, keep)
            assert z.shape[1] == (first or T)
            torch.testing.assert_close(ladder.finish(z), ladder(h0, taps, keep)[:, :first])


def test_side_widths() -> None:
    assert side_width(768, 12, 8) == 96
    assert Ladder(D, L, H, 1).width == D
    assert Ladder(D, L, H, 8, layers=[2, 0]).layers == (0, 2)
    assert Ladder(D, L, H, 8, layers=[-1, 0]).layers == (0, 3)
