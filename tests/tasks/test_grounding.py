"""The grounding task: loss, metrics, schedule, warnings, record."""

from __future__ import annotations

import json
import warnings
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor
from torchvision.ops import box_convert, box_iou, generalized_box_iou

import petl
from petl.backbones import bundled
from petl.data.scene_data import Scenes
from petl.tasks.grounding import Grounding
from tests.conftest import SMALL_FUSION, build

SMALL = {"bottleneck": 6, "relation_dim": 5, "shared_dim": 20}
FUSION = {**SMALL_FUSION, "query_length": 9}


def task(vision: str = "timm_vit", text: str = "hf_bert", **options: Any) -> Grounding:
    """On tiny random encoders; the tokeniser is the bundled one, whose ids are not fed to them."""
    size = {"detr": 96}.get(vision, 32)
    defaults = {"method": petl.M2IST(**SMALL), "image_size": size, "tokenizer": bundled.tokenizer(), **FUSION}
    return Grounding(build(vision), build(text), **defaults | options)


class Phrases:
    """What the task asks a data module for."""

    def __init__(self, source: str | None = None, steps: int = 4, **splits: list[str]) -> None:
        self.splits, self.image_source, self.steps_per_epoch = splits, source, steps

    def expressions(self, split: str) -> list[str]:
        return self.splits[split]


def under(module: Grounding, data: Any = None, **options: Any) -> Grounding:
    """The module as under a trainer with ``data``."""
    trainer = {"max_epochs": 3, "max_steps": -1, "accumulate_grad_batches": 1, "world_size": 1, "precision": "32-true"}
    module.trainer = SimpleNamespace(datamodule=data, **trainer | options)  # type: ignore[assignment]
    return module


def corners(*boxes: tuple[float, float, float, float]) -> Tensor:
    return box_convert(torch.tensor(boxes), "xyxy", "cxcywh")


# ---- loss and metrics


def test_loss_is_l1_plus_giou() -> None:
    loss, (predicted, truth) = Grounding.loss, torch.rand(2, 20, 4) * 0.4 + 0.1
    giou = generalized_box_iou(*(box_convert(b, "cxcywh", "xyxy") for b in (predicted, truth))).diagonal()
    expected = (predicted - truth).abs().sum(1).mean() + (1 - giou).mean()
    torch.testing.assert_close(loss(predicted, truth), expected)
    assert ((giou >= -1) & (giou <= 1)).all()
    assert loss(truth, truth).item() == pytest.approx(0, abs=1e-5)
    far = loss(corners((0, 0, 0.25, 0.25)), corners((0.75, 0.75, 1, 1)))  # hull 1, union 1/8: GIoU -7/8
    assert far.item() == pytest.approx(1.5 + 1 + 7 / 8, abs=1e-5)


@pytest.mark.parametrize("size", [0.0, 1e-8, 1e-30])
def test_loss_and_gradient_are_finite_where_boxes_vanish(size: float) -> None:
    for truth in ((0.3, 0.3, size, size), (0.5, 0.5, 0.2, 0.2), (0.3, 0.3, 0.2, size)):
        predicted = torch.tensor([[0.3, 0.3, size, size], [0.3, 0.3, 0.1, size]], requires_grad=True)
        loss = Grounding.loss(predicted, torch.tensor([truth, truth]))
        assert loss.isfinite()
        loss.backward()
        assert predicted.grad is not None
        assert predicted.grad.isfinite().all()


def test_loss_is_computed_in_fp32_under_autocast() -> None:
    predicted, truth = torch.rand(2, 8, 4) * 0.4 + 0.2
    with torch.autocast("cpu", torch.bfloat16):
        found = Grounding.loss(predicted, truth)
    assert found.dtype == torch.float32
    assert torch.equal(found, Grounding.loss(predicted, truth))


def test_hits_at_exactly_one_half_and_clamped_predictions(monkeypatch: pytest.MonkeyPatch) -> None:
    predicted = corners((0, 0, 0.5, 0.5), (0, 0, 0.5, 0.5), (-0.5, -0.5, 0.5, 0.5), (0.5, 0.5, 0.75, 0.75))
    truth = corners((0, 0, 0.5, 0.25), (0, 0, 0.5, 0.2499), (0, 0, 0.5, 0.5), (0, 0, 0.25, 0.25))
    module = task()
    monkeypatch.setattr(module, "boxes", lambda batch: predicted)
    monkeypatch.setattr(module, "log", lambda *args, **kwargs: None)
    module.test_step({"box": truth}, 0)
    assert module.metrics["test_acc"].compute().item() == 0.5
    assert module.metrics["test_iou"].compute().item() == pytest.approx((0.5 + 0.4998 + 1 + 0) / 4, abs=1e-4)


