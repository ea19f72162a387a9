"""VTAB-1k in the layout of the NOAH release: ``ROOT/<task>/{train800,val200,train800val200,test}.txt`` and ``images/``.

Lines are ``path label``, the path relative to the task folder. Protocol: choose on train800 / val200, train finally on
train800val200, test once; images are resized straight to the input size, no augmentation.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from petl.data.base import ImageDataModule, Sample, Split
from petl.errors import PetlError, nearest


class Task(NamedTuple):
    group: str
    num_classes: int


TASKS = {
    "cifar": Task("Natural", 100), "caltech101": Task("Natural", 102), "dtd": Task("Natural", 47),
    "oxford_flowers102": Task("Natural", 102), "oxford_iiit_pet": Task("Natural", 37), "svhn": Task("Natural", 10),
    "sun397": Task("Natural", 397), "patch_camelyon": Task("Specialized", 2), "eurosat": Task("Specialized", 10),
    "resisc45": Task("Specialized", 45), "diabetic_retinopathy": Task("Specialized", 5),
    "clevr_count": Task("Structured", 8), "clevr_dist": Task("Structured", 6), "dmlab": Task("Structured", 6),
    "kitti": Task("Structured", 4), "dsprites_loc": Task("Structured", 16), "dsprites_ori": Task("Structured", 16),
    "smallnorb_azi": Task("Structured", 18), "smallnorb_ele": Task("Structured", 9),
}  # fmt: skip
TRAIN_SPLITS = ("train800", "train800val200")


class VTAB(ImageDataModule):
    """One task of VTAB-1k, or a task of your own in the same layout.

    Args:
        root: folder of the task folders.
        task: one of the 19 names (see `petl.data.vtab.TASKS`), or another folder under root.
        train_split: "train800" (validates on val200) or "train800val200" (final training, nothing is validated).
        batch_size: images per step over all processes together.
        num_workers: loader processes per device.
        image_size: side of the input in pixels; None = the backbone's.
        mean: normalisation; None = the backbone's.
        std: normalisation; None = the backbone's.
        seed: of the data order.
        check_images: decode every image of the splits in use before the first epoch.
    """

    def __init__(
        self,
        root: str,
        task: str,
        train_split: str = "train800",
        batch_size: int = 64,
        num_workers: int = 0,
        image_size: int | None = None,
        mean: tuple[float, float, float] | None = None,
        std: tuple[float, float, float] | None = None,
        seed: int = 0,
        check_images: bool = True,
    ) -> None:
        super().__init__(batch_size, num_workers, image_size, mean, std, seed, check_images)
        if train_split not in TRAIN_SPLITS:
            raise PetlError(f"VTAB(train_split={train_split!r}): {nearest(train_split, TRAIN_SPLITS)}")
        self.folder, self.task, self.train_split = Path(root) / task, task, train_split
        self.name = f"vtab/{task}" if task in TASKS else f"vtab layout/{task} (not one of the 19)"
        if not self.folder.is_dir():
            there = [p.name for p in Path(root).iterdir() if p.is_dir()] if Path(root).is_dir() else []
            place = f"{root} has no folder {task!r}" if there else f"{root} is not a folder with VTAB tasks"
            raise PetlError(f"VTAB task {task!r}: {nearest(task, there or TASKS)} ({place}).")

    def read(self) -> None:
        used = {"train": self.train_split, "test": "test"} | ({"val": "val200"} if self.train_split == "train800" else {})
        lists = {}
        for split, name in used.items():
            file = self.folder / f"{name}.txt"
            if file.is_file():
                lists[split] = self._read_list(file)
            elif split != "test":
                self.problems.append(f"list {file} does not exist.")
        highest = max((s.label for v in lists.values() for s in list.__iter__(v)), default=0)
        self.num_classes = TASKS[self.task].num_classes if self.task in TASKS else highest + 1
        self.labels = self._labels()
        for split, samples in lists.items():
            for line, sample in enumerate(list.__iter__(samples), 1):
                if not 0 <= sample.label < self.num_classes:
                    file = self.folder / f"{used[split]}.txt"
                    self.problems.append(f"{file} line {line}: label {sample.label} is outside 0 to {self.num_classes - 1}.")
        self.splits, self.split_names = lists, {s: used[s] for s in lists}

    def _read_list(self, file: Path) -> Split:
        split = Split()
        for line, text in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            name, _, label = text.strip().rpartition(" ")
            if not name or not label.lstrip("-").isdigit():
                self.problems.append(f"{file} line {line}: {text!r} is not 'path label'.")
            elif ".." in Path(name).parts or Path(name).is_absolute():
                self.problems.append(f"{file} line {line}: {name!r} leads out of the task folder.")
            else:
                split.append(Sample(self.folder / name, int(label), name))
        if not split:
            self.problems.append(f"list {file} is empty.")
        return split

    def _labels(self) -> list[str]:
        file = self.folder / "labels.txt"
        if not file.is_file():
            return [str(i) for i in range(self.num_classes)]
        labels = file.read_text(encoding="utf-8").splitlines()
        if len(labels) != self.num_classes:
            self.problems.append(f"{file} names {len(labels)} classes, the task has {self.num_classes}.")
        return labels
