"""Adapters of grounding models: the pair by name, boxes in pixels, older schema, changed files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import petl
from petl.adapters import artefact
from petl.adapters.rebuild import check_grounding
from petl.adapters.state import trained_tensors
from petl.backbones import bundled
from tests.adapters.test_artefact import base, edit, trained
from tests.conftest import SMALL_FUSION, build, expressions_and_images, grounding

SMALL = {"bottleneck": 6, "relation_dim": 5, "shared_dim": 20}
VISION, TEXT = "bundled/tiny_clip_vision", "bundled/tiny_clip_text"
PREPROCESSING = {"image_size": [64, 64], "mean": [0.5] * 3, "std": [0.25] * 3, "interpolation": "bilinear",
                 "mode": "letterbox"}  # fmt: skip


def model(method: Any = None) -> petl.GroundingModel:
    """On the bundled pair, as after training."""
    torch.manual_seed(0)
    net = petl.GroundingModel(VISION, TEXT, method or petl.M2IST(**SMALL), **SMALL_FUSION)
    with torch.no_grad():
        for p in net.petl.parameters():
            p.normal_(0, 0.1)
    return net.eval()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("saved") / "a"
    return petl.save(model(), where, VISION, text_backbone=TEXT, preprocessing=PREPROCESSING, protocol={"seed": 3})


@pytest.fixture
def adapter(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "a"))


def config_of(adapter: Path) -> dict[str, Any]:
    return json.loads((adapter / artefact.CONFIG).read_text())


def picture(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(width).integers(0, 255, (height, width, 3), dtype=np.uint8))


# ---- round trip


def test_the_pair_is_found_again_by_name(adapter: Path) -> None:
    config = config_of(adapter)
    assert (config["schema"], config["task"]) == (artefact.SCHEMA, "grounding")
    assert (config["backbone"]["name"], config["text_backbone"]["name"]) == (VISION, TEXT)
    assert (config["backbone"]["family"], config["text_backbone"]["family"]) == ("timm_vit", "hf_clip_text")
    assert config["method"] == {"name": "m2ist", "options": {**petl.M2IST().to_dict()["options"], **SMALL}}
    assert config["head"] | SMALL_FUSION | {"kind": "grounding", "vision_width": 128, "text_width": 128,
                                            "dropout": 0.1} == config["head"]  # fmt: skip
    assert config["labels"] is None
    assert config["tensors"]["parameters"] == sum(p.numel() for p in model().parameters() if p.requires_grad)
    predictor, inputs = petl.load(adapter), expressions_and_images(model())
    assert torch.equal(predictor.model(*inputs), model()(*inputs))
    assert not predictor.model.training
    card = (adapter / "README.md").read_text()
    for text in (TEXT, VISION, "predictor.ground(", 'petl.load("path/to/this/directory")', "m2ist, grounding"):
        assert text in card


@pytest.mark.parametrize("method", [petl.DARA(**SMALL), petl.LinearProbe()], ids=lambda m: m.name)
def test_other_methods_and_equal_bytes(method: Any, tmp_path: Path) -> None:
    one, two = (petl.save(model(method), tmp_path / name, VISION, text_backbone=TEXT, preprocessing=PREPROCESSING)
                for name in "ab")  # fmt: skip
    for name in (artefact.CONFIG, artefact.TENSORS, artefact.CARD):
        assert (one / name).read_bytes() == (two / name).read_bytes()
    inputs = expressions_and_images(model())
    loaded = petl.load(one).model
    assert torch.equal(loaded(*inputs), model(method)(*inputs))
    assert sum("shared" in n for n in trained_tensors(loaded)) == (8 if method.name == "dara" else 0)


def test_ground_returns_a_box_in_the_picture(adapter: Path, tmp_path: Path) -> None:
    predictor = petl.load(adapter)
    for width, height in ((64, 64), (200, 50), (31, 90), (1, 1)):
        box = predictor.ground(picture(width, height), "the red circle")
        assert box == predictor.ground(picture(width, height), "The RED circle")
        x0, y0, x1, y1 = box
        assert 0 <= x0 <= x1 <= width
        assert 0 <= y0 <= y1 <= height
    assert predictor.ground(picture(64, 64), "red circle") != predictor.ground(picture(64, 64), "blue star left of it")
    picture(80, 60).save(tmp_path / "x.png")
    box = predictor.ground(tmp_path / "x.png", "red circle")
    assert box == predictor.ground(picture(80, 60), "red circle") == petl.load(adapter).ground(
        str(tmp_path / "x.png"), "red circle")  # fmt: skip
    assert not any(isinstance(v, torch.Tensor) for v in box)


def test_ground_gives_the_models_box_in_pixels(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A canvas of 64 with a picture of 200 x 100 on it: scale 0.32, 16 rows of padding above."""
    predictor = petl.load(adapter)
    monkeypatch.setattr(predictor.model, "forward", lambda *inputs: torch.tensor([[0.5, 0.5, 0.5, 0.25]]))
    assert predictor.ground(picture(200, 100), "red circle") == pytest.approx((50, 25, 150, 75), abs=1e-4)
    monkeypatch.setattr(predictor.model, "forward", lambda *inputs: torch.tensor([[0.5, 0.1, 1.0, 0.9]]))
    assert predictor.ground(picture(200, 100), "red circle") == pytest.approx((0, 0, 200, 60), abs=1e-3)


