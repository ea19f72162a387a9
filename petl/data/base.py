"""What every data module shares: splits, preprocessing of the weights, loaders, checks, the protocol record."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import lightning as L
import torch
from PIL import Image
from torch.utils.data import DataLoader

from petl.costs import parse_memory
from petl.data.cached import CachedBatches, Recordable, as_it_is
from petl.data.decoded import Decoded, Labelled, read_image
from petl.data.loading import EvalSampler, KeyedDataset, ResumableLoader, TrainSampler
from petl.data.transforms import normalisation, train_transform
from petl.errors import PetlError

SHOWN = 10  # problems named in an error; the rest are counted


class Sample(NamedTuple):
    """One entry of a split: a file (or an image in memory), its label, and the name that goes into the split's hash."""

    image: Path | Image.Image
    label: int
    name: str

    @property
    def line(self) -> str:
        return f"{self.name} {self.label}"


class Entry(Protocol):
    """What a split holds: `Sample`, or another record with a line for the split's hash; if it has an ``image``, a file
    of that is looked at before the first epoch."""

    @property
    def line(self) -> str: ...


E = TypeVar("E", bound=Entry)


class Split(Generic[E]):
    """The samples of a split, in a fixed order; images stay undecoded."""

    def __init__(self, samples: Iterable[E]) -> None:
        self.samples = list(samples)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, i: int) -> E:
        return self.samples[i]

    def counts(self) -> dict[str, int]:
        """How much there is of what, for the protocol record."""
        return {"images": len(self)}

    def digest(self) -> str:
        """SHA-256 over the lines of the samples, e.g. ``name label``."""
        return hashlib.sha256("".join(f"{s.line}\n" for s in self.samples).encode()).hexdigest()


@dataclass
class CheckReport:
    """What `petl data check` prints: ``lines`` of facts, and ``problems``."""

    lines: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


