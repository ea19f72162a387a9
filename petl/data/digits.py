"""scikit-learn's handwritten digits: 1,797 real 8 x 8 scans that come with the library. The embedded default."""

from __future__ import annotations

import numpy as np
from PIL import Image

from petl.data.base import ImageDataModule, Sample, Split, hold_out
from petl.errors import PetlError


class Digits(ImageDataModule):
    """Real handwritten digits, 10 classes, stratified split from the seed; grey as RGB, scaled up to the input size.

    Args:
        train_size: training images; train, val and test together are 1,797 at most.
        val_size: validation images.
        test_size: test images.
        augmentation: "none", or "shift" (moved by up to a sixteenth of the picture).
        batch_size: images per step over all processes together.
        num_workers: loader processes per device.
        image_size: side of the input in pixels; None = the backbone's.
        mean: normalisation; None = the backbone's.
        std: normalisation; None = the backbone's.
        seed: of split, data order and augmentation.
    """

    name = "digits"
    interpolation = "bicubic"

    def __init__(
        self,
        train_size: int = 600,
        val_size: int = 400,
        test_size: int = 797,
        augmentation: str = "none",
        batch_size: int = 32,
        num_workers: int = 0,
        image_size: int | None = None,
        mean: tuple[float, float, float] | None = None,
        std: tuple[float, float, float] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, num_workers, image_size, mean, std, seed)
        self.sizes, self.augmentation = {"train": train_size, "val": val_size, "test": test_size}, augmentation
        self.num_classes, self.labels = 10, [str(i) for i in range(10)]

    def read(self) -> None:
        from sklearn.datasets import load_digits

        data = load_digits()
        pixels = (data.images * (255 / 16)).round().astype(np.uint8)
        labels = [int(v) for v in data.target]
        if min(self.sizes.values()) < 0 or self.sizes["train"] < 1 or sum(self.sizes.values()) > len(labels):
            raise PetlError(f"Digits: sizes {self.sizes} must not be negative and sum to at most {len(labels)}.")
        parts = hold_out(labels, list(self.sizes.values()), self.seed)
        for split, indices in zip(self.sizes, parts, strict=True):
            if indices:
                self.splits[split] = Split(Sample(Image.fromarray(pixels[i]), labels[i], str(i)) for i in indices)
                self.split_names[split] = f"{len(indices)} of scikit-learn's digits"
