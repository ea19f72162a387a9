"""Order, partition and exact resume. The resume tests are real Lightning runs, continued from their checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader

from petl.data.loading import EvalSampler, KeyedDataset, ResumableLoader, TrainSampler, order
from petl.errors import PetlError

COUNT, BATCH = 9, 2  # 4 whole batches per epoch, one sample left over


class Numbers:
    """Sample i is the number i; remembers what was read (in this process)."""

    def __init__(self, count: int = COUNT) -> None:
        self.count = count
        self.read: list[int] = []

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> int:
        self.read.append(i)
        return i


def noisy(i: int) -> dict[str, Tensor]:
    return {"image": i + torch.rand(1) / 10}


def loader(workers: int = 0, limit: int | float = 1.0, source: Numbers | None = None) -> ResumableLoader:
    data = KeyedDataset(source or Numbers(), noisy, seed=3)
    return ResumableLoader(data, TrainSampler(data, BATCH, 1, 0, seed=3), workers, limit=limit)


def seen(batch: dict[str, Tensor]) -> tuple[list[int], list[float]]:
    """Which samples, and how they were augmented."""
    return batch["index"].tolist(), batch["image"].flatten().tolist()


# ---- order and partition


def test_order_is_a_permutation_that_depends_on_seed_and_epoch_alone() -> None:
    first = order(50, 1, 2)
    torch.manual_seed(99)
    assert order(50, 1, 2) == first
    assert sorted(first) == list(range(50))
    assert len({tuple(first), tuple(order(50, 1, 3)), tuple(order(50, 2, 2)), tuple(range(50))}) == 4
    assert order(50, 1, 2) != order(50, 2, 1), "seed and epoch are not interchangeable"


@pytest.mark.parametrize("world", [1, 2, 4])
def test_global_batches_do_not_depend_on_the_number_of_processes(world: int) -> None:
    ranks = [TrainSampler(range(43), 8, world, r, seed=5) for r in range(world)]
    for sampler in ranks:
        sampler.set_epoch(2)
    parts = [list(s) for s in ranks]
    assert [len(p) for p in parts] == [len(s) for s in ranks] == [40 // world] * world
    size = 8 // world
    batches = [[key for p in parts for key in p[k * size : (k + 1) * size]] for k in range(5)]
    wanted = order(43, 5, 2)
    assert batches == [[(2, i) for i in wanted[8 * k : 8 * k + 8]] for k in range(5)]


@pytest.mark.parametrize(("batch", "world", "near"), [(10, 4, "8 or 12"), (2, 4, "4 or 8"), (0, 1, "1 or 2")])
def test_batch_must_be_divisible_by_processes(batch: int, world: int, near: str) -> None:
    with pytest.raises(PetlError, match=rf"batch_size {batch} .* {world} processes; nearest: {near}"):
        TrainSampler(range(100), batch, world, 0, 0)


def test_data_smaller_than_a_batch_is_an_error() -> None:
    with pytest.raises(PetlError, match=r"7 samples, fewer than one batch of 8; use a batch_size of at most 6"):
        TrainSampler(range(7), 8, 2, 0, 0)


def test_skip_works_once_and_length_stays() -> None:
    sampler = TrainSampler(range(COUNT), BATCH, 1, 0, seed=0)
    whole = list(sampler)
    sampler.skip = 3
    assert len(sampler) == len(whole) == 8
    assert list(sampler) == whole[6:]
    assert list(sampler) == whole


@pytest.mark.parametrize(("count", "world"), [(7, 1), (7, 2), (7, 4), (3, 4), (8, 4)])
def test_evaluation_counts_each_sample_once(count: int, world: int) -> None:
    samplers = [EvalSampler(range(count), world, r) for r in range(world)]
    assert [len(s) for s in samplers] == [len(list(s)) for s in samplers]
    assert sorted(key for s in samplers for key in s) == [(0, i) for i in range(count)]


# ---- augmentation


def test_augmentation_depends_on_seed_epoch_and_sample_and_not_on_workers() -> None:
    passes: dict[int, list[Any]] = {}
    for workers in (0, 2):
        batches = loader(workers)
        passes[workers] = []
        for epoch in range(2):
            batches.sampler.set_epoch(epoch)
            passes[workers].append([seen(b) for b in batches])
    assert passes[0] == passes[2]
    values = [v for epoch in passes[0] for _, batch in epoch for v in batch]
    assert len(set(values)) == len(values), "a sample is augmented differently in each epoch"


def test_random_state_of_the_caller_is_untouched() -> None:
    torch.manual_seed(4)
    expected = torch.rand(3)
    torch.manual_seed(4)
    assert len(list(loader())) == 4
    assert torch.equal(torch.rand(3), expected)


# ---- resume of the loader alone


def test_skipped_images_are_not_loaded_and_later_epochs_are_whole() -> None:
    full = loader()
    full.sampler.set_epoch(5)
    wanted = [seen(b) for b in full]
    source = Numbers()
    resumed = loader(source=source)
    resumed.load_state_dict({"epoch": 5, "batches": 3})
    assert resumed.state_dict() == {"epoch": 5, "batches": 3}, "before the first batch"
    assert len(resumed) == 4
    assert [seen(b) for b in resumed] == wanted[3:]
    assert source.read == wanted[3][0], "only the last batch was read"
    assert resumed.state_dict() == {"epoch": 5, "batches": 4}
    resumed.sampler.set_epoch(6)
    full.sampler.set_epoch(6)
    assert [seen(b) for b in resumed] == [seen(b) for b in full]


def test_a_finished_epoch_is_followed_by_the_next() -> None:
    full, resumed = loader(), loader()
    full.sampler.set_epoch(3)
    resumed.load_state_dict({"epoch": 2, "batches": 4})
    assert [seen(b) for b in resumed] == [seen(b) for b in full]
    assert resumed.state_dict() == {"epoch": 3, "batches": 4}


# ---- resume of Lightning runs


class Data(L.LightningDataModule):
    def __init__(self, workers: int) -> None:
        super().__init__()
        self.workers = workers

    def train_dataloader(self) -> ResumableLoader:
        assert self.trainer is not None
        return loader(self.workers, self.trainer.limit_train_batches)

    def val_dataloader(self) -> DataLoader:
        data = KeyedDataset(Numbers(3), noisy, seed=0)
        return DataLoader(data, 2, sampler=EvalSampler(data, 1, 0))


class Recorder(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.seen: list[Any] = []

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        self.seen.append((batch_idx, *seen(batch)))
        return self.layer(batch["image"]).mean()

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None: ...

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.01)


class SaveAtEnd(Callback):
    """What `petl fit` does: a run state when training ends."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.save_checkpoint(self.file)


