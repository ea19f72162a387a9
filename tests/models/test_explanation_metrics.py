"""Metrics of attributions: known numbers on additive games, truth for few and many players, inputs without any."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import petl
from petl import PetlError
from petl.models import explanation_metrics
from petl.models.attributions import ATTRIBUTIONS, SHAPLEY
from petl.models.explained import ExplainedClassifier
from petl.models.explanation_metrics import COMPARED, RANKED, evaluate
from petl.nn.shapley import coalitions, exact_shapley
from tests.models.test_attributions import adapted, predicted, recorded, seeded, state, table, text, vision

WEIGHTS = torch.tensor([0.5, -0.25, 0.0625, 0.125])  # no two coalitions have the same sum
NULL = 0.25


def additive(
    model: ExplainedClassifier, monkeypatch: pytest.MonkeyPatch, weights: Tensor, product: float = 0.0
) -> None:
    """v(S) = 0.25 + sum of the weights in S for every class, and ``product`` where the first two players are in S."""

    def values(x: Any, masks: Tensor, players: Any = None) -> Tensor:
        v = NULL + masks.float() @ weights + product * (masks[..., 0] & masks[..., 1])
        return v[..., None].expand(-1, -1, 5)

    monkeypatch.setattr(model, "values", values)


def constant(phi: Tensor) -> Any:
    return lambda model, x, classes, generator: phi.expand(len(x), -1)


def test_an_additive_game_is_ranked_as_it_should(images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    model = vision(players=(2, 2))
    additive(model, monkeypatch, WEIGHTS)
    mine = {"right": constant(WEIGHTS), "wrong": constant(-WEIGHTS), "silent": constant(torch.zeros(4))}
    found = evaluate(model, images, [*mine, "kernelshap"], seeded(), attributions=ATTRIBUTIONS | mine)
    # insertion 1/4 3/4 7/8 15/16 11/16, deletion 11/16 3/16 1/16 0 1/4: trapezoids over k / 4
    numbers = {m: [round(float(v), 6) for v in found["right"][m]] for m in RANKED}
    assert numbers == {
        "insertion": [0.757812] * 3, "deletion": [0.179688] * 3, "faithfulness": [1.0] * 3, "sensitivity_n": [1.0] * 3,
    }  # fmt: skip
    torch.testing.assert_close(found["wrong"]["insertion"], found["right"]["deletion"])
    torch.testing.assert_close(found["wrong"]["faithfulness"], -torch.ones(3))
    assert found["silent"]["faithfulness"].isnan().all()
    assert found["silent"]["sensitivity_n"].isnan().all()
    assert ((found["silent"]["insertion"] > 0.179) & (found["silent"]["insertion"] < 0.758)).all()  # ties: random order
    exact = found["kernelshap"]
    for metric in ("pearson", "spearman"):
        torch.testing.assert_close(exact[metric], torch.ones(3))
    assert exact["squared_error"].max() < 1e-9
    torch.testing.assert_close(exact["squared_truth"], WEIGHTS.square().sum().expand(3))
    assert not exact["squared_noise"].any()
    assert exact["efficiency_gap"].max() < 1e-6
    assert set(found["right"]) == set(RANKED)


def test_distance_and_efficiency_gap_are_to_the_exact_values(images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    model = vision(players=(2, 2))
    additive(model, monkeypatch, WEIGHTS, product=0.4)  # Shapley values: 0.2 more for the first two
    off = torch.tensor([0.7, -0.05, 0.0625, 0.125]) + torch.tensor([0.1, 0.0, 0.0, 0.0])
    found = evaluate(model, images, ["kernelshap"], seeded(), attributions={"kernelshap": constant(off)})["kernelshap"]
    torch.testing.assert_close(found["squared_error"], torch.full((3,), 0.01))
    torch.testing.assert_close(found["squared_truth"], torch.full((3,), 0.49 + 0.0025 + 0.0625**2 + 0.125**2))
    torch.testing.assert_close(found["efficiency_gap"], torch.full((3,), 0.1))


def test_truth_of_a_network_is_enumerated_up_to_twelve_players(images: Tensor) -> None:
    model = vision(players=(2, 3))
    classes = predicted(model, images)
    exact = exact_shapley(table(model, images, classes, 6))[..., 0]
    chosen = ["kernelshap", "autognothi"]
    found = evaluate(model, images, chosen, seeded())
    for name in chosen:
        phi = ATTRIBUTIONS[name](model, images, classes, seeded())  # 32 draws of 62: not exact
        numbers = found[name]
        assert set(numbers) == {*RANKED, *COMPARED, *(("prediction_preserved",) if name == "autognothi" else ())}
        assert all(v.shape == (3,) and v.dtype == torch.float32 and v.isfinite().all() for v in numbers.values())
        if name == "autognothi":  # no draws
            torch.testing.assert_close(numbers["squared_error"], (phi - exact).square().sum(1), rtol=1e-3, atol=1e-8)
            r = torch.stack([torch.corrcoef(torch.stack(rows))[0, 1] for rows in zip(phi, exact, strict=True)])
            torch.testing.assert_close(numbers["pearson"], r, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(numbers["squared_truth"], exact.square().sum(1), rtol=1e-4, atol=1e-8)
    assert found["autognothi"]["prediction_preserved"].tolist() == [1.0] * 3
    assert found["autognothi"]["efficiency_gap"].max() < 1e-5  # rounding: these random values are large


def test_looking_up_gives_what_evaluating_gives(images: Tensor) -> None:
    model = vision(players=(2, 2))
    shared = ("random", "leave-one-out")
    with_table = evaluate(model, images, [*shared, "kernelshap"], seeded())  # kernelshap draws nothing: 14 coalitions
    without = evaluate(model, images, shared, seeded())
    for name in shared:
        for metric in RANKED:
            # evaluated twice, a coalition may differ in its last bit and does not tie in Spearman's ranks any more
            off = 1e-5 if metric in ("insertion", "deletion") else 0.02
            torch.testing.assert_close(with_table[name][metric], without[name][metric], rtol=0, atol=off)


def test_many_players_are_compared_with_a_converged_estimate(images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(explanation_metrics, "ENUMERATED", 8)
    model = vision(players=(3, 3))
    classes = predicted(model, images)
    exact = exact_shapley(table(model, images, classes, 9))[..., 0]
    asked = recorded(model, monkeypatch)
    found = evaluate(model, images, ["autognothi"], seeded())["autognothi"]
    assert (3, 50 * 9, 9) in [a.shape for a in asked]
    phi = ATTRIBUTIONS["autognothi"](model, images, classes, None)
    torch.testing.assert_close(found["squared_truth"], exact.square().sum(1), rtol=0.1, atol=1e-5)
    torch.testing.assert_close(found["squared_error"], (phi - exact).square().sum(1), rtol=0.1, atol=1e-5)
    assert (found["squared_noise"] < 0.05 * found["squared_truth"]).all()
    rough = evaluate(model, images, ["autognothi"], seeded(), subsets_truth=40)["autognothi"]
    assert (rough["squared_noise"] > 2 * found["squared_noise"]).all()
    none = evaluate(model, images, ["autognothi"], seeded(), subsets_truth=0)["autognothi"]
    assert all(none[m].isnan().all() for m in COMPARED[:5])
    assert none["insertion"].isfinite().all()
    assert none["efficiency_gap"].max() < 1e-5


def test_the_noise_is_as_large_as_the_error_of_the_truth(images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(explanation_metrics, "ENUMERATED", 8)
    model = vision(players=(3, 3))
    interactions = torch.randn(9, 9, 9, generator=torch.Generator().manual_seed(0))  # pairs do not cancel third order

    def values(x: Any, masks: Tensor, players: Any = None) -> Tensor:
        s = masks.double()
        return torch.einsum("bki,bkj,bkl,ijl->bk", s, s, s, interactions.double())[..., None].expand(-1, -1, 5)

    monkeypatch.setattr(model, "values", values)
    truth = exact_shapley(values(None, coalitions(9)[None])[0, :, :1])[:, 0].float()
    right = {"kernelshap": constant(truth)}
    x = images[:1].expand(16, -1, -1, -1)
    runs = [evaluate(model, x, ["kernelshap"], seeded(i), attributions=right, masks=2) for i in range(4)]
    error, noise = (torch.cat([r["kernelshap"][m] for r in runs]).mean() for m in ("squared_error", "squared_noise"))
    assert 0.7 < error / noise < 1.4


def test_the_exact_values_explain_better_than_chance(images: Tensor) -> None:
    model = vision(players=(3, 3))
    x = torch.cat([images, images.flip(-1), images.roll(9, 2), images.roll(5, 3)])
    classes = predicted(model, x)
    exact = exact_shapley(table(model, x, classes, 9))[..., 0]
    perfect = ATTRIBUTIONS | {"kernelshap": lambda *_: exact}
    found = evaluate(model, x, ["kernelshap", "random"], seeded(), attributions=perfect)
    best, chance = found["kernelshap"], found["random"]
    assert best["insertion"].mean() > chance["insertion"].mean() + 0.01
    assert best["deletion"].mean() < chance["deletion"].mean() - 0.01
    for metric in ("faithfulness", "sensitivity_n"):
        assert best[metric].mean() > chance[metric].mean() + 0.2
    assert best["faithfulness"].mean() > 0.7
    assert best["pearson"].min() > 0.999


def test_the_gap_is_to_what_the_values_promise_to_sum_to(images: Tensor) -> None:
    model = vision(players=(2, 2), grand="main")  # the prediction, which the surrogate does not give
    found = evaluate(model, images, ["autognothi", "kernelshap"], seeded(), masks=2)
    assert found["autognothi"]["efficiency_gap"].max() < 1e-5  # rounding: these random values are large
    assert found["kernelshap"]["efficiency_gap"].max() < 1e-5
    zeros = ATTRIBUTIONS | {"autognothi": constant(torch.zeros(4))}
    gap = evaluate(model, images, ["autognothi"], seeded(), masks=2, attributions=zeros)["autognothi"]["efficiency_gap"]
    classes = predicted(model, images)[:, None]
    promised = (model.link(model.logits(images)) - model.null(images)).gather(1, classes)[:, 0].detach()
    torch.testing.assert_close(gap, promised.abs())


def test_curves_of_one_attribution_take_one_call(images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    model = vision()
    asked = recorded(model, monkeypatch)
    evaluate(model, images, ["random"], seeded(), masks=10, sizes=(0.5,))
    assert [a.shape for a in asked] == [(3, 20, 16), (3, 2 * 17, 16)]
    uniform, fixed = asked[0].split(10, 1)
    assert len(uniform.sum(2).unique()) > 5
    assert (fixed.sum(2) == 8).all()


def test_a_seed_repeats_every_number_and_nothing_of_the_model_changes(images: Tensor) -> None:
    model = vision(players=(2, 2))
    before, logits = state(model), model.logits(images).detach()
    once, twice = (evaluate(model, images, generator=seeded(5), masks=20) for _ in range(2))
    assert once.keys() == ATTRIBUTIONS.keys()
    for name, numbers in once.items():
        for metric, values in numbers.items():
            assert torch.equal(values, twice[name][metric]), (name, metric)
            assert values.isfinite().all(), (name, metric)
    other = evaluate(model, images, ["random"], seeded(6), masks=20)["random"]
    assert not torch.equal(other["insertion"], once["random"]["insertion"])
    assert state(model) == before
    assert torch.equal(model.logits(images), logits)


def test_texts_with_few_or_no_words(tmp_path: Path) -> None:
    model, batch = text(tmp_path)  # 4, 3, 0 and 1 words
    found = evaluate(model, batch, generator=seeded(), masks=40)
    classes = predicted(model, batch)
    values = table(model, batch, classes, 4)[..., 0]
    for name, numbers in found.items():
        for metric in RANKED:
            assert numbers[metric][2].isnan(), (name, metric)
        torch.testing.assert_close(numbers["insertion"][3], (values[3, 0] + values[3, -1]) / 2)
        torch.testing.assert_close(numbers["deletion"][3], numbers["insertion"][3])
        assert numbers["sensitivity_n"][3].isnan()
        assert numbers["insertion"][:2].isfinite().all()
    for name in SHAPLEY:
        assert found[name]["pearson"][2:].isnan().all()
        assert found[name]["efficiency_gap"][[0, 1, 3]].max() < 1e-5
    assert found["kernelshap"]["squared_error"][[0, 1, 3]].max() < 1e-8
    assert found["autognothi"]["prediction_preserved"].tolist() == [1.0] * 4
    # an input has the same numbers in a batch of its own length
    alone = evaluate(model, {k: v[3:] for k, v in batch.items()}, ["autognothi"], seeded())["autognothi"]
    torch.testing.assert_close(alone["squared_truth"][0], found["autognothi"]["squared_truth"][3])


def test_a_changed_prediction_is_noticed(images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    model = vision(players=(2, 2))
    read = model.read

    def disturbed(x: Any, *readers: Any, rows: Any = None, keep: Any = None) -> Any:
        logits, states = read(x, *readers, rows=rows, keep=keep)
        return logits + 1e-6 * torch.tensor([[0.0], [1.0], [0.0]]) if rows is None else logits, states

    monkeypatch.setattr(model, "read", disturbed)
    found = evaluate(model, images, ["autognothi"], seeded(), masks=2)["autognothi"]
    assert found["prediction_preserved"].tolist() == [1.0, 0.0, 1.0]


def test_an_attribution_that_does_not_apply_is_nan_and_says_why(images: Tensor) -> None:
    model = adapted(petl.LadderSideTuning(reduction=4))
    with pytest.warns(UserWarning, match="gradcam: not a number. no gradient comes through"):
        found = evaluate(model, images, ["gradcam", "attention rollout"], seeded(), masks=2)
    assert all(v.isnan().all() for v in found["gradcam"].values())
    assert found["attention rollout"]["insertion"].isfinite().all()


def test_bad_options_are_refused(images: Tensor) -> None:
    model = vision(players=(2, 2))
    with pytest.raises(PetlError, match="did you mean 'kernelshap'"):
        evaluate(model, images, ["kernel shap"])
    with pytest.raises(PetlError, match="subsets_truth=51"):
        evaluate(model, images, ["kernelshap"], subsets_truth=51)
