"""Runs of the explanation task on images and on texts, and what it says about bad input."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import petl
from petl.data import Digits
from petl.models.games import value_table
from petl.nn.attribution_metrics import pearson
from petl.nn.shapley import exact_shapley
from petl.tasks.explanation import Explanation
from tests.adapters.explained import classifier, explained, save
from tests.conftest import _timm, grounding, tiny_bert_classifier
from tests.tasks.test_explanation import (
    SMALL,
    Made,
    bert,
    first_batch,
    headless,
    quadrants,
    task,
    texts,
    trainer,
    under,
)

# ---- runs


def confident() -> nn.Module:
    """A classifier that tells `quadrants` apart."""
    torch.manual_seed(7)
    model = _timm(depth=2)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.15)
        model.head.weight.mul_(4)  # type: ignore[operator,union-attr]
    return model.eval()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Explanation, Made, dict[str, float]]:
    data = Made(quadrants, train=128)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PL_GLOBAL_SEED", "0")  # whatever a test before has left
        module = task(confident(), surrogate_epochs=12, surrogate_lr=1e-2, lr=1e-2)
        fit = trainer(tmp_path_factory.mktemp("fit"), max_epochs=36, check_val_every_n_epoch=12)
        fit.fit(module, data)
        [found] = fit.test(module, data, verbose=False)
    return module, data, found


def test_it_explains_unseen_inputs(trained: tuple[Explanation, Made, dict[str, float]]) -> None:
    module, _, metrics = trained
    model, fresh = module.model, confident()
    x = torch.stack([quadrants(50_000 + i)["image"] for i in range(64)])
    with torch.no_grad():
        found, exact = model.explain(x), exact_shapley(value_table(model, x))
        assert torch.equal(found.logits, fresh(x)), "the prediction is what it was"
    chosen = found.logits.argmax(-1)[:, None, None].expand(-1, 4, 1)
    assert len(chosen.unique()) > 1
    phi, truth, constant = (
        v.gather(2, chosen)[..., 0]
        for v in (found.values, exact, ((found.grand - found.null)[:, None] / 4).expand(-1, 4, -1))
    )
    assert pearson(phi, truth).mean() >= 0.9
    error, baseline = ((v - truth).square().sum(1).mean() for v in (phi, constant))
    assert error < 0.1 * baseline
    assert found.efficiency_gap.max() < 1e-6
    assert metrics["test/autognothi/pearson"] >= 0.9
    assert metrics["test/autognothi/prediction_preserved"] == 1
    assert metrics["test/autognothi/relative_l2"] == pytest.approx(
        (metrics["test/autognothi/squared_error"] / metrics["test/autognothi/squared_truth"]) ** 0.5, abs=1e-5
    )
    assert module.gate["agreement"] > 0.8
    assert {n.split("/")[1] for n in metrics} == set(module.attributions)


def test_a_single_player_takes_it_all(tmp_path: Path) -> None:
    for sampler in ("kernel", "vitshapley"):  # tabulated, and drawn
        module = task(method=petl.AutoGnothi(reduction=4, players=(1, 1), sampler=sampler), surrogate_epochs=1)
        fit, data = trainer(tmp_path / sampler, max_epochs=2), Made(quadrants, train=32, test=4)
        fit.fit(module, data)
        with torch.no_grad():
            found = module.model.explain(first_batch(module, "val")["image"])
        torch.testing.assert_close(found.values[:, 0], found.grand - found.null)
        assert fit.callback_metrics["train/loss"] == fit.callback_metrics["val/loss"] == 0
        assert fit.test(module, data, verbose=False)[0]["test/autognothi/efficiency_gap"] < 1e-6


def test_texts_of_any_length(tmp_path: Path) -> None:
    module, data = bert(max_length=99, baselines=["random", "leave-one-out"]), Made(texts, batch_size=4, test=6)
    before = {n: p.detach().clone() for n, p in module.source.model.named_parameters()}
    fit = trainer(tmp_path, max_epochs=3)
    fit.fit(module, data)
    assert all(torch.equal(p, before[n]) for n, p in module.model.classifier.named_parameters())
    assert all(p.isfinite().all() for p in module.model.petl.parameters())
    assert not module.model.petl.knows_null, "it depends on the text"
    found = fit.test(module, data, verbose=False)[0]
    assert found["test/autognothi/efficiency_gap"] < 1e-6
    assert found["test/autognothi/prediction_preserved"] == 1
    rows = {k: v for b in [module.predict_step(b, 0) for b in data.test_dataloader()] for k, v in b.items()}
    assert rows.keys() == {"index", "prediction", "label", "probability", "values"}
    found_in = module.inputs({"text": ["dull " * 200]})
    assert found_in["input_ids"].shape == (1, 24), "cut to the positions there are"  # type: ignore[call-overload,index]
    assert module.protocol()["max_length"] == 24
    nothing = module.inputs({"text": ["", ""]})
    for stage, epoch in (("surrogate", 0), ("explainer", 2)):
        under(module, data, current_epoch=epoch)
        module.log = lambda *args, **kwargs: None  # type: ignore[assignment,method-assign]
        loss = module.training_step({"text": ["", ""], "index": torch.arange(2)}, 0)
        assert module.stage() == stage
        assert loss.isfinite()
        loss.backward()
    assert module.model.players(nothing).most == 0


def test_labels_that_do_not_exclude_each_other(tmp_path: Path) -> None:
    module = task(method=petl.AutoGnothi(**SMALL | {"link": "sigmoid"}), surrogate_epochs=1)
    data = Made(quadrants)
    trainer(tmp_path, max_epochs=2).fit(module, data)
    batch = first_batch(module, "val")
    with torch.no_grad():
        found = module.model.explain(batch["image"])
        full = module.model.surrogate_logits(batch["image"], found.players.valid)
    torch.testing.assert_close(found.grand, full.sigmoid(), atol=1e-5, rtol=0)
    same = ((full > 0) == (found.logits > 0)).all(1).float()
    assert torch.equal(module._surrogate_errors(batch)[1], same)
    assert found.values.sum(-1).abs().max() > 1e-3, "per label"


def test_a_binary_classifier_with_one_logit(tmp_path: Path) -> None:
    module = task(headless(1), petl.AutoGnothi(**SMALL | {"link": "sigmoid"}), surrogate_epochs=1)
    trainer(tmp_path, max_epochs=2).fit(module, Made(quadrants))
    with torch.no_grad():
        found = module.model.explain(first_batch(module, "val")["image"])
    assert found.values.shape == (16, 4, 1)
    assert found.efficiency_gap.max() < 1e-6


# ---- bad input: one clear error each

CONSTRUCTED: dict[str, tuple[Callable[[], Any], str]] = {
    "another method": (lambda: task(method=petl.SparseTuning()), "trains petl.AutoGnothi, not SparseTuning"),
    "no surrogate": (lambda: task(surrogate_epochs=0), r"surrogate_epochs=0\): 1 or more"),
    "an unknown baseline": (lambda: task(baselines=["rsie"]), "'rsie': did you mean 'rise'"),
    "odd subsets": (lambda: petl.AutoGnothi(subsets=7), "so subsets is even: 8, for instance"),
    "a negative rate": (lambda: task(surrogate_lr=-1.0), r"surrogate_lr=-1\.0\): surrogate_lr must be a number"),
    "a percentage": (lambda: task(min_agreement=95), r"min_agreement=95\): it is a share"),
    "no test inputs": (lambda: task(test_inputs=0), "1 or more, or null for all"),
    "no room for a word": (lambda: bert(max_length=2), "a start, a word and an end: 3 or more"),
    "no classifier": (lambda: task("runs/nowhere/adapter"), "'runs/nowhere/adapter' is neither an adapter .no adapter"),
    "a backbone by name": (lambda: task("bundled/tiny_clip_vision"), "or give a backbone and head_epochs"),
    "an unknown timm model": (lambda: task("timm/vit_bsae_patch16_224"), "did you mean 'timm/vit_base_patch16_224"),
    "nothing": (lambda: Explanation(classifier=None), "classifier 'None' is neither"),
    "another network": (lambda: task(nn.Linear(2, 2)), "no classifier that petl can look into"),
}


@pytest.mark.parametrize("name", CONSTRUCTED)
def test_options_that_cannot_be_right(name: str) -> None:
    make, message = CONSTRUCTED[name]
    with pytest.raises(petl.PetlError, match=message):
        make()


DIGITS = {"train_size": 32, "val_size": 10, "test_size": 0, "batch_size": 16}
TRAINED: dict[str, tuple[Callable[[], Explanation], Callable[[], Any], dict[str, Any], str]] = {
    "classes": (task, lambda: Digits(**DIGITS), {}, "the data has 10 classes, the classifier 5"),
    "no validation": (task, lambda: Made(quadrants, val=0), {}, "add a val split"),
    "no epoch": (task, lambda: Made(quadrants), {"max_epochs": 1}, "leaves no epoch for the explainer after 0 of"),
    "endless": (task, lambda: Made(quadrants), {"max_epochs": -1}, "leaves no epoch for the explainer"),
    "steps": (task, lambda: Made(quadrants), {"max_steps": 7}, "stages are whole epochs"),
    "reduction": (lambda: task(method=petl.AutoGnothi(reduction=5)), lambda: Made(quadrants), {}, "does not divide"),
    "heads": (lambda: task(method=petl.AutoGnothi(reduction=6)), lambda: Made(quadrants), {}, "does not divide into 3"),
    "players": (lambda: task(method=petl.AutoGnothi(reduction=4, players=(5, 1))), lambda: Made(quadrants), {},
                "the picture has 4 x 4 patches"),
    "no head": (lambda: task(headless()), lambda: Made(quadrants), {}, "no classification head"),
    "no count": (lambda: task(headless(), head_epochs=1), lambda: Made(quadrants), {"max_epochs": 4},
                 "number of classes is not known"),
    "texts for eyes": (task, lambda: Made(texts), {}, "made has no images to explain"),
    "images for readers": (bert, lambda: Digits(**DIGITS), {}, "this classifier reads text"),
    "no tokenizer": (lambda: task(tiny_bert_classifier()[0], petl.AutoGnothi(reduction=4)), lambda: Made(texts), {},
                     "explained with its tokenizer"),
}  # fmt: skip


@pytest.mark.parametrize("name", TRAINED)
def test_trainings_that_cannot_be_right(name: str, tmp_path: Path) -> None:
    make, data, options, message = TRAINED[name]
    with pytest.raises(petl.PetlError, match=message):
        trainer(tmp_path, **{"max_epochs": 3} | options).fit(make(), data())
    assert not [*tmp_path.iterdir()]


def test_names_of_the_data_give_way_to_those_of_the_classifier(capsys: pytest.CaptureFixture[str]) -> None:
    data = Digits(**DIGITS, image_size=32, mean=(0.5,) * 3, std=(0.5,) * 3)
    module = task(headless(10))
    module.source.labels = [f"digit {i}" for i in range(10)]
    assert under(module, data).labels == module.source.labels
    assert "['0', '1', '2', '3', '4'] are named otherwise by the classifier" in capsys.readouterr().out
    assert under(task(headless(10)), data).labels == data.labels
    assert capsys.readouterr().out == ""


def test_only_adapters_of_classifiers_are_explained(tmp_path: Path) -> None:
    save(explained(), tmp_path / "explanation")
    petl.save(grounding("vit+bert", petl.DARA(bottleneck=4, relation_dim=4, shared_dim=8)), tmp_path / "grounding")
    petl.save(petl.attach(headless(), petl.SparseTuning(bottleneck=4)), tmp_path / "features")
    save(classifier(petl.SparseTuning(bottleneck=4)), tmp_path / "dropping")
    save(classifier(), tmp_path / "fine")
    for name in ("explanation", "grounding", "features"):
        with pytest.raises(petl.PetlError, match=f"was trained for '{name}'; only classifiers are explained"):
            task(tmp_path / name)
    data = Made(quadrants)
    with pytest.raises(petl.PetlError, match="drops tokens inside this classifier"):
        under(task(tmp_path / "dropping", petl.AutoGnothi()), data)
    with pytest.raises(petl.PetlError, match="set head_epochs to 0"):
        task(tmp_path / "fine", head_epochs=2)
    module = under(task(tmp_path / "fine", petl.AutoGnothi()), data)
    assert module.labels == ["ant", "bee", "cat", "dog"]
    assert module.source.record()["backbone"] == "bundled/tiny_clip_vision"
    assert module.preprocessing["input_size"] == (3, 32, 32)
