"""The letterbox and the augmentation: round trips, and that the box stays on what it showed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from petl.data.grounding_transforms import (
    Augmentation,
    Example,
    TrainTransform,
    letterbox,
    mirrored,
    swap_sides,
)
from petl.data.transforms import evaluation_transform
from petl.errors import PetlError

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def record(side: int, **changed: Any) -> dict[str, Any]:
    return {
        "image_size": [side, side], "mean": MEAN, "std": STD, "interpolation": "bilinear", "mode": "letterbox"
    } | changed  # fmt: skip


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(width).integers(0, 255, (height, width, 3), np.uint8))


def shown(box: tuple[int, int, int, int], width: int, height: int) -> Image.Image:
    """Black, and white inside the box (x0, y0, x1, y1)."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[box[1] : box[3], box[0] : box[2]] = 255
    return Image.fromarray(pixels)


def random_box(rng: np.random.Generator, width: int, height: int) -> tuple[int, int, int, int]:
    x0, y0 = int(rng.integers(0, width - 8)), int(rng.integers(0, height - 8))
    return x0, y0, int(rng.integers(x0 + 8, width + 1)), int(rng.integers(y0 + 8, height + 1))


# ---- letterbox


@pytest.mark.parametrize(
    ("size", "side", "place", "inner"),
    [
        ((640, 427), 640, (0, 106), (640, 427)),  # round(213 / 2 - 0.1)
        ((427, 640), 640, (106, 0), (427, 640)),
        ((100, 50), 64, (0, 16), (64, 32)),
        ((32, 32), 64, (0, 0), (64, 64)),
        ((640, 3), 64, (0, 31), (64, 1)),  # 0.3 pixels high, drawn as one
    ],
)
def test_letterbox_against_torchvision(
    size: tuple[int, int], side: int, place: tuple[int, int], inner: tuple[int, int]
) -> None:
    image, (left, top), (width, height) = noise(*size), place, inner
    boxed = letterbox(image, record(side))
    assert (boxed.left, boxed.top, boxed.width, boxed.height) == (*place, *size)
    assert boxed.scale == side / max(size)
    steps = [v2.Resize((height, width), antialias=True), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
    assert torch.allclose(
        boxed.image[:, top : top + height, left : left + width],
        v2.Compose(steps)(F.pil_to_tensor(image)),
        atol=1e-6,
    )
    assert boxed.mask.sum() == width * height
    assert boxed.mask[top : top + height, left : left + width].all()
    assert (boxed.image[:, ~boxed.mask] == 0).all()
    assert torch.equal(evaluation_transform(record(side))(image), boxed.image), "the record alone says how"


def test_box_round_trip_is_within_a_pixel() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        width, height = (int(v) for v in rng.integers(10, 700, 2))
        boxed = letterbox(Image.new("L", (width, height)), record(64))
        box = random_box(rng, width, height)
        canvas = boxed.to_canvas(box)
        corners = torch.cat([canvas[:2] - canvas[2:] / 2, canvas[:2] + canvas[2:] / 2])
        assert corners.min() >= -1e-6
        assert corners.max() <= 1 + 1e-6
        assert np.abs(np.subtract(boxed.to_pixels(canvas), box)).max() < 1e-3 * max(width, height)


def test_a_box_beyond_the_picture_is_clamped_to_it() -> None:
    boxed = letterbox(noise(100, 50), record(64))
    assert boxed.to_pixels((0.5, 0.5, 1.5, 1.5)) == (0, 0, 100, 50)
    assert boxed.to_pixels(torch.tensor([0.5, 0.05, 1.0, 0.1])) == (0, 0, 100, 0), "all in the padding"


def test_the_letterbox_is_square() -> None:
    with pytest.raises(PetlError, match=r"the input is square, not \[64, 32\]"):
        letterbox(noise(8, 8), record(64, image_size=[64, 32]))


# ---- words


@pytest.mark.parametrize(
    ("phrase", "swapped"),
    [
        ("bright shirt on left", "bright shirt on right"),
        ("right", "left"),
        ("leftmost man, right of the leftover", "rightmost man, left of the leftover"),
        ("the right-hand side", "the left-hand side"),
        ("lefthand righthanded leftward rightwards leftside", "righthand lefthanded rightward leftwards rightside"),
        ("topleft top-right bottomright upperleft lower right", "topright top-left bottomleft upperright lower left"),
        ("left/right, left's", "right/left, right's"),
        ("upright copyright cleft brightly rightful", "upright copyright cleft brightly rightful"),
        ("lefttop rightcorner", "righttop leftcorner"),
        ("2nd from left2", "2nd from right2"),
    ],
)
def test_left_and_right_are_words(phrase: str, swapped: str) -> None:
    assert swap_sides(phrase) == swapped
    assert swap_sides(swapped) == phrase


def test_the_published_swap_of_letters() -> None:
    assert swap_sides("bright shirt on left", "reference") == "bleft shirt on right"
    assert swap_sides("upright leftover", "reference") == "upleft rightover"


# ---- augmentation


def example(width: int, height: int, box: tuple[float, ...], phrase: str = "a dog on the left") -> Example:
    boxes = tv_tensors.BoundingBoxes(torch.tensor([box]).float(), format="XYXY", canvas_size=(height, width))
    return Example(tv_tensors.Image(F.pil_to_tensor(noise(width, height))), boxes, phrase)


def test_mirrored_twice_is_the_same_again() -> None:
    one = example(31, 20, (2.5, 3.0, 17.25, 19.0))
    once, twice = mirrored(one), mirrored(mirrored(one))
    assert once.phrase == "a dog on the right"
    assert once.box.tolist() == [[31 - 17.25, 3.0, 31 - 2.5, 19.0]]
    assert torch.equal(once.image, one.image.flip(-1))
    assert torch.equal(twice.image, one.image)
    assert torch.equal(twice.box, one.box)
    assert twice.phrase == one.phrase


@pytest.mark.parametrize(
    "on",
    [{}, {"crop"}, {"scale"}, {"translate"}, {"flip"}, {"crop", "scale", "translate", "flip"}],
    ids=lambda on: "+".join(sorted(on)) or "none",
)
def test_the_box_stays_on_what_it_showed(on: set[str]) -> None:
    """A white rectangle: after all transforms its pixels fill the box, to a pixel of the canvas."""
    side, rng = 160, np.random.default_rng(1)
    flags = {k: k in on for k in ("crop", "scale", "translate", "flip", "color")}
    transform = TrainTransform(record(side, mean=[0.0] * 3, std=[1.0] * 3), Augmentation(**flags))
    for _ in range(60):
        width, height = (int(v) for v in rng.integers(60, 300, 2))
        box = random_box(rng, width, height)
        image, mask, target, _ = transform(shown(box, width, height), box, "the thing")
        cx, cy, w, h = (target * side).tolist()
        rows, columns = torch.where(image[0] > 0.5)
        found = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
        wanted = (cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2)
        assert np.abs(np.subtract(found, wanted)).max() <= 1.0, (width, height, box)
        assert mask[rows, columns].all()
        assert min(wanted) + 1e-4 >= 0
        assert max(wanted) <= side + 1e-4
        assert (image[:, ~mask] == 0).all()


def test_crops_keep_the_centre_and_half_of_the_box() -> None:
    rng, cropped = np.random.default_rng(2), 0
    transform = TrainTransform(record(640), Augmentation())
    lost = TrainTransform(record(640), Augmentation(crop_rule="reference"))
    empty = 0
    for _ in range(300):
        width, height = (int(v) for v in rng.integers(400, 800, 2))
        x0, y0 = rng.uniform(0, width - 20), rng.uniform(0, height - 20)
        one = example(width, height, (x0, y0, rng.uniform(x0 + 10, width), rng.uniform(y0 + 10, height)))
        after = transform.random_crop(one)
        before, kept = ((b[2] - b[0]) * (b[3] - b[1]) for b in (one.box[0], after.box[0]))
        assert kept >= 0.5 * before - 1e-3
        assert after.box[0].min() >= 0
        assert after.image.shape[-2:] == after.box.canvas_size
        assert all(s <= v for s, v in zip(after.size, one.size))
        cropped += after.size != one.size
        box = lost.random_crop(one).box[0]
        empty += bool((box[2] - box[0]) * (box[3] - box[1]) <= 0)
    assert cropped > 250
    assert empty > 5, "the published rule leaves boxes without area"


@pytest.mark.parametrize("phrase", ["the dog at the bottom", "bright"])
def test_phrases_with_words_of_place_are_not_cropped(phrase: str) -> None:
    transform = TrainTransform(record(160), Augmentation(scale=False, translate=False, flip=False, color=False))
    for _ in range(10):
        _, mask, _, _ = transform(noise(160, 120), (10, 10, 30, 30), phrase)
        assert mask.sum() == 160 * 120
    sizes = {int(transform(noise(160, 120), (10, 10, 30, 30), "dog")[1].sum()) for _ in range(10)}
    assert len(sizes) > 1


def test_scale_and_translation_cover_their_range() -> None:
    transform = TrainTransform(record(640), Augmentation(crop=False, flip=False, color=False))
    sides, places = set(), set()
    for _ in range(60):
        _, mask, _, _ = transform(Image.new("RGB", (64, 32)), (0, 0, 8, 8), "x")
        columns, rows = torch.where(mask.any(0))[0], torch.where(mask.any(1))[0]
        sides.add(len(columns))
        places.add((int(columns[0]), int(rows[0])))
    assert sides == {640, 608, 576, 544, 512, 480, 448}
    assert len(places) > 50


def test_colour_changes_and_stays_in_range() -> None:
    transform = TrainTransform(record(64, mean=[0.0] * 3, std=[1.0] * 3), Augmentation(False, False, False, False))
    image, plain = noise(64, 64), letterbox(noise(64, 64), record(64, mean=[0.0] * 3, std=[1.0] * 3)).image
    outs = [transform(image, (0, 0, 8, 8), "x")[0] for _ in range(20)]
    same = sum(torch.allclose(out, plain, atol=1e-6) for out in outs)
    assert 0 < same < 12
    assert all(out.min() >= 0 and out.max() <= 1 for out in outs)


def test_unknown_rules_are_named() -> None:
    with pytest.raises(PetlError, match="flip_words='word': did you mean 'words'"):
        Augmentation(flip_words="word")
    with pytest.raises(PetlError, match="crop='centre': did you mean 'center'"):
        Augmentation(crop_rule="centre")
