"""The adapter directory. The rows of specs/field.md A.5 (what peers accept silently) have the opposite outcome here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import petl
from petl.adapters import artefact
from petl.backbones.classifier import Classifier
from petl.methods.attach import attached
from petl.nn.head import Head
from tests.conftest import _timm, build

SMALL = {"num_classes": 0}


def trained(method: petl.Method | None = None, classes: int = 4, **shape: object) -> Classifier:
    torch.manual_seed(3)
    backbone = petl.attach(_timm(**SMALL | shape), method or petl.SparseTuning(bottleneck=4))
    model = Classifier(backbone, Head("linear", 24, classes))
    with torch.no_grad():
        for p in attached(model.backbone).parameters():
            p.normal_(0, 0.1)
    return model.eval()


def base(**shape: object) -> nn.Module:
    torch.manual_seed(3)
    return _timm(**SMALL | shape)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    half = [0.5] * 3
    preprocessing = {"image_size": [32, 32], "mean": half, "std": half, "interpolation": "bicubic", "mode": "resize"}
    return petl.save(trained(), tmp_path / "a", labels=["ant", "bee", "cat", "dog"], preprocessing=preprocessing)


def edit(adapter: Path, **changes: object) -> None:
    config = json.loads((adapter / artefact.CONFIG).read_text())
    config.update(changes)
    (adapter / artefact.CONFIG).write_text(json.dumps(config))


# ---- field.md A.5


def test_other_weights_of_the_same_architecture_are_refused(adapter: Path) -> None:
    torch.manual_seed(4)
    with pytest.raises(petl.PetlError, match="right architecture with other weights"):
        petl.load(adapter, backbone=_timm(**SMALL))


def test_another_model_of_the_same_shape_is_refused(adapter: Path) -> None:
    """deit_tiny for vit_tiny: equal shapes, other numbers."""
    torch.manual_seed(5)
    with pytest.raises(petl.PetlError, match="other weights"):
        petl.load(adapter, backbone=_timm(**SMALL, qkv_bias=True))


@pytest.mark.parametrize("depth", [2, 6])
def test_a_cut_or_deeper_model_is_refused(adapter: Path, depth: int) -> None:
    with pytest.raises(petl.PetlError, match="another architecture"):
        petl.load(adapter, backbone=base(depth=depth))


def test_the_head_travels(adapter: Path, images: torch.Tensor) -> None:
    loaded = petl.load(adapter, backbone=base())
    assert torch.equal(loaded.model(images), trained()(images))
    assert loaded.labels == ["ant", "bee", "cat", "dog"]


def test_own_timm_head_travels_too(tmp_path: Path, images: torch.Tensor) -> None:
    model = petl.attach(build("timm_vit"), petl.SparseTuning(bottleneck=4))
    with torch.no_grad():
        model.head.weight.mul_(3)
    petl.save(model, tmp_path / "own", labels=list("abcde"))
    assert torch.equal(petl.load(tmp_path / "own", backbone=build("timm_vit")).model(images), model(images))


def test_another_width_is_one_clear_error(adapter: Path) -> None:
    with pytest.raises(petl.PetlError, match="another architecture") as error:
        petl.load(adapter, backbone=base(embed_dim=48))
    assert str(error.value).count("\n") == 0


def test_a_misspelt_option_is_refused(adapter: Path) -> None:
    edit(adapter, method={"name": "sparse_tuning", "options": {"bottleneck": 4, "keep_rat": 0.7}})
    with pytest.raises(petl.PetlError, match="did you mean 'keep_rate'"):
        petl.load(adapter, backbone=base())


def test_an_unknown_method_names_the_nearest(adapter: Path) -> None:
    edit(adapter, method={"name": "sparse_tunning", "options": {}})
    with pytest.raises(petl.PetlError, match="sparse_tuning"):
        petl.load(adapter, backbone=base())


def test_the_base_is_named_and_found_again(tmp_path: Path, images: torch.Tensor) -> None:
    args = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
    torch.manual_seed(0)
    network = petl.load_backbone("timm/vit_tiny_patch16_224", args, pretrained=False)
    save_file(network.state_dict(), tmp_path / "w.safetensors")
    model = Classifier(petl.attach(network, petl.SparseTuning(bottleneck=4)), Head("linear", 24, 3))
    petl.save(model, tmp_path / "a", "timm/vit_tiny_patch16_224", backbone_args=args, weights_file="w.safetensors")
    with pytest.raises(petl.PetlError, match=r"local file 'w\.safetensors'"):
        petl.load(tmp_path / "a")
    loaded = petl.load(tmp_path / "a", weights=tmp_path / "w.safetensors")
    assert torch.equal(loaded.model(images), model.eval()(images))
    config = json.loads((tmp_path / "a" / artefact.CONFIG).read_text())
    assert config["backbone"]["name"] == "timm/vit_tiny_patch16_224"


def test_no_name_and_no_model_is_an_error(adapter: Path) -> None:
    with pytest.raises(petl.PetlError, match="without a backbone name"):
        petl.load(adapter)


# ---- integrity


def test_flipped_bit_cut_file_and_missing_file(adapter: Path) -> None:
    file = adapter / artefact.TENSORS
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    with pytest.raises(petl.PetlError, match="damaged or was changed"):
        petl.load(adapter, backbone=base())
    file.write_bytes(data[:100])
    with pytest.raises(petl.PetlError, match="damaged or was changed"):
        petl.load(adapter, backbone=base())
    file.unlink()
    with pytest.raises(petl.PetlError, match="incomplete"):
        petl.load(adapter, backbone=base())


@pytest.mark.parametrize("change", ["missing", "extra", "shape"])
def test_tensors_must_fit_both_ways_even_with_a_forged_digest(adapter: Path, change: str) -> None:
    import hashlib

    tensors = load_file(adapter / artefact.TENSORS)
    name = "backbone.petl.blocks.1.down.weight"
    if change == "missing":
        del tensors[name]
    elif change == "extra":
        tensors["backbone.blocks.0.attn.qkv.weight"] = torch.zeros(72, 24)
    else:
        tensors[name] = torch.zeros(5, 24)
    save_file(tensors, adapter / artefact.TENSORS)
    digest = hashlib.sha256((adapter / artefact.TENSORS).read_bytes()).hexdigest()
    edit(adapter, tensors={"sha256": digest, "count": 1, "parameters": 1, "bytes": 1})
    network = base()
    with pytest.raises(petl.PetlError, match="Nothing was loaded"):
        petl.load(adapter, backbone=network)
    assert not hasattr(network, "petl")


def test_newer_schema_foreign_directory_and_broken_json(adapter: Path, tmp_path: Path) -> None:
    edit(adapter, schema=artefact.SCHEMA + 1)
    with pytest.raises(petl.PetlError, match="Update petl"):
        petl.load(adapter, backbone=base())
    (adapter / artefact.CONFIG).write_text('{"peft_type": "LORA"}')
    with pytest.raises(petl.PetlError, match="its config has no target_modules"):
        petl.load(adapter, backbone=base())
    (adapter / artefact.CONFIG).write_text('{"other": 1}')
    with pytest.raises(petl.PetlError, match="not written by petl"):
        petl.load(adapter, backbone=base())
    (adapter / artefact.CONFIG).write_text('{"schema": 1')
    with pytest.raises(petl.PetlError, match="cannot be read as JSON"):
        petl.load(adapter, backbone=base())
    (tmp_path / "empty").mkdir()
    with pytest.raises(petl.PetlError, match="is not an adapter"):
        petl.load(tmp_path / "empty", backbone=base())
    with pytest.raises(petl.PetlError, match="neither a directory nor a hub id"):
        petl.load(tmp_path / "nowhere", backbone=base())


def test_no_config_value_reaches_an_import(adapter: Path, tmp_path: Path) -> None:
    """Hostile values in every place that names something: refused, nothing imported, nothing executed."""
    record = json.loads((adapter / artefact.CONFIG).read_text())["backbone"]
    for changes in (
        {"method": {"name": "os.system", "options": {"command": f"touch {tmp_path}/pwned"}}},
        {"backbone": {**record, "name": f"timm/../../{tmp_path}"}},
        {"backbone": {**record, "name": "timm/vit_tiny_patch16_224", "args": {"checkpoint_path": str(tmp_path)}}},
        {"backbone": {**record, "name": "exec/whatever"}},
        {"head": {"kind": "__import__('os')", "in_features": 24, "num_classes": 4}},
        {"head": {"kind": "linear", "in_features": 10**12, "num_classes": 4}},
        {"labels": "abcd"},
    ):
        original = (adapter / artefact.CONFIG).read_text()
        edit(adapter, **changes)
        with pytest.raises(petl.PetlError):
            petl.load(adapter, backbone=None if "backbone" in changes else base())
        (adapter / artefact.CONFIG).write_text(original)
    assert not (tmp_path / "pwned").exists()


# ---- saving


def test_a_full_disk_leaves_the_old_adapter(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {p.name: p.read_bytes() for p in adapter.iterdir()}
    calls = []

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(petl.PetlError, match="No space left"):
        petl.save(trained(petl.SparseTuning(bottleneck=2)), adapter)
    assert {p.name: p.read_bytes() for p in adapter.iterdir()} == before
    assert [p.name for p in adapter.parent.iterdir()] == [adapter.name]


KILLED = """
import os, sys, signal
import petl.adapters.artefact as artefact
from pathlib import Path
real, calls = getattr(os, sys.argv[2]), [0]
def dying(*args, **kwargs):
    calls[0] += 1
    if calls[0] == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args, **kwargs)
