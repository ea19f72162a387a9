"""What every data set of visual grounding shares: one sample per referring expression, letterboxed pictures with masks.

A batch holds ``image`` (B, 3, S, S) normalised, zeros in the padding; ``mask`` (B, S, S), True on the picture; ``box``
(B, 4), cxcywh in [0, 1] of the padded canvas; ``expression``, a list of lower-cased strings, left and right swapped
where the picture was mirrored; ``index`` (B,). Without augmentation also ``picture`` (B,), a number of the picture, so
that one with several expressions is encoded once. Tokenising is the task's. From recorded activations: see
`petl.data.cached_references.CachedReferences`.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from PIL import Image

from petl.data.base import SHOWN, DataModule, Split
from petl.data.cached import CachedBatches, Inputs
from petl.data.cached_references import CachedReferences
from petl.data.decoded import opened, read_image
from petl.data.grounding_transforms import Augmentation, Canvas, Frame, TrainTransform
from petl.data.loading import KeyedDataset
from petl.errors import PetlError

if TYPE_CHECKING:
    from petl.data.references import BoxCount, Collector

Box = tuple[float, float, float, float]


class Reference(NamedTuple):
    """One expression and the box that it means.

    ``box`` is (x, y, w, h) in pixels of the picture; ``width`` and ``height`` are the picture's, where known; ``name``
    goes into the split's hash; expressions of one object share a ``ref_id`` (None: not known).
    """

    image: Path | Image.Image
    expression: str
    box: Box
    width: int | None
    height: int | None
    name: str
    ref_id: int | str | None = None

    @property
    def line(self) -> str:
        return f"{self.name} {self.expression} {' '.join(map(repr, self.box))}"

    @property
    def corners(self) -> Box:
        """(x0, y0, x1, y1)."""
        x, y, w, h = self.box
        return x, y, x + w, y + h


class References(Split[Reference]):
    """A split of grounding data."""

    def counts(self) -> dict[str, int]:
        """Pictures, referred objects (told apart by ``ref_id``, else by the box) and expressions."""
        refs = {(s.name, s.box if s.ref_id is None else s.ref_id) for s in self.samples}
        return {"images": len({s.name for s in self.samples}), "refs": len(refs), "expressions": len(self)}


class _Evaluation:
    """`Reference` -> entry of a batch, without anything random."""

    def __init__(self, preprocessing: Mapping[str, Any]) -> None:
        self.canvas = Canvas(preprocessing)
        self._sizes: dict[Path, tuple[int, int]] = {}

    def __call__(self, sample: Reference) -> dict[str, Any]:
        boxed = self.canvas.letterbox(opened(sample.image))
        return {"image": boxed.image, **self._entry(sample, boxed)}

    def light(self, sample: Reference) -> dict[str, Any]:
        """The entry without the image, which is not decoded."""
        return self._entry(sample, self.canvas.frame(self._size(sample.image)))

    def _entry(self, sample: Reference, frame: Frame) -> dict[str, Any]:
        return {
            "mask": frame.mask, "box": frame.to_canvas(sample.corners), "expression": sample.expression.lower(),
            "picture": zlib.crc32(sample.name.encode()),
        }  # fmt: skip

    def _size(self, image: Path | Image.Image) -> tuple[int, int]:
        """Width and height, of a file from its header."""
        if not isinstance(image, Path):
            return image.size
        if image not in self._sizes:
            try:
                with Image.open(image) as header:
                    self._sizes[image] = header.size
            except Exception:  # decoders raise anything; `read_image` names the file
                self._sizes[image] = read_image(image).size
        return self._sizes[image]


@dataclass(frozen=True)
class _Training:
    """`Reference` -> entry of a batch, augmented."""

    augment: TrainTransform

    def __call__(self, sample: Reference) -> dict[str, Any]:
        image, mask, box, phrase = self.augment(opened(sample.image), sample.corners, sample.expression.lower())
        return {"image": image, "mask": mask, "box": box, "expression": phrase}


class GroundingDataModule(DataModule):
    """Base of the grounding data sets: subclasses fill ``splits`` with `References` in `read`.

    Args:
        batch_size: expressions per step over all processes together.
        num_workers: loader processes per device.
        image_size: side of the square canvas in pixels; None = the backbone's.
        mean, std: normalisation of values in [0, 1]; None = the backbone's.
        seed: of data order, held-out images and augmentation.
        check_images: decode every image before the first epoch; else only look whether the files exist.
        test_split: what `test` and `predict` evaluate.
        augmentation: random transforms of training; None = none.
    """

    mode = "letterbox"
    interpolation = "bilinear"
    image_source: str | None = (
        None  # "coco": pictures of COCO train2014, which vision encoders may have been trained on
    )

    def __init__(
        self,
        batch_size: int = 64,
        num_workers: int = 0,
        image_size: int | None = None,
        mean: tuple[float, float, float] | None = None,
        std: tuple[float, float, float] | None = None,
        seed: int = 0,
        check_images: bool = True,
        test_split: str = "test",
        augmentation: Augmentation | None = None,
    ) -> None:
        super().__init__(batch_size, num_workers, image_size, mean, std, seed, check_images)
        self.test_split, self.augmentation = test_split, augmentation
        self._boxes: BoxCount | None = None
        self._stated: dict[Path, tuple[int, int]] = {}  # sizes that the lists give

    def collect(self, found: Collector, names: Mapping[str, str]) -> None:
        """Take over what was read from files: the splits that hold anything, with their ``names``, and the problems."""
        for split, samples in found.splits.items():
            if samples:
                self.splits[split], self.split_names[split] = References(samples), names[split]
            for s in samples:
                if isinstance(s.image, Path) and s.width and s.height:
                    self._stated[s.image] = s.width, s.height
        self.problems += found.problems
        self._boxes = found.boxes

    def setup(self, stage: str) -> None:
        super().setup(stage)
        Canvas(self.preprocessing)  # a shape that is not square is an error here and not in a loader process

    def transform(self, training: bool) -> Callable[[Reference], dict[str, Any]]:
        if training and self.augmentation is not None:
            return _Training(TrainTransform(self.preprocessing, self.augmentation))
        return _Evaluation(self.preprocessing)

    # ---- what `petl.TapCache` asks

    def varies(self, split: str, stream: str = "image") -> str | None:
        if split == "train" and hasattr(self.splits[split], "at"):
            return "its training pictures are new in every epoch"
        if split == "train" and stream == "image" and self.augmentation is not None:
            on = ", ".join(f"aug_{name}" for name, value in self.augmentation.record().items() if value is True)
            return f"random transforms change its pictures ({on})"
        return None

    def contents(self, split: str, stream: str = "image") -> list[str]:
        """Digests of the samples' pictures; of text every phrase that can stand in a batch, once."""
        return super().contents(split) if stream == "image" else self._phrases(split)

    def _phrases(self, split: str) -> list[str]:
        found = dict.fromkeys(self.expressions(split))
        if split == "train" and self.augmentation is not None:
            found |= dict.fromkeys(variant for phrase in found for variant in self.augmentation.phrases(phrase))
        return list(found)

    def inputs(self, split: str, stream: str = "image") -> Inputs:
        if stream == "image":
            return super().inputs(split)
        phrases = self._phrases(split)
        return lambda positions: {"expression": [phrases[i] for i in positions]}

    def from_taps(self, split: str, data: KeyedDataset) -> CachedBatches:
        light = data.transform.light if isinstance(data.transform, _Evaluation) else None
        return CachedReferences(data, light, self.cached[split], self._phrases(split))

    def expressions(self, split: str) -> list[str]:
        """Every expression of a split, lower-cased as in a batch."""
        self._read_once()
        if split not in self.splits:
            raise PetlError(f"{self.name} has no split {split!r}; it has: {', '.join(self.splits)}.")
        return [s.expression.lower() for s in self.splits[split].samples]

    def _damaged(self, splits: Sequence[str]) -> list[str]:
        """Files that are missing are counted before any picture is decoded: often the folder is wrong."""
        files = {s.image for split in splits for s in self.splits[split].samples if isinstance(s.image, Path)}
        missing = sorted(f for f in files if not f.is_file())
        if missing:
            shown = ", ".join(map(str, missing[:SHOWN])) + (" …" if len(missing) > SHOWN else "")
            return [f"{len(missing):,} of {len(files):,} image files do not exist: {shown}"]
        return super()._damaged(splits)

    def image_problem(self, path: Path) -> str | None:
        """Besides damage: another size than the list says, so that the boxes cannot fit."""
        if not self.check_images or path not in self._stated:
            return super().image_problem(path)
        try:
            size, stated = read_image(path).size, self._stated[path]
        except PetlError as error:
            return str(error)
        wrong = f"image {path} has {size[0]} x {size[1]} pixels, the list says {stated[0]} x {stated[1]}."
        return wrong if size != stated else None

    def facts(self) -> list[str]:
        """Boxes, and pictures that stand in training and in another split."""
        lines = []
        if self._boxes:
            lines.append(f"boxes    {self._boxes.share}" + (f"; {self._boxes.hint}" if self._boxes.hint else ""))
        seen = {s.name for s in self.splits["train"].samples} if "train" in self.splits else set()
        for split in (s for s in self.splits if s != "train"):
            shared = len(seen & {s.name for s in self.splits[split].samples})
            if shared:
                lines.append(f"note     {shared:,} images of {split} are images of train too")
        return lines

    def describe(self, split: str) -> str:
        return ", ".join(f"{count:,} {what}" for what, count in self.splits[split].counts().items())

    def protocol(self) -> dict[str, Any]:
        augmentation = self.augmentation.record() if self.augmentation else "none"
        return super().protocol() | {"test_split": self.test_split, "augmentation": augmentation}
