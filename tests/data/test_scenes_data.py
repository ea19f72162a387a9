"""Scenes as a data set: disjoint, seeded, mixed in kind, new in every epoch where asked."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

from petl.data.scene_data import FreshScenes, Scenes, seed_of
from petl.data.scenes import COLORS, expressions, make_scene
from petl.errors import PetlError

PLAIN: dict[str, Any] = {"image_size": 64, "mean": (0.5,) * 3, "std": (0.25,) * 3, "batch_size": 8}
SMALL: dict[str, Any] = {"train_size": 20, "val_size": 4, "test_size": 6}


def scenes(**options: Any) -> Scenes:
    return Scenes(**PLAIN | SMALL | options)


def test_a_batch() -> None:
    data = scenes(expressions_per_scene=3)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].shape == (8, 3, 64, 64)
    assert (batch["mask"].shape, batch["mask"].dtype, bool(batch["mask"].all())) == ((8, 64, 64), torch.bool, True)
    assert (batch["box"].shape, batch["box"].dtype) == ((8, 4), torch.float32)
    assert batch["index"].dtype == torch.int64
    for k, index in enumerate(batch["index"].tolist()):
        sample = data.splits["train"][index]
        assert batch["expression"][k] == sample.expression
        x, y, w, h = (v / 64 for v in sample.box)
        assert batch["box"][k].tolist() == pytest.approx([x + w / 2, y + h / 2, w, h])
        pixels = np.asarray(sample.image) / 255
        assert torch.allclose(batch["image"][k] * 0.25 + 0.5, torch.tensor(pixels).permute(2, 0, 1).float(), atol=1e-5)
    assert (len(data.splits["train"]), len(data.splits["val"]), len(data.splits["test"])) == (60, 12, 18)
    assert data.expressions("val") == [s.expression for s in data.splits["val"].samples]
    assert data.image_source == "generated"


def test_every_expression_means_its_box() -> None:
    data = scenes(train_size=150)
    data.setup("fit")
    kinds: Counter[str] = Counter()
    single = 0
    for i, sample in enumerate(data.splits["train"].samples):
        scene = make_scene(int(sample.name.split()[-1]))
        found = next(e for e in expressions(scene) if e.text == sample.expression)
        x0, y0, x1, y1 = scene.things[found.target].box
        assert sample.box == (x0, y0, x1 - x0, y1 - y0)
        single += len(scene.things) == 1
        assert len(scene.things) > 1 or i // data.expressions_per_scene % 4 == 0
        kinds[found.kind] += 1
    assert set(kinds) == {"attribute", "extreme", "ordinal", "relation"}
    assert single, "every fourth scene of training may have one object"
    assert max(kinds.values()) < 0.75 * sum(kinds.values())


def test_splits_runs_and_epochs_use_different_scenes() -> None:
    data, other = scenes(), scenes(seed=1)
    names = [{s.name for s in d.splits[k].samples} for d in (data, other) for k in ("train", "val", "test")
             if d.setup("fit") is None]  # fmt: skip
    assert not names[0] & names[1] | names[0] & names[2] | names[1] & names[2] | names[0] & names[3]
    assert names[1:3] == names[4:6], "validation and test do not depend on the seed"
    starts = {seed_of(k, s, e, n) for k in ("train", "val", "test") for s in (0, 1) for e in (0, 1) for n in (0, 9)}
    assert len(starts) == 8 + 4 + 4
    assert min(starts) > 10_000_200, "pre-training used the seeds below"


def test_the_same_seed_gives_the_same_data() -> None:
    assert scenes().protocol() == scenes().protocol()
    assert scenes().protocol()["splits"]["train"] != scenes(seed=1).protocol()["splits"]["train"]
    assert scenes().protocol()["scenes_version"] == 1


def test_fresh_scenes_change_with_the_epoch_and_with_nothing_else() -> None:
    data = scenes(fresh=True)
    data.setup("fit")
    train = data.splits["train"]
    assert isinstance(train, FreshScenes)
    assert [train.at(0, i) for i in range(40)] == train.samples
    first, again, later = ([train.at(e, i).name for i in range(40)] for e in (1, 1, 2))
    assert first == again
    assert not {s.name for s in train.samples} & {*first} | {*first} & {*later}
    loader = data.train_dataloader()
    seen = []
    for epoch in (0, 1):
        loader.sampler.set_epoch(epoch)
        seen.append(next(iter(loader)))
    for epoch, batch in enumerate(seen):
        assert batch["expression"] == [train.at(epoch, i).expression for i in batch["index"].tolist()]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_size": 0}, "something to train on"),
        ({"val_size": -1}, "must not be negative"),
        ({"expressions_per_scene": 7}, r"expressions_per_scene=7\): it is 1 to 6"),
        ({"scene_size": 8}, "from 32 pixels on"),
        ({"test_split": "testA"}, r"test_split='testA'\): did you mean 'test'"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PetlError, match=message):
        scenes(**options)


def test_splits_of_size_zero_do_not_exist_and_test_can_be_val() -> None:
    data = scenes(test_size=0, test_split="val")
    data.setup("test")
    assert set(data.splits) == {"train", "val"}
    assert sum(len(b["expression"]) for b in data.test_dataloader()) == 8
    with pytest.raises(PetlError, match="scenes has no split 'test'; it has: train, val"):
        data.expressions("test")


def test_kinds_of_expressions() -> None:
    data = scenes(kinds=["attribute"], shapes=1, sizes=1, textures=1)
    words = {w for split in data.splits for text in data.expressions(split) for w in text.split()}
    assert words <= {"the", "small", "solid", "circle", *COLORS}
    assert data.protocol()["kinds"] == ["attribute"]
    assert scenes().protocol()["splits"]["val"] != scenes(kinds=["attribute"]).protocol()["splits"]["val"]
    with pytest.raises(PetlError, match=r"kinds=\['atribute'\]\): did you mean 'attribute'"):
        scenes(kinds=["atribute"])
    with pytest.raises(PetlError, match=r"kinds=\['relation'\]\): no scene has an expression .*shapes 1"):
        scenes(kinds=["relation"], shapes=1).setup("fit")


def test_scenes_drawn_otherwise_are_other_data() -> None:
    usual = scenes().protocol()
    for options in ({"brightness": 0.12, "noise": 1.5}, {"zoom": 1.5}, {"shapes": 1}, {"max_things": 3}):
        other = scenes(**options).protocol()
        assert all(usual["splits"][split]["sha256"] != other["splits"][split]["sha256"] for split in usual["splits"])
        assert other["drawn"].items() >= options.items()
    for options in ({"brightness": 0.0}, {"brightness": 1.5}, {"noise": -1}):
        with pytest.raises(PetlError, match="brightness"):
            scenes(**options)
    for options in ({"shapes": 0}, {"colors": 11}, {"sizes": 3}, {"textures": 4}):
        with pytest.raises(PetlError, match=f"{next(iter(options))}=.*: it is 1 to"):
            scenes(**options)