def test_the_pair_may_be_passed_in(adapter: Path) -> None:
    towers = petl.load_backbone(VISION), bundled.text()
    predictor = petl.load(adapter, backbone=towers, tokenizer=bundled.tokenizer())
    assert predictor.model.vision is towers[0]
    assert predictor.ground(picture(64, 64), "red circle") == petl.load(adapter).ground(picture(64, 64), "red circle")
    single: list[Any] = [petl.load_backbone(VISION), (bundled.text(),), (towers[0], towers[1], towers[1])]
    for wrong in single:
        with pytest.raises(petl.PetlError, match=r"pass backbone=\(image encoder, text encoder\)"):
            petl.load(adapter, backbone=wrong)
    swapped = bundled.text(), petl.load_backbone(VISION)
    with pytest.raises(petl.PetlError, match="no image encoder"):
        petl.load(adapter, backbone=swapped)
    with pytest.raises(petl.PetlError, match=r"another architecture \(hf_bert"):
        petl.load(adapter, backbone=(petl.load_backbone(VISION), build("hf_bert")))
    other = bundled.text(pretrained=False)
    with pytest.raises(petl.PetlError, match="this text encoder is the right architecture with other weights"):
        petl.load(adapter, backbone=(petl.load_backbone(VISION), other))
    assert "train" not in other.__dict__


def test_names_that_were_not_saved_are_asked_for(tmp_path: Path) -> None:
    nameless = petl.save(model(), tmp_path / "a", preprocessing=PREPROCESSING)
    with pytest.raises(petl.PetlError, match="without a backbone name"):
        petl.load(nameless)
    half = petl.save(model(), tmp_path / "b", VISION, preprocessing=PREPROCESSING)
    with pytest.raises(petl.PetlError, match=r"without a text encoder's name: petl\.load\(…, backbone="):
        petl.load(half)
    assert "backbone=(image_encoder, text_encoder)" in (half / "README.md").read_text()


# ---- the wrong kind


def classification(directory: Path) -> Path:
    half = [0.5] * 3
    record = {"image_size": [32, 32], "mean": half, "std": half, "interpolation": "bicubic", "mode": "resize"}
    return petl.save(trained(), directory, labels=["ant", "bee", "cat", "dog"], preprocessing=record)


