"""Grounding from recorded activations: one row a picture and one an expression, and no bit that differs."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import default_collate

import petl
from petl.adapters.state import trained_tensors
from petl.backbones import bundled
from petl.data import Expressions, Scenes
from petl.engine.pictures import BoxPictures
from petl.engine.tap_cache import TapCache
from petl.errors import PetlError
from petl.tasks.grounding import Grounding
from tests.conftest import SMALL_FUSION

FUSION = {**SMALL_FUSION, "query_length": 9}
M2IST = petl.M2IST(bottleneck=6, relation_dim=5, shared_dim=20)
METHODS: dict[str, petl.Method | None] = {
    "M2IST": M2IST,
    "M2IST from zero": petl.M2IST(bottleneck=6, relation_dim=5, shared_dim=20, side_seed="zero", pairs=2),
    "none": None,
    "ladder": petl.LadderSideTuning(reduction=4),
    "gate": petl.LadderSideTuning(reduction=4, form="gate", layers=(0, -2)),
}
OFF = dict.fromkeys(("aug_crop", "aug_scale", "aug_translate", "aug_flip", "aug_color"), False)
SIZES = ((80, 60), (50, 90), (64, 64), (30, 20))
PHRASES = ("the red star", "Red Star", "the left ring", "right ring", "a cross", "the topmost cross", "bright circle")


@pytest.fixture
def listed(tmp_path: Path) -> Path:
    """14 expressions of training about 3 pictures, 5 of validation about 2, in changing order; a list of them."""
    for n, (width, height) in enumerate(SIZES):
        pixels = np.random.default_rng(n).integers(0, 255, (height, width, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{n}.png")
    lines = []
    for i in range(19):
        split, n = ("train", i // 2 % 3) if i < 14 else ("val", 2 + i % 2)
        box = [2.0 + i % 3, 3.0, 10.0 + i, 12.5]
        lines.append({"image": f"{n}.png", "expression": PHRASES[i % 7], "bbox": box, "split": split})
        lines[-1]["bbox"][2] = min(box[2], SIZES[n][0] - box[0])
    file = tmp_path / "list.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)) + "\n")
    return file


class Run(NamedTuple):
    tensors: dict[str, Tensor]
    losses: list[float]
    metrics: dict[str, float]
    encoded: dict[str, int]  # pictures and expressions that went through an encoder
    cached: dict[str, set[str]]  # streams by split, while it trained


def train(method: petl.Method | None, data: Any, *callbacks: L.Callback, epochs: int = 3, **options: Any) -> Run:
    L.seed_everything(3)
    task = Grounding(method=method, lr=1e-3, method_lr=1e-2, frozen_dtype="float32", **FUSION | options)
    encoded = {"image": 0, "text": 0}

    def count(kind: str, out: Tensor) -> None:
        encoded[kind] += len(out)

    vision: Any = task.model.vision
    vision.patch_embed.register_forward_hook(lambda m, a, out: count("image", out))
    text: Any = task.model.text
    text.text_model.embeddings.register_forward_hook(lambda m, a, out: count("text", out))
    losses: list[float] = []
    cached: dict[str, set[str]] = {}

    class Watch(L.Callback):
        def on_train_start(self, *_: Any) -> None:
            cached.update({split: set(readers) for split, readers in data.cached.items()})

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *_: Any) -> None:
            losses.append(float(outputs["loss"]))

    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = L.Trainer(
            max_epochs=epochs, accelerator="cpu", num_sanity_val_steps=0, callbacks=[*callbacks, Watch()], **quiet
        )
        trainer.fit(task, data)
    metrics = {k: float(v) for k, v in trainer.callback_metrics.items()}
    tensors = {n: t.clone() for n, t in trained_tensors(task.model).items()}
    return Run(tensors, losses, metrics, encoded, cached)


def memory(mode: str = "require", **options: Any) -> TapCache:
    return TapCache(mode, "memory", dtype="float32", **options)


def assert_same(a: Run, b: Run) -> None:
    assert a.losses == b.losses
    assert a.metrics == b.metrics
    assert a.tensors.keys() == b.tensors.keys()
    assert all(torch.equal(a.tensors[n], b.tensors[n]) for n in a.tensors)


def of_files(file: Path, **options: Any) -> Expressions:
    return Expressions(str(file), **{"batch_size": 4, **OFF, **options})


@pytest.mark.parametrize("name", METHODS)
def test_fp32_cache_changes_no_bit(name: str, listed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain, cached = (train(METHODS[name], of_files(listed), *c) for c in ((), (memory(),)))
    assert_same(plain, cached)
    assert cached.encoded == {"image": 4, "text": 7}  # one picture and all expressions of val are those of train
    assert plain.encoded["text"] == 3 * (12 + 5)
    [line] = [v for v in capsys.readouterr().out.splitlines() if v.startswith("cache: ")]
    assert "7 computed now" in line
    assert line.endswith("float32 in memory")


def test_scenes_and_loader_workers() -> None:
    sizes = {"train_size": 12, "val_size": 5, "batch_size": 8, "expressions_per_scene": 3, "test_size": 0}
    plain = train(M2IST, Scenes(**sizes))
    cached = train(M2IST, Scenes(**sizes, num_workers=1), memory())
    assert_same(plain, cached)
    assert cached.encoded["image"] == 17


def test_a_second_run_finds_what_the_first_recorded(
    listed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    taps = tmp_path / "taps"
    first = train(M2IST, of_files(listed), TapCache("auto", str(taps)))
    second = train(M2IST, of_files(listed), TapCache("auto", str(taps)))
    assert_same(first, second)
    assert second.encoded == {"image": 0, "text": 0}
    lines = [v for v in capsys.readouterr().out.splitlines() if v.startswith("cache: ")]
    assert "0 computed now and" in lines[1]
    assert lines[1].count("0 computed now and") == 2
    other = train(None, of_files(listed), TapCache("auto", str(taps)))  # other taps are other keys
    assert other.encoded == {"image": 4, "text": 7}
    vision = bundled.vision()
    for norm in (m for m in vision.modules() if isinstance(m, torch.nn.LayerNorm)):
        norm.eps = 1e-3
    other = train(M2IST, of_files(listed), TapCache("auto", str(taps)), vision=vision)
    assert other.encoded == {"image": 4, "text": 0}, "the same weights are not the same network"
    longer = train(M2IST, of_files(listed), TapCache("auto", str(taps)), query_length=FUSION["query_length"] + 2)
    assert longer.encoded == {"image": 0, "text": 7}, "of another length"


def test_bf16_cache_stays_close(listed: Path) -> None:
    plain = train(M2IST, of_files(listed))
    cached = train(M2IST, of_files(listed), TapCache("require", "memory"))
    assert plain.losses != cached.losses
    assert cached.losses == pytest.approx(plain.losses, abs=0.02)


@pytest.mark.parametrize("limit", ["0.2MB", "0.7MB", "1.1MB"])
def test_what_a_limit_leaves_out_is_computed_at_every_step(
    limit: str, listed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = train(M2IST, of_files(listed))
    cached = train(M2IST, of_files(listed), memory(limit=limit))
    assert "others are computed at every step (limit)" in capsys.readouterr().out
    # in fewer at a time, which may round otherwise
    assert cached.losses == pytest.approx(plain.losses, abs=1e-4)
    assert cached.metrics == pytest.approx(plain.metrics, abs=1e-4)
    assert cached.encoded["image"] > 4
    assert cached.encoded["image"] <= plain.encoded["image"] + 4


def test_methods_inside_the_encoders_are_refused_with_the_reason(
    listed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    method = petl.DARA(bottleneck=4, relation_dim=4, shared_dim=8)
    plain, refused = (train(method, of_files(listed), *c) for c in ((), (memory("auto"),)))
    assert_same(plain, refused)
    reason = "dara changes what the encoders compute"
    assert f"cache: none, since {reason}" in capsys.readouterr().out
    assert refused.cached == {}
    with pytest.raises(PetlError, match=f"require, but nothing can be cached: {reason}"):
        train(method, of_files(listed), memory())


def test_random_transforms_leave_the_text_and_the_validation(listed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flips = {"aug_flip": True, "aug_scale": True, "batch_size": 7}
    plain, cached = (train(M2IST, of_files(listed, **flips), *c) for c in ((), (memory(),)))
    assert_same(plain, cached)
    assert cached.cached == {"train": {"text"}, "val": {"text", "image"}}
    assert cached.encoded == {"image": 3 * 14 + 2, "text": 7 + 2}  # two phrases name a side: both ways were recorded
    assert (
        "; no images of train, since random transforms change its pictures (aug_scale, aug_flip)"
        in capsys.readouterr().out
    )


def test_pictures_that_are_new_in_every_epoch(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {"train_size": 4, "val_size": 3, "batch_size": 8, "test_size": 0, "fresh": True}
    plain, cached = (train(M2IST, Scenes(**sizes), *c) for c in ((), (memory(),)))
    assert_same(plain, cached)
    assert set(cached.cached) == {"val"}
    out = capsys.readouterr().out
    for kind in ("images", "texts"):
        assert f"; no {kind} of train, since its training pictures are new in every epoch" in out
    train(M2IST, Scenes(**sizes | {"val_size": 0}), memory("auto"))
    assert "cache: none, since its training pictures are new in every epoch" in capsys.readouterr().out


def test_one_epoch_is_not_worth_it(listed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = train(None, of_files(listed), memory("auto"), epochs=1)
    assert run.cached == {}
    assert "cache: none, since one epoch sees each input once" in capsys.readouterr().out


def test_box_pictures_are_those_of_a_run_without_a_cache(listed: Path, tmp_path: Path) -> None:
    for name, caches in (("plain", ()), ("cached", (memory(),))):
        train(M2IST, of_files(listed), BoxPictures(tmp_path / name, count=3), *caches, epochs=2)
    files = sorted(f.name for f in (tmp_path / "plain").iterdir())
    assert len(files) == 2
    assert all((tmp_path / "plain" / f).read_bytes() == (tmp_path / "cached" / f).read_bytes() for f in files)


def test_an_entry_without_its_image_is_not_decoded(listed: Path) -> None:
    data = of_files(listed, image_size=64, mean=(0.5,) * 3, std=(0.5,) * 3)
    data.setup("fit")
    transform: Any = data.transform(training=True)
    whole = default_collate([transform(s) for s in data.splits["train"].samples])
    for file in listed.parent.glob("*.png"):
        file.write_bytes(file.read_bytes()[:60])  # the header is left
    light = default_collate([transform.light(s) for s in data.splits["train"].samples])
    assert whole.keys() - light.keys() == {"image"}
    for name, value in light.items():
        assert torch.equal(value, whole[name]) if isinstance(value, Tensor) else value == whole[name]
    (listed.parent / "0.png").write_bytes(b"")
    with pytest.raises(PetlError, match=r"0\.png is cut short"):
        data.transform(training=False).light(data.splits["train"].samples[0])  # type: ignore[attr-defined]