def test_predictions_are_shares_of_the_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    mask = torch.zeros(3, 64, 64, dtype=torch.bool)
    mask[0, 16:48], mask[1, :, 10:50], mask[2] = True, True, True
    boxes = torch.tensor([[0.5, 0.5, 0.5, 0.25], [30 / 64, 0.5, 40 / 64, 1.0], [0.5, 0.1, 2.0, 0.1]])
    module = task("bundled_vision", "bundled_text", image_size=None)
    monkeypatch.setattr(module, "boxes", lambda batch: boxes)
    found = module.predict_step({"mask": mask, "index": torch.arange(3), "expression": ["a", "b", "c"]}, 0)
    shares = list(zip(*(found[k] for k in ("x0", "y0", "x1", "y1")), strict=True))
    for box, expected in zip(shares, ((0.25, 0.25, 0.75, 0.75), (0, 0, 1, 1), (0, 0.05, 1, 0.15)), strict=True):
        assert box == pytest.approx(expected, abs=1e-6)


# ---- what it warns of


def warned(module: Grounding, stage: str = "fit") -> list[str]:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        module.setup(stage)
    return [str(w.message) for w in found]


def test_expressions_that_lose_something_are_counted() -> None:
    long = "the large red circle left of the small blue square"
    data = Phrases(train=["red circle", long, long], val=["blue star"], test=[long, "zyxzyx star", "vwvw qrqr"])
    module = under(task(), data)
    assert warned(module) == ["2 of 4 expressions are longer than query_length=9 and lose their end."]
    assert warned(module, "validate") == []
    test = warned(module, "test")
    assert test[0] == "1 of 3 expressions are longer than query_length=9 and lose their end."
    words = len(long.split()) + 4
    assert test[1:] == [f"{100 * 3 / words:.0f} % of the words are not in the text encoder's vocabulary."]
    assert warned(under(task(), Phrases(train=["red circle"] * 20 + ["red zyxzyx"]))) == []  # 1 of 42


def test_clips_tokenizer_has_no_token_of_its_own_for_unknown_words() -> None:
    tokenizer = bundled.tokenizer()
    tokenizer.unk_token = tokenizer.eos_token  # as in openai/clip-vit-*: "<|endoftext|>" is both
    assert warned(under(task(tokenizer=tokenizer), Phrases(train=["red circle", "blue star"]))) == []


@pytest.mark.parametrize(
    ("vision", "source", "weights", "pretrained", "leak"),
    [
        ("detr", "coco", None, True, "yes: DETR was trained on COCO, val and test images included"),
        ("detr", "coco", "a/detr-r50-unc.pth", True,
         "unknown: only if detr-r50-unc.pth was trained without the val and test images"),
        ("detr", "generated", None, True, "none known"),
        ("timm_vit", "coco", None, True, "none known"),
        ("detr", "coco", None, False, None),
    ],
)  # fmt: skip
def test_pictures_that_the_encoder_may_know(
    vision: str, source: str | None, weights: str | None, pretrained: bool, leak: str | None
) -> None:
    module = under(task(vision, pretrained=pretrained), Phrases(source, train=["red circle"]))
    module.vision_weights = weights
    message = f"image encoder and data share pictures: {leak}. Use weights trained without them (vision_weights) for "
    assert warned(module) == ([] if leak in ("none known", None) else [f"{message}numbers that count."])
    assert leak is None or module.protocol()["leak"] == leak
    assert module.protocol()["pretrained"] is pretrained


# ---- optimisation


def rates(module: Grounding, steps: int) -> list[list[float]]:
    """Learning rates of the groups at each step."""
    made: Any = module.configure_optimizers()
    seen = []
    for _ in range(steps):
        seen.append([g["lr"] for g in made["optimizer"].param_groups])
        made["optimizer"].step()
        made["lr_scheduler"]["scheduler"].step()
    assert made["lr_scheduler"]["interval"] == "step"
    return seen


