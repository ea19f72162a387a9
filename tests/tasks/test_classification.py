"""The classification task: loss, metrics, schedule, slim strict checkpoints."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import lightning as L
import pytest
import torch
import torch.nn.functional as F

import petl
from petl.data import Digits
from petl.engine.checkpoints import AtomicCheckpointIO
from petl.methods.attach import attached
from petl.nn.head import Head
from tests.conftest import _timm

SIZES = {"train_size": 60, "val_size": 35, "test_size": 33, "batch_size": 10}


def task(**options: object) -> petl.Classification:
    defaults = {"method": petl.SparseTuning(bottleneck=4), "lr": 1e-2}
    return petl.Classification(_timm(num_classes=0), **defaults | options)


def trainer(tmp_path: Path, **options: object) -> L.Trainer:
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    return L.Trainer(**{"max_epochs": 2, "accelerator": "cpu", "default_root_dir": tmp_path, **quiet, **options})


def test_fit_uses_the_weights_preprocessing_and_trains_only_what_it_should(tmp_path: Path) -> None:
    module, data = task(), Digits(**SIZES)
    frozen = {n: p.clone() for n, p in module.backbone.named_parameters() if not p.requires_grad}
    fit = trainer(tmp_path)
    fit.fit(module, data)
    assert data.preprocessing["image_size"] == [32, 32]
    assert module.model.head.fc.out_features == 10
    now = dict(module.backbone.named_parameters())
    assert all(torch.equal(p, now[n]) for n, p in frozen.items())
    optimised = {id(p) for g in fit.optimizers[0].param_groups for p in g["params"]}
    assert optimised == {id(p) for p in module.model.parameters() if p.requires_grad}


def test_metrics_are_those_of_the_whole_split(tmp_path: Path) -> None:
    module, data = task(), Digits(**SIZES)
    fit = trainer(tmp_path, max_epochs=1)
    fit.fit(module, data)
    [found] = fit.test(module, data, verbose=False)
    batches = list(data.test_dataloader())
    logits = torch.cat([module.model(b["image"]) for b in batches]).detach()
    labels = torch.cat([b["label"] for b in batches])
    hits = (logits.argmax(1) == labels).float()
    assert found["test/acc"] == pytest.approx(hits.mean().item(), abs=1e-6)
    per_class = torch.stack([hits[labels == c].mean() for c in range(10)]).mean()
    assert found["test/mean_class_acc"] == pytest.approx(per_class.item(), abs=1e-6)
    assert found["test/loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), abs=1e-5)


@pytest.mark.parametrize("options", [{"head": "bn_linear"}, {"label_smoothing": 0.1}, {"mixup": 0.8, "cutmix": 1.0},
                                     {"method": petl.LinearProbe()}, {"method": petl.FullFineTuning()},
                                     {"checkpointing": True}, {"warmup_epochs": 0.5, "min_lr": 1e-4}])  # fmt: skip
def test_every_option_trains(tmp_path: Path, options: dict) -> None:
    module = task(**options)
    trainer(tmp_path).fit(module, Digits(**SIZES))
    assert module.trainer.callback_metrics["train/loss"].isfinite()


def test_schedule_warms_up_and_ends_at_min_lr(tmp_path: Path) -> None:
    rates: list[float] = []

    class Watch(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, *args: object) -> None:
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    module = task(lr=1.0, warmup_epochs=1, min_lr=0.25)
    trainer(tmp_path, max_epochs=3, callbacks=[Watch()]).fit(module, Digits(**SIZES))
    assert len(rates) == 18
    assert rates[:7] == pytest.approx([1 / 7, 2 / 7, 3 / 7, 4 / 7, 5 / 7, 6 / 7, 1.0])
    assert all(a > b for a, b in pairwise(rates[6:]))
    assert 0.25 < rates[-1] < 0.28


def test_bad_options_and_batches(tmp_path: Path) -> None:
    wrong = (({"head": "lin"}, "linear"), ({"label_smoothing": 1.0}, "label_smoothing"), ({"lr": -1}, "at least 0"))
    for options, word in wrong:
        with pytest.raises(petl.PetlError, match=word):
            task(**options)
    with pytest.raises(petl.PetlError, match="even batch"):
        trainer(tmp_path).fit(task(mixup=1.0), Digits(**{**SIZES, "batch_size": 9}))
    with pytest.raises(petl.PetlError, match="batch of 1"):
        trainer(tmp_path).fit(task(head="bn_linear"), Digits(**{**SIZES, "batch_size": 1}))


def test_checkpoint_holds_trained_tensors_only_and_is_strict(tmp_path: Path) -> None:
    module = task()
    fit = trainer(tmp_path, enable_checkpointing=True, plugins=[AtomicCheckpointIO()])
    fit.fit(module, Digits(**SIZES))
    fit.save_checkpoint(tmp_path / "last.ckpt")
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert set(saved["state_dict"]) == {n for n, p in module.model.named_parameters() if p.requires_grad}
    frozen = sum(p.numel() for p in module.model.parameters() if not p.requires_grad) * 4
    trained = sum(v.numel() for v in saved["state_dict"].values()) * 4
    assert (tmp_path / "last.ckpt").stat().st_size < 4 * trained + 60_000 < frozen * 3

    other = task(method=petl.SparseTuning(bottleneck=5))
    with pytest.raises(petl.PetlError, match="of another shape"):
        trainer(tmp_path).fit(other, Digits(**SIZES), ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    (tmp_path / "cut.ckpt").write_bytes((tmp_path / "last.ckpt").read_bytes()[:1000])
    fit = trainer(tmp_path, plugins=[AtomicCheckpointIO()])
    with pytest.raises(petl.PetlError, match="cannot be read"):
        fit.fit(task(), Digits(**SIZES), ckpt_path=tmp_path / "cut.ckpt", weights_only=True)


def test_a_checkpoint_with_code_inside_is_refused(tmp_path: Path) -> None:
    import pickle

    class Evil:
        def __reduce__(self) -> tuple:
            return (Path.touch, (tmp_path / "pwned",))

    (tmp_path / "evil.ckpt").write_bytes(pickle.dumps({"state_dict": Evil()}))
    fit = trainer(tmp_path, plugins=[AtomicCheckpointIO()])
    with pytest.raises(petl.PetlError, match="cannot be read"):
        fit.fit(task(), Digits(**SIZES), ckpt_path=tmp_path / "evil.ckpt")
    assert not (tmp_path / "pwned").exists()


def test_frozen_batchnorm_and_dropout_never_move_in_fit(tmp_path: Path) -> None:
    network = _timm(num_classes=0, drop_path_rate=0.5, proj_drop_rate=0.5)
    network.blocks[0].mlp.norm = torch.nn.BatchNorm1d(17)
    module = petl.Classification(network, method=petl.SparseTuning(keep_rate=1.0, bottleneck=4))
    before = network.blocks[0].mlp.norm.running_mean.clone()
    trainer(tmp_path).fit(module, Digits(**SIZES))
    assert torch.equal(network.blocks[0].mlp.norm.running_mean, before)
    assert not network.blocks[0].mlp.norm.training
    assert attached(network).training


def test_heads() -> None:
    assert sum(p.numel() for p in Head("linear", 8, 3).parameters()) == 27
    head = Head("bn_linear", 8, 3)
    assert sum(p.numel() for p in head.parameters()) == 27
    assert head.norm.eps == 1e-6
    assert head.fc.weight.std() < 0.02
