"""AdaLoRA: orthogonality term, falling budget, bit-exact resumption. peft computes layers and importance."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

import petl
from petl.adapters.state import trained_tensors
from petl.data import Digits
from petl.methods.adalora import AdaLoRAModule
from petl.methods.attach import attached
from tests.conftest import _timm, build

OPTIONS = {"r": 4, "target_r": 2, "start": 0.2, "end": 0.7, "interval": 2}


def entries(module: AdaLoRAModule) -> int:
    """Entries of all Λ that are not zero."""
    return sum(int(layer.lora_E["default"].count_nonzero()) for layer in module.layers)


def test_the_term_is_the_mean_distance_from_orthogonality() -> None:
    module = attached(petl.attach(build("timm_vit"), petl.AdaLoRA(r=3, target_r=2, gamma=0.5)))
    expected = []
    for layer in module.layers:
        q, p = layer.lora_A["default"], layer.lora_B["default"]
        expected += [((q @ q.T - torch.eye(3)) ** 2).sum().sqrt(), ((p.T @ p - torch.eye(3)) ** 2).sum().sqrt()]
    found = module.regularisation()
    torch.testing.assert_close(found, 0.5 * torch.stack(expected).mean())
    found.backward()
    assert module.layers[0].lora_A["default"].grad.any()
    with torch.no_grad():
        for layer in module.layers:
            torch.nn.init.orthogonal_(layer.lora_A["default"])
            torch.nn.init.orthogonal_(layer.lora_B["default"])
    assert module.regularisation() < 1e-5


def test_other_methods_add_nothing_to_the_loss() -> None:
    assert attached(petl.attach(build("timm_vit"), petl.LoRA())).regularisation() is None


class Watch(L.Callback):
    """Budget after each step."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def on_train_batch_end(self, trainer: L.Trainer, module: petl.Classification, *args: object) -> None:
        self.seen.append(entries(attached(module.backbone)))


def task() -> petl.Classification:
    torch.manual_seed(3)
    return petl.Classification(_timm(num_classes=0), petl.AdaLoRA(**OPTIONS), lr=1e-2)


def fit(
    module: petl.Classification, folder: Path, callback: L.Callback | None, resume: Path | None = None, **options: Any
) -> None:
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
    keeps = isinstance(callback, ModelCheckpoint)
    trainer = L.Trainer(max_epochs=2, accelerator="cpu", default_root_dir=folder, callbacks=callback,
                        enable_checkpointing=keeps, **quiet, **options)  # fmt: skip
    data = Digits(train_size=80, val_size=10, test_size=10, batch_size=8)
    trainer.fit(module, data, ckpt_path=resume, weights_only=True)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_budget_falls_to_the_target_and_stays(accumulate: int, tmp_path: Path) -> None:
    watch = Watch()
    fit(task(), tmp_path, watch, accumulate_grad_batches=accumulate)
    steps = 20 // accumulate
    seen = watch.seen[accumulate - 1 :: accumulate]
    start, end = int(0.2 * steps), int(0.7 * steps)
    assert len(seen) == steps
    assert set(seen[:start]) == {4 * 4}
    assert seen[end - 1 :] == [4 * 2] * (steps - end + 1)
    pruned = [n for i, n in enumerate(seen) if (i + 1) % 2 == 0]  # between two prunings an entry may come back
    assert sorted(pruned, reverse=True) == pruned
    assert len(set(pruned)) > 2, "little by little"


def test_resumption_is_bit_exact_in_every_phase(tmp_path: Path) -> None:
    whole = task()
    every = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1, monitor=None)
    fit(whole, tmp_path, every)
    expected = trained_tensors(whole.model)
    for step in (2, 9, 14, 17):  # before ranks are pruned, between, at the end of that, after it
        resumed = task()
        fit(resumed, tmp_path, None, resume=tmp_path / f"step={step}.ckpt")
        found = trained_tensors(resumed.model)
        assert found.keys() == expected.keys()
        assert all(torch.equal(t, expected[n]) for n, t in found.items()), f"from step {step}"
        assert attached(resumed.backbone).config.rank_pattern == attached(whole.backbone).config.rank_pattern
    forgetful = task()  # the same checkpoint without the importance of the ranks leads elsewhere
    state = torch.load(tmp_path / "step=9.ckpt", weights_only=True)
    torch.save(state | {"method_state": [{}]}, tmp_path / "cut.ckpt")
    fit(forgetful, tmp_path, None, resume=tmp_path / "cut.ckpt")
    other = trained_tensors(forgetful.model)
    assert any(not torch.equal(t, expected[n]) for n, t in other.items())
