"""Decoded pictures stay in memory and are normalised where a batch is computed on: the same pixels, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import petl
from petl.data import Digits, ImageFolder
from petl.data.decoded import Decoded, read_image
from petl.data.transforms import evaluation_transform, normalisation, train_transform
from tests.tasks.test_classification import SIZES, task, trainer

SQUARE = {"image_size": 24, "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for label in ("cat", "dog"):
            (tmp_path / split / label).mkdir(parents=True)
            for i in range(3):
                pixels = rng.integers(0, 256, (40 + 3 * i, 50, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / split / label / f"{i}.png")
    return tmp_path


def pictures(data: Any, epochs: int = 2) -> list[Tensor]:
    """Training pictures of some epochs, then those of validation, twice."""
    loader, found = data.train_dataloader(), []
    for epoch in range(epochs):
        loader.sampler.set_epoch(epoch)
        found += [batch["image"] for batch in loader]
    return found + [batch["image"] for _ in range(2) for batch in data.val_dataloader()]


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that are decoded."""
    files: list[Path] = []
    whole = read_image

    def count(path: Path) -> Image.Image:
        files.append(path)
        return whole(path)

    monkeypatch.setattr("petl.data.decoded.read_image", count)
    return files


@pytest.mark.parametrize("augmentation", ["none", "shift", "flip_crop"])
def test_kept_pictures_are_the_same_and_decoded_once(folder: Path, augmentation: str, opened: list[Path]) -> None:
    found, decoded = [], []
    for limit in ("1GiB", "0GB"):
        data = ImageFolder(str(folder), augmentation=augmentation, batch_size=3, keep_decoded=limit, **SQUARE)
        data.setup("fit")
        opened.clear()
        found.append(pictures(data))
        decoded.append(len(opened))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert decoded == [12, 24]  # 6 of training and 6 of validation, each in two epochs


def test_the_limit_is_kept_and_the_rest_is_decoded_each_time(folder: Path, opened: list[Path]) -> None:
    data = ImageFolder(str(folder), augmentation="none", batch_size=3, keep_decoded="8MB", **SQUARE)
    data.setup("fit")
    store = data._decoded = Decoded(24 * 24 * 3 * 4 + 5)  # four pictures and a bit
    plain = ImageFolder(str(folder), augmentation="none", batch_size=3, keep_decoded="0GB", **SQUARE)
    plain.setup("fit")
    wanted = pictures(plain)
    opened.clear()
    assert all(torch.equal(a, b) for a, b in zip(pictures(data), wanted, strict=True))
    assert store.nbytes == 24 * 24 * 3 * 4
    assert len(opened) == 4 + 2 * (12 - 4)


def test_not_with_loader_processes_and_anew_for_another_size(folder: Path) -> None:
    apart = ImageFolder(str(folder), num_workers=1, **SQUARE)
    apart.setup("fit")
    assert apart._decoded is None
    data = ImageFolder(str(folder), augmentation="none", batch_size=3, **SQUARE)
    data.setup("fit")
    before = pictures(data)[0]
    kept = data._decoded
    data.setup("test")
    assert data._decoded is kept
    data.image_size = 12
    data.setup("fit")
    assert data._decoded is not kept
    assert pictures(data)[0].shape[-1] == before.shape[-1] // 2
    with pytest.raises(petl.PetlError, match="number with its unit"):
        ImageFolder(str(folder), keep_decoded="1")


MAKERS = {
    "evaluation": evaluation_transform,
    "shift": partial(train_transform, augmentation="shift"),
    "crop": partial(train_transform, augmentation="flip_crop"),
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_normalising_a_batch_is_normalising_each(make: Callable[[Any], Any]) -> None:
    record = SQUARE | {"image_size": [24, 24], "interpolation": "bicubic", "mode": "resize"}
    steps = make(record)
    scans = [Image.fromarray(np.random.default_rng(i).integers(0, 256, (30, 20, 3), dtype=np.uint8)) for i in range(3)]
    torch.manual_seed(0)
    raw = torch.stack([steps.pixels(steps.fixed(scan)) for scan in scans])
    torch.manual_seed(0)
    assert raw.dtype == torch.uint8
    assert torch.equal(normalisation(record)(raw), torch.stack([steps(scan) for scan in scans]))


def test_a_trainer_on_a_gpu_moves_uint8_and_learns_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.dtype] = []
    transfer = Digits.transfer_batch_to_device

    def watch(self: Digits, batch: Any, *args: Any) -> Any:
        seen.append(batch["image"].dtype)
        return transfer(self, batch, *args)

    monkeypatch.setattr(Digits, "transfer_batch_to_device", watch)
    weights = []
    for on_gpu in (True, False):
        monkeypatch.setattr(Digits, "_on_gpu", lambda self, on_gpu=on_gpu: on_gpu)
        seen.clear()
        torch.manual_seed(0)
        module, data = task(), Digits(**SIZES)
        fit = trainer(tmp_path)
        fit.fit(module, data)
        [tested] = fit.test(module, data, verbose=False)
        assert set(seen) == {torch.uint8 if on_gpu else torch.float32}
        weights.append((tested["test/loss"], [p for p in module.model.parameters() if p.requires_grad]))
        whole = next(iter(data.evaluation_loader("val", whole=True)))  # read by hand, also while a trainer runs
        assert whole["image"].dtype == torch.float32
    assert weights[0][0] == weights[1][0]
    assert all(torch.equal(a, b) for a, b in zip(weights[0][1], weights[1][1], strict=True))


def test_uint8_only_while_a_trainer_runs_on_a_gpu() -> None:
    data = Digits(**SIZES)
    for status, device, raw in (("running", "cuda", True), ("finished", "cuda", False), ("running", "cpu", False)):
        strategy = SimpleNamespace(root_device=torch.device(device))
        data.trainer = SimpleNamespace(state=SimpleNamespace(status=status), strategy=strategy)  # type: ignore[assignment]
        assert data._on_gpu() is raw
    data.trainer = None
    assert data._on_gpu() is False


def test_pictures_in_memory_are_not_taken_for_others_that_are_gone() -> None:
    record = {"image_size": [8, 8], "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bilinear", "mode": "resize"}
    preparation, decoded = evaluation_transform(record), Decoded(1 << 20)
    for grey in range(100):  # the memory of a picture that nobody holds is soon that of another
        found = decoded.fixed(Image.new("RGB", (9, 9), (grey,) * 3), preparation)
        assert found.getpixel((4, 4)) == (grey,) * 3
