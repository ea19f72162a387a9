"""VTAB layout on made-up tasks: a whole training, the protocol, and every kind of bad input."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from petl.data.transforms import evaluation_transform
from petl.data.vtab import TASKS, VTAB
from petl.errors import PetlError

SIZES = {"train800": 8, "val200": 4, "test": 5}
PLAIN: dict[str, Any] = {"image_size": 8, "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "batch_size": 4}


def make_task(root: Path, name: str = "eurosat", classes: int = 3) -> Path:
    """A task folder with a few random JPEG files; some paths hold spaces."""
    folder, rng, number = root / name, np.random.default_rng(0), 0
    (folder / "images" / "with space").mkdir(parents=True)
    lists: dict[str, list[str]] = {}
    for split, count in SIZES.items():
        for i in range(count):
            path = f"images/with space/{number} a.jpg" if i % 2 else f"images/{number}.jpg"
            Image.fromarray(rng.integers(0, 255, (12, 16, 3), np.uint8)).save(folder / path)
            lists.setdefault(split, []).append(f"{path} {i % classes}\n")
            number += 1
    lists["train800val200"] = lists["train800"] + lists["val200"]
    for split, lines in lists.items():
        (folder / f"{split}.txt").write_text("".join(lines))
    return folder


def change_line(file: Path, line: int, text: str) -> None:
    lines = file.read_text().splitlines()
    lines[line - 1] = text
    file.write_text("\n".join(lines) + "\n")


def task(root: Path, name: str = "eurosat", **options: Any) -> VTAB:
    return VTAB(str(root), name, **PLAIN | options)


# ---- what it gives


def test_table_of_tasks() -> None:
    assert Counter(t.group for t in TASKS.values()) == {"Natural": 7, "Specialized": 4, "Structured": 8}
    assert sum(t.num_classes for t in TASKS.values()) == 940


def test_splits_and_batches(tmp_path: Path) -> None:
    make_task(tmp_path)
    data = task(tmp_path)
    data.setup("fit")
    assert (data.num_classes, data.labels) == (10, [str(i) for i in range(10)])
    batches = [*data.train_dataloader()]
    assert [tuple(b["image"].shape) for b in batches] == [(4, 3, 8, 8)] * 2
    assert sorted(i for b in batches for i in b["index"].tolist()) == list(range(8))
    assert [b["label"].tolist() for b in data.val_dataloader()] == [[0, 1, 2, 0]]
    assert [b["index"].tolist() for b in data.test_dataloader()] == [[0, 1, 2, 3], [4]]


def test_images_are_preprocessed_as_the_record_says_and_resized_directly(tmp_path: Path) -> None:
    folder = make_task(tmp_path)
    data = task(tmp_path)
    data.setup("fit")
    record = json.loads(json.dumps(data.preprocessing))
    assert record == {
        "image_size": [8, 8], "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "mode": "resize"
    }  # fmt: skip
    with Image.open(folder / "images" / "with space" / "9 a.jpg") as image:
        expected = evaluation_transform(record)(image)
        bicubic = np.asarray(image.resize((8, 8), Image.Resampling.BICUBIC), np.float32) / 127.5 - 1
    assert torch.equal(next(iter(data.val_dataloader()))["image"][1], expected)
    assert torch.allclose(expected, torch.from_numpy(bicubic).permute(2, 0, 1), atol=1e-6)
    data.train_dataloader().sampler.set_epoch(7)
    for batch in data.train_dataloader():  # no augmentation: training images are evaluation images
        with Image.open(data.splits["train"].samples[batch["index"][0]].image) as image:  # type: ignore[arg-type]
            assert torch.equal(batch["image"][0], evaluation_transform(record)(image))


def test_final_training_has_no_validation(tmp_path: Path) -> None:
    make_task(tmp_path)
    data = task(tmp_path, train_split="train800val200")
    data.setup("fit")
    assert len(data.splits["train"]) == 12
    assert data.val_dataloader() == []
    with pytest.raises(PetlError, match=r"no val split, which 'validate' uses; it has: train \(train800val200\)"):
        task(tmp_path, train_split="train800val200").setup("validate")


def test_a_task_of_your_own_counts_its_classes_and_says_so(tmp_path: Path) -> None:
    folder = make_task(tmp_path, "mushrooms", classes=3)
    data = task(tmp_path, "mushrooms")
    assert data.protocol()["dataset"] == "vtab layout/mushrooms (not one of the 19)"
    assert data.num_classes == 3
    (folder / "labels.txt").write_text("morel\nfly agaric\ncep\ntruffle\n")
    named = task(tmp_path, "mushrooms")
    named.setup("fit")
    assert (named.num_classes, named.labels) == (4, ["morel", "fly agaric", "cep", "truffle"])


def test_protocol_is_json_and_its_hashes_follow_the_lists(tmp_path: Path) -> None:
    import hashlib

    folder = make_task(tmp_path)
    before = json.loads(json.dumps(task(tmp_path).protocol()))
    wanted = hashlib.sha256((folder / "val200.txt").read_bytes()).hexdigest()
    assert before["splits"]["val"] == {"name": "val200", "images": 4, "sha256": wanted}
    assert task(tmp_path).protocol() == before
    change_line(folder / "val200.txt", 2, "images/with space/9 a.jpg 2")
    after = task(tmp_path).protocol()
    assert after["splits"]["val"]["sha256"] != wanted
    assert after["splits"]["train"] == before["splits"]["train"]
    assert task(tmp_path, seed=1).protocol()["seed"] == 1


class Probe(L.LightningModule):
    """Takes the place of a task: says what its weights expect, as petl's tasks do."""

    def __init__(self) -> None:
        super().__init__()
        self.preprocessing = {
            "input_size": (3, 16, 16), "mean": (0.1, 0.2, 0.3), "std": (1, 1, 1), "interpolation": "bilinear"
        }  # fmt: skip
        self.layer = nn.LazyLinear(10)
        self.tested: list[int] = []
        self.shape: tuple[int, ...] = ()

    def setup(self, stage: str) -> None:
        assert self.trainer.datamodule.num_classes == 10  # type: ignore[attr-defined]
        self.layer(torch.zeros(1, 3 * 16 * 16))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        self.shape = tuple(batch["image"].shape)
        return nn.functional.cross_entropy(self.layer(batch["image"].flatten(1)), batch["label"])

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("val/images", float(len(batch["label"])), reduce_fx="sum")

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.tested += batch["index"].tolist()

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return batch["index"]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.01)


