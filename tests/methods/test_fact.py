"""FacT: counts, what a block computes from single C x C matrices, the shared factors, dropout, widths it cannot cut."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor

import petl
from petl.adapters.state import trained_tensors
from petl.costs import count_macs
from petl.methods.layers import plain
from tests.conftest import _timm, build, outputs
from tests.methods.by_hand import FAMILIES, Layers, attached_and_frozen, check_block, moved, trained_count, vit_b

TT, TK = petl.FacT(rank=4, scale=0.5), petl.FacT("tk", rank=4, scale=2.0)


@pytest.mark.parametrize(
    ("method", "count"),
    [
        (petl.FacT(), 2 * 768 * 16 + 144 * 16 * 16),
        (petl.FacT("tk", rank=32), 2 * 768 * 32 + 32**3 + 144 * 32),
    ],
)
def test_counts_on_vit_b(method: petl.FacT, count: int) -> None:
    assert count == {"tt": 61_440, "tk": 86_528}[method.variant]
    assert method.parameter_count(vit_b()) == trained_count(method, vit_b()) == count


@pytest.mark.parametrize("method", [TT, TK], ids=["tt", "tk"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_block_by_hand(family: str, method: petl.FacT) -> None:
    """ΔW put together from its matrices V Σ_i Uᵀ, one by one."""
    model, frozen = attached_and_frozen(family, method)
    factors = model.petl.factors

    def matrix(own: Tensor, row: int, column: int, columns: int) -> Tensor:
        if method.variant == "tt":
            sigma = own[4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
        else:
            weights = own[row * columns + column]
            sigma = sum(weights[k] * factors.core[k] for k in range(4))
        return method.scale * factors.v @ sigma @ factors.u

    def change(name: str, rows: range, columns: int) -> Tensor:
        own = model.petl.blocks[0][name].own
        return torch.cat([torch.cat([matrix(own, i, j, columns) for j in range(columns)], 1) for i in rows])

    fused = family == "timm_vit"
    changes = {p: change("qkv" if fused else p, range(i, i + 1) if fused else range(1), 1) for i, p in enumerate("qkv")}
    changes |= {"out": change("out", range(1), 1), "fc1": change("fc1", range(2), 1), "fc2": change("fc2", range(1), 2)}
    layers: Layers = {
        p: (lambda x, p=p: frozen[p](x) + x @ changes[p].T) if p in changes else frozen[p] for p in frozen
    }
    check_block(family, model.eval(), layers)


def test_mixing_the_core_is_counted(images: Tensor) -> None:
    model = petl.attach(build("timm_vit"), TK)
    view, c, r, n = model.petl.view, 24, 4, 17
    matrices = 3 + 1 + 2 + 2
    products = (3 + 1) * c * r + (1 + 1) * c * r + (2 + 1) * c * r + (1 + 2) * c * r
    share = view.depth * (n * (products + matrices * r * r) + matrices * r**3)
    tokens = model.petl.token_counts(16)
    assert model.petl.macs(tokens) == share
    assert count_macs(model, images[:1]) - view.macs(tokens, 16) == share


def test_shared_factors_are_registered_and_saved_once(images: Tensor) -> None:
    model = moved(petl.attach(build("timm_vit"), TK))
    shared = {n for n in model.petl.state_dict() if n.endswith((".u", ".v", ".core"))}
    assert shared == {"factors.u", "factors.v", "factors.core"}
    saved = {n for n in trained_tensors(model) if ".petl." in n}
    assert saved == {f"backbone.petl.{n}" for n in model.petl.state_dict()}
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        held = {id(part._factors[0]) for block in twin.petl.blocks for part in block.values()}
        assert held == {id(twin.petl.factors)}
        assert twin.petl.factors is not model.petl.factors


def test_dropout_is_in_the_middle_and_only_in_training(images: Tensor) -> None:
    model = moved(petl.attach(build("timm_vit"), petl.FacT(dropout=0.5)))
    assert torch.equal(model.eval()(images), model(images))
    assert not torch.equal(model.train()(images), model(images))
    part, layer = model.petl.blocks[0]["out"], model.blocks[0].attn.proj
    x = torch.randn(1, 24)
    draws = torch.stack([layer(x) for _ in range(40)]) - plain(layer, x)
    directions = torch.linalg.matrix_rank(draws[:, 0], tol=1e-4)
    assert directions <= part.own.shape[0], "what is dropped lies between U and V, so the change stays in V's range"


def test_no_dead_start(images: Tensor) -> None:
    for method in (TT, TK):
        model = petl.attach(build("timm_vit"), method)
        before = copy.deepcopy(model.petl.state_dict())
        optimizer = torch.optim.AdamW(model.petl.parameters(), lr=0.01, weight_decay=0)
        for _ in range(2):
            optimizer.zero_grad()
            outputs(model.train(), images).pow(2).sum().backward()
            optimizer.step()
        assert not [n for n, t in model.petl.state_dict().items() if torch.equal(t, before[n])]


def test_bad_options_and_widths() -> None:
    with pytest.raises(petl.PetlError, match="valid are: tk, tt"):
        petl.FacT("cp")
    with pytest.raises(petl.PetlError, match="rank must be an integer"):
        petl.FacT(rank=0)
    with pytest.raises(petl.PetlError, match="below 1"):
        petl.FacT(dropout=1.0)
    model = _timm(mlp_ratio=2.5)
    with pytest.raises(petl.PetlError, match="fc1 of block 0 is 60 x 24"):
        petl.attach(model, petl.FacT())
    assert not hasattr(model, "petl")
