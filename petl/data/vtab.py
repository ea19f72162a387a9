"""VTAB-1k in the layout of the NOAH release: ``ROOT/<task>/{train800,val200,train800val200,test}.txt`` and ``images/``.

Lines are ``path label``, the path relative to the task folder; it may hold spaces. ``labels.txt``, one class name per
line, may lie beside them. Protocol: choose on train800 / val200, train finally on train800val200, test once; images are
resized straight to the input size (bicubic), no augmentation.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from petl.costs import parse_memory
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
LINE = re.compile(r"(.*\S.*) (-?[0-9]{1,6})\s*")  # path and label: at the last space, since paths may hold spaces


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
        keep_decoded: memory for decoded images, e.g. "1GiB", which then are not decoded again; "0GB" = none. Not used
            with num_workers.
    """

    interpolation = "bicubic"

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
        keep_decoded: str = "1GiB",
    ) -> None:
        super().__init__(batch_size, num_workers, image_size, mean, std, seed, check_images)
        parse_memory(keep_decoded)
        self.keep_decoded = keep_decoded
        if train_split not in TRAIN_SPLITS:
            raise PetlError(f"VTAB(train_split={train_split!r}): {nearest(train_split, TRAIN_SPLITS)}")
        self.folder, self.task, self.train_split = Path(root) / task, task, train_split
        self.name = f"vtab/{task}" if task in TASKS else f"vtab layout/{task} (not one of the 19)"
        if not self.folder.is_dir():
            if not Path(root).is_dir():
                raise PetlError(f"VTAB root {root} does not exist: give the folder that holds the task folders (root).")
            there = [p.name for p in Path(root).iterdir() if p.is_dir()]
            raise PetlError(f"VTAB root {root} has no task {task!r}: {nearest(task, there)}")

    def read(self) -> None:
        validated = {"val": "val200"} if self.train_split == "train800" else {}
        used = {"train": self.train_split, **validated, "test": "test"}
        lists: dict[str, list[tuple[int, Sample]]] = {}  # by split: (line number, sample)
        for split, name in used.items():
            file = self.folder / f"{name}.txt"
            if file.is_file():
                lists[split] = self._read_list(file)
            elif split != "test":
                self.problems.append(f"list {file} does not exist.")
        self.labels = self._labels(max((s.label for v in lists.values() for _, s in v), default=0))
        self.num_classes = len(self.labels)
        for split, samples in lists.items():
            file = self.folder / f"{used[split]}.txt"
            self.problems += [
                f"{file} line {line}: label {s.label} is outside 0 to {self.num_classes - 1}."
                for line, s in samples
                if not 0 <= s.label < self.num_classes
            ]
            self.splits[split], self.split_names[split] = Split(s for _, s in samples), used[split]

    def _read_list(self, file: Path) -> list[tuple[int, Sample]]:
        samples = []
        for number, line in enumerate(self._lines(file), 1):
            found = LINE.fullmatch(line)
            name, label = found.groups() if found else ("", "")
            if not found:
                self.problems.append(f"{file} line {number}: {line!r} is not 'path label'.")
            elif ".." in Path(name).parts or Path(name).is_absolute():
                self.problems.append(f"{file} line {number}: {name!r} leads out of the task folder.")
            else:
                samples.append((number, Sample(self.folder / name, int(label), name)))
        if not samples:
            self.problems.append(f"list {file} holds no images.")
        return samples

    def _labels(self, highest: int) -> list[str]:
        """Class names: ``labels.txt``, else numbers. Of your own task, it or the lists say how many."""
        file = self.folder / "labels.txt"
        labels = [line.strip() for line in self._lines(file)] if file.is_file() else None
        count = TASKS[self.task].num_classes if self.task in TASKS else len(labels or range(highest + 1))
        if labels and len(labels) != count:
            self.problems.append(f"{file} names {len(labels)} classes, the task has {count}.")
            labels = None
        return labels or [str(i) for i in range(count)]

    def _lines(self, file: Path) -> list[str]:
        """Lines of a text file without the empty ones at its end."""
        try:
            return file.read_text(encoding="utf-8").rstrip().split("\n")  # names may hold what splitlines() splits at
        except UnicodeDecodeError as error:
            self.problems.append(f"{file} is not text in UTF-8: {error}.")
            return []