def test_end_to_end_with_the_preprocessing_of_the_weights(tmp_path: Path) -> None:
    make_task(tmp_path)
    data, probe = VTAB(str(tmp_path), "eurosat", batch_size=4), Probe()
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    trainer.fit(probe, datamodule=data)
    assert probe.shape == (4, 3, 16, 16)
    assert trainer.callback_metrics["val/images"] == 4
    assert data.preprocessing["mean"] == [0.1, 0.2, 0.3]
    assert data.preprocessing["interpolation"] == "bicubic", "VTAB's, whatever the weights say"
    trainer.test(probe, datamodule=data, verbose=False)
    assert probe.tested == list(range(5))
    predicted: Any = trainer.predict(probe, datamodule=data)
    assert torch.cat(predicted).tolist() == list(range(5))


# ---- bad input


def test_without_trainer_sizes_must_be_given(tmp_path: Path) -> None:
    make_task(tmp_path)
    with pytest.raises(PetlError, match="pass image_size, mean and std"):
        VTAB(str(tmp_path), "eurosat").setup("fit")


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"num_workers": -1}, {"image_size": 0}])
def test_values_out_of_range(tmp_path: Path, options: dict[str, int]) -> None:
    make_task(tmp_path)
    with pytest.raises(PetlError, match=rf"VTAB\({next(iter(options))}="):
        task(tmp_path, **options)


def test_unknown_task_and_split(tmp_path: Path) -> None:
    make_task(tmp_path)
    with pytest.raises(PetlError, match=r"no task 'eurostat': did you mean 'eurosat'\?"):
        task(tmp_path, "eurostat")
    with pytest.raises(PetlError, match=r"'train1000'.*did you mean 'train800'"):
        task(tmp_path, train_split="train1000")
    with pytest.raises(PetlError, match="nowhere does not exist"):
        task(tmp_path / "nowhere")


