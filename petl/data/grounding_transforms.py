"""Pictures, boxes and words of visual grounding: the letterbox of evaluation, and the augmentation of training.

Training follows TransVG, sizes relative to an input of 640 pixels: crop or long-side resize, colour jitter, horizontal
flip, random place on the canvas. Two defects of the published code are repaired: a mirrored picture swaps left and
right as *words* ("bright" stays), and a crop never loses the box (there, 6 % of the crops leave a box without area).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from petl.data.transforms import record_values, to_rgb
from petl.errors import PetlError, nearest

FLIP_WORDS = ("words", "reference")
CROPS = ("center", "reference")
BASE = 640  # pixels of the canvas that the sizes below belong to
LONG_SIDES = tuple(BASE - 32 * i for i in range(7))
SHORT_SIDES = (400, 500, 600)  # before a crop
CROP_SIDES = (384, 600)
CROP_TRIES = 20
MIN_VISIBLE = 0.5  # share of the box that a crop must keep
STRENGTH = 0.4  # of brightness, contrast and saturation: factors in [0.6, 1.4]
UNCROPPABLE = ("left", "right", "top", "bottom", "middle")  # anywhere in the phrase, as in TransVG

_LETTER = r"[^\W\d_]"
_PLACE = "top|bottom|upper|lower|middle|mid|center|front|back|far"
_SIDES = re.compile(
    rf"(?<!{_LETTER})((?:{_PLACE})?)(left|right)(?=(?:most|handed|hand|wards|ward|side|er|corner|{_PLACE})?(?!{_LETTER}))"
)


class Placement(NamedTuple):
    """Where the picture lies on the canvas: ``width`` x ``height`` pixels from (left, top)."""

    left: int
    top: int
    width: int
    height: int


@dataclass(frozen=True)
class Frame:
    """Where a picture lies on a square canvas, and the way from its pixels to the canvas and back.

    ``mask`` (S, S) is True on the picture. ``scale`` is canvas pixels per picture pixel, ``left`` and ``top`` where the
    picture begins, ``width`` and ``height`` its original size.
    """

    mask: Tensor
    scale: float
    left: int
    top: int
    width: int
    height: int

    @property
    def _ratios(self) -> tuple[float, float]:
        """Horizontal and vertical scale: they differ from ``scale`` by the rounding to whole pixels."""
        w, h = scaled(self.width, self.height, self.scale)
        return w / self.width, h / self.height

    def to_pixels(self, box: Sequence[float] | Tensor) -> tuple[float, float, float, float]:
        """(cx, cy, w, h) in [0, 1] of the canvas -> (x0, y0, x1, y1) in pixels of the picture, clamped to it."""
        side = self.mask.shape[-1]
        cx, cy, w, h = (float(v) * side for v in box)
        rx, ry = self._ratios
        xs = ((v - self.left) / rx for v in (cx - w / 2, cx + w / 2))
        ys = ((v - self.top) / ry for v in (cy - h / 2, cy + h / 2))
        (x0, x1), (y0, y1) = (min(max(x, 0.0), self.width) for x in xs), (min(max(y, 0.0), self.height) for y in ys)
        return x0, y0, x1, y1

    def to_canvas(self, box: Sequence[float]) -> Tensor:
        """(x0, y0, x1, y1) in pixels of the picture -> (4,) cxcywh in [0, 1] of the canvas."""
        rx, ry = self._ratios
        x0, y0, x1, y1 = (float(v) for v in box)
        return normalised((x0 * rx, y0 * ry, x1 * rx, y1 * ry), self.left, self.top, self.mask.shape[-1])


@dataclass(frozen=True)
class Letterboxed(Frame):
    """A picture in its `Frame`: ``image`` (3, S, S) is normalised, with zeros in the padding."""

    image: Tensor


def scaled(width: int, height: int, scale: float) -> tuple[int, int]:
    """Size in whole pixels after scaling, at least 1."""
    return max(1, round(width * scale)), max(1, round(height * scale))


def normalised(box: Sequence[float], left: int, top: int, side: int) -> Tensor:
    """(x0, y0, x1, y1) in pixels of a picture that lies at (left, top) -> (4,) cxcywh in [0, 1] of the canvas."""
    x0, y0, x1, y1 = box
    return torch.tensor([(x0 + x1) / 2 + left, (y0 + y1) / 2 + top, x1 - x0, y1 - y0]) / side


class Canvas:
    """The square input of a model: lays pictures on it and normalises them once. Raises `PetlError`.

    Args:
        preprocessing: record with ``image_size`` [S, S], ``mean`` and ``std``.
    """

    def __init__(self, preprocessing: Mapping[str, Any]) -> None:
        size, self.interpolation, mean, std = record_values(preprocessing)
        if len(set(size)) != 1:
            raise PetlError(f"letterbox: the input is square, not {size}; give one image_size.")
        self.side = size[0]
        self._mean, self._std = (torch.tensor(v).view(3, 1, 1) for v in (mean, std))

    def centred(self, width: int, height: int) -> Placement:
        dw, dh = self.side - width, self.side - height
        return Placement(round(dw / 2 - 0.1), round(dh / 2 - 0.1), width, height)

    def frame(self, size: tuple[int, int]) -> Frame:
        """Of a picture of ``size`` (width, height), as `letterbox` lays it."""
        scale = self.side / max(size)
        place = self.centred(*scaled(*size, scale))
        return Frame(self.mask(place), scale, place.left, place.top, *size)

    def letterbox(self, image: Image.Image) -> Letterboxed:
        picture, frame = _pixels(image), self.frame(image.size)
        width, height = scaled(*image.size, frame.scale)
        if (width, height) != image.size:
            picture = F.resize(picture, [height, width], self.interpolation, antialias=True)
        laid = self.lay(picture, Placement(frame.left, frame.top, width, height))
        return Letterboxed(frame.mask, frame.scale, frame.left, frame.top, frame.width, frame.height, laid)

    def mask(self, place: Placement) -> Tensor:
        """(S, S), True on the picture."""
        mask = torch.zeros(self.side, self.side, dtype=torch.bool)
        mask[place.top : place.top + place.height, place.left : place.left + place.width] = True
        return mask

    def lay(self, picture: Tensor, place: Placement) -> Tensor:
        """A picture (3, h, w), uint8 or float32 in [0, 1] -> image (3, S, S) with zeros around it."""
        image = torch.zeros(3, self.side, self.side)
        inside = image[:, place.top : place.top + place.height, place.left : place.left + place.width]
        torch.div(picture, 255 if picture.dtype == torch.uint8 else 1, out=inside)
        inside.sub_(self._mean).div_(self._std)
        return image


def letterbox(image: Image.Image, preprocessing: Mapping[str, Any]) -> Letterboxed:
    """One picture as in evaluation: long side to S, aspect kept, in the middle of the canvas."""
    return Canvas(preprocessing).letterbox(image)


def _pixels(image: Image.Image) -> Tensor:
    return F.pil_to_tensor(to_rgb(image))  # uint8 (3, H, W): resizing it is several times faster than resizing in PIL


def swap_sides(phrase: str, rule: str = "words") -> str:
    """The phrase for the mirrored picture: left and right change places.

    "words" swaps words and their compounds ("leftmost", "right-hand", "topleft") and leaves "bright", "upright" and
    "leftover"; "reference" swaps letters wherever they stand, as in TransVG.
    """
    other = {"left": "right", "right": "left"}
    if rule == "reference":
        return re.sub("left|right", lambda m: other[m[0]], phrase)
    return _SIDES.sub(lambda m: m[1] + other[m[2]], phrase)


@dataclass(frozen=True)
class Augmentation:
    """Which random transforms training uses.

    Args:
        crop: half of the pictures whose phrase has no word of place are cropped.
        scale: the long side is 448 to 640 of 640 pixels.
        translate: the picture lies anywhere on the canvas and not in its middle.
        flip: half of the pictures are mirrored, with left and right swapped in the phrase.
        color: brightness, contrast and saturation change in four of five pictures.
        flip_words: "words", or "reference" for the published code's swap of letters.
        crop_rule: "center", or "reference" for the published code's test, which lets boxes get lost.
    """

    crop: bool = True
    scale: bool = True
    translate: bool = True
    flip: bool = True
    color: bool = True
    flip_words: str = "words"
    crop_rule: str = "center"

    def __post_init__(self) -> None:
        for key, value, valid in (("flip_words", self.flip_words, FLIP_WORDS), ("crop", self.crop_rule, CROPS)):
            if value not in valid:
                raise PetlError(f"{key}={value!r}: {nearest(value, valid)}")

    @classmethod
    def of(cls, crop: bool, scale: bool, translate: bool, flip: bool, color: bool) -> Augmentation | None:
        """None where nothing is on: then training pictures are prepared as in evaluation."""
        return cls(crop, scale, translate, flip, color) if crop or scale or translate or flip or color else None

    def record(self) -> dict[str, Any]:
        return asdict(self)

    def phrases(self, phrase: str) -> tuple[str, ...]:
        """What can become of a phrase."""
        other = swap_sides(phrase, self.flip_words)
        return (phrase, other) if self.flip and other != phrase else (phrase,)


@dataclass(frozen=True)
class Example:
    """What the random transforms pass on: picture (3, H, W), box (1, 4) xyxy of its pixels, phrase."""

    image: tv_tensors.Image
    box: tv_tensors.BoundingBoxes
    phrase: str

    @property
    def size(self) -> tuple[int, int]:
        """Width and height."""
        return int(self.image.shape[-1]), int(self.image.shape[-2])


class TrainTransform:
    """Picture, box and phrase -> image (3, S, S), mask (S, S), box (4,) and phrase; draws from torch's generator.

    Args:
        preprocessing: record of the letterbox.
        augmentation: which steps are used.
    """

    def __init__(self, preprocessing: Mapping[str, Any], augmentation: Augmentation) -> None:
        self.canvas, self.augmentation = Canvas(preprocessing), augmentation
        self.jitter = v2.RandomApply([v2.ColorJitter(STRENGTH, STRENGTH, STRENGTH)], p=0.8)

    def __call__(self, image: Image.Image, box: Sequence[float], phrase: str) -> tuple[Tensor, Tensor, Tensor, str]:
        """``box``: (x0, y0, x1, y1) in pixels of the picture; comes back as cxcywh in [0, 1] of the canvas."""
        use, side = self.augmentation, self.canvas.side
        corners = torch.tensor([list(box)], dtype=torch.float32)  # whole numbers would be rounded at every step
        boxes = tv_tensors.BoundingBoxes(corners, format="XYXY", canvas_size=image.size[::-1])
        one = Example(tv_tensors.Image(_pixels(image)), boxes, phrase)
        if use.crop and not any(w in phrase for w in UNCROPPABLE) and chance():
            one = self.random_crop(self.resize(one, pick(self._sizes(SHORT_SIDES)) / min(one.size)))
        long_side = pick(self._sizes(LONG_SIDES)) if use.scale else side
        one = self.resize(one, long_side / max(one.size))
        if use.color:
            # in float: the jitter of uint8 converts at every step, which takes twice as long
            one = Example(self.jitter(F.to_dtype(one.image, torch.float32, scale=True)), one.box, one.phrase)
        if use.flip and chance():
            one = mirrored(one, use.flip_words)
        place = self.canvas.centred(*one.size)
        if use.translate:
            width, height = one.size
            place = Placement(between(0, side - width), between(0, side - height), width, height)
        target = normalised(one.box[0].tolist(), place.left, place.top, side)
        return self.canvas.lay(one.image, place), self.canvas.mask(place), target, one.phrase

    def _sizes(self, sizes: Sequence[int]) -> list[int]:
        """Sizes that belong to a canvas of 640 pixels, for this one."""
        return [round(v * self.canvas.side / BASE) for v in sizes]

    def resize(self, one: Example, scale: float) -> Example:
        width, height = scaled(*one.size, scale)
        if (width, height) == one.size:
            return one
        image = F.resize(one.image, [height, width], self.canvas.interpolation, antialias=True)
        return Example(image, F.resize(one.box, [height, width]), one.phrase)

    def random_crop(self, one: Example) -> Example:
        """A random part that holds the centre of the box and half of it; the whole after 20 tries without one."""
        low, high = self._sizes(CROP_SIDES)
        x0, y0, x1, y1 = one.box[0].tolist()
        cx, cy, area = (x0 + x1) / 2, (y0 + y1) / 2, (x1 - x0) * (y1 - y0)
        for _ in range(CROP_TRIES):
            width, height = (between(min(low, v), min(v, high)) for v in one.size)
            left, top = between(0, one.size[0] - width), between(0, one.size[1] - height)
            seen = max(0.0, min(x1, left + width) - max(x0, left)) * max(0.0, min(y1, top + height) - max(y0, top))
            if self.augmentation.crop_rule == "reference":
                fits = cx > top and cy > left  # sic
            else:
                inside = left < cx < left + width and top < cy < top + height
                fits = inside and seen >= MIN_VISIBLE * area
            if fits:
                box = F.clamp_bounding_boxes(F.crop(one.box, top, left, height, width))
                return Example(F.crop(one.image, top, left, height, width), box, one.phrase)
        return one


def mirrored(one: Example, rule: str = "words") -> Example:
    """Left and right swapped in picture, box and phrase; twice gives the same example again."""
    return Example(F.horizontal_flip(one.image), F.horizontal_flip(one.box), swap_sides(one.phrase, rule))


def chance() -> bool:
    return bool(torch.rand(()) < 0.5)


def between(low: int, high: int) -> int:
    """A random whole number, both ends included."""
    return int(torch.randint(low, high + 1, ()))


def pick(values: Sequence[int]) -> int:
    return values[between(0, len(values) - 1)]