class DataModule(Recordable, L.LightningDataModule):
    """Base of all data sets.

    Subclasses fill ``splits`` in `read`, where they never decode images, and say how a sample becomes an entry of a
    batch. Sizes, mean and std come from the backbone's weights unless given; data without images have no
    preprocessing (`_preprocessing` is empty), and of the arguments only ``batch_size``, ``num_workers`` and ``seed``.

    Args:
        batch_size: samples per step over all processes together.
        num_workers: loader processes per device.
        image_size: side of the square input in pixels; None = the backbone's.
        mean, std: normalisation of values in [0, 1]; None = the backbone's.
        seed: of data order, held-out samples and augmentation.
        check_images: decode every image before the first epoch, so that a damaged file does not end a training midway.
    """

    name: str
    mode = "resize"  # see `evaluation_transform`
    interpolation: str | None = None  # None = the backbone's
    test_split = "test"  # what `test` and `predict` evaluate
    group = 1  # training samples in a row that stay together in a batch

    def __init__(
        self,
        batch_size: int = 64,
        num_workers: int = 0,
        image_size: int | None = None,
        mean: tuple[float, float, float] | None = None,
        std: tuple[float, float, float] | None = None,
        seed: int = 0,
        check_images: bool = True,
    ) -> None:
        super().__init__()
        for key, value, least in (
            ("batch_size", batch_size, 1),
            ("num_workers", num_workers, 0),
            ("image_size", image_size, 1),
        ):
            if value is not None and value < least:
                raise PetlError(f"{type(self).__name__}({key}={value}): it is at least {least}.")
        self.batch_size, self.num_workers, self.seed, self.check_images = batch_size, num_workers, seed, check_images
        self.image_size, self.mean, self.std = image_size, mean, std
        self.splits: dict[str, Split[Any]] = {}  # "train", "val", "test": those that exist
        self.split_names: dict[str, str] = {}  # the data set's own names for them
        self.preprocessing: dict[str, Any] = {}  # what `evaluation_transform` takes; after `setup`
        self.problems: list[str] = []  # found by `read`
        self.cached = {}
        self._has_read = False
        self._damage: dict[str, list[str]] = {}  # by split: what decoding found

    @abstractmethod
    def read(self) -> None:
        """Fill ``splits``, ``split_names``, ``problems``, and what else the kind of data set has."""

    @abstractmethod
    def transform(self, training: bool) -> Callable[[Any], dict[str, Any]]:
        """What makes an entry of a batch from a sample; only in ``training`` with augmentation."""

    @abstractmethod
    def describe(self, split: str) -> str:
        """What a split holds, for `check`."""

    def _read_once(self) -> None:
        if not self._has_read:
            self.splits, self.split_names, self.problems = {}, {}, []
            self.read()
            self._has_read = True

    # ---- Lightning's hooks

    def setup(self, stage: str) -> None:
        """Read the lists and look at every image of the splits that ``stage`` uses. Raises `PetlError` for bad data."""
        self._read_once()
        self.preprocessing = self._preprocessing()
        used = {"fit": ("train", "val"), "validate": ("val",)}.get(stage, (self.test_split,))
        problems = self.problems + self._damaged([s for s in used if s in self.splits])
        if problems:
            more = f"\n  and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
            listed = "\n  ".join(problems[:SHOWN])
            raise PetlError(f"{self.name}: {len(problems)} problems in the data:\n  {listed}{more}")
        if used[0] not in self.splits:
            there = ", ".join(f"{s} ({n})" for s, n in self.split_names.items())
            verb = getattr(stage, "value", stage)  # Lightning passes an enum
            raise PetlError(f"{self.name} has no {used[0]} split, which '{verb}' uses; it has: {there or 'none'}.")

    def _preprocessing(self) -> dict[str, Any]:
        weights: dict[str, Any] = getattr(getattr(self.trainer, "lightning_module", None), "preprocessing", None) or {}
        size = [self.image_size] * 2 if self.image_size else list(weights.get("input_size", ()))[1:]
        mean, std = self.mean or weights.get("mean"), self.std or weights.get("std")
        if not size or mean is None or std is None:
            raise PetlError(
                f"{self.name}: without a Trainer the backbone's preprocessing is not known; pass image_size, mean and "
                "std (they are in the task's .preprocessing, e.g. petl.Classification(...).preprocessing)."
            )
        return {
            "image_size": size,
            "mean": list(mean),
            "std": list(std),
            "interpolation": self.interpolation or weights.get("interpolation", "bicubic"),
            "mode": self.mode,
        }

    def train_dataloader(self) -> Any:
        if getattr(self.trainer, "overfit_batches", 0):
            raise PetlError("Trainer(overfit_batches) replaces petl's data order: use limit_train_batches instead.")
        if "train" not in self.splits:
            raise PetlError(f"{self.name} has no train split; call setup('fit') before train_dataloader().")
        world, rank = self._world()
        data = self._entries("train", training=True, moved=True)
        sampler = TrainSampler(data, self.batch_size, world, rank, self.seed, self.group)
        limit = self.trainer.limit_train_batches if self.trainer else 1.0
        collate, still = (None, False) if isinstance(data, KeyedDataset) else (as_it_is, data.still)
        return ResumableLoader(data, sampler, *self._loading("train"), limit, collate, still)

    @property
    def steps_per_epoch(self) -> int:
        """Training batches of an epoch, ``limit_train_batches`` counted in."""
        whole = len(self.splits["train"]) // self.batch_size
        limit = self.trainer.limit_train_batches if self.trainer else 1.0
        return min(whole, limit) if isinstance(limit, int) else int(whole * limit)

    def val_dataloader(self) -> Any:
        return self.evaluation_loader("val")

    def test_dataloader(self) -> Any:
        return self.evaluation_loader(self.test_split)

    def predict_dataloader(self) -> Any:
        return self.evaluation_loader(self.test_split)

    def evaluation_loader(self, split: str, whole: bool = False) -> Any:
        """Batches of a split in order, as in evaluation: this process's share, or with ``whole`` all of them."""
        if split not in self.splits:
            return []
        world, rank = (1, 0) if whole else self._world()
        data, (workers, pin) = self._entries(split, training=False, moved=not whole), self._loading(split)
        return DataLoader(
            data,
            collate_fn=None if isinstance(data, KeyedDataset) else as_it_is,
            batch_size=max(1, self.batch_size // world),  # by name: Lightning makes the loader anew to predict
            sampler=EvalSampler(data, world, rank),
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=pin,
            generator=torch.Generator(),  # an iterator draws a seed when it is made: not from the training's generator
        )

    def _loading(self, split: str) -> tuple[int, bool]:
        """Loader processes of a split, and whether its batches lie in pinned memory."""
        return (0, False) if self.on_device(split) else (self.num_workers, torch.cuda.is_available())

    def _entries(self, split: str, training: bool, moved: bool) -> KeyedDataset | CachedBatches:
        """What a loader reads; ``moved``: a trainer moves its batches to the device."""
        data = self.entries(split, training)
        if split in self.cached:
            return self.from_taps(split, data)
        if moved and isinstance(data.transform, Labelled) and self._on_gpu():
            data.transform = replace(data.transform, raw=True)
        return data

    def _on_gpu(self) -> bool:
        """Whether a trainer runs on a GPU: pictures travel there as uint8, and are normalised there."""
        run: Any = self.trainer
        strategy = getattr(run, "strategy", None)
        return strategy is not None and strategy.root_device.type == "cuda" and run.state.status == "running"

    def entries(self, split: str, training: bool = False) -> KeyedDataset:
        """The entries of batches, all made from the samples themselves."""
        return KeyedDataset(self.splits[split], self.transform(training), self.seed)

    def _world(self) -> tuple[int, int]:
        return (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)

    # ---- checks and record

    def _damaged(self, splits: Sequence[str]) -> list[str]:
        """Images of these splits that are missing or do not decode; every split is looked at once."""
        images = {
            s: [getattr(x, "image", None) for x in self.splits[s].samples] for s in splits if s not in self._damage
        }
        new = {s: [x for x in v if isinstance(x, Path)] for s, v in images.items()}

        with ThreadPoolExecutor(8) as pool:  # decoders release the GIL
            files = list(dict.fromkeys(f for v in new.values() for f in v))
            found = dict(zip(files, pool.map(self.image_problem, files), strict=True))
        self._damage |= {s: [p for f in dict.fromkeys(v) if (p := found[f])] for s, v in new.items()}
        return list(dict.fromkeys(p for s in splits for p in self._damage[s]))

    def image_problem(self, path: Path) -> str | None:
        """What is wrong with an image file, if anything."""
        try:
            if self.check_images:
                read_image(path)
            elif not path.is_file():
                return f"image {path} does not exist."
        except PetlError as error:
            return str(error)
        return None

    def check(self) -> CheckReport:
        """Look at every split and every image. Raises nothing: problems are listed."""
        report = CheckReport([self.name])
        try:
            self._read_once()
        except PetlError as error:
            report.problems.append(str(error))
            return report
        report.lines += self.facts()
        for split, data in self.splits.items():
            report.lines.append(
                f"{split:<8} {self.split_names[split]}: {self.describe(split)}, list SHA-256 {data.digest()[:16]}"
            )
        report.problems += self.problems + self._damaged(list(self.splits))
        return report

    def facts(self) -> list[str]:
        """Lines of `check` about the whole data set."""
        return []

    def protocol(self) -> dict[str, Any]:
        """What decides a number on the side of the data, as JSON values; ``preprocessing`` is empty before `setup`."""
        self._read_once()
        return {
            "dataset": self.name,
            "splits": {
                s: {"name": self.split_names[s], **v.counts(), "sha256": v.digest()} for s, v in self.splits.items()
            },
            "batch_size": self.batch_size,
            "seed": self.seed,
            "preprocessing": self.preprocessing,
        }


class LabelledDataModule(DataModule):
    """Base of the data sets for classification: subclasses set ``num_classes`` and ``labels`` in `read`."""

    num_classes: int
    labels: list[str]
    things = "images"  # what a split holds, in words

    def facts(self) -> list[str]:
        shown = ", ".join(self.labels[:10]) + (" …" if len(self.labels) > 10 else "")
        return [f"classes  {self.num_classes}: {shown}"]

    def describe(self, split: str) -> str:
        data = self.splits[split]
        counts = Counter(s.label for s in data.samples)
        spread = f"{min(counts.values())} to {max(counts.values())} per class" if counts else "empty"
        return f"{len(data)} {self.things}, {len(counts)} classes seen, {spread}"

    def protocol(self) -> dict[str, Any]:
        return super().protocol() | {"num_classes": self.num_classes}


class ImageDataModule(LabelledDataModule):
    """Classification of images."""

    augmentation = "none"
    keep_decoded = "1GiB"  # of memory for decoded pictures; not with loader processes, which share none
    _decoded: Decoded | None = None

    def varies(self, split: str, stream: str = "image") -> str | None:
        if split != "train" or self.augmentation == "none":
            return None
        return f"augmentation {self.augmentation!r} changes its pictures at random"

    def light(self, sample: Sample) -> dict[str, Any]:
        return {"label": sample.label}

    def setup(self, stage: str) -> None:
        before = self.preprocessing
        super().setup(stage)
        if self.preprocessing != before:
            self._decoded = None if self.num_workers else Decoded(parse_memory(self.keep_decoded))

    def transform(self, training: bool) -> Callable[[Sample], dict[str, Any]]:
        augmentation = self.augmentation if training else "none"
        return Labelled(train_transform(self.preprocessing, augmentation), self._decoded)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        if "image" in batch and batch["image"].dtype == torch.uint8:
            batch["image"] = normalisation(self.preprocessing)(batch["image"])
        return batch

    def protocol(self) -> dict[str, Any]:
        return super().protocol() | {"augmentation": self.augmentation}


def hold_out(labels: Sequence[int], sizes: Sequence[int], seed: int) -> list[list[int]]:
    """Disjoint stratified subsets of ``range(len(labels))`` of these sizes, in ascending order, from a seed.

    Each class is spread evenly over the whole (its i-th shuffled member stands at quantile (i + u) / n_c), so any
    contiguous part holds its share of every class.
    """
    generator = torch.Generator().manual_seed(seed)
    totals, seen = Counter(labels), Counter[int]()
    place: list[float] = [0.0] * len(labels)
    for i in torch.randperm(len(labels), generator=generator).tolist():
        label = labels[i]
        place[i] = (seen[label] + float(torch.rand((), generator=generator))) / totals[label]
        seen[label] += 1
    ranked = sorted(range(len(labels)), key=lambda i: place[i])
    parts, start = [], 0
    for size in sizes:
        parts.append(sorted(ranked[start : start + size]))
        start += size
    return parts
