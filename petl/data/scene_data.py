"""Generated scenes as a grounding data set: splits, and the expressions of each scene as samples."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from typing import Any, NamedTuple

import numpy as np

from petl.data.grounding import GroundingDataModule, Reference, References
from petl.data.grounding_transforms import Augmentation
from petl.data.scenes import COLORS, KINDS, SHAPES, SIZES, TEXTURES, VERSION, Expression, expressions, make_scene
from petl.errors import PetlError, nearest

TRIES = 32  # seeds for one place in a split: a quarter of the scenes hold one object, which says nothing
MOST = 6  # expressions of one scene; nearly every scene with two objects has as many


def seed_of(split: str, seed: int, epoch: int, number: int) -> int:
    """First of the seeds for one place in a split: above all those of pre-training, and no two places share one.

    Validation and test scenes do not depend on the seed of the run, so that runs compare on the same scenes.
    """
    kind = ("train", "val", "test").index(split) + 1
    run = seed & 0xFFFFFFFF if split == "train" else 0
    return (kind << 96) + (run << 64) + (epoch << 40) + number * TRIES


def choose(found: list[Expression], count: int, rng: np.random.Generator) -> list[Expression]:
    """``count`` of the expressions: one of each kind in turn, kinds and expressions in random order."""
    kinds: dict[str, list[Expression]] = {str(k): [] for k in rng.permutation(sorted({e.kind for e in found}))}
    for i in rng.permutation(len(found)):
        kinds[found[i].kind].append(found[i])
    return [e for turn in zip_longest(*kinds.values()) for e in turn if e is not None][:count]


class Drawn(NamedTuple):
    """How scenes are drawn: the arguments of `make_scene` after the seed."""

    size: int
    max_things: int
    zoom: float
    shapes: int
    colors: int
    sizes: int
    textures: int
    brightness: float
    noise: float

    def __str__(self) -> str:
        """What tells these pictures from those of the same seed that are drawn without options."""
        usual = Drawn(*(make_scene.__defaults__ or ()))
        return "".join(f" {k} {v:g}" for k, v, u in zip(self._fields, self, usual, strict=True) if v != u)


def references(first: int, count: int, least: int, drawn: Drawn, kinds: Sequence[str] = KINDS) -> list[Reference]:
    """``count`` samples of the first scene from this seed on that has ``least`` objects and expressions enough."""
    for seed in range(first, first + TRIES):
        scene = make_scene(seed, *drawn)
        found = [e for e in expressions(scene) if e.kind in kinds]
        if len(scene.things) >= least and len(found) >= count:
            break
    samples = []
    for e in choose(found, count, np.random.default_rng([VERSION, seed, 1])):
        x0, y0, x1, y1 = scene.things[e.target].box
        box = (x0, y0, x1 - x0, y1 - y0)
        name = f"scene {VERSION} {seed}{drawn}"
        samples.append(Reference(scene.image, e.text, box, drawn.size, drawn.size, name, f"{name} {e.target}"))
    return samples


def least(split: str, number: int) -> int:
    """Objects that a scene has at least: two, but every fourth of training may have one."""
    return 1 if split == "train" and number % 4 == 0 else 2


class FreshScenes(References):
    """Training scenes that are new in every epoch; ``samples`` are those of the first."""

    def __init__(self, seed: int, scenes: int, count: int, drawn: Drawn, kinds: Sequence[str] = KINDS) -> None:
        self.seed, self.count, self.drawn, self.kinds = seed, count, drawn, kinds
        super().__init__(r for n in range(scenes) for r in self._scene(0, n))

    def _scene(self, epoch: int, number: int) -> list[Reference]:
        seed = seed_of("train", self.seed, epoch, number)
        return references(seed, self.count, least("train", number), self.drawn, self.kinds)

    def at(self, epoch: int, index: int) -> Reference:
        if epoch == 0:
            return self.samples[index]
        number, slot = divmod(index, self.count)
        return self._scene(epoch, number)[slot]


class Scenes(GroundingDataModule):
    """Generated scenes with referring expressions: attributes, extremes, ordinals and relations. No files.

    Every expression fits exactly one object. Scenes of validation and test have at least two objects; some of training
    have one, which teaches to find things before it teaches to tell them apart. Scenes of training, validation, test,
    and of the pre-training of the bundled backbone are all different; validation and test are the same for every seed.

    Args:
        train_size: training scenes; there are ``expressions_per_scene`` times as many samples.
        val_size: validation scenes.
        test_size: test scenes.
        expressions_per_scene: samples drawn from each scene, mixed in kind; 1 to 6.
        kinds: of expressions: "attribute", "extreme", "ordinal", "relation"; None = all.
        max_things: objects in a scene at most, 2 or more.
        zoom: factor on the size of the objects, 0.5 to 2; small ones are a fifth as wide as the picture.
        shapes: how many shapes there are, the first of `petl.data.scenes.SHAPES`.
        colors: how many colours, likewise.
        sizes: 1 = all objects are small, 2.
        textures: 1 = all are solid, 2 = also striped, 3 = also dotted.
        brightness: factor on all pixel values, above 0 and at most 1; the bundled backbone has seen scenes at 1.
        noise: standard deviation of sensor noise in grey levels, after that.
        fresh: new training scenes in every epoch; False = the same ones.
        scene_size: side of the generated pictures in pixels; they are scaled to the input.
        test_split: what `test` evaluates: "test" or "val".
        aug_crop, aug_scale, aug_translate, aug_flip, aug_color: see `petl.data.grounding_transforms.Augmentation`.
        batch_size: expressions per step over all processes together.
        num_workers: loader processes per device.
        image_size: side of the input in pixels; None = the backbone's.
        mean: normalisation; None = the backbone's.
        std: normalisation; None = the backbone's.
        seed: of training scenes, data order and augmentation.
    """

    name = "scenes"
    image_source = "generated"

    def __init__(
        self,
        train_size: int = 3000,
        val_size: int = 250,
        test_size: int = 500,
        expressions_per_scene: int = 2,
        kinds: Sequence[str] | None = None,
        max_things: int = 4,
        zoom: float = 1.0,
        shapes: int = len(SHAPES),
        colors: int = len(COLORS),
        sizes: int = len(SIZES),
        textures: int = len(TEXTURES),
        brightness: float = 1.0,
        noise: float = 0.0,
        fresh: bool = False,
        scene_size: int = 64,
        test_split: str = "test",
        aug_crop: bool = False,
        aug_scale: bool = False,
        aug_translate: bool = False,
        aug_flip: bool = False,
        aug_color: bool = False,
        batch_size: int = 64,
        num_workers: int = 0,
        image_size: int | None = None,
        mean: tuple[float, float, float] | None = None,
        std: tuple[float, float, float] | None = None,
        seed: int = 0,
    ) -> None:
        augmentation = Augmentation.of(aug_crop, aug_scale, aug_translate, aug_flip, aug_color)
        super().__init__(
            batch_size, num_workers, image_size, mean, std, seed, test_split=test_split, augmentation=augmentation
        )
        if test_split not in ("val", "test"):
            raise PetlError(f"Scenes(test_split={test_split!r}): {nearest(test_split, ('val', 'test'))}")
        self.sizes = {"train": train_size, "val": val_size, "test": test_size}
        self.expressions_per_scene, self.fresh, self.kinds = expressions_per_scene, fresh, tuple(kinds or KINDS)
        self.drawn = Drawn(scene_size, max_things, zoom, shapes, colors, sizes, textures, brightness, noise)
        self.group = 1 if augmentation else expressions_per_scene  # so that a scene is encoded once for all of them
        if train_size < 1 or min(self.sizes.values()) < 0:
            raise PetlError(f"Scenes: sizes {self.sizes} must not be negative, and there is something to train on.")
        if not 1 <= expressions_per_scene <= MOST:
            raise PetlError(f"Scenes(expressions_per_scene={expressions_per_scene}): it is 1 to {MOST}.")
        for kind in self.kinds:
            if kind not in KINDS:
                raise PetlError(f"Scenes(kinds={list(self.kinds)}): {nearest(kind, KINDS)}")
        if max_things < 2:
            raise PetlError(f"Scenes(max_things={max_things}): with fewer than two there is nothing to tell apart.")
        known = {"shapes": SHAPES, "colors": COLORS, "sizes": SIZES, "textures": TEXTURES}
        for what, all_of_them in known.items():
            count = getattr(self.drawn, what)
            if not 1 <= count <= len(all_of_them):
                raise PetlError(f"Scenes({what}={count}): it is 1 to {len(all_of_them)}.")
        if not 0.5 <= zoom <= 2:
            raise PetlError(f"Scenes(zoom={zoom}): it lies between 0.5 and 2.")
        if not 0 < brightness <= 1 or not 0 <= noise <= 64:
            raise PetlError(
                f"Scenes(brightness={brightness}, noise={noise}): brightness is above 0 and at most 1, noise 0 to 64."
            )
        if scene_size < 32:
            raise PetlError(f"Scenes(scene_size={scene_size}): shapes can be told apart from 32 pixels on.")

    def read(self) -> None:
        count = self.expressions_per_scene
        for split, scenes in self.sizes.items():
            if split == "train" and self.fresh:
                self.splits[split] = FreshScenes(self.seed, scenes, count, self.drawn, self.kinds)
            elif scenes:
                self.splits[split] = References(
                    r
                    for n in range(scenes)
                    for r in references(seed_of(split, self.seed, 0, n), count, least(split, n), self.drawn, self.kinds)
                )
            else:
                continue
            if not self.splits[split].samples:
                raise PetlError(
                    f"Scenes(kinds={list(self.kinds)}): no scene has an expression of these kinds as they are drawn"
                    f" ({str(self.drawn).strip()}). Other kinds, or more shapes, colors and max_things."
                )
            new = ", new in every epoch" if split == "train" and self.fresh else ""
            self.split_names[split] = f"{scenes} generated scenes{new}"

    def protocol(self) -> dict[str, Any]:
        return super().protocol() | {
            "scenes_version": VERSION, "fresh": self.fresh, "kinds": list(self.kinds), "drawn": self.drawn._asdict()
        }  # fmt: skip
