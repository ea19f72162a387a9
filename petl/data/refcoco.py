"""RefCOCO, RefCOCO+, RefCOCOg and ReferItGame, in the forms in which they are published."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from petl.data.grounding import GroundingDataModule
from petl.data.grounding_transforms import Augmentation
from petl.data.refer_files import hub_files, hub_rows, refer_files, refer_rows
from petl.data.references import LIST, Collector, Row, json_rows, read_manifest
from petl.errors import PetlError, nearest


class Lists(NamedTuple):
    """One way of splitting a data set: published numbers of referred objects (None: not published), what to test."""

    refs: dict[str, int | None]
    test: str


DATASETS: dict[str, dict[str, Lists]] = {
    "refcoco": {"unc": Lists({"train": 42404, "val": 3811, "testA": 1975, "testB": 1810}, "testA")},
    "refcoco+": {"unc": Lists({"train": 42278, "val": 3805, "testA": 1975, "testB": 1798}, "testA")},
    "refcocog": {
        "umd": Lists({"train": 42226, "val": 2573, "test": 5023}, "test"),
        "google": Lists({"train": 44822, "val": 5000}, "val"),
    },
    "refclef": {
        "unc": Lists(dict.fromkeys(("train", "val", "testA", "testB", "testC")), "testA"),
        "berkeley": Lists(dict.fromkeys(("train", "val", "test")), "test"),
    },
}


class RefCOCO(GroundingDataModule):
    """RefCOCO, RefCOCO+, RefCOCOg or ReferItGame, one sample per expression.

    Under root or root/<dataset> lies one of: ``refs(<split_by>).p`` and ``instances.json`` as published with
    lichengunc/refer; rows as in jxu124/refcoco (parquet, json or jsonl); or, in root or root/<dataset>_<split_by>, what
    `petl data prepare refcoco` wrote. The numbers of objects must be the published ones.

    Args:
        dataset: "refcoco", "refcoco+", "refcocog" or "refclef" (ReferItGame).
        root: folder of the lists.
        image_root: folder of the pictures: COCO's train2014, for ReferItGame its own.
        split_by: "unc", "umd", "google" or "berkeley"; None = the usual one: unc, of RefCOCOg umd.
        test_split: what `test` evaluates; None = testA, or test, or of the google split val.
        partial: the lists are a part of the data set, so that the published numbers do not hold.
        int_boxes: cut the boxes to whole pixels, as TransVG does.
        aug_crop, aug_scale, aug_translate, aug_flip, aug_color: see `petl.data.grounding_transforms.Augmentation`.
        flip_words: "words", or "reference" for the published code's swap of left and right.
        crop: "center", or "reference" for the published code's crops, which may lose the box.
        batch_size: expressions per step over all processes together.
        num_workers: loader processes per device.
        image_size: side of the input in pixels; None = the backbone's.
        mean: normalisation; None = the backbone's.
        std: normalisation; None = the backbone's.
        seed: of data order and augmentation.
        check_images: decode every image of the splits in use before the first epoch; else only look for the files.
    """

    def __init__(
        self,
        dataset: str,
        root: str,
        image_root: str,
        split_by: str | None = None,
        test_split: str | None = None,
        partial: bool = False,
        int_boxes: bool = False,
        aug_crop: bool = True,
        aug_scale: bool = True,
        aug_translate: bool = True,
        aug_flip: bool = True,
        aug_color: bool = True,
        flip_words: str = "words",
        crop: str = "center",
        batch_size: int = 64,
        num_workers: int = 0,
        image_size: int | None = None,
        mean: tuple[float, float, float] | None = None,
        std: tuple[float, float, float] | None = None,
        seed: int = 0,
        check_images: bool = False,
    ) -> None:
        if dataset not in DATASETS:
            raise PetlError(f"RefCOCO(dataset={dataset!r}): {nearest(dataset, DATASETS)}")
        split_by = split_by or next(iter(DATASETS[dataset]))
        if split_by not in DATASETS[dataset]:
            raise PetlError(f"RefCOCO({dataset!r}, split_by={split_by!r}): {nearest(split_by, DATASETS[dataset])}")
        self.lists = DATASETS[dataset][split_by]
        test_split = test_split or self.lists.test
        if test_split not in self.lists.refs:
            there = ", ".join(self.lists.refs)
            raise PetlError(
                f"RefCOCO({dataset!r}, split_by={split_by!r}, test_split={test_split!r}): its splits are {there}."
            )
        flags = (aug_crop, aug_scale, aug_translate, aug_flip, aug_color)
        augmentation = Augmentation(*flags, flip_words, crop) if any(flags) else None
        super().__init__(batch_size, num_workers, image_size, mean, std, seed, check_images, test_split, augmentation)
        self.dataset, self.split_by = dataset, split_by
        self.root, self.image_root, self.partial, self.int_boxes = Path(root), Path(image_root), partial, int_boxes
        self.name = f"{dataset}/{split_by}" + (" (partial)" if partial else "")
        self.image_source = None if dataset == "refclef" else "coco"
        self.sources: list[Path] = []  # the files that were read

    def read(self) -> None:
        found = Collector(self.image_root, self.lists.refs, self.int_boxes)
        found.add(self._rows(found))
        self.collect(found, {s: f"{self.dataset} {self.split_by} {s}" for s in self.lists.refs})
        self._count_refs()

    def _rows(self, found: Collector) -> Iterable[Row]:
        """From the first form that lies under root."""
        if not self.root.is_dir():
            raise PetlError(f"RefCOCO root {self.root} does not exist: give the folder of the lists (root).")
        for folder in (self.root, self.root / f"{self.dataset}_{self.split_by}"):
            if (folder / LIST).is_file():
                self._check_manifest(folder)
                self.sources = [folder / LIST]
                return json_rows(folder / LIST, found)
        for folder in (self.root / self.dataset, self.root):
            if files := refer_files(folder, self.split_by):
                self.sources = list(files)
                return refer_rows(*files, found)
            if rows := hub_files(folder):
                self.sources = rows
                first_test = next((s for s in self.lists.refs if s.startswith("test")), "test")
                return hub_rows(rows, first_test, found)
        there = ", ".join(sorted(p.name for p in self.root.iterdir())[:8]) or "nothing"
        raise PetlError(
            f"{self.root} holds neither {self.dataset}/refs({self.split_by}).p with instances.json, nor rows of the "
            f"hub, nor {LIST} of 'petl data prepare'; it holds: {there}."
        )

    def _check_manifest(self, folder: Path) -> None:
        manifest = read_manifest(folder)
        for key, wanted in (("dataset", self.dataset), ("split_by", self.split_by)):
            if key in manifest and manifest[key] != wanted:
                raise PetlError(f"{folder} was prepared from {key} {manifest[key]!r}, and not {wanted!r}.")

    def _count_refs(self) -> None:
        """The published numbers of objects, which tell a part or another version from the data set."""
        if self.partial:
            return
        for split, published in self.lists.refs.items():
            refs = self.splits[split].counts()["refs"] if split in self.splits else 0
            if published is not None and refs != published:
                self.problems.append(
                    f"{split} has {refs:,} referred objects, {self.dataset} {self.split_by} has {published:,}; if this "
                    "is a part of it on purpose, say partial: true."
                )
