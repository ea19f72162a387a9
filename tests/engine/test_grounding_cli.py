"""Grounding on the command line: generated scenes, real expressions, RefCOCO's files, the shipped configs, a kill."""

from __future__ import annotations

import csv
import json
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file
from torchvision.ops import box_convert

from petl.cli import find_config
from petl.data import Expressions, Scenes
from petl.nn.boxes import paired_iou
from tests.conftest import private
from tests.data.refer import PLAIN, REFS, file_name, pictures, write_refer
from tests.engine.conftest import petl_command
from tests.engine.grounding import QUICK, SCENES, Petl, commands, tiny_pair

WORDS = sorted({word for *_, texts in REFS for text in texts for word in text.lower().split()})


@pytest.fixture(scope="module")
def petl() -> Iterator[Petl]:
    with commands() as run:
        yield run


def adapter_config(run: Path) -> Any:
    return json.loads((run / "adapter" / "adapter_config.json").read_text())


def metrics(run: Path, stage: str = "test") -> dict[str, float]:
    return json.loads((run / f"{stage}_metrics.json").read_text())


def predictions(run: Path) -> list[dict[str, str]]:
    with (run / "predictions.csv").open() as file:
        return list(csv.DictReader(file))


def corners(row: dict[str, str]) -> list[float]:
    return [float(row[k]) for k in ("x0", "y0", "x1", "y1")]


def is_drawn(file: Path) -> bool:
    """Whether the picture shows a frame in the colour of a prediction without a truth, #0969da."""
    pixels = np.asarray(Image.open(file).convert("RGB")).astype(int)
    return min(pixels.shape[:2]) > 200 and (abs(pixels - [9, 105, 218]).sum(2) < 12).sum() > 100


def grounded(printed: str) -> dict[str, list[float]]:
    """Boxes in pixels by expression, from what `petl ground` printed."""
    lines = [line.rpartition(": ") for line in printed.splitlines() if line.endswith(")")]
    return {phrase: [float(v) for v in rest.partition("(")[0].split()] for phrase, _, rest in lines}


# ---- generated scenes


def test_from_yaml_to_a_drawn_box(petl: Petl, tmp_path: Path) -> None:
    done = petl_command("fit", *map(str, SCENES), "--run_dir", "run", cwd=tmp_path)
    assert "epoch 1/1" in done.stdout
    assert "adapter: run/adapter   (petl info, petl ground, petl.load)" in done.stdout
    run = tmp_path / "run"
    given = yaml.safe_load((run / "config.yaml").read_text())["data"]["init_args"]
    data = Scenes(**given | {"image_size": 64, "mean": (0.5,) * 3, "std": (0.5,) * 3})
    data.setup("test")
    config = adapter_config(run)
    protocol = config["protocol"]
    assert protocol["data"]["dataset"] == "scenes"
    held = {s: {k: v[k] for k in ("expressions", "sha256")} for s, v in protocol["data"]["splits"].items()}
    assert held == {s: {"expressions": len(v), "sha256": v.digest()} for s, v in data.splits.items()}
    assert (protocol["training"]["leak"], protocol["training"]["seed"]) == ("none known", 0)
    shipped = yaml.safe_load(find_config("quickstart/grounding").read_text())["model"]["init_args"]
    assert protocol["training"]["method_lr"] == shipped["method_lr"]
    bottleneck = config["method"]["options"]["bottleneck"]
    assert bottleneck == shipped["method"]["init_args"]["bottleneck"]
    assert set(protocol["metrics"]) == {"val/loss", "val/acc", "val/iou"}
    assert config["preprocessing"]["mode"] == "letterbox"
    [picture] = (run / "pictures").glob("boxes_*.png")
    assert Image.open(picture).size[0] > 600, "four in a row"

    petl("test", "--config", "run/config.yaml", cwd=tmp_path)
    petl("predict", "--config", "run/config.yaml", cwd=tmp_path)
    rows = predictions(run)
    assert [int(r["index"]) for r in rows] == [*range(14)]
    assert [r["expression"] for r in rows] == data.expressions("test"), "each once"
    found = box_convert(torch.tensor([corners(r) for r in rows]), "xyxy", "cxcywh")
    truth = torch.tensor([s.corners for s in data.splits["test"].samples]) / 64
    iou = paired_iou(found, box_convert(truth, "xyxy", "cxcywh"))
    assert metrics(run)["test/iou"] == pytest.approx(float(iou.mean()), abs=1e-5)
    assert metrics(run)["test/acc"] == pytest.approx(float((iou >= 0.5).float().mean()), abs=1e-6)

    info = petl("info", "run/adapter", cwd=tmp_path).stdout
    for text in (f"m2ist (bottleneck={bottleneck}", "bundled/tiny_clip_vision", "bundled/tiny_clip_text",
                 "task       grounding", "leak none known", "intact     yes"):  # fmt: skip
        assert text in info

    sample = data.splits["test"].samples[3]
    sample.image.save(tmp_path / "scene.png")
    phrases = [sample.expression, "The Thing On The Left", "the last one"]
    done = petl_command("ground", "run/adapter", "scene.png", *phrases, "--out", "deep/x.png", cwd=tmp_path)
    boxes = grounded(done.stdout)
    assert [*boxes] == phrases
    assert "pixels of 64 x 64" in done.stdout
    assert boxes[sample.expression] == pytest.approx([64 * v for v in corners(rows[3])], abs=0.06)
    assert all(0 <= x0 < x1 <= 64 and 0 <= y0 < y1 <= 64 for x0, y0, x1, y1 in boxes.values())
    assert is_drawn(tmp_path / "deep" / "x.png")