def test_classifying_and_grounding_are_told_apart(adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(petl.PetlError, match="trained for 'grounding', not for classification"):
        petl.load(adapter).classify(picture(64, 64))
    other = classification(tmp_path / "c")
    with pytest.raises(petl.PetlError, match="trained for 'classification', not for grounding"):
        petl.load(other, backbone=base()).ground(picture(32, 32), "an ant")
    with pytest.raises(petl.PetlError, match="pass one backbone, not a pair"):
        petl.load(other, backbone=(base(), build("hf_bert")))
    network = base()
    edit(other, task="grounding")
    with pytest.raises(petl.PetlError, match="has a head and a text_backbone"):
        petl.load(other, backbone=network)
    edit(adapter, task="classification")
    with pytest.raises(petl.PetlError, match=r"needs a petl\.GroundingModel"):
        petl.load(adapter)


def test_bad_input_to_ground(adapter: Path, tmp_path: Path) -> None:
    predictor = petl.load(adapter)
    for expression in ("", "  \n"):
        with pytest.raises(petl.PetlError, match="expression is empty"):
            predictor.ground(picture(8, 8), expression)
    (tmp_path / "x.png").write_text("hello")
    with pytest.raises(petl.PetlError, match=r"x\.png is cut short or not an image"):
        predictor.ground(tmp_path / "x.png", "red circle")
    with pytest.raises(petl.PetlError, match="does not exist"):
        predictor.ground(tmp_path / "y.png", "red circle")
    edit(adapter, preprocessing=None)
    with pytest.raises(petl.PetlError, match="without preprocessing"):
        petl.load(adapter).ground(picture(8, 8), "red circle")


def test_schema_1_still_loads(tmp_path: Path, images: torch.Tensor) -> None:
    old = classification(tmp_path / "c")
    config = config_of(old)
    assert config.pop("text_backbone") is None
    (old / artefact.CONFIG).write_text(json.dumps(config | {"schema": 1}))
    loaded = petl.load(old, backbone=base())
    assert torch.equal(loaded.model(images), trained()(images))
    assert loaded.labels == ["ant", "bee", "cat", "dog"]
    (old / artefact.CONFIG).write_text(json.dumps(config | {"schema": 2}))
    with pytest.raises(petl.PetlError, match=r"keys missing \['text_backbone'\]"):
        petl.load(old, backbone=base())


# ---- changed files

Change = Callable[[dict[str, Any]], Any]
CHANGES: dict[str, Change] = {
    **{f"{key}={value!r}": lambda c, key=key, value=value: c["head"].update({key: value}) for key, value in (
        ("fusion_dim", 32), ("fusion_dim", 15), ("fusion_dim", "16"), ("fusion_dim", 10**9), ("fusion_dim", 1.5),
        ("fusion_layers", 3), ("fusion_layers", 0), ("fusion_heads", 5), ("fusion_hidden", 25), ("fusion_hidden", None),
        ("query_length", 8), ("query_length", -7), ("query_length", 99), ("vision_width", 64), ("text_width", "x"),
        ("dropout", "0.1"), ("dropout", None), ("kind", "linear"), ("grid", [4, 16]), ("grid", None),
    )},
    **{f"without {key}": lambda c, key=key: c["head"].pop(key) for key in ("fusion_dim", "dropout", "kind", "grid")},
    "no head": lambda c: c.update(head=None),
    "no text encoder": lambda c: c.update(text_backbone=None),
    "text encoder without digest": lambda c: c["text_backbone"].pop("weights"),
    "another picture size": lambda c: c["preprocessing"].update(image_size=[32, 32]),
    "another method": lambda c: c["method"].update(name="dara"),
    "another width": lambda c: c["method"]["options"].update(bottleneck=7),
}  # fmt: skip
NAMES: dict[str, Change] = {
    "empty text encoder": lambda c: c.update(text_backbone={}),
    "text encoder by path": lambda c: c["text_backbone"].update(name="exec/whatever"),
    "encoders swapped": lambda c: c.update(backbone=c["text_backbone"] | {"args": {}}, text_backbone=c["backbone"]),
}
CHANGES |= {
    "a size that does not exist": lambda c: c["head"].update(fusion_foo=5),
    "picture size a number": lambda c: c["preprocessing"].update(image_size=64),
    "picture size a mapping": lambda c: c["preprocessing"].update(image_size={"a": 1}),
    "dropout above 1": lambda c: c["head"].update(dropout=5.0),
}


@pytest.fixture(scope="module")
def towers() -> tuple[torch.nn.Module, torch.nn.Module]:
    return petl.load_backbone(VISION), bundled.text()


@pytest.mark.parametrize("name", [*CHANGES, *NAMES])
def test_a_changed_config_is_one_clear_error(adapter: Path, name: str, towers: Any) -> None:
    config = config_of(adapter)
    (CHANGES | NAMES)[name](config)
    (adapter / artefact.CONFIG).write_text(json.dumps(config))
    with pytest.raises(petl.PetlError) as error:
        petl.load(adapter, backbone=towers if name in CHANGES else None)
    assert str(error.value).count("\n") == 0
    assert not any("train" in t.__dict__ for t in towers), "encoders that were passed in stay as they were"


def test_without_preprocessing_the_size_of_the_canvas_is_kept(tmp_path: Path) -> None:
    net = grounding("detr+bert", petl.M2IST(**SMALL))  # 96 pixels, and DETR's own are 640
    inputs = expressions_and_images(net)
    loaded = petl.load(petl.save(net, tmp_path / "a"), backbone=(build("detr"), build("hf_bert")))
    assert torch.equal(loaded.model(*inputs), net(*inputs))


def test_grounding_needs_a_tokenizer(adapter: Path) -> None:
    predictor = petl.load(adapter, backbone=(petl.load_backbone(VISION), bundled.text()))
    with pytest.raises(petl.PetlError, match="tokenizer"):
        predictor.ground(picture(8, 8), "red circle")


def test_checking_an_adapter_against_a_running_model(adapter: Path) -> None:
    """What `petl test --adapter` does before it evaluates."""
    config = config_of(adapter)
    check_grounding(adapter, model(), config)
    wider = petl.GroundingModel(VISION, TEXT, petl.M2IST(**SMALL), **SMALL_FUSION | {"fusion_dim": 32})
    with pytest.raises(petl.PetlError, match=r"another vision-language part than the model: fusion_dim differ"):
        check_grounding(adapter, wider, config)
    with pytest.raises(petl.PetlError, match="this image encoder is another architecture"):
        check_grounding(adapter, grounding("detr+bert"), config)
