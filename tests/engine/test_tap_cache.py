"""Training from recorded activations: the same results as without, and faults that cost time, never a wrong value."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

import petl
from petl.adapters.state import trained_tensors
from petl.data import Digits
from petl.data.tap_reader import TapReader
from petl.engine.tap_cache import TapCache
from petl.errors import PetlError
from tests.conftest import build
from tests.engine.conftest import petl_command

LADDER = petl.LadderSideTuning(reduction=2)
CACHED: dict[str, tuple[petl.Method, dict[str, Any]]] = {
    "probe": (petl.LinearProbe(), {}),
    "probe with BatchNorm": (petl.LinearProbe(), {"head": "bn_linear"}),
    "ladder": (LADDER, {}),
    "ladder, checkpointing": (LADDER, {"checkpointing": True}),
    "last blocks": (petl.LoRA(r=2, dropout=0.1, layers=(-2, -1)), {}),
    "last block in full": (petl.FullFineTuning(layers=(-1,)), {"lr": 1e-4}),
}


def train(
    method: petl.Method, cache: TapCache | None, family: str = "timm_vit", limits: dict[str, Any] | None = None,
    **options: Any,
) -> Any:  # fmt: skip
    """A short training: its tensors, its last metrics, and how many pictures the backbone saw."""
    data_options = {"train_size": 40, "val_size": 21, "test_size": 20, "batch_size": 8} | options.pop("data", {})
    L.seed_everything(3)
    backbone = build(family)
    seen: list[int] = []
    patches = next(m for m in backbone.modules() if isinstance(m, torch.nn.Conv2d))
    patches.register_forward_hook(lambda layer, args, out: seen.append(len(out)))
    task, data = petl.Classification(backbone, method, **({"lr": 1e-2} | options)), Digits(**data_options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = L.Trainer(
            **({"max_epochs": 3} | (limits or {})), accelerator="cpu", logger=False,
            enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, callbacks=[cache] if cache else [], num_sanity_val_steps=0,
        )  # fmt: skip
        trainer.fit(task, datamodule=data)
    return trained_tensors(task.model), {k: float(v) for k, v in trainer.callback_metrics.items()}, sum(seen)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


@pytest.mark.parametrize("family", ["timm_vit", "hf_clip_vision"])
@pytest.mark.parametrize("name", CACHED)
def test_fp32_cache_changes_no_bit(name: str, family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    method, options = CACHED[name]
    tensors, metrics, seen = train(method, None, family, **options)
    cached, found, filled = train(method, TapCache("require", str(tmp_path), dtype="float32"), family, **options)
    assert same(tensors, cached)
    assert metrics == found
    assert seen == 3 * (40 + 21)
    assert filled == 40 + 21
    out = capsys.readouterr().out
    assert "61 images (train, val)" in out
    assert "61 computed now and 0 found" in out


def test_bf16_cache_stays_close(tmp_path: Path) -> None:
    _, metrics, _ = train(LADDER, None)
    _, found, _ = train(LADDER, TapCache("require", str(tmp_path)))
    assert metrics != found  # it is rounded, and says so
    assert found["val/loss"] == pytest.approx(metrics["val/loss"], abs=0.02)


@pytest.mark.parametrize("directory", ["memory", None])
def test_a_second_run_finds_what_the_first_recorded(
    directory: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PETL_CACHE", str(tmp_path / "taps"))
    first = train(LADDER, TapCache("auto", directory))
    second = train(LADDER, TapCache("auto", directory))
    assert same(first[0], second[0])
    assert second[2] == (0 if directory is None else 61)
    out = capsys.readouterr().out.splitlines()
    assert len([line for line in out if line.startswith("cache: ")]) == 2
    assert (tmp_path / "taps").exists() == (directory is None)


def test_other_weights_find_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(LADDER, TapCache("require", str(tmp_path)))
    plain = build

    def changed(family: str) -> torch.nn.Module:
        model = plain(family)
        with torch.no_grad():
            next(model.parameters()).view(-1)[0] += 1e-4
        return model

    monkeypatch.setattr(sys.modules[__name__], "build", changed)
    assert train(LADDER, TapCache("require", str(tmp_path)))[2] == 61


def test_a_limit_keeps_some_and_computes_the_others_with_the_same_result(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = train(LADDER, TapCache("require", str(tmp_path / "whole")))
    size = 4 * 17 * 24 * 2  # bytes of one sample in bf16
    part = train(LADDER, TapCache("require", str(tmp_path / "part"), limit=f"{(30 * size + 20000) / 1e6:.6f}MB"))
    assert same(whole[0], part[0])
    assert whole[1] == part[1]
    assert 61 < part[2] < 3 * 61
    out = capsys.readouterr().out
    assert "are computed at every step (limit)" in out
    assert sum(f.stat().st_size for f in (tmp_path / "part").rglob("*.safetensors")) <= 30 * size + 20000


@pytest.mark.parametrize(
    ("method", "options", "reason"),
    [
        (petl.LoRA(r=2), {}, "lora changes the network from its first block on"),
        (LADDER, {"data": {"augmentation": "shift", "val_size": 0}}, "augmentation 'shift' changes its pictures"),
        (LADDER, {"mixup": 0.5, "data": {"val_size": 0}}, "Mixup and CutMix mix its pictures at random"),
        (petl.FullFineTuning(), {}, "full_fine_tuning changes the network from its first block on"),
    ],
)  # fmt: skip
def test_what_cannot_be_cached_is_not_and_the_reason_is_given(
    method: petl.Method, options: dict[str, Any], reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = train(method, None, **dict(options))
    cached = train(method, TapCache("auto", str(tmp_path)), **dict(options))
    assert same(plain[0], cached[0])
    assert not list(tmp_path.iterdir())
    assert f"cache: none, since {reason}" in capsys.readouterr().out
    with pytest.raises(PetlError, match="cache: require, but nothing can be cached"):
        train(method, TapCache("require", str(tmp_path)), **dict(options))


@pytest.mark.parametrize("limits", [{"max_steps": 9}, {"limit_train_batches": 2}, {"max_epochs": 1}])
def test_a_training_that_sees_inputs_once_is_not_worth_it(
    limits: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(LADDER, TapCache("auto", str(tmp_path)), limits=limits)  # an epoch has five batches
    assert not list(tmp_path.iterdir())
    assert "cache: none, since" in capsys.readouterr().out
    train(LADDER, TapCache("require", str(tmp_path)), limits=limits)
    assert list(tmp_path.iterdir())


def test_validation_is_cached_where_training_pictures_vary(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = {"data": {"augmentation": "shift"}}
    plain = train(LADDER, None, **dict(options))
    cached = train(LADDER, TapCache("require", str(tmp_path), dtype="float32"), **dict(options))
    assert same(plain[0], cached[0])
    assert plain[1] == cached[1]
    assert cached[2] == 3 * 40 + 21
    assert "no images of train, since augmentation 'shift'" in capsys.readouterr().out


def test_a_damaged_shard_is_computed_anew(tmp_path: Path) -> None:
    whole = train(LADDER, TapCache("require", str(tmp_path)))
    shard = next(tmp_path.rglob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-7] ^= 16
    shard.write_bytes(bytes(content))
    again = train(LADDER, TapCache("require", str(tmp_path)))
    assert same(whole[0], again[0])
    assert again[2] > 0


def test_a_directory_that_cannot_be_written_costs_time_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    plain = train(LADDER, None)
    found = train(LADDER, TapCache("auto", str(tmp_path / "file" / "taps")))
    assert same(plain[0], found[0])
    assert "are computed at every step (cannot write" in capsys.readouterr().out


@pytest.mark.parametrize("option", [{"mode": "autp"}, {"dtype": "bf16"}, {"limit": "20"}])
def test_unknown_options_are_refused(option: dict[str, str]) -> None:
    with pytest.raises(PetlError):
        TapCache(**option)


def cacheable(config: Path, tmp_path: Path) -> Path:
    """The tiny run of this folder with a method and data that can be cached."""
    text = config.read_text().replace("    mixup: 0.5\n", "").replace(", augmentation: shift", "")
    text = text.replace("petl.SparseTuning", "petl.LadderSideTuning")
    config.write_text(text.replace("{keep_rate: 0.6, bottleneck: 4}", "{reduction: 2}"))
    return config


def adapter(run: Path) -> bytes:
    return (run / "adapter" / "adapter_model.safetensors").read_bytes()


def test_the_command_line_with_workers_and_two_processes(config: Path, tmp_path: Path) -> None:
    config, taps = cacheable(config, tmp_path), ["--cache", "require", "--cache_dtype", "float32"]
    runs = {
        "off": ["--cache", "off"],
        "on": [*taps, "--cache_dir", str(tmp_path / "a")],
        "workers": [*taps, "--cache_dir", str(tmp_path / "a"), "--data.num_workers", "2"],
    }
    two = ["--trainer.devices", "2", "--trainer.strategy", "ddp"]
    runs |= {"two": ["--cache", "off", *two], "two on": [*taps, "--cache_dir", str(tmp_path / "b"), *two]}
    out = {}
    for name, extra in runs.items():
        run = tmp_path / name.replace(" ", "_")
        done = petl_command("fit", "--config", str(config), "--run_dir", str(run), *extra, cwd=tmp_path)
        out[name] = (adapter(run), done.stdout)
    assert out["off"][0] == out["on"][0] == out["workers"][0]
    assert out["two"][0] == out["two on"][0]
    assert "0 computed now and 101 found" in out["workers"][1]
    assert out["two on"][1].count("cache: ") == 1


def test_killed_while_filling_and_continued(config: Path, tmp_path: Path) -> None:
    config, run = cacheable(config, tmp_path), tmp_path / "run"
    dying = (
        "import os, signal, sys, petl.models.frozen as f; from petl.cli import main\n"
        "plain, calls = f.FrozenFeatures.record, []\n"
        "def record(self, x):\n"
        "    calls.append(1)\n"
        "    if len(calls) == 4: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return plain(self, x)\n"
        "f.FrozenFeatures.record = record\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    common = ["fit", "--config", str(config), "--cache", "require", "--cache_dir", str(tmp_path / "taps")]
    killed = subprocess.run([sys.executable, "-c", dying, *common, "--run_dir", str(run)], capture_output=True)
    assert killed.returncode == -signal.SIGKILL
    assert not (run / "adapter").exists()
    petl_command(*common, "--run_dir", str(tmp_path / "again"), cwd=tmp_path)
    petl_command(*common[:-1], str(tmp_path / "fresh"), "--run_dir", str(tmp_path / "other"), cwd=tmp_path)
    assert adapter(tmp_path / "again") == adapter(tmp_path / "other")
    assert not list((tmp_path / "taps").rglob(".tmp*"))
    assert json.loads((tmp_path / "again" / "fit_metrics.json").read_text())["seconds"] > 0


def test_taps_on_the_device_are_read_there_and_not_by_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = train(LADDER, TapCache("require", str(tmp_path)))
    moved: list[TapReader] = []
    monkeypatch.setattr(TapReader, "fits", lambda reader, device: True)
    whole = TapReader.to
    monkeypatch.setattr(TapReader, "to", lambda reader, device: moved.append(whole(reader, device)) or moved[-1])
    monkeypatch.setattr(Digits, "on_device", lambda data, split: split in data.cached)
    forked: list[int] = []
    monkeypatch.setattr(torch.utils.data.dataloader, "_MultiProcessingDataLoaderIter", lambda loader: forked.append(1))
    found = train(LADDER, TapCache("require", str(tmp_path)), data={"num_workers": 2})
    assert same(plain[0], found[0])
    assert plain[1] == found[1]
    assert not forked
    assert [len(reader._shards) for reader in moved] == [1, 1]


def test_the_next_training_with_the_same_data_does_not_read_these_taps(tmp_path: Path) -> None:
    data = Digits(train_size=16, val_size=4, test_size=20, batch_size=8)
    for cache in ([TapCache("require", str(tmp_path))], []):
        task = petl.Classification(build("timm_vit"), LADDER)
        trainer = L.Trainer(
            max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, callbacks=cache,
        )  # fmt: skip
        trainer.fit(task, datamodule=data)
        assert not data.cached
        assert "image" in next(iter(data.train_dataloader()))
