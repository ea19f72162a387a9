"""Images of your own: class folders, CSV, held-out samples, image modes and augmentation."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from petl.data.folder import ImageFolder
from petl.data.transforms import evaluation_transform, train_transform
from petl.errors import PetlError

PLAIN: dict[str, Any] = {"image_size": 8, "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "batch_size": 4}
RECORD = {"image_size": [14, 14], "mean": [0] * 3, "std": [1] * 3, "interpolation": "bicubic", "mode": "center_crop"}


def save(file: Path, number: int) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(number).integers(0, 255, (10, 20, 3), np.uint8)
    Image.fromarray(pixels).save(file)


def tree(root: Path, **splits: dict[str, int]) -> Path:
    """``tree(root, train={"cat": 3})`` writes root/train/cat/{0,1,2}.png."""
    for s, (split, classes) in enumerate(splits.items()):
        for c, (name, count) in enumerate(classes.items()):
            for i in range(count):
                save(root / split / name / f"{i}.png", 10_000 * s + 100 * c + i)
    return root


def folder(root: Path, **options: Any) -> ImageFolder:
    return ImageFolder(str(root), **PLAIN | options)


# ---- class folders


def test_folders_classes_and_splits(tmp_path: Path) -> None:
    tree(tmp_path, train={"dog": 4, "cat": 3}, val={"cat": 1, "dog": 2}, test={"dog": 1})
    (tmp_path / "train" / "dog" / "notes.txt").write_text("not an image")
    (tmp_path / "train" / ".ipynb_checkpoints").mkdir()
    data = folder(tmp_path)
    data.setup("fit")
    assert (data.labels, data.num_classes) == (["cat", "dog"], 2)
    assert {s: len(v) for s, v in data.splits.items()} == {"train": 7, "val": 3, "test": 1}
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].shape == (4, 3, 8, 8)
    assert [b["label"].tolist() for b in data.val_dataloader()] == [[0, 1, 1]]
    assert [b["label"].tolist() for b in data.test_dataloader()] == [[1]]
    assert data.protocol()["augmentation"] == "flip_crop"


def test_evaluation_images_equal_the_transform_of_the_record(tmp_path: Path) -> None:
    tree(tmp_path, train={"a": 4}, val={"a": 1})
    data = folder(tmp_path)
    data.setup("validate")
    assert data.preprocessing["mode"] == "center_crop"
    with Image.open(tmp_path / "val" / "a" / "0.png") as image:
        expected = evaluation_transform(data.preprocessing)(image)
        nearly = np.asarray(image.resize((18, 9), Image.Resampling.BICUBIC), np.float32)[0:8, 5:13] / 127.5 - 1
    assert torch.equal(next(iter(data.val_dataloader()))["image"][0], expected)
    assert torch.allclose(expected, torch.from_numpy(nearly).permute(2, 0, 1), atol=1e-6), (
        "9 = 8 / 0.875, then the middle"
    )


def test_without_test_folder_the_val_split_is_tested_and_the_protocol_says_so(tmp_path: Path) -> None:
    tree(tmp_path, train={"a": 4}, val={"a": 2})
    data = folder(tmp_path)
    data.setup("test")
    splits = data.protocol()["splits"]
    assert splits["test"] == splits["val"] | {"name": "the val split (val)"}
    assert sum(len(b["label"]) for b in data.test_dataloader()) == 2


def test_no_val_folder_and_no_fraction_means_no_validation(tmp_path: Path) -> None:
    data = folder(tree(tmp_path, train={"a": 5}))
    data.setup("fit")
    assert (data.val_dataloader(), data.test_dataloader()) == ([], [])


def test_held_out_samples_are_stratified_seeded_and_disjoint(tmp_path: Path) -> None:
    tree(tmp_path, train={"a": 20, "b": 10})
    data = folder(tmp_path, val_fraction=0.2)
    data.setup("fit")
    data.check()
    data.setup("test")
    train, val = ({s.name for s in data.splits[n].samples} for n in ("train", "val"))
    assert (len(train), len(val), len(train & val)) == (24, 6, 0)
    assert Counter(s.label for s in data.splits["val"].samples) == {0: 4, 1: 2}
    assert data.split_names["val"] == "0.2 held out of train"
    assert folder(tmp_path, val_fraction=0.2).protocol()["splits"] == data.protocol()["splits"]
    assert folder(tmp_path, val_fraction=0.2, seed=1).protocol()["splits"] != data.protocol()["splits"]


def test_a_fraction_that_holds_out_nothing_or_a_whole_class(tmp_path: Path) -> None:
    with pytest.raises(PetlError, match="less than one image"):
        folder(tree(tmp_path / "few", train={"a": 4}), val_fraction=0.1).setup("fit")
    with pytest.raises(PetlError, match=r"leaves no training image of class '(a|b)'"):
        folder(tree(tmp_path / "most", train={"a": 1, "b": 1, "c": 8}), val_fraction=0.9).setup("fit")
    with pytest.raises(PetlError, match=r"val_fraction=1.*lies in"):
        folder(tmp_path, val_fraction=1.0)


def test_classes_that_differ(tmp_path: Path) -> None:
    tree(tmp_path, train={"cat": 4, "dog": 1}, val={"cats": 1, "dog": 1})
    with pytest.raises(PetlError) as error:
        folder(tmp_path).setup("fit")
    text = str(error.value)
    assert "2 problems" in text
    assert "class 'cats' of val is not a class of train; did you mean 'cat'?" in text
    assert "no images of class 'cat'" in text


def test_empty_folders(tmp_path: Path) -> None:
    tree(tmp_path, train={"cat": 4})
    (tmp_path / "train" / "dog").mkdir()
    with pytest.raises(PetlError, match=r"train/dog holds no images"):
        folder(tmp_path).setup("fit")
    (tmp_path / "hollow" / "train").mkdir(parents=True)
    with pytest.raises(PetlError, match=r"hollow/train has no class folders with images; .*hollow holds \['train'\]"):
        folder(tmp_path / "hollow").setup("fit")
    with pytest.raises(PetlError, match="it does not exist"):
        folder(tmp_path / "nowhere").setup("fit")
    assert "it does not exist" in folder(tmp_path / "nowhere").check().problems[0]


def test_a_second_look_after_the_images_were_added(tmp_path: Path) -> None:
    (tmp_path / "train" / "cat").mkdir(parents=True)
    data = folder(tmp_path)
    assert "no class folders with images" in data.check().problems[0]
    tree(tmp_path, train={"cat": 4})
    assert data.check().problems == []


def test_damaged_image_and_tiny_training_set(tmp_path: Path) -> None:
    tree(tmp_path, train={"a": 3})
    data = folder(tmp_path)
    data.setup("fit")
    with pytest.raises(PetlError, match="3 samples, fewer than one batch of 4"):
        data.train_dataloader()
    (tmp_path / "train" / "a" / "1.png").write_bytes(b"\x89PNG\r\n\x1a\n rest is missing")
    with pytest.raises(PetlError, match=r"train/a/1.png is cut short or not an image"):
        folder(tmp_path).setup("fit")


# ---- CSV


def write_csv(root: Path, *lines: str) -> str:
    (root / "list.csv").write_text("\n".join(lines) + "\n", encoding="utf-8-sig")
    return str(root / "list.csv")


def test_csv(tmp_path: Path) -> None:
    tree(tmp_path, all={"x": 5})
    elsewhere = tmp_path / "elsewhere" / "0.png"
    save(elsewhere, 77)
    file = write_csv(
        tmp_path, "path,label,split", "all/x/0.png,red,train", "all/x/1.png,blue,", '"all/x/2.png",red,val',
        "all/x/3.png,blue,test", "", f"{elsewhere},blue,train",
    )  # fmt: skip
    data = folder(tmp_path, csv=file)
    data.setup("fit")
    assert data.labels == ["blue", "red"]
    assert [(s.name, s.label) for s in data.splits["train"].samples] == [
        ("all/x/0.png", 1), ("all/x/1.png", 0), (str(elsewhere), 0)
    ]  # fmt: skip
    assert (len(data.splits["val"]), len(data.splits["test"])) == (1, 1)
    before = data.protocol()["splits"]
    assert before["val"]["name"] == "list.csv, val"
    changed = write_csv(
        tmp_path, "path,label,split", "all/x/0.png,red,train", "all/x/1.png,blue,", "all/x/2.png,blue,val"
    )
    assert folder(tmp_path, csv=changed).protocol()["splits"]["val"]["sha256"] != before["val"]["sha256"]


def test_csv_without_split_column_holds_out(tmp_path: Path) -> None:
    tree(tmp_path, all={"x": 8})
    file = write_csv(tmp_path, "label,path", *(f"{'ab'[i % 2]},all/x/{i}.png" for i in range(8)))
    data = folder(tmp_path, csv=file, val_fraction=0.25)
    data.setup("fit")
    assert (len(data.splits["train"]), len(data.splits["val"])) == (6, 2)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["path,class", "a.png,1"], r"must have the columns path and label; it has \['path', 'class'\]"),
        ([], r"must have the columns path and label; it has \[\]"),
        (["path,label,split", "all/x/0.png,a,trian"], r"line 2: split 'trian'; did you mean 'train'"),
        (["path,label", "all/x/0.png,a", "", "all/x/1.png"], r"line 4: path or label is empty"),
        (["path,label,split", "all/x/0.png,a,train", "all/x/1.png,b,val"], r"class 'b' of val is not a class of train"),
        (["path,label,split", "all/x/0.png,a,val"], "lists no training images"),
        (["path,label", "all/x/9.png,a"], r"all/x/9.png does not exist"),
    ],
)
def test_bad_csv(tmp_path: Path, lines: list[str], message: str) -> None:
    tree(tmp_path, all={"x": 2})
    with pytest.raises(PetlError, match=message):
        folder(tmp_path, csv=write_csv(tmp_path, *lines)).setup("fit")


def test_csv_that_is_not_there_or_no_text(tmp_path: Path) -> None:
    with pytest.raises(PetlError, match="does not exist"):
        folder(tmp_path, csv=str(tmp_path / "none.csv")).setup("fit")
    (tmp_path / "x.csv").write_bytes(b"path,label\n\xff\xfe,1\n")
    with pytest.raises(PetlError, match="not a CSV file in UTF-8"):
        folder(tmp_path, csv=str(tmp_path / "x.csv")).setup("fit")


# ---- transforms


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "I;16", "1"])
def test_every_image_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    """A picture that is grey 200 on the left and black on the right, in every mode, through a file."""
    pixels = np.zeros((28, 28), np.uint8)
    pixels[:, :14] = 255 if mode == "1" else 200
    grey = Image.fromarray(pixels)
    if mode == "I;16":
        image = Image.fromarray(pixels.astype(np.uint16) * 257)
    else:
        image = grey.convert("RGB").convert(mode) if mode == "CMYK" else grey.convert(mode)
    file = tmp_path / ("x.tif" if mode == "CMYK" else "x.png")
    image.save(file)
    with Image.open(file) as loaded:
        assert loaded.mode == mode
        out = evaluation_transform(RECORD | {"mode": "resize"})(loaded)
    assert out.shape == (3, 14, 14)
    assert torch.allclose(out[:, 7, 0], torch.full((3,), pixels[0, 0] / 255), atol=0.01)
    assert torch.allclose(out[:, 7, -1], torch.zeros(3), atol=0.01)


def test_transparent_pixels_are_white() -> None:
    clear = Image.new("RGBA", (20, 20), (255, 0, 0, 0))
    assert torch.equal(evaluation_transform(RECORD)(clear), torch.ones(3, 14, 14))


def test_augmentations() -> None:
    gradient = Image.fromarray(np.tile(np.linspace(60, 250, 32).astype(np.uint8), (32, 1)))
    plain = evaluation_transform(RECORD)(gradient)
    assert torch.equal(train_transform(RECORD, "none")(gradient), plain)
    flip_crop, shift = train_transform(RECORD, "flip_crop"), train_transform(RECORD, "shift")
    torch.manual_seed(0)
    flipped = [bool(x[0, 7, 0] > x[0, 7, -1]) for x in (flip_crop(gradient) for _ in range(20))]
    assert 3 < sum(flipped) < 17
    resized = evaluation_transform(RECORD | {"mode": "resize"})(gradient)
    offsets = set()
    for _ in range(20):
        moved = shift(gradient)
        assert moved.shape == (3, 14, 14)
        assert (moved[0, 7, 4:10].diff() > 0).all(), "not flipped"
        fits = [d for d in (-1, 0, 1) if torch.allclose(moved[0, 7, 2:12], resized[0, 7, 2 + d : 12 + d], atol=1e-3)]
        assert fits, "moved by at most one of 14 pixels"
        offsets.update(fits)
    assert offsets == {-1, 0, 1}


def test_bad_names_and_records() -> None:
    with pytest.raises(PetlError, match=r"'flipcrop': did you mean 'flip_crop'"):
        train_transform(RECORD, "flipcrop")
    with pytest.raises(PetlError, match=r"mode 'centre_crop': did you mean 'center_crop'"):
        evaluation_transform(RECORD | {"mode": "centre_crop"})
    with pytest.raises(PetlError, match=r"record is not usable: KeyError: 'mean'"):
        evaluation_transform({k: v for k, v in RECORD.items() if k != "mean"})
    with pytest.raises(PetlError, match=r"record is not usable: ValueError"):
        evaluation_transform(RECORD | {"interpolation": "cubic"})


def test_augmentation_name_reaches_the_training_images(tmp_path: Path) -> None:
    tree(tmp_path, train={"a": 4})
    data = folder(tmp_path, augmentation="shifts")
    data.setup("fit")
    with pytest.raises(PetlError, match="did you mean 'shift'"):
        data.train_dataloader()
    images = {}
    for name in ("none", "flip_crop"):
        data = folder(tmp_path, augmentation=name)
        data.setup("fit")
        images[name] = next(iter(data.train_dataloader()))["image"]
    assert not torch.equal(images["none"], images["flip_crop"])
