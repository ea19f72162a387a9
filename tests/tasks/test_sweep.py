"""Sweeps of methods beside one network: every member ends as it would alone; labels of their own; adapters; resume."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

import petl
from petl.adapters.artefact import read_config
from petl.adapters.state import trained_tensors
from petl.data import Digits
from petl.engine.checkpoints import AtomicCheckpointIO
from tests.conftest import build
from tests.tasks.test_classification import SIZES, trainer

MEMBERS: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "gate.r4": {"options": {"reduction": 4, "form": "gate"}, "lr": 3e-3, "seed": 5, "warmup_epochs": 1, "min_lr": 1e-4},
    "probe": {"method": "linear_probe", "head": "bn_linear", "weight_decay": 0.1},
    "low": {"method": petl.LadderSideTuning(reduction=8, layers=(1, 3)), "label_smoothing": 0.1, "seed": 0},
}
METHODS = {
    "plain": petl.LadderSideTuning(reduction=2),
    "gate.r4": petl.LadderSideTuning(reduction=4, form="gate"),
    "probe": petl.LinearProbe(),
    "low": petl.LadderSideTuning(reduction=8, layers=(1, 3)),
}
COMMON: dict[str, Any] = {"lr": 1e-2, "weight_decay": 1e-3}
CLIP = {"gradient_clip_val": 0.5}


def sweep(members: Any = None, **options: Any) -> petl.SideSweep:
    backbone = build("timm_vit")
    L.seed_everything(0, verbose=False)
    return petl.SideSweep(members or MEMBERS, backbone, petl.LadderSideTuning(reduction=2), **COMMON | options)


def member_tensors(module: petl.SideSweep, name: str) -> dict[str, Tensor]:
    with module.alone(name) as model:
        return {k: v.clone() for k, v in trained_tensors(model).items()}


def equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> petl.SideSweep:
    module, data = sweep(), Digits(**SIZES)
    fit = trainer(tmp_path_factory.mktemp("sweep"), **CLIP)
    fit.fit(module, data)
    return module


@pytest.mark.parametrize("name", MEMBERS)
def test_each_member_ends_as_it_would_alone(name: str, trained: petl.SideSweep, tmp_path: Path) -> None:
    settings = {k: v for k, v in (MEMBERS[name] or {}).items() if k not in ("method", "options", "seed")}
    backbone = build("timm_vit")
    L.seed_everything((MEMBERS[name] or {}).get("seed", 0), verbose=False)
    alone = petl.Classification(backbone, METHODS[name], **COMMON | settings)
    fit = trainer(tmp_path, **CLIP)
    fit.fit(alone, Digits(**SIZES))
    assert equal(member_tensors(trained, name), trained_tensors(alone.model))  # bit for bit
    [found] = fit.test(alone, Digits(**SIZES), verbose=False)
    [together] = trained.trainer.test(trained, Digits(**SIZES), verbose=False)
    for key in ("loss", "acc", "mean_class_acc"):
        assert together[f"test/{name}/{key}"] == found[f"test/{key}"]


def test_the_backbone_stays_as_it_was(trained: petl.SideSweep) -> None:
    before, now = build("timm_vit").state_dict(), trained.backbone.state_dict()
    assert all(torch.equal(before[n], now[n]) for n in before if not n.startswith("head."))
    trainable = {id(p) for p in trained.model.parameters() if p.requires_grad}
    optimised = [p for g in trained.trainer.optimizers[0].param_groups for p in g["params"]]
    assert len(trained.trainer.optimizers[0].param_groups) == len(MEMBERS)
    assert {id(p) for p in optimised} == trainable - {id(p) for p in trained.backbone.head.parameters()}


def test_recorded_activations_train_the_same(trained: petl.SideSweep, tmp_path: Path) -> None:
    from lightning.pytorch.callbacks import LambdaCallback

    from petl.engine.tap_cache import TapCache

    module = sweep()
    cache = TapCache("require", "memory", dtype="float32")
    splits: list[str] = []
    watch = LambdaCallback(on_train_start=lambda trainer, task: splits.extend(trainer.datamodule.cached))
    trainer(tmp_path, callbacks=[cache, watch], **CLIP).fit(module, Digits(**SIZES))
    assert set(splits) == {"train", "val"}
    for name in MEMBERS:
        assert equal(member_tensors(module, name), member_tensors(trained, name))


def test_recomputed_side_blocks_train_the_same(trained: petl.SideSweep, tmp_path: Path) -> None:
    module = sweep(checkpointing=True)
    trainer(tmp_path, **CLIP).fit(module, Digits(**SIZES))
    assert [m.checkpointing for m in module.side.members] == [True] * len(MEMBERS)
    for name in MEMBERS:
        assert equal(member_tensors(module, name), member_tensors(trained, name))
    assert [m.checkpointing for m in module.side.members] == [True] * len(MEMBERS)


def test_a_run_that_was_stopped_ends_the_same(trained: petl.SideSweep, tmp_path: Path) -> None:
    class Save(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
            if trainer.global_step == 8:
                trainer.save_checkpoint(tmp_path / "last.ckpt")
                raise KeyError("the power went out")

    options = CLIP | {"enable_checkpointing": True}
    with pytest.raises(KeyError, match="power"):
        trainer(tmp_path, callbacks=[Save()], plugins=[AtomicCheckpointIO()], **options).fit(sweep(), Digits(**SIZES))
    module = sweep()
    fit = trainer(tmp_path, plugins=[AtomicCheckpointIO()], **options)
    fit.fit(module, Digits(**SIZES), ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    for name in MEMBERS:
        assert equal(member_tensors(module, name), member_tensors(trained, name))
    other = sweep({"plain": None})
    with pytest.raises(petl.PetlError, match="do not fit the model"):
        trainer(tmp_path).fit(other, Digits(**SIZES), ckpt_path=tmp_path / "last.ckpt", weights_only=True)


def test_adapters_load_and_predict_the_same(trained: petl.SideSweep, tmp_path: Path, images: Tensor) -> None:
    logits = [x.detach() for x in trained.model.eval()(images)]
    record = {"metrics": {"val/gate.r4/acc": 0.25, "val/plain/acc": 0.5}, "training": {}}
    assert trained.save_adapter(tmp_path / "adapter", record) == tmp_path
    assert {p.name for p in tmp_path.iterdir()} == set(MEMBERS)
    for name, expected in zip(MEMBERS, logits):
        predictor = petl.load(tmp_path / name / "adapter", backbone=build("timm_vit"))
        assert torch.equal(predictor.model(images), expected)
        assert predictor.labels == [str(i) for i in range(10)]
    config = read_config(tmp_path / "gate.r4" / "adapter")
    training = config["protocol"]["training"]
    assert config["method"] == json.loads(json.dumps(METHODS["gate.r4"].to_dict()))
    assert config["protocol"]["metrics"] == {"val/acc": 0.25}
    assert (training["lr"], training["weight_decay"], training["seed"]) == (3e-3, 1e-3, 5)
    assert training["beside"] == ["plain", "probe", "low"]
    assert training["schedule"] == "linear warm-up over 1 epochs, cosine to 0.0001, per step"
    together = petl.load({n: tmp_path / n / "adapter" for n in MEMBERS}, backbone=build("timm_vit"))
    assert torch.allclose(together.all_logits(images)["low"], logits[3], atol=1e-5)


class OddDigits(Digits):
    """The same digits in the same order, with other labels."""

    def read(self) -> None:
        super().read()
        for split in self.splits.values():
            split.samples = [s._replace(label=s.label % 2) for s in split.samples]
        self.num_classes, self.labels = 2, ["even", "odd"]


def label_file(path: Path) -> Path:
    digits = Digits(**SIZES)
    digits.read()
    rows = {s.name: ("even", "odd")[s.label % 2] for d in digits.splits.values() for s in d.samples}
    if path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        with open(path, "w", newline="") as file:
            csv.writer(file).writerows([("name", "label"), *rows.items()])
    return path


@pytest.mark.parametrize("name", ["parity.json", "parity.csv"])
def test_another_task_on_the_same_images(name: str, tmp_path: Path) -> None:
    file = label_file(tmp_path / name)
    module = sweep({"digit": None, "parity": {"labels": str(file)}})
    fit = trainer(tmp_path, max_epochs=1)
    fit.fit(module, Digits(**SIZES))
    [found] = fit.test(module, Digits(**SIZES), verbose=False)
    backbone = build("timm_vit")
    L.seed_everything(0, verbose=False)
    alone = petl.Classification(backbone, METHODS["plain"], **COMMON)
    fit = trainer(tmp_path, max_epochs=1)
    fit.fit(alone, OddDigits(**SIZES))
    [expected] = fit.test(alone, OddDigits(**SIZES), verbose=False)
    assert equal(member_tensors(module, "parity"), trained_tensors(alone.model))
    assert found["test/parity/acc"] == expected["test/acc"]
    module.save_adapter(tmp_path / "adapter", {"training": {}})
    config = read_config(tmp_path / "parity" / "adapter")
    assert config["labels"] == ["even", "odd"]
    assert config["protocol"]["labels"]["file"] == name
    assert "labels" not in read_config(tmp_path / "digit" / "adapter")["protocol"]


def test_labels_that_do_not_fit(tmp_path: Path) -> None:
    def wrong(name: str, text: str) -> Any:
        (tmp_path / name).write_text(text)
        return sweep({"a": {"labels": str(tmp_path / name)}})

    for name, text, words in (
        ("a.json", "[1]", "no JSON object"),
        ("b.json", "{", "cannot be read"),
        ("c.csv", "id,label\n1,2\n", "columns 'name' and 'label'"),
        ("d.json", '{"1": "x"}', "1 samples of 1 classes"),
    ):
        with pytest.raises(petl.PetlError, match=words):
            wrong(name, text)
    with pytest.raises(petl.PetlError, match=r"no label for \d+ of 60 samples of the train split"):
        trainer(tmp_path).fit(wrong("e.json", '{"1": "x", "2": "y"}'), Digits(**SIZES))
    (tmp_path / "n.json").write_text('{"1": 10, "2": 9, "3": "-1"}')
    assert sweep({"a": {"labels": str(tmp_path / "n.json")}}).label_files["a"].classes == ["-1", "9", "10"]


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ({}, "no members"),
        ({"a/b": None}, "'a/b'.* name of a folder"),
        ({"adapter": None}, "none of adapter, checkpoints"),
        ({"a": {"lrr": 1}}, "member 'a': there is no setting 'lrr': did you mean 'lr'"),
        ({"a": {"options": {"reductoin": 2}}}, "no option 'reductoin': did you mean 'reduction'"),
        ({"a": {"options": {"reduction": 5}}}, "member 'a': ladder reduction=5 does not divide"),
        ({"a": {"method": "ladder"}}, "method 'ladder' is not known: did you mean"),
        ({"a": {"method": "bitfit"}}, "'bitfit' changes what the frozen blocks compute"),
        ({"a": {"method": 3}}, "method=3 must be the name"),
        ({"a": {"lr": "fast"}}, "lr='fast' must be a number"),
        ({"a": {"label_smoothing": 1}}, r"a number in \[0, 1\)"),
        ({"a": {"head": "lin"}}, "head='lin'"),
        ({"a": {"seed": "one"}}, "seed='one' must be an integer"),
        ({"a": 3}, "its settings are a mapping"),
        ({"a": {"options": 3}}, "options=3 must be a mapping"),
    ],
)
def test_bad_members(members: Any, words: str) -> None:
    with pytest.raises(petl.PetlError, match=words):
        petl.SideSweep(members, build("timm_vit"), petl.LadderSideTuning(reduction=2))


def test_numbers_may_be_written_as_yaml_reads_them() -> None:
    assert sweep({"a": {"lr": "1e-3"}}).members["a"].lr == 1e-3