def test_the_method_is_chosen_on_the_command_line(petl: Petl, tmp_path: Path) -> None:
    printed, kept = {}, {}
    sizes = ["--model.method.bottleneck", 32, "--model.method.relation_dim", 32, "--model.method.shared_dim", 64]
    for method in ("M2IST", "DARA", "null"):
        given = [*SCENES, "--model.method", method, *(sizes if method != "null" else [])]
        printed[method] = petl("report", *given, cwd=tmp_path).stdout
        kept[method] = float(printed[method].partition("memory")[2].split()[0])
    for method, name in (("M2IST", "m2ist"), ("DARA", "dara")):
        assert f"method      {name}, input 3x64x64" in printed[method]
        assert "parameters  125,184 trained (3.85 % of the backbone's 3,251,712) + " in printed[method]
    assert "parameters  0 trained" in printed["null"]
    assert "goes back to image layer 2 and text layer 0" in printed["DARA"]
    assert "goes back to side streams" in printed["M2IST"]
    assert kept["null"] < kept["M2IST"] < 0.5 * kept["DARA"], "no activation inside an encoder is kept"
    # per pair: 2 C b + b + C for each unimodal adapter, d (C_v + C_l + 2) + (d + 1) (C_v + C_l - C_s) for the rest
    assert 125_184 == 4 * (2 * (2 * 128 * 32 + 32 + 128) + 32 * (256 + 2) + 33 * (256 - 64))

    options = ["--model.method", "DARA", "--model.method.variant", "paper", "--run_dir", "dara"]
    petl("fit", *SCENES, *options, cwd=tmp_path)
    method = adapter_config(tmp_path / "dara")["method"]
    assert method["name"] == "dara"
    shipped = yaml.safe_load(find_config("quickstart/grounding").read_text())["model"]["init_args"]["method"]
    assert method["options"]["variant"] == "paper"
    assert method["options"]["bottleneck"] == shipped["init_args"]["bottleneck"], "the file's options stay"


def test_a_killed_run_ends_with_the_same_adapter(petl: Petl, tmp_path: Path) -> None:
    augmented = [v for k in ("crop", "scale", "translate", "flip", "color") for v in (f"--data.aug_{k}", "true")]
    command = ["fit", *SCENES, *augmented, "--trainer.max_epochs", 2, "--model.dropout", 0.1,
               "--model.head_epochs", 0.5, "--checkpoint_every", 2]  # fmt: skip
    petl(*command, "--run_dir", "whole", cwd=tmp_path)
    killed = petl(*command, "--run_dir", "killed", cwd=tmp_path, check=False, kill=(9, "training_step", signal.SIGKILL))
    assert killed.returncode == -9
    assert not (tmp_path / "killed" / "adapter").exists()
    resumed = petl(*command, "--run_dir", "killed", "--ckpt_path", "last", cwd=tmp_path)
    assert "epoch 2/2" in resumed.stdout
    assert "epoch 1/2" not in resumed.stdout, "it went on, and did not start again"
    whole, killed_ = (
        {p.name: p.read_bytes() for p in (tmp_path / r / "adapter").iterdir()} for r in ("whole", "killed")
    )
    assert whole == killed_


