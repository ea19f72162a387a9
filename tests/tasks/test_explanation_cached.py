"""Explanations trained from recorded activations and kept games: the same results as without."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

import petl
from petl.adapters.state import trained_tensors
from petl.data import Digits, Sentences
from petl.data.cached import CachedStages
from petl.engine.tap_cache import TapCache
from petl.models.games import Bank, fixed_masks
from petl.models.recorded import Recorded
from petl.nn.shapley import kernel_masks, shapley_loss
from petl.tasks.explanation import Explanation
from tests.adapters.explained import classifier
from tests.conftest import build
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

MANY: dict[str, Any] = {"reduction": 4, "subsets": 4}  # 16 players: too many to tabulate


class Passes(L.Callback):
    """How many pictures pass the patch embedding unmasked or masked, and are decoded, by stage."""

    def __init__(self) -> None:
        self.pictures: dict[str, int] = {}
        self.without: dict[str, int] = {}

    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        layer = next(m for m in pl_module.model.classifier.modules() if isinstance(m, torch.nn.Conv2d))
        self.task, self.counting = pl_module, False
        layer.register_forward_hook(self.count)

    def count(self, layer: Any, args: Any, out: Tensor) -> None:
        if self.counting:
            stage = self.task.stage()
            self.pictures[stage] = self.pictures.get(stage, 0) + len(out)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.counting, stage = True, pl_module.stage()
        self.without[stage] = self.without.get(stage, 0) + ("image" not in batch)

    def on_train_batch_end(self, *args: Any) -> None:
        self.counting = False


def digits(**options: Any) -> Digits:
    return Digits(**{"train_size": 48, "val_size": 21, "test_size": 8, "batch_size": 16} | options)


def run(
    folder: Path, cache: TapCache | None, method: dict[str, Any], data: Any = None, make: Any = headless, **options: Any
) -> tuple[dict[str, Tensor], dict[str, float], Passes]:
    L.seed_everything(5)
    options = {"head_epochs": 1, "surrogate_epochs": 2} | options
    module, watch = Explanation(make(), petl.AutoGnothi(**method), **options), Passes()
    fit = trainer(folder, max_epochs=6, callbacks=[*([cache] if cache else []), watch], num_sanity_val_steps=0)
    fit.fit(module, data or digits())
    return trained_tensors(module.model), {k: float(v) for k, v in fit.callback_metrics.items()}, watch


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(t, two[n]) for n, t in one.items())


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "whole games": (SMALL | {"subsets": 8}, {}),
    "drawn": (MANY, {}),
    "a bank": (MANY, {"bank": 16}),
    "gates and some blocks": (MANY | {"form": "gate", "layers": (1,)}, {}),
    "the classifier's sum": (MANY | {"grand": "main"}, {}),
    "mean colour": (SMALL | {"removal": "mean"}, {}),
}


@pytest.mark.parametrize("name", CASES)
def test_fp32_cache_changes_no_bit(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    method, options = CASES[name]
    tensors, metrics, plain = run(tmp_path / "a", None, method, **options)
    cache = TapCache("require", str(tmp_path / "taps"), dtype="float32")
    cached, found, watch = run(tmp_path / "b", cache, method, **options)
    assert same(tensors, cached)
    assert metrics == found
    out = capsys.readouterr().out
    assert "features of 69 images (train, val)" in out
    assert "69 computed now and 0 found" in out
    kept = name in ("whole games", "a bank")
    assert watch.without == {"head": 3, "surrogate": 0, "explainer": 9 * kept}
    assert "head" not in watch.pictures
    assert watch.pictures["surrogate"] == plain.pictures["surrogate"] // 2, "the masked pass alone is left"
    if name == "whole games":
        assert watch.pictures["explainer"] == plain.pictures["explainer"] - 3 * 48, "playing the games is left"
    again, found, _ = run(
        tmp_path / "c", TapCache("require", str(tmp_path / "taps"), dtype="float32"), method, **options
    )
    assert same(tensors, again)
    assert metrics == found
    assert "0 computed now and 69 found" in capsys.readouterr().out
    for key in (json.loads(p.read_text())["key"] for p in (tmp_path / "taps").glob("*/key.json")):
        assert {"classifier", "structure", "preprocessing", "precision", "device"} <= key.keys()


def test_a_trained_classifier_is_not_taken_for_another(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def trained(scale: float, head: float, cache: bool = True) -> dict[str, Tensor]:
        model = classifier(petl.AdaptFormer(bottleneck=4, scale=scale))
        model.head.fc.weight.data.mul_(head)  # type: ignore[operator,union-attr]
        callback = TapCache("require", str(tmp_path / "taps"), dtype="float32") if cache else None
        return run(tmp_path / "run", callback, SMALL, Made(quadrants, train=32), lambda: model, head_epochs=0)[0]

    for scale, head in ((0.1, 1), (0.2, 1), (0.2, 2)):
        assert same(trained(scale, head), trained(scale, head, False))
        assert "logits of 56 images (train, val), 0.0 MiB, 56 computed now and 0 found" in capsys.readouterr().out


def test_a_limit_or_bf16_or_a_random_transform(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    method, options = CASES["drawn"]
    tensors, metrics, _ = run(tmp_path / "a", None, method, **options)
    small = TapCache("auto", str(tmp_path / "taps"), limit="0.06MB", dtype="float32")
    partial, found, _ = run(tmp_path / "b", small, method, **options)
    assert "are computed at every step (limit)" in capsys.readouterr().out
    assert same(tensors, partial)
    assert metrics == found
    rounded, found, _ = run(tmp_path / "c", TapCache("require", "memory"), method, **options)
    assert not same(tensors, rounded)
    assert found["val/loss"] == pytest.approx(metrics["val/loss"], rel=0.05)
    method = CASES["whole games"][0]
    tensors, metrics, _ = run(tmp_path / "f", None, method)
    small = TapCache("auto", str(tmp_path / "less"), limit="0.01MB", dtype="float32")
    partial, found, _ = run(tmp_path / "g", small, method)
    assert same(tensors, partial), "games that find no room there are kept in memory"
    assert metrics == found
    data = digits(augmentation="shift")
    method, options = CASES["drawn"]
    tensors, metrics, _ = run(tmp_path / "d", None, method, data, **options)
    shifted, found, watch = run(tmp_path / "e", TapCache("require", "memory", dtype="float32"), method, data, **options)
    assert "since augmentation 'shift' changes its pictures at random" in capsys.readouterr().out
    assert same(tensors, shifted)
    assert metrics == found
    assert not any(watch.without.values())


def test_games_are_found_again_for_the_same_surrogate_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    played: list[int] = []
    values = petl.ExplainedClassifier.values

    def counted(self: Any, x: Any, masks: Tensor, *rest: Any) -> Tensor:
        played.append(masks[..., 0].numel())
        return values(self, x, masks, *rest)

    monkeypatch.setattr(petl.ExplainedClassifier, "values", counted)
    method = SMALL | {"subsets": 8}
    counts = []
    for rate in (1e-3, 1e-3, 2e-3):
        played.clear()
        run(tmp_path / "run", TapCache("auto", str(tmp_path / "taps"), dtype="float32"), method, surrogate_lr=rate)
        counts.append(sum(played))
    assert counts[0] == counts[2] == counts[1] + 48 * 16 + 21 * 8, "of training and of validation inputs"


def test_validation_is_judged_once_where_there_is_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    judged: list[int] = []
    play = Explanation._play

    def counted(self: Any, what: Any, batch: dict[str, Any]) -> dict[str, Tensor]:
        judged.append(len(batch["index"]))
        return play(self, what, batch)

    monkeypatch.setattr(Explanation, "_play", counted)
    counts, found = [], []
    for cache in (None, TapCache("off"), TapCache("auto", "memory", dtype="float32"),
                  TapCache("auto", str(tmp_path / "taps"), limit="0.02MB", dtype="float32")):  # fmt: skip
        judged.clear()
        found.append(run(tmp_path / "run", cache, MANY)[:2])
        counts.append(sum(judged))
    assert counts[:3] == [3 * 21, 3 * 21, 21]
    assert counts[3] > 3 * 5
    assert all(same(found[0][0], tensors) and found[0][1] == metrics for tensors, metrics in found)


def test_checkpointing_changes_no_bit(tmp_path: Path) -> None:
    (one, metrics, _), (two, found, _) = (run(tmp_path / "run", None, MANY, checkpointing=c) for c in (True, False))
    assert same(one, two)
    assert metrics == found


def test_stages_ask_for_what_they_need() -> None:
    class Reader:
        def __init__(self, name: str, gone: set[int]) -> None:
            self.name, self.gone = name, gone

        def read(self, indices: list[int]) -> tuple[dict[str, Tensor], list[int]]:
            return {self.name: torch.tensor(indices)}, [row for row, i in enumerate(indices) if i in self.gone]

    data = Made(quadrants)
    data.setup("fit")
    needs = ((0, frozenset({"a"})), (2, frozenset({"image", "a"})), (5, frozenset({"a", "b"})))
    batches = CachedStages(data.entries("train"), data.light, {"a": Reader("x", set()), "b": Reader("y", {3})}, needs)
    keys = [7, 3, 9]
    seen = {epoch: batches.__getitems__([(epoch, i) for i in keys]) for epoch in (0, 1, 2, 4, 5, 9)}
    assert [sorted(batch["taps"]) for batch in seen.values()] == [["a"]] * 4 + [["a", "b"]] * 2
    assert ["image" in batch for batch in seen.values()] == [False, False, True, True, False, False]
    pictures = torch.stack([quadrants(i)["image"] for i in keys])
    assert torch.equal(seen[2]["image"], pictures)
    assert all(batch["index"].tolist() == keys for batch in seen.values())
    assert seen[4]["missing"] == {}
    assert seen[5]["missing"]["b"]["rows"].tolist() == [1]
    assert torch.equal(seen[5]["missing"]["b"]["image"], pictures[1:2])
    without = CachedStages(data.entries("train"), data.light, {}, needs)  # nothing was recorded: pictures for all
    assert torch.equal(without.__getitems__([(0, i) for i in keys])["image"], pictures)


@pytest.mark.parametrize("options", [{}, {"form": "gate"}, {"removal": "mean"}, {"grand": "main"}], ids=str)
def test_explained_from_what_was_recorded(options: dict[str, Any]) -> None:
    model = petl.ExplainedClassifier(build("timm_vit"), petl.AutoGnothi(**SMALL | options))
    x = torch.randn(3, 3, 32, 32)
    recorded = Recorded(model.logits(x), model.record(x), (32, 32))
    for knows in (False, True):
        if knows:
            model.measure_null(x)
        one, two = model.explain(x), model.explain(recorded)
        for part in ("logits", "values", "null", "grand"):
            assert torch.equal(getattr(one, part), getattr(two, part)), part
        assert one.grid == two.grid == (2, 2)
        grads = [torch.autograd.grad(e.values.square().sum(), model.petl.explainer.parameters()) for e in (one, two)]
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


# ---- the bank


def test_a_bank_follows_from_the_number_of_the_input() -> None:
    module = under(task(method=petl.AutoGnothi(**MANY), bank=12), Made(quadrants))
    game, batch = module.game(), first_batch(module)
    assert isinstance(game, Bank)
    kept = game.play(module.model, batch["image"], batch["index"])
    assert kept["masks"].shape == (16, 12, 16)
    assert torch.equal(kept["masks"][:, ::2], ~kept["masks"][:, 1::2]), "pairs"
    players = module.model.players(batch["image"])
    for row in (0, 7):
        expected = kernel_masks(torch.tensor([16]), 12, torch.Generator().manual_seed(row))[0]
        assert torch.equal(kept["masks"][row], expected)
    torch.testing.assert_close(kept["values"], module.model.values(batch["image"], kept["masks"], players))
    torch.testing.assert_close(kept["null"][3], module.model.null(batch["image"])[3])
    torch.testing.assert_close(kept["grand"], module.model.values(batch["image"], players.valid[:, None])[:, 0])


def test_the_mean_over_draws_is_the_loss_on_the_whole_bank() -> None:
    module = under(task(method=petl.AutoGnothi(**MANY), bank=12), Made(quadrants))
    batch = first_batch(module)
    game: Any = module.game()
    kept = game.play(module.model, batch["image"], batch["index"])
    found = module.model.explain(batch["image"], kept["null"], kept["grand"])
    whole = shapley_loss(found.values, kept["masks"], kept["values"], kept["null"])
    torch.manual_seed(0)
    drawn = torch.stack([game.loss(found, kept) for _ in range(400)])
    assert drawn.std() > 1e-3 * whole
    assert abs(float(drawn.mean() - whole)) < 4 * float(drawn.std()) / 20
    everything = Bank(12, 12, "kernel", 16)
    torch.testing.assert_close(everything.loss(found, kept), whole)


def test_when_a_bank_is_used() -> None:
    def game(method: dict[str, Any], bank: int | None, epochs: int = 60) -> Any:
        return under(task(method=petl.AutoGnothi(**method), bank=bank), Made(quadrants), max_epochs=epochs).game()

    assert str(game(SMALL, 16)) == "16 coalitions of 4 players", "all that there are"
    assert isinstance(game(SMALL, 14), Bank)
    assert isinstance(game(SMALL | {"sampler": "vitshapley"}, 16), Bank)
    assert isinstance(game(MANY, 8), Bank)
    assert game(MANY, None) is None
    for bank in (5, 2):
        with pytest.raises(petl.PetlError, match=f"bank={bank}.: an even number of coalitions, no less than the 4"):
            task(bank=bank)
    data = Made(quadrants)
    data.augmentation = "shift"
    with pytest.raises(petl.PetlError, match="bank=8: values are kept of inputs that stay the same, but they do"):
        under(task(bank=8), data)


def test_sentences_stay_the_same(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("1 fine\n0 dull\n1 fine\n0 long\n")
    data = Sentences(str(tmp_path / "a.txt"), val_size=0)
    data.setup("fit")
    fine, dull, again, _ = digests = data.contents("train")
    assert fine == again != dull
    assert {len(d) for d in digests} == {64}
    assert data.varies("train") is None


def test_a_bank_of_texts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module, data = bert(bank=8), Made(texts, batch_size=4, test=0)
    fit = trainer(tmp_path, max_epochs=3, callbacks=[TapCache("auto", "memory")])
    fit.fit(module, data)
    out = capsys.readouterr().out
    assert "cache: none, since a text is padded to the longest of its batch" in out
    assert "the game of every training input is computed once: 8 coalitions of up to 24 players" in out
    batch = first_batch(module)
    x = module.inputs(batch)
    kept = module._once("train", {}, module.game().play, batch)  # type: ignore[union-attr]
    players = module.model.players(x)
    masks = fixed_masks(players, batch["index"], lambda n, g: kernel_masks(n, 8, g))
    assert torch.equal(kept["masks"][..., : players.most].bool(), masks)
    torch.testing.assert_close(kept["values"], module.model.values(x, masks, players), atol=1e-6, rtol=1e-5)
