"""How a task uses the hardware: frozen weights in bf16, compiled blocks, the kernel of the optimiser."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn

import petl
from petl.adapters.artefact import read_config, read_tensors
from petl.backbones.bundled import text, tokenizer, vision
from petl.data import Digits, Scenes
from petl.engine.checkpoints import AtomicCheckpointIO
from petl.methods.attach import attached
from petl.methods.regional import compile_blocks
from petl.tasks.hardware import adamw, frozen_dtype
from tests.conftest import SMALL_FUSION
from tests.tasks.test_classification import SIZES, task, trainer

CPU = torch.device("cpu")


def same(**options: object) -> petl.Classification:
    """A task on the same random backbone, with the same method, at every call."""
    torch.manual_seed(0)
    return task(**options)


def held(module: petl.Classification) -> set[torch.dtype]:
    return {p.dtype for p in module.backbone.parameters() if not p.requires_grad}


def test_a_training_with_frozen_weights_in_bf16(tmp_path: Path) -> None:
    module, data = same(frozen_dtype="bfloat16"), Digits(**SIZES)
    assert held(module) == {torch.float32}, "the device is not known yet"
    identity = attached(module.backbone).identity
    fit = trainer(tmp_path)
    fit.fit(module, data)
    assert held(module) == {torch.bfloat16}
    assert {p.dtype for p in module.model.parameters() if p.requires_grad} == {torch.float32}
    state = fit.optimizers[0].state
    assert {v.dtype for s in state.values() for v in s.values()} == {torch.float32}
    assert next(iter(data.val_dataloader()))["image"].dtype == torch.float32
    assert module.protocol()["frozen_dtype"] == "bfloat16"
    [tested] = fit.test(module, data, verbose=False)
    module.save_adapter(tmp_path / "adapter")
    config = read_config(tmp_path / "adapter")
    assert config["backbone"]["weights"] == identity.weights
    loaded = same()
    [again] = _tested(loaded, data, tmp_path)
    assert held(loaded) == {torch.float32}
    assert again["test/loss"] == pytest.approx(tested["test/loss"], rel=0.02)


def _tested(module: petl.Classification, data: Digits, tmp_path: Path) -> Any:
    from petl.engine.callbacks import LoadAdapter

    return trainer(tmp_path, callbacks=[LoadAdapter(tmp_path / "adapter")]).test(module, data, verbose=False)


def test_a_resumed_training_ends_with_the_same_adapter(tmp_path: Path) -> None:
    class Save(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *args: object) -> None:
            if trainer.global_step == 7:  # in the second of three epochs
                trainer.save_checkpoint(tmp_path / "7.ckpt")

    options = {"enable_checkpointing": True, "plugins": [AtomicCheckpointIO()], "max_epochs": 3}
    whole, resumed = same(frozen_dtype="bfloat16"), same(frozen_dtype="bfloat16")
    trainer(tmp_path / "a", callbacks=[Save()], **options).fit(whole, Digits(**SIZES))
    saved = torch.load(tmp_path / "7.ckpt", weights_only=True)
    assert {t.dtype for t in saved["state_dict"].values()} == {torch.float32}
    trainer(tmp_path / "b", **options).fit(resumed, Digits(**SIZES), ckpt_path=tmp_path / "7.ckpt", weights_only=True)
    for name, module in (("whole", whole), ("resumed", resumed)):
        module.save_adapter(tmp_path / name)
    one, two = (read_tensors(tmp_path / n, read_config(tmp_path / n)) for n in ("whole", "resumed"))
    assert all(torch.equal(t, two[n]) for n, t in one.items())


def test_what_the_dtype_is_on_which_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    for able in (True, False):
        monkeypatch.setattr("petl.tasks.hardware.computes_in_bf16", lambda device, able=able: able)
        for precision in ("32-true", "bf16-mixed"):
            assert frozen_dtype("auto", precision, CPU) == (torch.bfloat16 if able else None)
            assert frozen_dtype("bfloat16", precision, CPU) == torch.bfloat16
            assert frozen_dtype("float32", precision, CPU) is None
        for precision in ("bf16-true", "16-mixed", "64-true"):
            assert frozen_dtype("auto", precision, CPU) is None
            assert frozen_dtype("float32", precision, CPU) is None
            with pytest.raises(petl.PetlError, match=f"not with {precision}"):
                frozen_dtype("bfloat16", precision, CPU)
    with pytest.raises(petl.PetlError, match="did you mean 'bfloat16'"):
        task(frozen_dtype="bfloat")


@pytest.mark.parametrize("method", [petl.LoRA(), petl.FullFineTuning(), petl.LadderSideTuning()], ids=lambda m: m.name)
def test_under_mixed_precision(tmp_path: Path, method: object) -> None:
    module = task(frozen_dtype="bfloat16", method=method)
    trainer(tmp_path, max_epochs=1, precision="bf16-mixed").fit(module, Digits(**SIZES))
    assert module.trainer.callback_metrics["train/loss"].isfinite()
    assert module.protocol()["frozen_dtype"] == ("float32" if module.method.name == "full_fine_tuning" else "bfloat16")
    with pytest.raises(petl.PetlError, match="not with bf16-true"):
        trainer(tmp_path, precision="bf16-true").fit(task(frozen_dtype="bfloat16"), Digits(**SIZES))


def test_grounding_with_both_encoders_in_bf16(tmp_path: Path) -> None:
    module = petl.Grounding(
        vision(), text(), petl.AdaptFormer(bottleneck=4), tokenizer=tokenizer(), frozen_dtype="bfloat16",
        **SMALL_FUSION | {"query_length": 12},
    )  # fmt: skip
    trainer(tmp_path, max_epochs=1).fit(module, Scenes(train_size=8, val_size=4, test_size=4, batch_size=4))
    assert module.protocol()["frozen_dtype"] == "bfloat16"
    assert module.trainer.callback_metrics["train/loss"].isfinite()


def test_compiled_blocks_train_as_others_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.compiler.reset()
    eager = partial(compile_blocks, backend="eager", fullgraph=True)
    monkeypatch.setattr("petl.tasks.base.compile_blocks", eager)
    saved = []
    for compiles in (True, False):
        module = same(method=petl.LoRA(), compile=compiles)
        fit = trainer(tmp_path, enable_checkpointing=True, plugins=[AtomicCheckpointIO()])
        fit.fit(module, Digits(**SIZES))
        fit.test(module, Digits(**SIZES), verbose=False)
        fit.save_checkpoint(tmp_path / "a.ckpt")
        saved.append(torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"])
        assert module.protocol()["compile"] == compiles
        assert ("forward" in module.backbone.blocks[0].__dict__) == compiles
    assert saved[0].keys() == saved[1].keys()
    for name, tensor in saved[0].items():
        torch.testing.assert_close(tensor, saved[1][name], atol=1e-5, rtol=1e-4)


def test_one_kernel_for_all_tensors_on_a_cuda_device_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.optim, "AdamW", lambda groups, **options: options["fused"])
    there, here = SimpleNamespace(is_cuda=True), nn.Parameter(torch.zeros(2))
    plain = SimpleNamespace(precision_plugin=SimpleNamespace())
    scaled = SimpleNamespace(precision_plugin=SimpleNamespace(scaler=object()))
    for tensors, run, fused in (([there], plain, True), ([there], scaled, None), ([there, here], plain, None)):
        assert adamw([{"params": tensors}], 1e-3, 0.0, run) is fused


def test_the_record_is_json(tmp_path: Path) -> None:
    module = task()
    trainer(tmp_path, max_epochs=1).fit(module, Digits(**SIZES))
    assert json.loads(json.dumps(module.protocol()))["compile"] is False
