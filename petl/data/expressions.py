"""Referring expressions of your own: a JSON-lines file beside a folder of pictures."""

from __future__ import annotations

from pathlib import Path

import torch

from petl.data.grounding import GroundingDataModule, References
from petl.data.grounding_transforms import Augmentation
from petl.data.references import Collector, json_rows
from petl.errors import PetlError, nearest

SPLITS = ("train", "val", "test")


class Expressions(GroundingDataModule):
    """A JSON-lines file, one object per line with ``image``, ``expression`` and a box in pixels.

    The box is ``bbox`` [x, y, w, h] or ``bbox_xyxy`` [x0, y0, x1, y1]; ``split`` ("train", "val" or "test"; "train"
    where it is missing), ``width``, ``height`` and ``ref_id`` may stand beside it, other keys are ignored. Pixels are
    the file's, before any rotation that a camera noted. Without a test split, the validation split is tested.

    Args:
        file: the list.
        image_root: folder that its images are relative to; None = the file's.
        split: None = each line's own; "train", "val" or "test": every line belongs to it, whatever the line says.
        val_fraction: share of the training images held out (seeded, with all their expressions) where no line is val.
        test_split: what `test` evaluates: "test", "val" or "train".
        aug_crop, aug_scale, aug_translate, aug_flip, aug_color: see `petl.data.grounding_transforms.Augmentation`.
        batch_size: expressions per step over all processes together.
        num_workers: loader processes per device.
        image_size: side of the input in pixels; None = the backbone's.
        mean: normalisation; None = the backbone's.
        std: normalisation; None = the backbone's.
        seed: of data order, held-out images and augmentation.
        check_images: decode every image of the splits in use before the first epoch; else only look for the files.
    """

    def __init__(
        self,
        file: str,
        image_root: str | None = None,
        split: str | None = None,
        val_fraction: float = 0.0,
        test_split: str = "test",
        aug_crop: bool = True,
        aug_scale: bool = True,
        aug_translate: bool = True,
        aug_flip: bool = True,
        aug_color: bool = True,
        batch_size: int = 64,
        num_workers: int = 0,
        image_size: int | None = None,
        mean: tuple[float, float, float] | None = None,
        std: tuple[float, float, float] | None = None,
        seed: int = 0,
        check_images: bool = True,
    ) -> None:
        augmentation = Augmentation.of(aug_crop, aug_scale, aug_translate, aug_flip, aug_color)
        super().__init__(batch_size, num_workers, image_size, mean, std, seed, check_images, test_split, augmentation)
        for key, value in (("split", split), ("test_split", test_split)):
            if value is not None and value not in SPLITS:
                raise PetlError(f"Expressions({key}={value!r}): {nearest(value, SPLITS)}")
        if not 0 <= val_fraction < 1:
            raise PetlError(f"Expressions(val_fraction={val_fraction}): it lies in [0, 1).")
        self.file, self.split, self.val_fraction = Path(file), split, val_fraction
        self.image_root = Path(image_root) if image_root else self.file.parent
        self.name = f"expressions/{self.file.name}"

    def read(self) -> None:
        if not self.image_root.is_dir():
            raise PetlError(f"image_root {self.image_root} does not exist: name the folder of the list's images.")
        advice = "; with split: train every line is taken for training, whatever it says"
        found = Collector(self.image_root, SPLITS, advice=advice)
        found.add(json_rows(self.file, found, self.split))
        self.collect(found, {s: f"{self.file.name}, {s}" for s in SPLITS})
        if not self.splits and not self.problems:
            self.problems.append(f"{self.file} holds no expressions.")
        if "val" not in self.splits and "train" in self.splits and self.val_fraction:
            self._hold_out()
        if "test" not in self.splits and "val" in self.splits:
            self.splits["test"] = self.splits["val"]
            self.split_names["test"] = f"the val split ({self.split_names['val']})"

    def _hold_out(self) -> None:
        """Move ``val_fraction`` of the training images to val: no image is on both sides."""
        samples = self.splits["train"].samples
        names = sorted({s.name for s in samples})
        shuffled = torch.randperm(len(names), generator=torch.Generator().manual_seed(self.seed)).tolist()
        held = {names[i] for i in shuffled[: round(self.val_fraction * len(names))]}
        if not 0 < len(held) < len(names):
            self.problems.append(
                f"val_fraction={self.val_fraction:g} of {len(names)} images leaves nothing to train on or to validate."
            )
            return
        self.splits["train"] = References(s for s in samples if s.name not in held)
        self.splits["val"] = References(s for s in samples if s.name in held)
        self.split_names["val"] = f"{self.val_fraction:g} of the images held out of train"