# ---- expressions that people wrote


def test_a_run_from_recorded_activations_ends_with_the_same_adapter(petl: Petl, tmp_path: Path) -> None:
    given: list[object] = [
        "fit",
        *SCENES,
        "--trainer.max_epochs",
        2,
        "--model.dropout",
        0.1,
        "--cache_dtype",
        "float32",
    ]
    petl(*given, "--cache", "off", "--run_dir", "plain", cwd=tmp_path)
    taps: list[object] = ["--cache", "require", "--cache_dir", tmp_path / "taps"]
    first = petl(*given, *taps, "--run_dir", "cached", cwd=tmp_path)
    again = petl(*given, *taps, "--run_dir", "again", "--data.num_workers", 1, cwd=tmp_path)
    [line] = [v for v in first.stdout.splitlines() if v.startswith("cache: ")]
    assert ", 30 computed now and 0 found; float32 in" in line
    assert again.stdout.count(", 0 computed now and ") == 2
    weights = {
        (tmp_path / r / "adapter" / "adapter_model.safetensors").read_bytes() for r in ("plain", "cached", "again")
    }
    assert len(weights) == 1
    plain, cached = (metrics(tmp_path / run, "fit") for run in ("plain", "cached"))
    assert {k: v for k, v in plain.items() if k.startswith("val/")}.items() <= cached.items()
    drawn = [sorted((tmp_path / r / "pictures").glob("boxes_*.png")) for r in ("plain", "cached")]
    assert [a.read_bytes() for a in drawn[0]] == [b.read_bytes() for b in drawn[1]]


def test_real_expressions_from_the_archive_to_a_picture(petl: Petl, tmp_path: Path) -> None:
    listed, archive = private("grounding", "rec_human.jsonl"), private("grounding", "coco_val128.tar")
    encoders = tiny_pair(tmp_path, private("text", "bert-base-uncased-vocab.txt"))
    petl("data", "prepare", "expressions", "--file", listed, "--images", archive, listed.parent, "--split", "train",
         "--out", "real", cwd=tmp_path)  # fmt: skip
    real = ["--data", "petl.data.Expressions", "--data.file", "real/references.jsonl", "--data.val_fraction", 0.3]
    checked = petl("data", "check", "--config", "quickstart/grounding", *real, cwd=tmp_path).stdout
    assert "0 of 46 boxes (0.0%) are impossible" in checked
    assert "no problems found" in checked

    data = Expressions(str(tmp_path / "real" / "references.jsonl"), val_fraction=0.3, **PLAIN)
    data.setup("test")
    held_out = data.expressions("test")
    assert len(held_out) == 46 - len(data.expressions("train")) > 5
    small = ["--config", "quickstart/grounding", *QUICK, *real]
    detr = [*encoders, "--model.image_size", 96, "--model.method.shared_dim", 16]
    for name, model in (("detr", detr), ("bundled", [])):
        run = tmp_path / name
        done = petl("fit", *small, *model, "--run_dir", name, cwd=tmp_path)
        petl("test", "--config", f"{name}/config.yaml", cwd=tmp_path)
        petl("predict", "--config", f"{name}/config.yaml", cwd=tmp_path)
        assert set(metrics(run)) == {"test/loss", "test/acc", "test/iou"}
        assert 0 <= metrics(run)["test/acc"] <= 1
        assert 0 < metrics(run)["test/iou"] < 1
        assert [r["expression"] for r in predictions(run)] == held_out
        protocol = adapter_config(run)["protocol"]
        assert protocol["data"]["dataset"] == "expressions/references.jsonl"
        assert protocol["data"]["splits"]["test"]["expressions"] == len(held_out)
        assert all(0 <= v <= 1 for r in predictions(run) for v in corners(r))
    assert "not in the text encoder's vocabulary" in done.stderr, "the bundled one knows scenes only"

    image = data.splits["test"].samples[0].image
    done = petl("ground", "detr/adapter", image, "person in red", held_out[0], cwd=tmp_path)
    width, height = Image.open(image).size
    assert f"pixels of {width} x {height}" in done.stdout
    assert width != height
    first, expected = grounded(done.stdout)[held_out[0]], corners(predictions(tmp_path / "detr")[0])
    assert first == pytest.approx([a * b for a, b in zip(expected, [width, height] * 2)], abs=0.1), "as in evaluation"
    assert is_drawn(tmp_path / "grounded.png")


