"""Referring expressions of one's own, and what every grounding data module does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from petl.data.expressions import Expressions
from petl.data.grounding_transforms import letterbox
from petl.data.transforms import evaluation_transform
from petl.errors import PetlError
from tests.conftest import private
from tests.data.refer import PLAIN


def entry(n: int = 0, **changed: Any) -> dict[str, Any]:
    """A good line: a box on picture n, which has 40 x 30 pixels."""
    return {"image": f"{n}.png", "expression": "The Thing", "bbox": [4.0, 3.0, 10.0, 12.5]} | changed


def write(root: Path, *lines: dict[str, Any] | str) -> Path:
    """``list.jsonl`` with these lines, and every picture they name."""
    root.mkdir(parents=True, exist_ok=True)
    for line in (v for v in lines if isinstance(v, dict) and isinstance(v.get("image"), str)):
        pixels = np.random.default_rng(len(line["image"])).integers(0, 255, (30, 40, 3), np.uint8)
        Image.fromarray(pixels).save(root / Path(line["image"]).name)
    file = root / "list.jsonl"
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n"
    file.write_text(text, encoding="utf-8")
    return file


def data(file: Path, **options: Any) -> Expressions:
    return Expressions(str(file), **PLAIN | options)


# ---- reading and batches


def test_a_batch_in_evaluation_is_the_letterbox(tmp_path: Path) -> None:
    file = write(tmp_path, entry(0), entry(0, split="val"), entry(1, split="val", bbox_xyxy=[0, 0, 40, 30]) | {})
    lines = [json.loads(v) for v in file.read_text().splitlines()]
    del lines[2]["bbox"]
    file.write_text("\n".join(map(json.dumps, lines)))
    made = data(file)
    made.setup("validate")
    batch = next(iter(made.val_dataloader()))
    assert made.preprocessing == {
        "image_size": [64, 64], "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bilinear", "mode": "letterbox",
    }  # fmt: skip
    with Image.open(tmp_path / "0.png") as image:
        boxed = letterbox(image, made.preprocessing)
        assert torch.equal(evaluation_transform(made.preprocessing)(image), batch["image"][0])
    assert torch.equal(batch["image"][0], boxed.image)
    assert torch.equal(batch["mask"][0], boxed.mask)
    assert boxed.to_pixels(batch["box"][0]) == pytest.approx((4, 3, 14, 15.5))
    assert batch["box"][1].tolist() == pytest.approx([0.5, 0.5, 1.0, 0.75])
    assert batch["expression"] == ["the thing", "the thing"]
    assert batch["index"].tolist() == [0, 1]


def test_training_is_augmented_by_seed_epoch_and_sample_alone(tmp_path: Path) -> None:
    made = data(write(tmp_path, *[entry(n, expression=f"left {n}") for n in range(4)]))
    made.setup("fit")
    loader, passes = made.train_dataloader(), []
    for epoch in (0, 1, 0):
        loader.sampler.set_epoch(epoch)
        batches = list(loader)
        order = torch.cat([b["index"] for b in batches]).argsort()
        images = torch.cat([b["image"] for b in batches])[order]
        words = [w for b in batches for w in b["expression"]]
        passes.append((images, torch.cat([b["box"] for b in batches])[order], [words[i] for i in order]))
    assert torch.equal(passes[0][0], passes[2][0])
    assert torch.equal(passes[0][1], passes[2][1])
    assert passes[0][2] == passes[2][2]
    assert not torch.equal(passes[0][0], passes[1][0])
    assert made.protocol()["augmentation"]["flip_words"] == "words"
    off = data(tmp_path / "list.jsonl", **dict.fromkeys([f"aug_{k}" for k in ("crop", "scale", "translate", "flip",
                                                                              "color")], False))  # fmt: skip
    off.setup("fit")
    assert off.protocol()["augmentation"] == "none"
    batch = next(iter(off.train_dataloader()))
    sample = off.splits["train"][int(batch["index"][0])]
    with Image.open(sample.image) as image:
        assert torch.equal(letterbox(image, off.preprocessing).image, batch["image"][0])


def test_splits_counts_and_what_is_tested(tmp_path: Path) -> None:
    lines = [entry(0), entry(0, expression="it"), entry(1, split="val"), entry(2, split="test", ref_id="a")]
    made = data(write(tmp_path, *lines))
    report = made.check()
    assert not report.problems
    assert report.lines[:3] == [
        "expressions/list.jsonl",
        "boxes    0 of 4 boxes (0.0%) are impossible",
        f"train    list.jsonl, train: 1 images, 1 refs, 2 expressions, list SHA-256 "
        f"{made.splits['train'].digest()[:16]}",
    ]
    assert made.expressions("train") == ["the thing", "it"]
    assert made.protocol()["splits"]["test"]["expressions"] == 1
    without = data(write(tmp_path, *lines[:3]))
    without.setup("test")
    assert without.protocol()["splits"]["test"]["name"] == "the val split (list.jsonl, val)"
    assert data(tmp_path / "list.jsonl", test_split="train").protocol()["test_split"] == "train"
    with pytest.raises(PetlError, match="has no val split, which 'validate' uses; it has: train"):
        data(write(tmp_path, entry(0))).setup("validate")


def test_held_out_images_are_on_one_side_only(tmp_path: Path) -> None:
    file = write(tmp_path, *[entry(n, expression=f"{k}") for n in range(10) for k in range(3)])
    made = data(file, val_fraction=0.3)
    made.setup("fit")
    train, val = ({s.name for s in made.splits[k].samples} for k in ("train", "val"))
    assert (len(train), len(val), len(train & val)) == (7, 3, 0)
    assert len(made.splits["val"]) == 9
    assert data(file, val_fraction=0.3).protocol()["splits"] == made.protocol()["splits"]
    assert data(file, val_fraction=0.3, seed=1).protocol()["splits"] != made.protocol()["splits"]
    with pytest.raises(PetlError, match="leaves nothing to train on"):
        data(file, val_fraction=0.01).setup("fit")


def test_images_of_two_splits_are_noted(tmp_path: Path) -> None:
    made = data(write(tmp_path, entry(0), entry(0, split="val")))
    assert "note     1 images of val are images of train too" in made.check().lines


def test_the_digest_knows_name_expression_and_box(tmp_path: Path) -> None:
    digests = set()
    for changed in ({}, {"expression": "another"}, {"bbox": [4.0, 3.0, 10.0, 12.0]}, {"image": "9.png"}):
        made = data(write(tmp_path, entry() | changed))
        digests.add(made.protocol()["splits"]["train"]["sha256"])
    assert len(digests) == 4


# ---- bad input


def problems(file: Path, **options: Any) -> str:
    """The one error of `setup`, which equals what `check` lists."""
    with pytest.raises(PetlError) as error:
        data(file, **options).setup("fit")
    listed = data(file, **options).check().problems
    assert all(p in str(error.value) for p in listed[:10])
    return str(error.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"image": "0.png", "expr', r"list.jsonl line 2 is not JSON, or cut short: Unterminated string"),
        ("[1, 2]", "line 2 is not a JSON object but list"),
        ({"image": "0.png", "bbox": [0, 0, 9, 9]}, "line 2: needs expression; it has image, bbox"),
        ({"image": "0.png", "expresion": "x", "bbox": [0, 0, 9, 9]}, "'expresion': did you mean 'expression'?"),
        ({"image": "0.png", "expression": "x"}, "needs either bbox or bbox_xyxy"),
        (entry(expression="  "), "line 2: the expression is empty or no text"),
        (entry(expression=7), "the expression is empty or no text"),
        (entry(image="../0.png"), "line 2: image '../0.png' leads out of the image folder"),
        (entry(image=3), "image is 3, not a path"),
        (entry(bbox=[1, 2, 3]), r"the box is \[1, 2, 3\], not a list of four numbers"),
        (entry(bbox=[1, 2, 3, float("nan")]), "not a list of four numbers"),
        (entry(bbox=[1, 2, 0, 3]), r"line 2: box \[1.0, 2.0, 0.0, 3.0\] \(x, y, w, h\) has no area or does not lie"),
        (entry(bbox=[1, 2, -3, 3]), "1 of 2 boxes .50.0%. are impossible"),
        (entry(bbox=[35, 2, 10, 3]), "does not lie in the picture of 40 x 30 pixels"),
        (entry(bbox=[-5, 2, 10, 3]), "does not lie in the picture of 40 x 30 pixels"),
        (entry(split="validation"), r"line 2: split 'validation'; valid are: test, train, val; with split: train"),
        (entry(split=["val"]), r"line 2: split \['val'\]"),
        (entry(width="40"), "width is '40', not a number of pixels"),
        (entry(ref_id=[1]), r"ref_id is \[1\]"),
        (entry(width=41, height=30), "image .*0.png has 40 x 30 pixels, the list says 41 x 30"),
    ],
)  # fmt: skip
def test_bad_lines_are_named(tmp_path: Path, line: dict[str, Any] | str, message: str) -> None:
    import re

    text = problems(write(tmp_path, entry(1), line))
    assert re.search(message, text), text


def test_a_box_may_reach_over_the_edge_by_a_rounding(tmp_path: Path) -> None:
    data(write(tmp_path, entry(bbox=[30.4, 3, 10.2, 27.5]), entry(bbox=[-0.5, 0, 9, 9]))).setup("fit")


def test_corners_given_as_sizes_are_found(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    boxes = [[*map(float, rng.integers(0, 15, 2)), *map(float, rng.integers(20, 30, 2))] for _ in range(30)]
    text = problems(write(tmp_path, *[entry(bbox=b) for b in boxes]))
    assert 'they are given as (x, y, w, h): if they are (x0, y0, x1, y1), name the key "bbox_xyxy"' in text
    small = [[10.0, 10.0, 12.0 + k % 7, 13.0] for k in range(30)]
    hint = data(write(tmp_path, *[entry(bbox=b) for b in small])).check()
    assert not hint.problems
    assert "100% of the boxes make sense as (x0, y0, x1, y1)" in hint.lines[1]
    sizes = [{**entry(), "bbox_xyxy": [20.0, 15.0, 9.0, 9.0]} for _ in range(3)]
    for line in sizes:
        del line["bbox"]
    text = problems(write(tmp_path, *sizes))
    assert 'if they are (x, y, w, h), name the key "bbox"' in text


def test_missing_images_are_counted_and_named(tmp_path: Path) -> None:
    file = write(tmp_path, *[entry(n) for n in range(12)])
    for n in range(11):
        (tmp_path / f"{n}.png").unlink()
    for check_images in (True, False):
        text = problems(file, check_images=check_images)
        assert "1 problems" in text
        assert f"11 of 12 image files do not exist: {tmp_path / '0.png'}, " in text
        assert text.count(".png") == 10


def test_damaged_images_files_and_folders(tmp_path: Path) -> None:
    file = write(tmp_path, entry(0, width=40, height=30), entry(1))
    (tmp_path / "0.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    assert "0.png is cut short or not an image" in problems(file)
    with pytest.raises(PetlError, match=r"nowhere.jsonl does not exist"):
        data(tmp_path / "nowhere.jsonl").setup("fit")
    with pytest.raises(PetlError, match=r"image_root .*nowhere does not exist"):
        data(file, image_root=str(tmp_path / "nowhere")).setup("fit")
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(PetlError, match="cannot be read as text in UTF-8"):
        data(file).setup("fit")
    file.write_text("\n\n")
    with pytest.raises(PetlError, match="holds no expressions"):
        data(file).setup("fit")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "tran"}, r"split='tran'\): did you mean 'train'"),
        ({"test_split": "testA"}, r"test_split='testA'\): did you mean 'test'"),
        ({"val_fraction": 1.0}, r"val_fraction=1.0\): it lies in \[0, 1\)"),
        ({"batch_size": 0}, r"Expressions\(batch_size=0\): it is at least 1"),
    ],
)
def test_bad_options(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(PetlError, match=message):
        data(tmp_path / "list.jsonl", **options)


# ---- expressions that people wrote


def test_real_expressions_are_read(tmp_path: Path) -> None:
    human = private("grounding", "rec_human.jsonl")
    made = data(human, split="test", image_root=str(human.parent))
    made._read_once()
    assert made.splits["test"].counts() == {"images": 21, "refs": 29, "expressions": 46}
    assert not made.problems
    assert "far left cut off" in made.expressions("test")
    templated = data(private("grounding", "rec_templated.jsonl"), image_root=str(human.parent))
    assert "split 'val2017'; did you mean 'val'?" in templated.check().problems[0]
