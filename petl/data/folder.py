"""Images of your own: class folders (``root/train/CLASS/*.jpg``) or a CSV file."""

from __future__ import annotations

import csv as csv_module
from pathlib import Path

from torchvision.datasets.folder import IMG_EXTENSIONS

from petl.data.base import ImageDataModule, Sample, Split, hold_out
from petl.errors import PetlError, nearest

SPLITS = ("train", "val", "test")


class ImageFolder(ImageDataModule):
    """Classification of images in folders ``root/{train,val[,test]}/CLASS/``, or listed in a CSV file.

    Evaluation: shorter side to size / 0.875, centre crop. Without a test split, the validation split is tested.

    Args:
        root: folder with train/ and val/, or the folder that paths in the CSV are relative to.
        csv: file with the header path,label[,split]; split is train, val or test (train where the column is missing).
        augmentation: "flip_crop" (random resized crop, horizontal flip), "shift" or "none".
        val_fraction: share of train held out (stratified, from the seed) where there is no val split; 0 = no validation.
        batch_size: images per step over all processes together.
        num_workers: loader processes per device.
        image_size: side of the input in pixels; None = the backbone's.
        mean: normalisation; None = the backbone's.
        std: normalisation; None = the backbone's.
        seed: of data order, held-out images and augmentation.
        check_images: decode every image of the splits in use before the first epoch.
    """

    mode = "center_crop"

    def __init__(
        self,
        root: str,
        csv: str | None = None,
        augmentation: str = "flip_crop",
        val_fraction: float = 0.0,
        batch_size: int = 64,
        num_workers: int = 0,
        image_size: int | None = None,
        mean: tuple[float, float, float] | None = None,
        std: tuple[float, float, float] | None = None,
        seed: int = 0,
        check_images: bool = True,
    ) -> None:
        super().__init__(batch_size, num_workers, image_size, mean, std, seed, check_images)
        if not 0 <= val_fraction < 1:
            raise PetlError(f"ImageFolder(val_fraction={val_fraction}): it lies in [0, 1).")
        self.root, self.csv = Path(root), Path(csv) if csv else None
        self.augmentation, self.val_fraction = augmentation, val_fraction
        self.name = f"folder/{self.csv.name if self.csv else self.root.name}"

    def read(self) -> None:
        named = self._from_csv(self.csv) if self.csv else self._from_folders()
        self.labels = sorted({label for rows in named.values() for _, label in rows})
        self.num_classes = len(self.labels)
        index = {label: i for i, label in enumerate(self.labels)}
        for split, rows in named.items():
            self.splits[split] = Split(Sample(path, index[label], str(path.relative_to(self.root))) for path, label in rows)
            self.split_names[split] = str(self.csv or self.root / split) if split in named else split
        if "val" not in self.splits and self.val_fraction and "train" in self.splits:
            samples = list(list.__iter__(self.splits["train"]))
            count = round(self.val_fraction * len(samples))
            held, kept = hold_out([s.label for s in samples], [count, len(samples) - count], self.seed)
            self.splits["train"] = Split(samples[i] for i in kept)
            self.splits["val"] = Split(samples[i] for i in held)
            self.split_names["val"] = f"{self.val_fraction:g} held out of train"
        if "test" not in self.splits and "val" in self.splits:
            self.splits["test"], self.split_names["test"] = self.splits["val"], f"the val split ({self.split_names['val']})"

    def _from_folders(self) -> dict[str, list[tuple[Path, str]]]:
        named: dict[str, list[tuple[Path, str]]] = {}
        for split in SPLITS:
            folder = self.root / split
            if not folder.is_dir():
                continue
            classes = sorted(p for p in folder.iterdir() if p.is_dir())
            named[split] = []
            for directory in classes:
                files = sorted(p for p in directory.rglob("*") if p.suffix.lower() in IMG_EXTENSIONS)
                if not files:
                    self.problems.append(f"{directory} holds no images.")
                named[split] += [(p, directory.name) for p in files]
        if not named.get("train"):
            there = [p.name for p in self.root.iterdir()][:8] if self.root.is_dir() else "nothing, it does not exist"
            raise PetlError(f"{self.root / 'train'} has no class folders with images; {self.root} holds {there}.")
        known = {label for _, label in named["train"]}
        for split in ("val", "test"):
            found = {label for _, label in named.get(split, [])}
            for label in sorted(found - known):
                self.problems.append(f"{self.root / split / label}: train has no such class; {nearest(label, known)}")
            if split == "val" and split in named:
                self.problems += [f"{self.root / split} has no folder for class {c!r}." for c in sorted(known - found)]
        return named

    def _from_csv(self, file: Path) -> dict[str, list[tuple[Path, str]]]:
        if not file.is_file():
            raise PetlError(f"CSV file {file} does not exist.")
        named: dict[str, list[tuple[Path, str]]] = {}
        with open(file, newline="", encoding="utf-8") as handle:
            reader = csv_module.DictReader(handle)
            header = reader.fieldnames or []
            if not {"path", "label"} <= set(header):
                raise PetlError(f"{file}: the header must have the columns path and label; it has {list(header)}.")
            for line, row in enumerate(reader, 2):
                split = (row.get("split") or "train").strip()
                path, label = (row["path"] or "").strip(), (row["label"] or "").strip()
                if split not in SPLITS:
                    self.problems.append(f"{file} line {line}: split {split!r}; {nearest(split, SPLITS)}")
                elif not path or not label:
                    self.problems.append(f"{file} line {line}: path or label is empty.")
                else:
                    named.setdefault(split, []).append((self.root / path, label))
        if not named.get("train"):
            raise PetlError(f"{file} lists no training images.")
        known = {label for _, label in named["train"]}
        for split in ("val", "test"):
            for label in sorted({label for _, label in named.get(split, [])} - known):
                self.problems.append(f"{file}: class {label!r} of {split} is not in train; {nearest(label, known)}")
        return named