# ---- RefCOCO and the shipped configs, on a pair with the widths of the published one


def test_refcoco_configs_run_on_their_tiny_twins(petl: Petl, tmp_path: Path) -> None:
    encoders = tiny_pair(tmp_path, WORDS, width=256, layers=(6, 7))
    pictures(tmp_path / "train2014")
    write_refer(tmp_path / "refer")
    data = ["--data.root", "refer", "--data.image_root", "train2014", "--data.partial", "true"]
    twin = [*data, "--data.num_workers", 0, "--data.batch_size", 2, "--trainer.max_epochs", 2, "--trainer.accelerator",
            "cpu", *encoders, "--model.image_size", 96]  # fmt: skip
    for name in ("dara", "full", "m2ist"):
        if name == "m2ist":  # the last one reads what prepare made of the published files
            assert "testA    1 images, 1 refs, 2 expressions" in petl(
                "data", "prepare", "refcoco", "--root", "refer", "--partial", cwd=tmp_path
            ).stdout  # fmt: skip
            shutil.rmtree(tmp_path / "refer" / "refcoco")
        assert "no problems found" in petl("data", "check", "--config", f"refcoco/{name}", *data, cwd=tmp_path).stdout
        done = petl("fit", "--config", f"refcoco/{name}", *twin, cwd=tmp_path)
        assert done.stderr.count("image encoder and data share pictures: yes:") == 1
        run = tmp_path / "runs" / "refcoco" / name
        for split, texts in (("testA", ["the bright man", "man"]), ("testB", ["the wall"])):
            given = ["--config", run / "config.yaml", "--data.test_split", split]
            petl("test", *given, cwd=tmp_path)
            if name == "m2ist":
                petl("predict", *given, cwd=tmp_path)
                assert [r["expression"] for r in predictions(run)] == texts
            assert 0 < metrics(run)["test/iou"] < 1
        protocol = adapter_config(run)["protocol"]
        assert protocol["data"]["dataset"] == "refcoco/unc (partial)"
        assert protocol["training"]["leak"].startswith("yes")
        assert "lr_drop" not in protocol["training"]
        assert "divided by 10 after epoch 60" in protocol["training"]["schedule"]
        assert protocol["selection"] == "best val/acc over epochs"
        assert "GMACs" in petl("report", "--config", f"refcoco/{name}", *twin, cwd=tmp_path).stdout
    options = adapter_config(run)["method"]["options"]
    assert (options["shared_dim"], options["scale"], options["side_seed"]) == (256, 0.1, "embedding")
    # what DARA does not have (side_seed) is left out
    report = petl("report", "--config", "refcoco/m2ist", *twin, "--model.method", "DARA", cwd=tmp_path).stdout
    assert "method      dara, input 3x96x96" in report
    done = petl("ground", run / "adapter", tmp_path / "train2014" / file_name(2), "left dog", cwd=tmp_path)
    assert "pixels of 50 x 90" in done.stdout


def test_weights_without_a_leak_are_asked_for_again(petl: Petl, tmp_path: Path) -> None:
    from petl.backbones import load_backbone

    encoders = tiny_pair(tmp_path, WORDS)
    weights = {k: v + 0.01 for k, v in load_backbone(str(encoders[1])).state_dict().items() if v.is_floating_point()}
    save_file(load_backbone(str(encoders[1])).state_dict() | weights, tmp_path / "unc.safetensors")
    pictures(tmp_path / "train2014")
    write_refer(tmp_path)
    small = [*encoders, "--model.image_size", 96, "--model.method.shared_dim", 16, "--model.vision_weights",
             "unc.safetensors", "--data.root", ".", "--data.image_root", "train2014", "--data.partial", "true",
             "--data.num_workers", 0]  # fmt: skip
    petl("fit", "--config", "refcoco/dara", *QUICK, *small, "--data.batch_size", 2, "--run_dir", "run", cwd=tmp_path)
    protocol = adapter_config(tmp_path / "run")["protocol"]
    assert (
        protocol["training"]["leak"] == "unknown: only if unc.safetensors was trained without the val and test images"
    )
    ground = ["ground", "run/adapter", tmp_path / "train2014" / file_name(3), "man"]
    done = petl(*ground, cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert "local file 'unc.safetensors': pass its path" in done.stderr
    assert "man" in grounded(petl(*ground, "--weights", "unc.safetensors", cwd=tmp_path).stdout)
