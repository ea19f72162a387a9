"""The recipes as modules, a small task in the VTAB layout, and hand-made records of runs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

RECIPES = Path(__file__).parents[2] / "recipes"
sys.path.insert(0, str(RECIPES))  # as for a script in that folder

DONE = {
    "weights": "a" * 64,
    "backbone": {"name": "timm/vit_base_patch16_224.orig_in21k", "args": {}, "weights_file": None, "parameters": 1},
    "preprocessing": {"image_size": [224, 224], "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic",
                      "mode": "resize"},
    "augmentation": "none",
    "selection": "last epoch",
    "settings": "as given",
    "epochs": 100,
    "batch_size": 64,
    "training": {"precision": "32-true"},
    "device": "CPU",
    "side_by_side": 1,
}  # fmt: skip
COST = {"method_parameters": 102_912, "head_parameters": 7_690, "macs": 16_867_000_000,
        "saved_bytes_per_image": 3 * 2**20, "saved_bytes_constant": 0, "train_images_per_second": 40.0,
        "inference_images_per_second": 100.0, "peak_memory_bytes": None, "seconds": 12.0}  # fmt: skip


def record(method: str, task: str, seed: int = 0, acc: float = 0.5, **changes: Any) -> dict[str, Any]:
    """The record of a finished run; ``changes`` of its protocol."""
    splits = {s: {"name": s, "images": 10, "sha256": f"{task}-{s}"} for s in ("train", "test")}
    return {"status": "done", "method": method, "task": task, "seed": seed, "test": {"acc": acc, "mean_class_acc": acc},
            "protocol": DONE | {"splits": splits} | changes, "cost": dict(COST)}  # fmt: skip


def failure(method: str, task: str, seed: int = 0) -> dict[str, Any]:
    return {"status": "failed", "method": method, "task": task, "seed": seed, "reason": "out of memory"}


@pytest.fixture(scope="session")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Root of the task "digits": 60 / 20 images to train, 40 to test."""
    from make_vtab_layout import Encoded, Source, png, write
    from sklearn.datasets import load_digits

    root = tmp_path_factory.mktemp("layout")
    digits = load_digits()
    images = [Encoded(png((15.9 * p).astype("uint8")), ".png", int(c)) for p, c in zip(digits.images, digits.target)]
    write(root / "digits", Source(images, [str(i) for i in range(10)], (60, 20, 40)), seed=0)
    return root