def test_groups_and_step_decay() -> None:
    module = under(task(lr=1e-3, method_lr=1e-4, lr_drop=2, weight_decay=0.03), Phrases(steps=4))
    head, rest = module.parameter_groups()
    assert {id(p) for p in head["params"]} == {id(p) for p in module.model.head.parameters()}
    assert {id(p) for p in rest["params"]} == {id(p) for p in module.model.petl.parameters()}
    groups = module.configure_optimizers()["optimizer"].param_groups
    assert [g["weight_decay"] for g in groups] == [0.03, 0.03]
    found = rates(module, 12)
    assert found[:8] == [pytest.approx([1e-3, 1e-4])] * 8
    assert found[8:] == [pytest.approx([1e-4, 1e-5])] * 4
    accumulated = rates(under(module, Phrases(steps=4), accumulate_grad_batches=2), 6)
    assert [r[0] for r in accumulated] == pytest.approx([1e-3] * 4 + [1e-4] * 2)
    full = task(method=petl.FullFineTuning())
    still = {n for n, p in full.model.named_parameters() if not p.requires_grad}
    assert still == {"vision.head.weight", "vision.head.bias", "text.pooler.dense.weight", "text.pooler.dense.bias"}
    assert len(full.parameter_groups()[1]["params"]) == 123


@pytest.mark.parametrize("epochs", [None, -1])
def test_step_decay_under_max_steps(epochs: int | None) -> None:
    module = under(task(lr=1.0, lr_drop=1), Phrases(steps=4), max_epochs=epochs, max_steps=8)
    assert [r[0] for r in rates(module, 8)] == pytest.approx([1.0] * 4 + [0.1] * 4)


def test_warm_up_and_cosine_move_all_groups_alike() -> None:
    module = under(task(lr=1.0, method_lr=0.1, warmup_epochs=1, min_lr=0.25), Phrases(steps=4))
    found = rates(module, 12)
    assert [r[0] for r in found[:5]] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert all(a[0] > b[0] for a, b in pairwise(found[4:]))
    assert 0.25 < found[-1][0] < 0.4
    assert [r[1] / r[0] for r in found] == pytest.approx([0.1] * 12)
    assert len(rates(under(task(method=None), Phrases()), 1)[0]) == 1, "an empty group is left out"


def test_the_method_starts_after_the_head() -> None:
    module = under(task(lr=1.0, method_lr=0.1, warmup_epochs=0.5, head_epochs=1), Phrases(steps=4))
    head, late = zip(*rates(module, 12), strict=True)
    alone = rates(under(task(lr=1.0, warmup_epochs=0.5, method=None), Phrases(steps=4)), 12)
    assert head == pytest.approx([r[0] for r in alone])
    assert late[:4] == (0, 0, 0, 0)
    assert [b / a for a, b in zip(head[4:], late[4:], strict=True)] == pytest.approx([0.1 / 3, 0.2 / 3] + [0.1] * 6)
    assert len(rates(under(task(method=None, head_epochs=1), Phrases()), 1)[0]) == 1
    with pytest.raises(petl.PetlError, match=r"head_epochs=3\) with max_epochs=3: the method would never learn"):
        under(task(head_epochs=3), Phrases()).configure_optimizers()


def test_record() -> None:
    options = {"lr": 2e-4, "method_lr": 3e-5, "weight_decay": 0.01, "lr_drop": 2}
    record = under(task("detr", **options), Phrases("coco")).protocol()
    assert record.items() >= {"optimizer": "AdamW", "epochs": 3, **options}.items() - {("lr_drop", 2)}
    assert "divided by 10 after epoch 2" in record["schedule"]
    assert record["leak"].startswith("yes")
    assert "cosine to 1e-06" in under(task(min_lr=1e-6), Phrases()).protocol()["schedule"]
    assert json.loads(json.dumps(record)) == record


def test_head_and_adapters_start_the_same_whatever_was_drawn_before() -> None:
    torch.manual_seed(1)
    one, state = task(), torch.get_rng_state()
    torch.rand(7)
    two = task()
    assert all(torch.equal(p, dict(two.named_parameters())[n]) for n, p in one.named_parameters())
    torch.manual_seed(1)
    build("timm_vit"), build("hf_bert")
    assert torch.equal(torch.get_rng_state(), state), "building the task draws nothing"


# ---- a run


@torch.no_grad()
def test_a_picture_with_several_expressions_is_encoded_once() -> None:
    module = task("bundled_vision", "bundled_text", image_size=None)
    counts: list[int] = []
    module.model.vision.patch_embed.register_forward_hook(lambda m, a, out: counts.append(len(out)))
    which = torch.tensor([0, 0, 1, 2, 2, 2, 0])
    batch = {"image": torch.randn(3, 3, 64, 64)[which], "mask": torch.ones(7, 64, 64, dtype=torch.bool),
             "expression": ["red star", "blue star", "red star", "a ring", "a cross", "red star", "top"]}  # fmt: skip
    batch["mask"][which == 1, 32:] = False
    expected = module.eval().boxes(batch)
    torch.testing.assert_close(module.boxes(batch | {"picture": which * 7919}), expected, atol=1e-5, rtol=1e-5)
    assert counts == [7, 4]


