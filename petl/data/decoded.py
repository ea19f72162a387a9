"""Pictures on their way into a batch: decoded once where memory allows, normalised where the batch is computed on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from petl.data.transforms import Preparation
from petl.errors import PetlError


def read_image(path: Path) -> Image.Image:
    """Open and decode; raises `PetlError` that names the file."""
    try:
        with Image.open(path) as image:
            image.load()
            return image
    except Exception as error:  # decoders raise anything: OSError, SyntaxError, struct.error, DecompressionBombError
        kind = "does not exist" if isinstance(error, FileNotFoundError) else f"is cut short or not an image ({error})"
        raise PetlError(f"image {path} {kind}.") from error


def opened(image: Path | Image.Image) -> Image.Image:
    """The image itself, or the decoded file."""
    return read_image(image) if isinstance(image, Path) else image


class Decoded:
    """Pictures after `Preparation.fixed`, kept as uint8 while there is room; the others are decoded at every use.

    Args:
        limit: bytes.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.nbytes = limit, 0
        self._pixels: dict[tuple[str, Path | int], tuple[Any, np.ndarray]] = {}  # with the image: its id stays its own

    def fixed(self, image: Path | Image.Image, preparation: Preparation) -> Image.Image:
        """``preparation.fixed`` of the picture."""
        key = (preparation.name, image if isinstance(image, Path) else id(image))
        kept = self._pixels.get(key)
        if kept is not None:
            return Image.fromarray(kept[1])
        found = preparation.fixed(opened(image))
        pixels = np.asarray(found)
        if self.nbytes + pixels.nbytes <= self.limit:
            self._pixels[key] = image, pixels
            self.nbytes += pixels.nbytes
        return found


@dataclass(frozen=True)
class Labelled:
    """A sample -> entry of a batch: ``image`` (3, H, W) and ``label``.

    ``decoded``: what keeps its pictures, None = nothing does. ``raw``: the image stays uint8, and is normalised later.
    """

    preparation: Callable[[Image.Image], Tensor]
    decoded: Decoded | None = None
    raw: bool = False

    def __call__(self, sample: Any) -> dict[str, Any]:
        return {"image": self._picture(sample.image), "label": sample.label}

    def _picture(self, image: Path | Image.Image) -> Tensor:
        steps = self.preparation
        if not isinstance(steps, Preparation):
            return steps(opened(image))
        fixed = steps.fixed(opened(image)) if self.decoded is None else self.decoded.fixed(image, steps)
        pixels = steps.pixels(fixed)
        return pixels if self.raw else steps.normalise(pixels)
