"""The explanation task: losses, stages and their schedules, the gate between them."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Categorical, kl_divergence

import petl
from petl.backbones.players import Players
from petl.data import Digits
from petl.data.base import DataModule, Split
from petl.models.games import WholeGame, fixed_masks, surrogate_loss
from petl.nn.shapley import coalitions, divergence, kernel_masks, kernel_weights, uniform_size_masks
from petl.tasks.explanation import Explanation
from tests.conftest import build, tiny_bert_classifier

QUIET = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
SMALL: dict[str, Any] = {"reduction": 4, "players": (2, 2), "subsets": 4}


class Number(NamedTuple):
    """An input that is made from a number."""

    number: int

    @property
    def line(self) -> str:
        return str(self.number)


class Made(DataModule):
    """Inputs without labels, made by ``make`` from their numbers."""

    name, augmentation = "made", "none"

    def __init__(self, make: Callable[[int], dict[str, Any]], batch_size: int = 16, **sizes: int) -> None:
        super().__init__(batch_size, image_size=32, mean=(0.5,) * 3, std=(0.5,) * 3)
        self.make, self.sizes = make, {"train": 64, "val": 24, "test": 20} | sizes

    def read(self) -> None:
        for split, count in self.sizes.items():
            if count:
                start = 10_000 * [*self.sizes].index(split)
                self.splits[split] = Split(Number(start + i) for i in range(count))

    def _preprocessing(self) -> dict[str, Any]:
        return {} if self.make is texts else super()._preprocessing()

    def transform(self, training: bool) -> Callable[[Number], dict[str, Any]]:
        return lambda sample: self.make(sample.number)

    def describe(self, split: str) -> str:
        return split

    def varies(self, split: str, stream: str = "image") -> str | None:
        return None if self.augmentation == "none" else "they do"

    def contents(self, split: str, stream: str = "image") -> list[str]:
        return [sample.line for sample in self.splits[split].samples]

    def light(self, sample: Number) -> dict[str, Any]:
        return {}


def quadrants(number: int) -> dict[str, Tensor]:
    """A picture whose quadrants are each one of three textures, with noise."""
    textures = 1.5 * torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(number)
    a, b, c, d = textures[torch.randint(3, (4,), generator=generator)]
    picture = torch.cat([torch.cat([a, b], 2), torch.cat([c, d], 2)], 1)
    return {"image": picture + 0.3 * torch.randn(picture.shape, generator=generator)}


TEXTS = ("a fine film", "", "dull", "a dull and empty film with a fine ending", "not fine at all", "endings")


def texts(number: int) -> dict[str, str]:
    """Of 8 to 0 words; the first four of training are empty."""
    return {"text": "" if number < 4 else TEXTS[number % 6]}


def task(classifier: Any = None, method: Any = None, **options: Any) -> Explanation:
    options = {"surrogate_epochs": 1} | options
    return Explanation(classifier or build("timm_vit"), method or petl.AutoGnothi(**SMALL), **options)


def headless(classes: int = 0) -> nn.Module:
    model = build("timm_vit")
    model.reset_classifier(classes)  # type: ignore[operator]
    return model


def bert(**options: Any) -> Explanation:
    model, tokenizer = tiny_bert_classifier()
    return task(model, petl.AutoGnothi(reduction=4, subsets=4), tokenizer=tokenizer, **options)


def trainer(folder: Path, **options: Any) -> L.Trainer:
    return L.Trainer(**{"accelerator": "cpu", "default_root_dir": folder, "log_every_n_steps": 1, **QUIET, **options})


def under(module: Explanation, data: Any, stage: str = "fit", **options: Any) -> Explanation:
    """The module as under a trainer with ``data``, set up."""
    defaults = {"max_epochs": 3, "max_steps": -1, "accumulate_grad_batches": 1, "world_size": 1, "current_epoch": 2,
                "precision": "32-true", "state": SimpleNamespace(fn=stage)}  # fmt: skip
    if hasattr(data, "setup"):
        data.setup(stage)
    module.trainer = SimpleNamespace(datamodule=data, **defaults | options)  # type: ignore[assignment]
    module.setup(stage)
    return module


def first_batch(module: Explanation, split: str = "train") -> dict[str, Any]:
    return next(iter(module.data.evaluation_loader(split)))


# ---- losses


@pytest.mark.parametrize("link", ["softmax", "sigmoid"])
def test_the_surrogate_learns_the_mean_of_what_it_cannot_tell_apart(link: str) -> None:
    """Two inputs that coincide under the mask: one output for both, E[f | x_S], as forward KL has it."""
    p = torch.tensor([[0.90, 0.08, 0.02], [0.10, 0.10, 0.80]])
    f = p.log() + 3 if link == "softmax" else p.logit()
    free = torch.zeros(3, requires_grad=True)
    optimizer = torch.optim.Adam([free], lr=0.05)
    for _ in range(400):
        optimizer.zero_grad()
        divergence(f, free.expand(2, 3), link).mean().backward()
        optimizer.step()
    found = free.detach().softmax(-1) if link == "softmax" else free.detach().sigmoid()
    torch.testing.assert_close(found, p.mean(0), atol=1e-3, rtol=0)
    geometric = p.log().mean(0).softmax(-1)
    assert link != "softmax" or (geometric - found).abs().max() > 0.1, "what reversed KL would find"


def test_divergences_are_those_of_the_distributions() -> None:
    f, g = 3 * torch.randn(2, 7, 5)
    torch.testing.assert_close(divergence(f, g, "softmax"), kl_divergence(Categorical(logits=f), Categorical(logits=g)))
    labels = kl_divergence(Bernoulli(logits=f), Bernoulli(logits=g)).sum(-1)
    torch.testing.assert_close(divergence(f, g, "sigmoid"), labels, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(divergence(f[:, :1], g[:, :1], "sigmoid"), divergence(  # binary: two classes, or a label
        torch.cat([f[:, :1], 0 * f[:, :1]], 1), torch.cat([g[:, :1], 0 * g[:, :1]], 1), "softmax"
    ), atol=1e-5, rtol=1e-4)  # fmt: skip
    for link in ("softmax", "sigmoid"):
        assert divergence(f, f, link).abs().max() < 1e-6
        assert divergence(f.bfloat16(), g.bfloat16(), link).dtype == torch.float32
        assert divergence(60 * f, -60 * f, link).isfinite().all()
    torch.testing.assert_close(divergence(f + 2, g - 5, "softmax"), divergence(f, g, "softmax"))
    assert divergence(f, 2 * f, "softmax").min() > 0.01, "logits, not probabilities"


def test_inputs_that_coincide_under_the_mask_have_one_output_and_two_targets() -> None:
    module = under(task(), Made(quadrants))
    x = first_batch(module)["image"][:1].repeat(2, 1, 1, 1)
    x[1, :, :16, :16] = -x[1, :, :16, :16]
    masks = torch.tensor([[False, True, True, True]] * 2)
    found, f = module.model.surrogate_logits(x, masks), module.model.logits(x)
    torch.testing.assert_close(found[0], found[1], atol=1e-6, rtol=0)  # the same but for their places in the batch
    assert not torch.allclose(f[0], f[1], atol=0.01)
    torch.testing.assert_close(surrogate_loss(module.model, x, f, masks), divergence(f, found, "softmax"))


@pytest.mark.parametrize("grand", ["surrogate", "main"])
def test_the_tabulated_loss_is_the_expectation_of_the_sampled_one(grand: str) -> None:
    module = under(task(method=petl.AutoGnothi(**SMALL | {"grand": grand})), Made(quadrants), max_epochs=60)
    module.epochs["surrogate"] = 1
    batch = first_batch(module)
    x = module.inputs(batch)
    explainer = [*module.model.petl.explainer.parameters()]
    module.model.petl.explainer.mlp[-1].weight.data.mul_(30)  # type: ignore[operator,union-attr]
    tabulated = module._explainer_loss(batch)
    assert len(module._kept["train"]) == 64
    expected = torch.zeros(())
    for row, weight in zip(coalitions(4), kernel_weights(4).tolist()):
        masks = row.expand(len(x), 1, 4)
        expected = expected + weight * module._sampled_loss(batch, masks, module.model.values(x, masks))
    assert float(expected) > 1e-5
    if grand == "surrogate":  # otherwise its sum is not that of the game, which adds a constant
        torch.testing.assert_close(tabulated, expected, rtol=1e-4, atol=1e-8)
    for one, two in zip(torch.autograd.grad(tabulated, explainer), torch.autograd.grad(expected, explainer)):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-6)


def test_when_games_are_tabulated() -> None:
    for method, options, expected in (
        ({}, {}, True),
        ({"subsets": 2}, {"max_epochs": 8}, False),  # there are 16 coalitions, training draws 14
        ({"sampler": "vitshapley"}, {}, False),
        ({"players": (4, 4)}, {}, False),
    ):
        module = under(task(method=petl.AutoGnothi(**SMALL | method)), Made(quadrants), **{"max_epochs": 30} | options)
        assert isinstance(module.game(), WholeGame) == expected, method
    data = Made(quadrants)
    data.augmentation = "shift"
    assert under(task(), data, max_epochs=90).game() is None


def test_validation_masks_depend_on_the_input_alone() -> None:
    counts = torch.tensor([5, 0, 3, 1, 5])
    index = torch.tensor([4, 9, 2, 7, 4])
    together = fixed_masks(Players(torch.zeros(5, 7), counts, 6), index, lambda n, g: kernel_masks(n, 6, g))
    assert together.shape == (5, 6, 6)
    assert together[1].sum() == together[3].sum() == 0
    assert torch.equal(together[0], together[4])
    for i in range(5):
        alone = fixed_masks(Players(torch.zeros(1, 7), counts[i : i + 1], 5), index[i : i + 1], uniform_size_masks)
        again = fixed_masks(Players(torch.zeros(1, 7), counts[i : i + 1], 5), index[i : i + 1], uniform_size_masks)
        assert torch.equal(alone, again)
        single = fixed_masks(
            Players(torch.zeros(1, 7), counts[i : i + 1], 6), index[i : i + 1], lambda n, g: kernel_masks(n, 6, g)
        )
        assert torch.equal(together[i], single[0])
    module = under(task(), Made(quadrants))
    batch = first_batch(module, "val")
    torch.rand(3)
    errors = [module._surrogate_errors(batch) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*errors))
    parts = [{k: v[p] for k, v in batch.items()} for p in (slice(0, 5), slice(5, None))]
    halves = [module._surrogate_errors(part)[0] for part in parts]
    torch.testing.assert_close(torch.cat(halves), errors[0][0], atol=1e-6, rtol=1e-4)


# ---- stages


def rates(module: Explanation, steps: int) -> list[list[float]]:
    """Learning rates of the groups at each step."""
    made: Any = module.configure_optimizers()
    seen = []
    for _ in range(steps):
        seen.append([g["lr"] for g in made["optimizer"].param_groups])
        made["optimizer"].step()
        made["lr_scheduler"]["scheduler"].step()
    return seen


def test_each_stage_has_its_own_schedule_and_rests_outside_of_it() -> None:
    data = Made(quadrants, batch_size=1, train=20)
    module = task(surrogate_epochs=2, surrogate_lr=1.0, lr=0.5)
    surrogate, explainer = zip(*rates(under(module, data, max_epochs=5), 100))
    assert surrogate[:3] == pytest.approx([1 / 3, 2 / 3, 1.0]), "5 % of 40 steps"
    assert surrogate[21] == pytest.approx(0.5, abs=1e-6)
    assert all(a > b > 0 for a, b in pairwise(surrogate[2:40]))
    assert surrogate[40:] == (0.0,) * 60
    assert explainer[:40] == (0.0,) * 40
    assert explainer[40:44] == pytest.approx([0.125, 0.25, 0.375, 0.5])
    assert 0 < explainer[-1] < 0.001
    data = Made(quadrants, batch_size=16, train=64)
    data.num_classes = 3  # type: ignore[attr-defined]
    module = task(headless(), head_epochs=1, surrogate_epochs=1, head_lr=3.0)
    found = rates(under(module, data, max_epochs=3, accumulate_grad_batches=2), 6)
    assert [[r > 0 for r in step] for step in found] == [[i == s // 2 for i in range(3)] for s in range(6)]
    assert found[0][0] == 3.0
    groups: Any = module.configure_optimizers()
    sizes = [sum(p.numel() for p in g["params"]) for g in groups["optimizer"].param_groups]
    assert sizes == [24 * 3 + 3, *module.method.explainer_parameter_count(module.model.view, 3)]


class Watch(L.Callback):
    """Which tensors each step moves, and what the explainer starts from."""

    def __init__(self) -> None:
        self.moved: list[set[str]] = []
        self.start: dict[str, Tensor] = {}
        self.stages: list[str] = []

    def copy(self, module: Any) -> dict[str, Tensor]:
        return {n: p.detach().clone() for n, p in module.model.named_parameters()}

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, *_: Any) -> None:
        self.before = self.copy(module)
        self.stages.append(module.stage())
        if not self.start and module.stage() == "explainer":
            self.start = self.before

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, *_: Any) -> None:
        now = self.copy(module)
        parts = {"classifier.backbone": "backbone", "classifier.head": "head", "petl.surrogate": "surrogate"}
        self.moved.append({
            next((v for k, v in parts.items() if n.startswith(k)), "explainer")
            for n in now if not torch.equal(now[n], self.before[n])
        })  # fmt: skip
        assert not any(p.grad is not None and p.grad.any() for s in ("head", "surrogate", "explainer")
                       for p in module.tensors(s) if s != module.stage())  # fmt: skip


def test_tensors_outside_their_stage_do_not_move(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = Digits(train_size=48, val_size=22, test_size=10, batch_size=16, augmentation="shift")
    module, watch = task(headless(), head_epochs=1, surrogate_epochs=2, weight_decay=0.5), Watch()
    fit = trainer(tmp_path, max_epochs=4, callbacks=[watch], gradient_clip_val=1.0)
    fit.fit(module, data)
    expected = ["head"] * 3 + ["surrogate"] * 6 + ["explainer"] * 3
    assert watch.stages == expected
    assert watch.moved == [{stage} for stage in expected], "no weight decay, no moments of Adam"
    ladders = [{n.removeprefix(p): t for n, t in watch.start.items() if n.startswith(p)}
               for p in ("petl.surrogate.ladder.", "petl.explainer.ladder.")]  # fmt: skip
    assert len(ladders[0]) > 20
    assert all(torch.equal(t, ladders[1][n]) for n, t in ladders[0].items()), "the explainer starts as the surrogate"

    # the gate: measured once on the whole validation split, said, stored
    errors = [module._surrogate_errors(batch) for batch in data.evaluation_loader("val")]
    gate = module.gate
    assert gate["inputs"] == 22
    assert gate["kl"] == pytest.approx(float(torch.cat([e[0] for e in errors]).mean()), abs=1e-6)
    assert gate["agreement"] == pytest.approx(float(torch.cat([e[1] for e in errors]).mean()), abs=1e-6)
    assert json.loads((tmp_path / "surrogate.json").read_text()) == gate
    line = f"surrogate: KL {gate['kl']:.4f} on masked inputs, agrees with the classifier on "
    assert capsys.readouterr().out.count(f"{line}{100 * gate['agreement']:.1f} % of 22 full inputs (validation)") == 1
    protocol = module.protocol()
    assert protocol["surrogate"] == gate
    assert protocol["stages"] == {"head": 1, "surrogate": 2}
    assert json.loads(json.dumps(protocol)) == protocol
    checkpoint: dict[str, Any] = {}
    module.on_save_checkpoint(checkpoint)
    other = under(task(build("timm_vit"), petl.AutoGnothi(**SMALL)), Made(quadrants))
    assert checkpoint["surrogate_gate"] == gate
    with pytest.raises(petl.PetlError, match="do not fit"):
        other.on_load_checkpoint(checkpoint)
    assert other.gate == {}
    saved = module.save_adapter(tmp_path / "a", {"training": protocol})
    assert json.loads((saved / "adapter_config.json").read_text())["protocol"]["training"]["surrogate"] == gate
    [validated] = fit.validate(module, data, verbose=False)
    assert validated["val/kl"] == pytest.approx(gate["kl"], abs=1e-6)
    assert validated == fit.validate(module, data, verbose=False)[0], "the same masks again"
    assert module.model.petl.knows_null
    null = module.model.null(first_batch(module, "val")["image"])[0]
    torch.testing.assert_close(null, module.model.petl.null, atol=1e-6, rtol=0)


def test_a_surrogate_that_is_too_bad_stops_the_training(tmp_path: Path) -> None:
    module = task(surrogate_epochs=1, surrogate_lr=0.0, min_agreement=1.0)
    with pytest.raises(petl.PetlError) as caught:
        trainer(tmp_path, max_epochs=3).fit(module, Made(quadrants))
    assert "of the validation inputs, min_agreement asks for 100.0 %" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["surrogate.json"]
    assert json.loads((tmp_path / "surrogate.json").read_text())["agreement"] < 1
    assert not module.model.petl.knows_null
