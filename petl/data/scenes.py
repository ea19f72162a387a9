"""Generated scenes: coloured shapes with exact boxes, captions and referring expressions.

A scene is a pure function of ``(seed, size)``: no file, no network, any number of them. `VERSION` changes
whenever the same seed would give another picture or another sentence; it is recorded with everything trained on scenes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from PIL import Image, ImageDraw

VERSION = 1
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "diamond", "heart", "hexagon", "arrow")
COLORS = {
    "red": (214, 39, 40), "green": (44, 150, 44), "blue": (40, 80, 200), "yellow": (240, 205, 40),
    "purple": (140, 60, 170), "orange": (245, 130, 30), "white": (245, 245, 245), "black": (20, 20, 20),
    "pink": (250, 140, 190), "cyan": (40, 200, 210),
}  # fmt: skip
SIZES = ("small", "large")
TEXTURES = ("solid", "striped", "dotted")
BACKGROUNDS = {"gray": (128, 128, 128), "sand": (205, 190, 150), "navy": (30, 40, 80), "mint": (180, 220, 200)}
KINDS = ("attribute", "extreme", "ordinal", "relation")
ORDINALS = ("first", "second", "third", "fourth")
_SUPERSAMPLE = 4


@dataclass(frozen=True)
class Thing:
    """One object. ``box`` is (x0, y0, x1, y1) in pixels of the scene, tight around the drawn shape."""

    shape: str
    color: str
    size: str
    texture: str
    box: tuple[float, float, float, float]

    @property
    def center(self) -> tuple[float, float]:
        x0, y0, x1, y1 = self.box
        return (x0 + x1) / 2, (y0 + y1) / 2

    @property
    def name(self) -> str:
        """Everything that is visible, as a noun phrase without article; "solid" goes unsaid."""
        texture = "" if self.texture == "solid" else f"{self.texture} "
        return f"{self.size} {texture}{self.color} {self.shape}"


@dataclass(frozen=True)
class Expression:
    """A phrase that fits exactly one object: ``things[target]``. ``kind``: one of `KINDS`."""

    text: str
    target: int
    kind: str


@dataclass(frozen=True)
class Scene:
    image: Image.Image
    things: tuple[Thing, ...]
    background: str
    caption: str


def _outline(shape: str, c: float, r: float) -> list[tuple[float, float]]:
    """Corners of a polygonal shape of radius ``r`` around (c, c)."""

    def at(angle: float, radius: float = r) -> tuple[float, float]:
        return c + radius * math.sin(angle), c - radius * math.cos(angle)

    if shape == "square":
        k = 0.85 * r
        return [(c - k, c - k), (c + k, c - k), (c + k, c + k), (c - k, c + k)]
    if shape == "triangle":
        return [at(2 * math.pi * i / 3) for i in range(3)]
    if shape == "star":
        return [at(math.pi * i / 5, r if i % 2 == 0 else 0.42 * r) for i in range(10)]
    if shape == "diamond":
        return [(c, c - r), (c + 0.65 * r, c), (c, c + r), (c - 0.65 * r, c)]
    if shape == "hexagon":
        return [at(math.pi * i / 3) for i in range(6)]
    if shape == "cross":
        k = 0.32 * r
        return [(c - k, c - r), (c + k, c - r), (c + k, c - k), (c + r, c - k), (c + r, c + k), (c + k, c + k),
                (c + k, c + r), (c - k, c + r), (c - k, c + k), (c - r, c + k), (c - r, c - k),
                (c - k, c - k)]  # fmt: skip
    if shape == "arrow":
        k = 0.3 * r
        return [(c - r, c - k), (c, c - k), (c, c - r), (c + r, c), (c, c + r), (c, c + k), (c - r, c + k)]
    turns = [2 * math.pi * i / 40 for i in range(40)]  # heart
    return [
        (
            c + r * math.sin(t) ** 3,
            c - r * (13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 17,
        )
        for t in turns
    ]


def _stencil(shape: str, diameter: float) -> Image.Image:
    """Mask ("L", 0 or 255) of one shape, cropped to its own bounds."""
    r, side = diameter / 2, int(diameter) + 3
    mask = Image.new("L", (side, side), 0)
    draw, c = ImageDraw.Draw(mask), side / 2
    if shape in ("circle", "ring"):
        draw.ellipse((c - r, c - r, c + r, c + r), fill=255)
        if shape == "ring":
            draw.ellipse((c - 0.55 * r, c - 0.55 * r, c + 0.55 * r, c + 0.55 * r), fill=0)
    else:
        draw.polygon(_outline(shape, c, r), fill=255)
    return mask.crop(mask.getbbox())


def _fill(texture: str, color: str, size: tuple[int, int]) -> Image.Image:
    base = COLORS[color]
    paint = Image.new("RGB", size, base)
    other = (250, 250, 250) if sum(base) < 420 else (40, 40, 40)
    draw, step = ImageDraw.Draw(paint), 3 * _SUPERSAMPLE
    if texture == "striped":
        for y in range(0, size[1], 2 * step):
            draw.rectangle((0, y, size[0], y + step - 1), fill=other)
    elif texture == "dotted":
        for row, y in enumerate(range(step // 2, size[1], step)):
            for x in range(step // 2 + (row % 2) * step // 2, size[0], step):
                draw.ellipse((x - step // 4, y - step // 4, x + step // 4, y + step // 4), fill=other)
    return paint


def make_scene(
    seed: int,
    size: int = 64,
    max_things: int = 4,
    zoom: float = 1.0,
    shapes: int = len(SHAPES),
    colors: int = len(COLORS),
    sizes: int = len(SIZES),
    textures: int = len(TEXTURES),
    brightness: float = 1.0,
    noise: float = 0.0,
) -> Scene:
    """The scene of ``seed``: an RGB picture of ``size`` x ``size`` pixels with 1 to ``max_things`` separate objects.

    Small objects are about a fifth as wide as the picture, large ones two fifths, times ``zoom``. They are of the first
    ``shapes``, ``colors``, ``sizes`` and ``textures`` of `SHAPES`, `COLORS`, `SIZES` and `TEXTURES`. A picture taken in
    little light: all values times ``brightness``, and then noise of standard deviation ``noise`` in grey levels.
    """
    rng = np.random.default_rng([VERSION, seed])
    side = size * _SUPERSAMPLE
    background = str(rng.choice(list(BACKGROUNDS)))
    shade = np.array(BACKGROUNDS[background]) + rng.integers(-14, 15, 3)
    canvas = Image.new("RGB", (side, side), tuple(int(v) for v in shade.clip(0, 255)))
    placed: list[tuple[int, int, int, int]] = []
    things: list[Thing] = []
    # half of the scenes repeat one or two shapes, so that ordinals and relations are needed to tell things apart
    few = rng.random() < 0.5
    chosen = rng.choice(SHAPES[:shapes], min(2, shapes), replace=False) if few else np.array(SHAPES[:shapes])
    weights = np.array([0.6, 0.2, 0.2][:textures])
    weights = weights / weights.sum()
    for _ in range(int(rng.integers(1, max_things + 1))):
        shape, color = str(rng.choice(chosen)), str(rng.choice(list(COLORS)[:colors]))
        thing_size, texture = str(rng.choice(SIZES[:sizes])), str(rng.choice(TEXTURES[:textures], p=weights))
        share = rng.uniform(0.17, 0.23) if thing_size == "small" else rng.uniform(0.34, 0.42)
        mask = _stencil(shape, share * zoom * side)
        w, h = mask.size
        for _ in range(30):  # a free place, or this object is left out
            x, y = int(rng.integers(1, side - w)), int(rng.integers(1, side - h))
            if all(x + w < a or x > c or y + h < b or y > d for a, b, c, d in placed):
                canvas.paste(_fill(texture, color, (w, h)), (x, y), mask)
                placed.append((x, y, x + w, y + h))
                x0, y0, x1, y1 = (v / _SUPERSAMPLE for v in placed[-1])
                things.append(Thing(shape, color, thing_size, texture, (x0, y0, x1, y1)))
                break
    image = canvas.resize((size, size), Image.Resampling.BOX)
    grain = rng.normal(0, rng.uniform(0, 8), (size, size, 3))
    pixels = brightness * (np.asarray(image) + grain)
    if noise:
        pixels += np.random.default_rng([VERSION, seed, 2]).normal(0, noise, pixels.shape)
    image = Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))
    return Scene(image, tuple(things), background, _caption(things, background, size, rng))


def _caption(things: list[Thing], background: str, size: int, rng: np.random.Generator) -> str:
    """One sentence that is true of the scene: where one object lies, how two of them lie, or what there is."""
    kind = int(rng.integers(4))
    if kind == 0 or len(things) == 1:
        thing = things[int(rng.integers(len(things)))]
        return f"a {thing.name} at the {_place(thing, size)}"
    if kind == 1:
        i, j = (int(v) for v in rng.choice(len(things), 2, replace=False))
        return f"a {things[i].name} {_relation(things[i], things[j])} a {things[j].name}"
    parts = [f"a {things[int(i)].name}" for i in rng.permutation(len(things))]
    return " and ".join(parts) + (f" on {background}" if kind == 2 else "")


def _place(thing: Thing, size: int) -> str:
    """Ninth of the picture: "top left" … "middle" … "bottom right"."""
    column, row = (min(int(3 * v / size), 2) for v in thing.center)
    words = [w for w in (("top", "", "bottom")[row], ("left", "", "right")[column]) if w]
    return " ".join(words) or "middle"


def _relation(a: Thing, b: Thing) -> str:
    (ax, ay), (bx, by) = a.center, b.center
    if abs(ax - bx) >= abs(ay - by):
        return "left of" if ax < bx else "right of"
    return "above" if ay < by else "below"


def expressions(scene: Scene) -> list[Expression]:
    """Every phrase of the grammar that fits exactly one object of the scene (none is ambiguous)."""
    things, found = scene.things, []
    for i, thing in enumerate(things):
        for phrase in _noun_phrases(thing):
            if _fits(things, phrase) == [i]:
                found.append(Expression(f"the {phrase}", i, "attribute"))
        for noun in (thing.shape, f"{thing.color} {thing.shape}"):
            peers = _fits(things, noun)
            if len(peers) < 2:
                continue
            for axis, ends in ((0, ("leftmost", "rightmost")), (1, ("topmost", "bottom"))):
                order = sorted(peers, key=lambda k: things[k].center[axis])
                gap = min(abs(things[a].center[axis] - things[b].center[axis]) for a, b in pairwise(order))
                if gap < 2:  # too close to call
                    continue
                if i in (order[0], order[-1]):
                    found.append(Expression(f"the {ends[0] if i == order[0] else ends[1]} {noun}", i, "extreme"))
                if axis == 0 and len(order) > 2:
                    ordinal = ORDINALS[order.index(i)]
                    found.append(Expression(f"the {ordinal} {noun} from the left", i, "ordinal"))
        for j, other in enumerate(things):
            noun, anchor = thing.shape, f"{other.color} {other.shape}"
            peers = _fits(things, noun)
            if i != j and len(peers) > 1 and _fits(things, anchor) == [j] and j not in peers:
                relation = _relation(thing, other)
                if [k for k in peers if _relation(things[k], other) == relation] == [i]:
                    found.append(Expression(f"the {noun} {relation} the {anchor}", i, "relation"))
    return found


def _noun_phrases(thing: Thing) -> list[str]:
    return [
        thing.shape,
        f"{thing.color} {thing.shape}",
        f"{thing.size} {thing.shape}",
        f"{thing.texture} {thing.shape}",
        f"{thing.size} {thing.color} {thing.shape}",
        f"{thing.size} {thing.texture} {thing.color} {thing.shape}",
    ]


def _fits(things: tuple[Thing, ...], phrase: str) -> list[int]:
    words = set(phrase.split())
    return [i for i, t in enumerate(things) if words <= {t.shape, t.color, t.size, t.texture}]