def train(workers: int, callbacks: list[Callback], resume: Path | None = None, **options: Any) -> list[Any]:
    """Samples of each step of one run."""
    module = Recorder()
    trainer = L.Trainer(
        accelerator="cpu", logger=False, callbacks=callbacks, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks), **{"max_epochs": 3} | options,
    )  # fmt: skip
    trainer.fit(module, datamodule=Data(workers), ckpt_path=resume, weights_only=True if resume else None)
    return module.seen


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.stem.partition("step=")[2])


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_from_every_step_gives_the_uninterrupted_run(tmp_path: Path, workers: int) -> None:
    every = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    full = train(workers, [every])
    files = sorted(tmp_path.glob("*.ckpt"), key=step_of)
    assert [step_of(f) for f in files] == list(range(1, 13))
    assert [v[1] for v in full] == [order(COUNT, 3, k // 4)[k % 4 * 2 :][:2] for k in range(12)]
    for file in files:
        assert train(workers, [], file) == full[step_of(file) :], file.name


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_epochs": -1, "max_steps": 12},
        {"limit_train_batches": 3},
        {"max_epochs": -1, "max_steps": 9, "limit_train_batches": 3},
    ],
    ids=["epochs", "steps", "limited", "limited_steps"],
)
def test_resume_from_the_end_of_epochs(tmp_path: Path, workers: int, options: dict[str, Any]) -> None:
    """There Lightning does not restore the loader (epochs), or restores it and counts an epoch twice (steps)."""
    ends = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, save_on_train_epoch_end=True)
    full = train(workers, [ends], **options)
    files = sorted(tmp_path.glob("*.ckpt"), key=step_of)[:2]
    assert len(files) == 2
    for file in files:
        assert train(workers, [], file, **options) == full[step_of(file) :], file.name


def test_resume_from_every_step_of_limited_epochs(tmp_path: Path) -> None:
    """The last batch that is used is not the loader's last; here the run is also validated in mid-epoch."""
    options = {"limit_train_batches": 3, "val_check_interval": 2}
    every = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    full = train(0, [every], **options)
    for file in tmp_path.glob("*.ckpt"):
        assert train(0, [], file, **options) == full[step_of(file) :], file.name


@pytest.mark.parametrize("workers", [0, 2])
def test_a_finished_training_can_be_extended(tmp_path: Path, workers: int) -> None:
    full = train(workers, [], max_epochs=4)
    first = train(workers, [SaveAtEnd(tmp_path / "last.ckpt")], max_epochs=2)
    assert first + train(workers, [], tmp_path / "last.ckpt", max_epochs=4) == full


def test_a_training_killed_again_and_again(tmp_path: Path) -> None:
    """Each run does three steps, then continues from its last checkpoint; three steps and four batches fall apart."""
    full, pieces, file = train(0, [], max_epochs=-1, max_steps=12), [], None
    for stop in (3, 6, 9, 12):
        every = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        pieces += train(0, [every], file, max_epochs=-1, max_steps=stop)
        file = tmp_path / f"step={stop}.ckpt"
    assert pieces == full
