"""What every image data module shares: splits, preprocessing of the weights, loaders, checks, the protocol record."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from PIL import Image
from torch.utils.data import DataLoader

from petl.data.loading import EvalSampler, KeyedDataset, ResumableLoader, TrainSampler
from petl.data.transforms import evaluation_transform, train_transform
from petl.errors import PetlError


class Sample(NamedTuple):
    """One entry of a split: a file (or an image in memory), its label, and the name that goes into the split's hash."""

    image: Path | Image.Image
    label: int
    name: str


class Split(list[Sample]):
    """The samples of a split; ``split[i]`` gives (PIL image, label)."""

    def __getitem__(self, i: Any) -> Any:
        sample = super().__getitem__(i)
        if not isinstance(sample, Sample):
            return sample
        return (sample.image if isinstance(sample.image, Image.Image) else read_image(sample.image)), sample.label

    def digest(self) -> str:
        """SHA-256 over the lines ``name label``."""
        return hashlib.sha256("".join(f"{s.name} {s.label}\n" for s in self).encode()).hexdigest()


def read_image(path: Path) -> Image.Image:
    """Open and decode; raises `PetlError` that names the file."""
    try:
        with Image.open(path) as image:
            image.load()
            return image
    except (OSError, SyntaxError, ValueError) as error:
        kind = "does not exist" if not path.exists() else f"is cut short or not an image ({error})"
        raise PetlError(f"image {path} {kind}.") from error


@dataclass
class CheckReport:
    """What `petl data check` prints: ``lines`` of facts, and ``problems``."""

    lines: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


class ImageDataModule(L.LightningDataModule):
    """Base of all image data sets.

    Subclasses set ``num_classes`` and ``labels`` and fill ``splits`` in `read`; they never decode there. Sizes, mean
    and std come from the backbone's weights unless given.

    Args:
        batch_size: images per step over all processes together.
        num_workers: loader processes per device.
        image_size: side of the square input in pixels; None = the backbone's.
        mean, std: normalisation of values in [0, 1]; None = the backbone's.
        seed: of data order, held-out samples and augmentation.
        check_images: decode every image before the first epoch, so that a damaged file does not end a training midway.
    """

    name: str
    mode = "resize"  # see `evaluation_transform`
    augmentation = "none"

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
        self.batch_size, self.num_workers, self.seed, self.check_images = batch_size, num_workers, seed, check_images
        self.image_size, self.mean, self.std = image_size, mean, std
        self.num_classes: int
        self.labels: list[str]
        self.splits: dict[str, Split] = {}  # "train", "val", "test": those that exist
        self.split_names: dict[str, str] = {}  # the data set's own names for them
        self.preprocessing: dict[str, Any] = {}
        self.problems: list[str] = []  # found by `read`
        self._checked: set[str] = set()

    @abstractmethod
    def read(self) -> None:
        """Fill ``splits``, ``split_names``, ``num_classes``, ``labels`` and ``problems``."""

    # ---- Lightning's hooks

    def setup(self, stage: str) -> None:
        if not self.splits:
            self.read()
        self.preprocessing = self._preprocessing()
        needed = ("train", "val") if stage == "fit" else ("val",) if stage == "validate" else ("test",)
        problems = self.problems + self._damaged([s for s in needed if s in self.splits])
        if problems:
            more = f"\n  and {len(problems) - 10} more" if len(problems) > 10 else ""
            raise PetlError(f"{self.name}: {len(problems)} problems in the data:\n  " + "\n  ".join(problems[:10]) + more)

    def _preprocessing(self) -> dict[str, Any]:
        weights: dict[str, Any] = getattr(getattr(self.trainer, "lightning_module", None), "preprocessing", None) or {}
        size = [self.image_size] * 2 if self.image_size else list(weights.get("input_size", ()))[1:]
        mean, std = self.mean or weights.get("mean"), self.std or weights.get("std")
        if not size or mean is None or std is None:
            raise PetlError(
                f"{self.name}: without a Trainer the backbone's preprocessing is not known; pass image_size, mean and std "
                "(they are in petl's Classification(...).preprocessing)."
            )
        interpolation = weights.get("interpolation", "bicubic")
        return {"image_size": size, "mean": list(mean), "std": list(std), "interpolation": interpolation, "mode": self.mode}

    def train_dataloader(self) -> Any:
        world, rank = self._world()
        data = KeyedDataset(self._split("train"), train_transform(self.preprocessing, self.augmentation), self.seed)
        sampler = TrainSampler(data, self.batch_size, world, rank, self.seed)
        return ResumableLoader(data, self.batch_size // world, sampler=sampler, drop_last=True, **self._loader())

    def val_dataloader(self) -> Any:
        return self._evaluation("val")

    def test_dataloader(self) -> Any:
        return self._evaluation("test")

    def predict_dataloader(self) -> Any:
        return self._evaluation("test")

    def _evaluation(self, split: str) -> Any:
        if split not in self.splits:
            return []
        world, rank = self._world()
        data = KeyedDataset(self.splits[split], evaluation_transform(self.preprocessing), self.seed)
        size = max(1, self.batch_size // world)
        return DataLoader(data, size, sampler=EvalSampler(data, world, rank), **self._loader())

    def _split(self, split: str) -> Split:
        if split not in self.splits:
            raise PetlError(f"{self.name} has no {split} split.")
        return self.splits[split]

    def _world(self) -> tuple[int, int]:
        return (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)

    def _loader(self) -> dict[str, Any]:
        workers = self.num_workers
        return {"num_workers": workers, "persistent_workers": workers > 0, "pin_memory": torch.cuda.is_available()}

    # ---- checks and record

    def _damaged(self, splits: Sequence[str]) -> list[str]:
        """Images of these splits that are missing or do not decode; every file is looked at once."""
        splits = [s for s in splits if s not in self._checked]
        self._checked.update(splits)
        files = [s.image for name in splits for s in list.__iter__(self.splits[name]) if isinstance(s.image, Path)]

        def problem(path: Path) -> str | None:
            try:
                if self.check_images:
                    read_image(path)
                elif not path.is_file():
                    return f"image {path} does not exist."
            except PetlError as error:
                return str(error)
            return None

        with ThreadPoolExecutor(8) as pool:  # decoders release the GIL
            return [p for p in pool.map(problem, dict.fromkeys(files)) if p]

    def check(self) -> CheckReport:
        """Look at every split and every image. Raises nothing: problems are listed."""
        report = CheckReport([f"{self.name}"])
        try:
            self.read()
        except PetlError as error:
            report.problems.append(str(error))
            return report
        report.lines.append(f"classes  {self.num_classes}: {', '.join(self.labels[:10])}{' …' * (len(self.labels) > 10)}")
        for split, samples in self.splits.items():
            counts = Counter(s.label for s in list.__iter__(samples))
            spread = f"{min(counts.values())} to {max(counts.values())} per class" if counts else "empty"
            report.lines.append(
                f"{split:<8} {self.split_names[split]}: {len(samples)} images, {len(counts)} classes seen, {spread}, "
                f"list SHA-256 {samples.digest()[:16]}"
            )
        report.problems += self.problems + self._damaged(list(self.splits))
        return report

    def protocol(self) -> dict[str, Any]:
        """Everything on the side of the data that decides a number, as JSON values."""
        return {
            "dataset": self.name,
            "splits": {
                s: {"name": self.split_names[s], "images": len(v), "sha256": v.digest()} for s, v in self.splits.items()
            },
            "num_classes": self.num_classes,
            "batch_size": self.batch_size,
            "seed": self.seed,
            "augmentation": self.augmentation,
            "preprocessing": self.preprocessing,
        }


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