def test_fit_and_test(tmp_path: Path) -> None:
    module = Grounding(method=petl.DARA(bottleneck=4, relation_dim=4, shared_dim=8), lr=1e-3, method_lr=1e-3,
                       lr_drop=1, **FUSION)  # fmt: skip
    data = Scenes(train_size=8, val_size=2, test_size=5, batch_size=4)
    frozen = {n: p.clone() for n, p in module.model.named_parameters() if not p.requires_grad}
    trained = {n: p.clone() for n, p in module.model.named_parameters() if p.requires_grad}
    seen: list[float] = []

    class Watch(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, *args: object) -> None:
            seen.append(trainer.optimizers[0].param_groups[1]["lr"])

    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    fit = L.Trainer(max_epochs=2, accelerator="cpu", default_root_dir=tmp_path, callbacks=[Watch()], **quiet)
    fit.fit(module, data)
    assert seen == pytest.approx([1e-3] * 4 + [1e-4] * 4)
    now = dict(module.model.named_parameters())
    assert all(torch.equal(p, now[n]) for n, p in frozen.items())
    assert not any(torch.equal(p, now[n]) for n, p in trained.items() if not n.startswith("petl") or ".up." in n)
    [found] = fit.test(module, data, verbose=False)
    batches = list(data.test_dataloader())
    with torch.no_grad():
        boxes = torch.cat([module.eval().boxes(b) for b in batches])
    truth = torch.cat([b["box"] for b in batches])
    iou = box_iou(box_convert(boxes, "cxcywh", "xyxy").clamp(0, 1), box_convert(truth, "cxcywh", "xyxy")).diagonal()
    assert len(iou) == 10
    assert found["test/acc"] == pytest.approx((iou >= 0.5).float().mean().item(), abs=1e-6)
    assert found["test/iou"] == pytest.approx(iou.mean().item(), abs=1e-5)
    assert found["test/loss"] == pytest.approx(module.loss(boxes, truth).item(), abs=1e-5)
    checkpoint: dict[str, Any] = {}
    module.on_save_checkpoint(checkpoint)
    assert checkpoint["state_dict"].keys() == trained.keys()


@pytest.mark.parametrize("method", [petl.DARA(**SMALL), petl.M2IST(**SMALL, side_seed="zero")], ids=["dara", "m2ist"])
def test_until_the_method_starts_the_head_learns_as_without_it(method: petl.Method, tmp_path: Path) -> None:
    def train(**options: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """What is trained, before the last of four steps and after it."""
        module, before = Grounding(lr=1e-3, method_lr=1e-3, **FUSION, **options), {}

        class Watch(L.Callback):
            def on_train_batch_start(self, trainer: L.Trainer, *args: object) -> None:
                before.update((n, p.clone()) for n, p in module.model.named_parameters() if p.requires_grad)

        quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
        trainer = L.Trainer(max_epochs=2, accelerator="cpu", default_root_dir=tmp_path, gradient_clip_val=0.1,
                            callbacks=[Watch()], **quiet)  # fmt: skip
        trainer.fit(module, Scenes(train_size=4, val_size=1, test_size=1, batch_size=4))
        assert trainer.global_step == 4
        return before, dict(module.model.named_parameters())

    start = dict(Grounding(method=method, **FUSION).model.petl.named_parameters())
    (alone, _), (before, after) = train(), train(method=method, head_epochs=1.5)
    assert {f"petl.{n}" for n in start} | alone.keys() == before.keys()
    assert all(torch.equal(p, before[n]) for n, p in alone.items()), "the head, through clipping and all"
    assert all(torch.equal(p, before[f"petl.{n}"]) for n, p in start.items())
    assert [n for n in start if not torch.equal(after[f"petl.{n}"], start[n])]


def test_bad_options() -> None:
    for options, message in (
        ({"head_epochs": -1}, "head_epochs=-1"),
        ({"method_lr": -1.0}, r"method_lr=-1\.0\): method_lr must be a number of at least 0"),
        ({"lr_drop": -1}, "lr_drop"),
        ({"tokenizer": None}, "needs the model's tokenizer too"),
        ({"method": petl.M2IST(shared_dim=25)}, "at most 24"),
        ({"query_length": 99}, "query_length=99"),
    ):
        with pytest.raises(petl.PetlError, match=message):
            task(**options)
    with pytest.raises(petl.PetlError, match="tiny_clip_vision"):
        Grounding(vision="bundled/tiny_clip_vison")
