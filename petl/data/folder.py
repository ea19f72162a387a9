"""Images of your own: class folders (``root/train/CLASS/*.jpg``) or a CSV file."""

from __future__ import annotations

import csv as csv_module
from pathlib import Path
from typing import NamedTuple

from torchvision.datasets.folder import IMG_EXTENSIONS, has_file_allowed_extension

from petl.costs import parse_memory
from petl.data.base import ImageDataModule, Sample, Split, hold_out
from petl.errors import PetlError, nearest

SPLITS = ("train", "val", "test")


class Entry(NamedTuple):
    """An image by its path relative to root (or as the CSV writes it), and the name of its class."""

    name: str
    label: str


class ImageFolder(ImageDataModule):
    """Classification of images in folders ``root/{train,val[,test]}/CLASS/``, or listed in a CSV file.

    Evaluation: shorter side to size / 0.875, centre crop. Without a test split, the validation split is tested.

    Args:
        root: folder with train/ and val/, or the folder that paths in the CSV are relative to.
        csv: file with the header path,label[,split]; split is train, val or test (train where it is empty or missing).
        augmentation: "flip_crop" (random resized crop, horizontal flip), "shift" or "none".
        val_fraction: share of train held out (stratified, seeded) where there is no val split; 0 = no validation.
        batch_size: images per step over all processes together.
        num_workers: loader processes per device.
        image_size: side of the input in pixels; None = the backbone's.
        mean: normalisation; None = the backbone's.
        std: normalisation; None = the backbone's.
        seed: of data order, held-out images and augmentation.
        check_images: decode every image of the splits in use before the first epoch.
        keep_decoded: memory for decoded images, e.g. "1GiB", which then are not decoded again; "0GB" = none. Not used
            with num_workers.
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
        keep_decoded: str = "1GiB",
    ) -> None:
        super().__init__(batch_size, num_workers, image_size, mean, std, seed, check_images)
        parse_memory(keep_decoded)
        self.keep_decoded = keep_decoded
        if not 0 <= val_fraction < 1:
            raise PetlError(f"ImageFolder(val_fraction={val_fraction}): it lies in [0, 1).")
        self.root, self.csv = Path(root), Path(csv) if csv else None
        self.augmentation, self.val_fraction = augmentation, val_fraction
        self.name = f"folder/{self.csv.name if self.csv else self.root.name}"

    def read(self) -> None:
        named = self._from_csv(self.csv) if self.csv else self._from_folders()
        self.labels = sorted({entry.label for entries in named.values() for entry in entries})
        self.num_classes = len(self.labels)
        index = {label: i for i, label in enumerate(self.labels)}
        for split in (s for s in SPLITS if s in named):
            self.splits[split] = Split(Sample(self.root / e.name, index[e.label], e.name) for e in named[split])
            self.split_names[split] = f"{self.csv.name}, {split}" if self.csv else split
        if "val" not in self.splits and self.val_fraction:
            self._hold_out()
        if "test" not in self.splits and "val" in self.splits:
            self.splits["test"] = self.splits["val"]
            self.split_names["test"] = f"the val split ({self.split_names['val']})"

    def _hold_out(self) -> None:
        """Move ``val_fraction`` of train to val."""
        samples = self.splits["train"].samples
        count = round(self.val_fraction * len(samples))
        held, kept = hold_out([s.label for s in samples], [count, len(samples) - count], self.seed)
        self.splits["train"], self.splits["val"] = (Split(samples[i] for i in part) for part in (kept, held))
        self.split_names["val"] = f"{self.val_fraction:g} held out of train"
        left = {s.label for s in self.splits["train"].samples}
        self.problems += [
            f"val_fraction={self.val_fraction:g} leaves no training image of class {name!r}."
            for i, name in enumerate(self.labels)
            if i not in left
        ]
        if not held:
            self.problems.append(f"val_fraction={self.val_fraction:g} of {len(samples)} images is less than one image.")

    def _from_folders(self) -> dict[str, list[Entry]]:
        named: dict[str, list[Entry]] = {}
        for split in SPLITS:
            folder = self.root / split
            if not folder.is_dir():
                continue
            named[split] = []
            # hidden folders are what editors and notebooks leave behind
            for directory in sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")):
                files = sorted(p for p in directory.rglob("*") if has_file_allowed_extension(p.name, IMG_EXTENSIONS))
                if not files:
                    self.problems.append(f"{directory} holds no images ({', '.join(IMG_EXTENSIONS)}).")
                named[split] += [Entry(p.relative_to(self.root).as_posix(), directory.name) for p in files]
        if not named.get("train"):
            there = (
                sorted(p.name for p in self.root.iterdir())[:8] if self.root.is_dir() else "nothing: it does not exist"
            )
            raise PetlError(f"{self.root / 'train'} has no class folders with images; {self.root} holds {there}.")
        self._compare_classes(named, str(self.root))
        missing = {e.label for e in named["train"]} - {e.label for e in named.get("val", named["train"])}
        self.problems += [f"{self.root / 'val'} has no images of class {c!r}." for c in sorted(missing)]
        return named

    def _from_csv(self, file: Path) -> dict[str, list[Entry]]:
        if not file.is_file():
            raise PetlError(f"CSV file {file} does not exist.")
        named: dict[str, list[Entry]] = {}
        with open(file, newline="", encoding="utf-8-sig") as handle:  # spreadsheets write a byte order mark
            reader = csv_module.DictReader(handle)
            try:
                header = reader.fieldnames or []
                if not {"path", "label"} <= set(header):
                    raise PetlError(f"{file}: the header must have the columns path and label; it has {list(header)}.")
                for row in reader:
                    name, label, split = ((row.get(key) or "").strip() for key in ("path", "label", "split"))
                    split = split or "train"
                    if split not in SPLITS:
                        self.problems.append(
                            f"{file} line {reader.line_num}: split {split!r}; {nearest(split, SPLITS)}"
                        )
                    elif not name or not label:
                        self.problems.append(f"{file} line {reader.line_num}: path or label is empty.")
                    else:
                        named.setdefault(split, []).append(Entry(name, label))
            except (UnicodeDecodeError, csv_module.Error) as error:
                raise PetlError(f"{file} is not a CSV file in UTF-8: {error}.") from error
        if not named.get("train"):
            listed = f" ({self.problems[0]})" if self.problems else ""
            raise PetlError(f"{file} lists no training images{listed}.")
        self._compare_classes(named, str(file))
        return named

    def _compare_classes(self, named: dict[str, list[Entry]], where: str) -> None:
        """Classes of val and test that train does not have are problems."""
        known = {e.label for e in named["train"]}
        for split in ("val", "test"):
            for label in sorted({e.label for e in named.get(split, [])} - known):
                hint = nearest(label, known)
                self.problems.append(f"{where}: class {label!r} of {split} is not a class of train; {hint}")