def test_all_damaged_images_are_named_before_training(tmp_path: Path) -> None:
    folder = make_task(tmp_path)
    (folder / "images" / "0.jpg").unlink()
    cut = folder / "images" / "2.jpg"
    cut.write_bytes(cut.read_bytes()[:200])
    (folder / "images" / "8.jpg").write_text("this is text")
    (folder / "images" / "12.jpg").write_text("this is text, and in the test split")
    data = task(tmp_path)
    for _ in range(2):  # the second try does not pass because the images were looked at before
        with pytest.raises(PetlError) as error:
            data.setup("fit")
        text = str(error.value)
        assert "3 problems" in text
        assert "images/0.jpg does not exist" in text
        assert "images/2.jpg is cut short" in text
        assert "images/8.jpg is cut short or not an image" in text
    problems = data.check().problems
    assert len(problems) == 4
    assert "images/12.jpg" in problems[-1]
    with pytest.raises(PetlError, match="1 problems"):
        task(tmp_path).setup("test")
    with pytest.raises(PetlError, match=r"1 problems in the data:\n.*0.jpg does not exist"):
        task(tmp_path, check_images=False).setup("fit")


def test_many_problems_are_counted(tmp_path: Path) -> None:
    folder = make_task(tmp_path)
    for image in folder.rglob("*.jpg"):
        image.unlink()
    with pytest.raises(PetlError) as error:
        task(tmp_path).setup("fit")
    assert str(error.value).count("does not exist") == 10
    assert "12 problems" in str(error.value)
    assert "and 2 more" in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("images/8.jpg 10", r"val200.txt line 3: label 10 is outside 0 to 9"),
        ("images/8.jpg -1", r"val200.txt line 3: label -1 is outside 0 to 9"),
        ("images/8.jpg", r"val200.txt line 3: 'images/8.jpg' is not 'path label'"),
        ("images/8.jpg two", r"val200.txt line 3: .* is not 'path label'"),
        ("", r"val200.txt line 3: '' is not 'path label'"),
        ("../eurosat/images/8.jpg 1", r"val200.txt line 3: .* leads out of the task folder"),
    ],
)
def test_bad_lines(tmp_path: Path, text: str, message: str) -> None:
    folder = make_task(tmp_path)
    change_line(folder / "val200.txt", 3, text)
    with pytest.raises(PetlError, match=message):
        task(tmp_path).setup("fit")
    problems = task(tmp_path).check().problems
    assert len(problems) == 1


def test_line_numbers_count_the_lines_of_the_file(tmp_path: Path) -> None:
    folder = make_task(tmp_path)
    change_line(folder / "train800.txt", 2, "nonsense")
    change_line(folder / "train800.txt", 4, "images/with space/3 a.jpg 77")
    problems = task(tmp_path).check().problems
    assert [p.split("train800.txt ")[1].split(":")[0] for p in problems] == ["line 2", "line 4"]


def test_missing_and_empty_lists(tmp_path: Path) -> None:
    folder = make_task(tmp_path)
    (folder / "val200.txt").unlink()
    with pytest.raises(PetlError, match=r"list .*val200.txt does not exist"):
        task(tmp_path).setup("fit")
    (folder / "val200.txt").write_text("")
    with pytest.raises(PetlError, match=r"list .*val200.txt holds no images"):
        task(tmp_path).setup("fit")
    (folder / "val200.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PetlError, match=r"val200.txt is not text in UTF-8"):
        task(tmp_path).setup("fit")
    (folder / "test.txt").unlink()
    with pytest.raises(PetlError, match="has no test split"):
        task(tmp_path, train_split="train800val200").setup("test")


def test_wrong_number_of_class_names(tmp_path: Path) -> None:
    folder = make_task(tmp_path)
    (folder / "labels.txt").write_text("a\nb\n")
    with pytest.raises(PetlError, match=r"labels.txt names 2 classes, the task has 10"):
        task(tmp_path).setup("fit")


def test_check_reports_what_is_there(tmp_path: Path) -> None:
    make_task(tmp_path)
    data = task(tmp_path)
    report = data.check()
    assert report.problems == []
    text = "\n".join(report.lines)
    assert "train800: 8 images, 3 classes seen, 2 to 3 per class" in text
    assert data.splits["test"].digest()[:16] in text
    assert data.check().lines == report.lines
