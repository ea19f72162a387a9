"""The scene generator: exact boxes, true captions, expressions that fit one object."""

from __future__ import annotations

import numpy as np
import pytest

from petl.backbones import bundled
from petl.data import scenes


def test_same_seed_same_scene() -> None:
    a, b, c = scenes.make_scene(5), scenes.make_scene(5), scenes.make_scene(6)
    assert np.array_equal(np.asarray(a.image), np.asarray(b.image))
    assert a.things == b.things
    assert not np.array_equal(np.asarray(a.image), np.asarray(c.image))


def test_boxes_hold_the_objects_and_nothing_else_is_drawn() -> None:
    for seed in range(40):
        scene = scenes.make_scene(seed, size=96)
        assert scene.things
        pixels = np.asarray(scene.image).astype(int)
        inside = np.zeros(pixels.shape[:2], bool)
        for thing in scene.things:
            x0, y0, x1, y1 = thing.box
            assert 0 <= x0 < x1 <= 96
            assert 0 <= y0 < y1 <= 96
            inside[int(y0) : int(np.ceil(y1)), int(x0) : int(np.ceil(x1))] = True
        background = np.median(pixels[~inside], 0)
        assert np.abs(pixels[~inside] - background).max() < 60, "something lies outside every box"


def test_every_expression_fits_exactly_its_target() -> None:
    kinds = set()
    for seed in range(300):
        scene = scenes.make_scene(seed)
        found = scenes.expressions(scene)
        for e in found:
            kinds.add(e.kind)
            target = scene.things[e.target]
            words = e.text.split()
            assert target.shape in words
            if e.kind == "attribute":
                said = set(words) - {"the"}
                fits = [t for t in scene.things if said <= {t.shape, t.color, t.size, t.texture}]
                assert fits == [target]
            if e.kind == "extreme" and "leftmost" in words:
                peers = [t for t in scene.things if set(words) - {"the", "leftmost"} <= {t.shape, t.color}]
                assert target.center[0] == min(t.center[0] for t in peers)
        texts = [e.text for e in found]
        assert len(texts) == len(set(texts)), "one phrase for two objects"
    assert kinds == {"attribute", "extreme", "ordinal", "relation"}


@pytest.mark.parametrize("size", [48, 128])
def test_sizes_and_counts(size: int) -> None:
    scene = scenes.make_scene(3, size=size, max_things=2)
    assert scene.image.size == (size, size)
    assert 1 <= len(scene.things) <= 2


def test_the_bundled_vocabulary_knows_every_word_of_the_grammar() -> None:
    tokenizer = bundled.tokenizer()
    for seed in range(200):
        scene = scenes.make_scene(seed)
        for text in [scene.caption, *(e.text for e in scenes.expressions(scene))]:
            ids = tokenizer(text)["input_ids"]
            assert tokenizer.unk_token_id not in ids, text
            assert len(ids) <= bundled.CONTEXT


def test_fewer_shapes_colours_sizes_and_textures() -> None:
    for seed in range(60):
        scene = scenes.make_scene(seed, shapes=1, colors=3, sizes=1, textures=1)
        assert {(t.shape, t.size, t.texture) for t in scene.things} == {("circle", "small", "solid")}
        assert {t.color for t in scene.things} <= {"red", "green", "blue"}
    seen = {t.texture for seed in range(60) for t in scenes.make_scene(seed, textures=2).things}
    assert seen == {"solid", "striped"}


def test_little_light_changes_pixels_and_nothing_else() -> None:
    day, night = scenes.make_scene(5), scenes.make_scene(5, brightness=0.12, noise=1.5)
    assert night.things == day.things
    assert night.caption == day.caption
    difference = np.asarray(night.image).astype(float) - 0.12 * np.asarray(day.image)
    assert 1.2 < difference.std() < 1.8
    assert np.asarray(night.image).max() < 45
    assert np.array_equal(np.asarray(scenes.make_scene(5, noise=0.0).image), np.asarray(day.image))