setattr(os, sys.argv[2], dying)
target = Path(sys.argv[1])
artefact.write_directory(target, {name: b"new" for name in (artefact.CONFIG, artefact.TENSORS, artefact.CARD)})
"""


@pytest.mark.parametrize(("function", "call"), [("fsync", 1), ("fsync", 2), ("fsync", 3), ("rename", 1), ("rename", 2)])
def test_killed_while_saving_the_old_adapter_is_whole(adapter: Path, function: str, call: int) -> None:
    """SIGKILL at every step of the replacement: a reader finds the old adapter, whole."""
    before = {p.name: p.read_bytes() for p in adapter.iterdir()}
    done = subprocess.run([sys.executable, "-c", KILLED, str(adapter), function, str(call)], timeout=60)
    assert done.returncode == -9
    petl.load(adapter, backbone=base())
    assert {p.name: p.read_bytes() for p in adapter.iterdir()} == before


def test_saving_does_not_overwrite_what_is_not_an_adapter(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("x")
    with pytest.raises(petl.PetlError, match="not an adapter"):
        petl.save(trained(), tmp_path / "thesis")
    assert (tmp_path / "thesis" / "chapter1.tex").read_text() == "x"
    with pytest.raises(petl.PetlError, match="3 labels for a head of 4"):
        petl.save(trained(), tmp_path / "b", labels=["a", "b", "c"])
    with pytest.raises(petl.PetlError, match="no method is attached"):
        petl.save(base(), tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_same_model_same_bytes(tmp_path: Path) -> None:
    one, two = petl.save(trained(), tmp_path / "one"), petl.save(trained(), tmp_path / "two")
    for name in (artefact.CONFIG, artefact.TENSORS, artefact.CARD):
        assert (one / name).read_bytes() == (two / name).read_bytes()


# ---- use


def test_classify_one_and_many(adapter: Path, tmp_path: Path) -> None:
    from PIL import Image

    predictor = petl.load(adapter, backbone=base())
    paths = []
    for i, mode in enumerate(("RGB", "L", "RGBA", "P")):
        paths.append(tmp_path / f"{i}.png")
        Image.new("RGB", (40, 50), (60 * i, 40, 90)).convert(mode).save(paths[-1])
    many = predictor.classify(paths)
    assert [p.label in predictor.labels for p in many] == [True] * 4
    one = predictor.classify(paths[0])
    assert one.label == many[0].label
    assert one.probability == pytest.approx(many[0].probability, abs=1e-5)
    assert sum(one.probabilities.values()) == pytest.approx(1, abs=1e-5)
    assert one.top(2)[0] == (one.label, pytest.approx(one.probability))
    (tmp_path / "not.png").write_text("hello")
    with pytest.raises(petl.PetlError, match=r"not\.png is cut short or not an image"):
        predictor.classify(tmp_path / "not.png")
    with pytest.raises(petl.PetlError, match="no exact merge"):
        predictor.merge()


def test_model_card_says_what_it_is(adapter: Path) -> None:
    card = (adapter / "README.md").read_text()
    assert "sparse_tuning" in card
    assert "ant, bee, cat, dog" in card
    assert f"{json.loads((adapter / artefact.CONFIG).read_text())['tensors']['parameters']:,} trained" in card
