"""Image preprocessing on torchvision: what evaluation does, and the few augmentations on top of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as F

from petl.errors import PetlError, nearest

AUGMENTATIONS = ("none", "flip_crop", "shift")
MODES = ("resize", "center_crop", "letterbox")
CROP_SHARE = 0.875


def to_rgb(image: Image.Image) -> Image.Image:
    """Any PIL mode to RGB: 16-bit grey is scaled, transparency is laid on white."""
    if image.mode.startswith("I;16") or image.mode == "I":
        image = Image.fromarray((np.asarray(image, np.float32) / 257).clip(0, 255).astype(np.uint8))
    if "A" in image.getbands() or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


def record_values(
    preprocessing: Mapping[str, Any],
) -> tuple[list[int], InterpolationMode, list[float], list[float]]:
    """Size [H, W], interpolation, mean and std of a record. Raises `PetlError` if one is missing or no number."""
    try:
        size = [int(v) for v in preprocessing["image_size"]]
        interpolation = InterpolationMode(str(preprocessing["interpolation"]))
        mean, std = ([float(v) for v in preprocessing[k]] for k in ("mean", "std"))
    except (KeyError, TypeError, ValueError) as error:
        raise PetlError(f"preprocessing record is not usable: {type(error).__name__}: {error}") from error
    if min(std) <= 0:
        raise PetlError(f"preprocessing divides by std {std}: its values are above 0.")
    return size, interpolation, mean, std


@dataclass(frozen=True)
class Preparation:
    """PIL image -> normalised tensor (3, H, W), in parts that need not be done at the same time and place.

    ``name``: tells apart what ``fixed`` does, PIL -> PIL, the same at every call. ``drawn``: random steps on that, if
    any. ``normalise``: uint8 (…, 3, H, W) -> float32.
    """

    name: str
    fixed: Callable[[Image.Image], Image.Image]
    drawn: Callable[[Image.Image], Image.Image] | None
    normalise: Callable[[Tensor], Tensor]

    def pixels(self, fixed: Image.Image) -> Tensor:
        """uint8 (3, H, W) of what ``fixed`` made."""
        return F.pil_to_tensor(fixed if self.drawn is None else self.drawn(fixed))

    def __call__(self, image: Image.Image) -> Tensor:
        return self.normalise(self.pixels(self.fixed(image)))


def evaluation_transform(preprocessing: Mapping[str, Any]) -> Callable[[Image.Image], Tensor]:
    """PIL image -> normalised tensor (3, H, W), as in evaluation.

    ``preprocessing``: ``image_size`` [H, W], ``mean``, ``std``, ``interpolation``, and ``mode``: "resize" straight to
    the size, "center_crop" of a picture whose shorter side is the size / 0.875, or "letterbox" (see
    `petl.data.grounding_transforms.letterbox`, which gives the mask too). Raises `PetlError` for others.
    """
    mode = preprocessing.get("mode")
    if mode not in MODES:
        raise PetlError(f"preprocessing mode {mode!r}: {nearest(str(mode), MODES)}")
    size, interpolation, *_ = record_values(preprocessing)
    if mode == "letterbox":
        from petl.data.grounding_transforms import letterbox

        record = dict(preprocessing)
        return lambda image: letterbox(image, record).image
    name = f"{mode} {size} {interpolation.value}"
    if mode == "resize":
        steps = [v2.Resize(size, interpolation, antialias=True)]
    else:
        steps = [v2.Resize(round(max(size) / CROP_SHARE), interpolation, antialias=True), v2.CenterCrop(size)]
    return Preparation(name, v2.Compose([to_rgb, *steps]), None, normalisation(preprocessing))


def train_transform(preprocessing: Mapping[str, Any], augmentation: str) -> Callable[[Image.Image], Tensor]:
    """PIL image -> normalised tensor (3, H, W), with augmentation.

    "none" is evaluation; "flip_crop": random resized crop (40 to 100 % of the area) and horizontal flip; "shift": moved
    by up to a sixteenth of the picture, for things that must not be flipped.
    """
    if augmentation not in AUGMENTATIONS:
        raise PetlError(f"augmentation {augmentation!r}: {nearest(augmentation, AUGMENTATIONS)}")
    if augmentation == "none":
        return evaluation_transform(preprocessing)
    size, interpolation, *_ = record_values(preprocessing)
    normalise = normalisation(preprocessing)
    if augmentation == "flip_crop":
        crop = v2.RandomResizedCrop(size, scale=(0.4, 1.0), interpolation=interpolation, antialias=True)
        return Preparation("whole", to_rgb, v2.Compose([crop, v2.RandomHorizontalFlip()]), normalise)
    resize = v2.Resize(size, interpolation, antialias=True)
    shift = v2.RandomAffine(0, translate=(1 / 16, 1 / 16), interpolation=InterpolationMode.BILINEAR)
    return Preparation(f"resize {size} {interpolation.value}", v2.Compose([to_rgb, resize]), shift, normalise)


def normalisation(preprocessing: Mapping[str, Any]) -> Callable[[Tensor], Tensor]:
    """uint8 (…, 3, H, W) -> float32, with the mean and std of a record."""
    *_, mean, std = record_values(preprocessing)
    return v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)])
