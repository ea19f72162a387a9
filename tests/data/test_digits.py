"""The embedded data set, and what all data modules promise: lazy imports, loaders by rank, repeatable splits."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from petl.data.digits import Digits
from petl.data.loading import order
from petl.data.transforms import evaluation_transform
from petl.errors import PetlError

PLAIN: dict[str, Any] = {"image_size": 16, "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}


def digits(**options: Any) -> Digits:
    data = Digits(**PLAIN | options)
    data.setup("fit")
    return data


def test_splits_are_stratified_disjoint_and_seeded() -> None:
    data = digits()
    assert {s: len(v) for s, v in data.splits.items()} == {"train": 600, "val": 400, "test": 797}
    for split in data.splits.values():
        counts = Counter(s.label for s in split.samples)
        assert len(counts) == 10
        assert max(counts.values()) - min(counts.values()) <= 0.02 * len(split) + 3
    assert len({s.name for split in data.splits.values() for s in split.samples}) == 1797
    assert digits().protocol() == data.protocol()
    other = digits(seed=1).protocol()["splits"]
    assert other["train"]["sha256"] != data.protocol()["splits"]["train"]["sha256"]


def test_images_are_the_scans_of_scikit_learn() -> None:
    from sklearn.datasets import load_digits

    data, source = digits(batch_size=32), load_digits()
    batch = next(iter(data.test_dataloader()))
    assert batch["image"].shape == (32, 3, 16, 16)
    sample = data.splits["test"].samples[5]
    assert batch["label"][5] == source.target[int(sample.name)]
    scan = Image.fromarray((source.images[int(sample.name)] * 255 / 16).round().astype(np.uint8))
    assert torch.equal(batch["image"][5], evaluation_transform(data.preprocessing)(scan))
    assert torch.equal(batch["image"][:, 0], batch["image"][:, 2]), "grey"
    assert batch["image"].min() < -0.9
    assert batch["image"].max() > 0.9


def test_split_of_size_zero_does_not_exist() -> None:
    data = digits(val_size=0, test_size=0, train_size=1797)
    assert (data.val_dataloader(), data.test_dataloader()) == ([], [])
    with pytest.raises(PetlError, match="digits has no test split, which 'test' uses"):
        data.setup("test")


@pytest.mark.parametrize("sizes", [{"train_size": 601}, {"val_size": -1}, {"train_size": 0}])
def test_sizes_that_do_not_fit(sizes: dict[str, int]) -> None:
    with pytest.raises(PetlError, match="sum to at most 1797"):
        digits(**sizes)
    assert "sum to at most 1797" in Digits(**PLAIN | sizes).check().problems[0]


def test_shift_changes_training_images_only() -> None:
    plain, moved = digits(batch_size=600), digits(batch_size=600, augmentation="shift")
    a, b = (next(iter(d.train_dataloader())) for d in (plain, moved))
    assert torch.equal(a["index"], b["index"])
    assert not torch.equal(a["image"], b["image"])
    a, b = (next(iter(d.val_dataloader())) for d in (plain, moved))
    assert torch.equal(a["image"], b["image"])
    assert moved.protocol()["augmentation"] == "shift"


def test_loaders_of_several_processes_share_the_global_batch() -> None:
    parts, tested = [], []
    for rank in range(2):
        data = digits(batch_size=32)
        data.trainer = SimpleNamespace(world_size=2, global_rank=rank, limit_train_batches=1.0)  # type: ignore[assignment]
        batch = next(iter(data.train_dataloader()))
        assert len(batch["index"]) == 16
        parts += batch["index"].tolist()
        tested += [i for b in data.test_dataloader() for i in b["index"].tolist()]
    assert parts == order(600, 0, 0)[:32]
    assert sorted(tested) == list(range(797))


def test_loaders_before_setup_and_overfit_batches_are_refused() -> None:
    with pytest.raises(PetlError, match=r"call setup\('fit'\)"):
        Digits(**PLAIN).train_dataloader()
    data = digits()
    data.trainer = SimpleNamespace(overfit_batches=2)  # type: ignore[assignment]
    with pytest.raises(PetlError, match="use limit_train_batches"):
        data.train_dataloader()


def test_importing_petl_data_imports_neither_torch_nor_sklearn() -> None:
    code = (
        "import sys, petl.data; assert petl.data.__all__ == ['VTAB', 'Digits', 'Expressions', 'ImageFolder', 'RefCOCO',"
        " 'Scenes', 'Sentences'];"
        "print([m for m in ('torch', 'sklearn', 'lightning', 'torchvision') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    import petl.data

    with pytest.raises(AttributeError, match="Digit'"):
        _ = petl.data.Digit
