"""Adapters that peft reads, adapters that peft wrote: equal logits both ways, one error for whatever does not fit."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

import petl
from petl.adapters.artefact import read_config, read_tensors
from petl.backbones.classifier import Classifier
from petl.methods.attach import attached
from petl.nn.head import Head
from tests.conftest import FAMILIES, _timm, build, outputs
from tests.test_contract import variants

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
NAMES = ("lora", "dora", "adalora", "ia3", "vera", "oft", "loha", "lokr", "fourierft", "peft")


def moved(model: nn.Module) -> nn.Module:
    """Every trained tensor at another place."""
    torch.manual_seed(11)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    return model.eval()


def read_by_peft(directory: Path, model: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it does not know petl's record
        return PeftModel.from_pretrained(model, directory).eval()


def written_by_peft(directory: Path, config: Any, family: str = "timm_vit", pruned: bool = False) -> PeftModel:
    """A peft adapter of a small network, with random values in what it trains."""
    model = moved(get_peft_model(build(family), config))
    model.save_pretrained(directory)
    return model


def edit(directory: Path, name: str = CONFIG, **changes: Any) -> None:
    config = json.loads((directory / name).read_text())
    (directory / name).write_text(json.dumps(config | changes))


# ---- petl writes, peft reads


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "method", [pytest.param(m, id=f"{n}{i or ''}") for n in NAMES for i, m in enumerate(variants(n))]
)
def test_peft_reads_every_method_with_the_networks_own_head(method, family: str, images, tmp_path: Path) -> None:
    model = moved(petl.attach(build(family), method))
    petl.save(model, tmp_path / "adapter")
    plain = read_by_peft(tmp_path / "adapter", build(family))
    torch.testing.assert_close(outputs(plain, images), outputs(model, images), atol=2e-6, rtol=0)
    assert not torch.allclose(outputs(model, images), outputs(build(family), images), atol=1e-3)
    again = petl.load(tmp_path / "adapter", backbone=build(family))
    assert torch.equal(outputs(again.model, images), outputs(model, images))


@pytest.mark.parametrize("family", ["timm_vit", "hf_vit"])
@pytest.mark.parametrize("name", ["lora", "dora", "vera"])
def test_a_linear_head_of_petl_is_the_head_of_the_plain_network(family: str, name: str, images, tmp_path: Path) -> None:
    method = variants(name)[0]
    model = moved(Classifier(petl.attach(build(family), method), Head("linear", 24, 5)))
    petl.save(model, tmp_path / "adapter", labels=list("abcde"))
    plain = read_by_peft(tmp_path / "adapter", build(family))
    torch.testing.assert_close(outputs(plain, images), model(images), atol=2e-6, rtol=0)
    loaded = petl.load(tmp_path / "adapter", backbone=build(family))
    assert loaded.labels == list("abcde")
    assert torch.equal(loaded.model(images), model(images))
    assert json.loads((tmp_path / "adapter" / CONFIG).read_text())["modules_to_save"] == [
        "head" if family == "timm_vit" else "classifier"
    ]


def test_another_head_leaves_the_features(images, tmp_path: Path) -> None:
    model = Classifier(petl.attach(_timm(num_classes=0), petl.LoRA()), Head("bn_linear", 24, 7))
    before = {k: v.clone() for k, v in model.backbone.state_dict().items() if "lora" not in k}
    moved(model)
    petl.save(model, tmp_path / "adapter")
    other = _timm(num_classes=0).eval()
    other.load_state_dict(before)
    plain = read_by_peft(tmp_path / "adapter", other)
    torch.testing.assert_close(plain(images), model.backbone(images), atol=2e-6, rtol=0)
    assert json.loads((tmp_path / "adapter" / CONFIG).read_text())["modules_to_save"] is None


def test_q_and_v_of_a_fused_layer_become_one_pair_of_twice_the_rank(images, tmp_path: Path) -> None:
    method = petl.LoRA(r=2, alpha=6, parts=("q", "v", "fc1"), dropout=0.1)
    model = moved(petl.attach(build("timm_vit"), method))
    petl.save(model, tmp_path)
    config = LoraConfig.from_pretrained(tmp_path)
    assert (config.r, config.lora_alpha, config.lora_dropout) == (2, 6, 0.1)
    assert config.target_modules == {f"blocks.{i}.{m}" for i in range(4) for m in ("attn.qkv", "mlp.fc1")}
    found, layer = load_file(tmp_path / TENSORS), model.blocks[1].attn.qkv
    a, b = (found[f"base_model.model.blocks.1.attn.qkv.lora_{x}.weight"] for x in "AB")
    assert (a.shape, b.shape) == ((4, 24), (72, 4))
    assert torch.equal(a, torch.cat([layer.q.lora_A["default"].weight, layer.v.lora_A["default"].weight]))
    assert torch.equal(b[:24, :2], layer.q.lora_B["default"].weight)
    assert torch.equal(b[48:, 2:], layer.v.lora_B["default"].weight)
    assert b.count_nonzero() == 2 * 24 * 2
    plain = read_by_peft(tmp_path, build("timm_vit"))
    inner = plain.base_model.model.blocks[1]
    assert inner.attn.qkv.scaling["default"] == inner.mlp.fc1.scaling["default"] == 3
    torch.testing.assert_close(outputs(plain, images), outputs(model, images), atol=2e-6, rtol=0)
    again = petl.load(tmp_path, backbone=build("timm_vit")).model
    assert attached(again).method == method
    assert torch.equal(again.blocks[1].attn.qkv.v.lora_B["default"].weight, layer.v.lora_B["default"].weight)


def test_the_record_of_petl_is_strict_as_ever(images, tmp_path: Path) -> None:
    model = moved(petl.attach(build("timm_vit"), petl.VeRA(r=4)))
    petl.save(model, tmp_path / "a")
    config = read_config(tmp_path / "a")
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert config["tensors"]["parameters"] == trained, "VeRA's random matrices are saved, not counted"
    assert f"{trained:,} trained parameters" in (tmp_path / "a" / "README.md").read_text()
    assert read_tensors(tmp_path / "a", config).keys() == config["tensors"]["names"].keys()
    other = build("timm_vit")
    with torch.no_grad():
        other.blocks[3].mlp.fc2.weight[0, 0] += 1e-3
    with pytest.raises(petl.PetlError, match="other weights"):
        petl.load(tmp_path / "a", backbone=other)
    with pytest.raises(petl.PetlError, match="another architecture"):
        petl.load(tmp_path / "a", backbone=_timm(depth=3))
    edit(tmp_path / "a", petl=config | {"extra": 1})
    with pytest.raises(petl.PetlError, match=r"unknown \['extra'\]"):
        petl.load(tmp_path / "a", backbone=build("timm_vit"))


@pytest.mark.parametrize("change", ["entry", "shape", "missing", "nonsense"])
def test_a_changed_file_is_refused(change: str, tmp_path: Path) -> None:
    import hashlib

    model = moved(petl.attach(build("timm_vit"), petl.LoRA()))
    petl.save(model, tmp_path)
    record = read_config(tmp_path)
    tensors = load_file(tmp_path / TENSORS)
    name = "base_model.model.blocks.1.attn.qkv.lora_B.weight"
    if change == "entry":
        tensors[name][30, 0] = 1.0  # k, which petl does not adapt
    elif change == "shape":
        tensors[name] = tensors[name][:70].clone()
    elif change == "missing":
        del tensors[name]
    else:
        record["tensors"]["names"]["backbone.head.weight"] = [1, 2, 3, 4, 5]
    save_file(tensors, tmp_path / TENSORS)
    record["tensors"]["sha256"] = hashlib.sha256((tmp_path / TENSORS).read_bytes()).hexdigest()
    edit(tmp_path, petl=record)
    with pytest.raises(petl.PetlError, match="a file was changed"):
        petl.load(tmp_path, backbone=build("timm_vit"))


# ---- peft writes, petl reads

PLAIN = {
    "lora": LoraConfig(r=4, lora_alpha=12, target_modules=["qkv", "fc1"], modules_to_save=["head"]),
    "regex": LoraConfig(target_modules=r".*blocks\.[13]\.mlp\.fc\d", modules_to_save=["head"]),
    "rslora": LoraConfig(use_rslora=True, target_modules=["proj"], modules_to_save=["head"]),
    "some blocks": LoraConfig(
        target_modules=["qkv"], layers_to_transform=[1, 2], layers_pattern="blocks", modules_to_save=["head"]
    ),
    "ranks": LoraConfig(target_modules=["qkv", "fc2"], rank_pattern={"fc2": 3}, modules_to_save=["head"]),
    "dora": LoraConfig(use_dora=True, target_modules=["qkv"], modules_to_save=["head"]),
    "all": LoraConfig(target_modules="all-linear", exclude_modules=["head"], modules_to_save=["head"]),
    "ia3": peft.IA3Config(target_modules=["qkv", "fc2"], feedforward_modules=["fc2"], modules_to_save=["head"]),
    "vera": peft.VeraConfig(r=8, target_modules=["qkv", "fc1"], modules_to_save=["head"]),
    "vera without matrices": peft.VeraConfig(r=8, save_projection=False, target_modules=["qkv"]),
    "oft": peft.OFTConfig(oft_block_size=8, target_modules=["qkv"], modules_to_save=["head"]),
    "loha": peft.LoHaConfig(r=2, target_modules=["qkv"], modules_to_save=["head"]),
    "lokr": peft.LoKrConfig(r=2, target_modules=["qkv"], modules_to_save=["head"]),
    "hra": peft.HRAConfig(r=4, target_modules=["qkv"], modules_to_save=["head"]),
}  # fmt: skip


@pytest.mark.parametrize("name", PLAIN)
def test_what_peft_wrote_gives_equal_logits(name: str, images, tmp_path: Path) -> None:
    theirs = written_by_peft(tmp_path / "plain", PLAIN[name])
    loaded = petl.load(tmp_path / "plain", backbone=build("timm_vit"))
    assert torch.equal(outputs(loaded.model, images), outputs(theirs, images))
    assert loaded.config["task"] == "classification"
    petl.save(loaded.model, tmp_path / "ours")  # from here on the adapter knows its base
    again = petl.load(tmp_path / "ours", backbone=build("timm_vit"))
    assert torch.equal(outputs(again.model, images), outputs(theirs, images))
    loaded.merge()
    torch.testing.assert_close(outputs(loaded.model, images), outputs(theirs, images), atol=1e-5, rtol=0)


def test_hugging_face_networks_too(images, tmp_path: Path) -> None:
    config = LoraConfig(target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"])
    theirs = written_by_peft(tmp_path, config, "hf_vit")
    loaded = petl.load(tmp_path, backbone=build("hf_vit"))
    assert torch.equal(outputs(loaded.model, images), outputs(theirs, images))


def test_pruned_ranks_of_adalora_come_back_as_zeros(images, tmp_path: Path) -> None:
    config = peft.AdaLoraConfig(
        init_r=4, target_r=2, total_step=4, tfinal=1, target_modules=["qkv"], modules_to_save=["head"]
    )
    theirs = get_peft_model(build("timm_vit"), config)
    optimizer = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], lr=1e-2)
    for step in range(4):
        optimizer.zero_grad()
        outputs(theirs, images).pow(2).sum().backward()
        optimizer.step()
        theirs.base_model.update_and_allocate(step)
    theirs.eval()
    theirs.save_pretrained(tmp_path)
    shapes = {t.shape[0] for n, t in load_file(tmp_path / TENSORS).items() if "lora_A" in n}
    assert shapes != {4}, "peft cuts pruned ranks off"
    loaded = petl.load(tmp_path, backbone=build("timm_vit"))
    assert attached(loaded.model).method == petl.AdaLoRA(
        r=4, target_r=2, targets=tuple(f"blocks.{i}.attn.qkv" for i in range(4))
    )
    assert torch.equal(outputs(loaded.model, images), outputs(theirs, images))


def test_an_adapter_without_a_head_keeps_that_of_the_network_and_says_so(images, tmp_path: Path) -> None:
    theirs = written_by_peft(tmp_path, LoraConfig(target_modules=["qkv"]))
    with pytest.warns(UserWarning, match="brings no head"):
        loaded = petl.load(tmp_path, backbone=build("timm_vit"))
    assert torch.equal(outputs(loaded.model, images), outputs(theirs, images))


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    written_by_peft(tmp_path, PLAIN["lora"])
    return tmp_path


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"depth": 2}, "0 tensors missing .* 8 without a place"),
        ({"depth": 6}, "8 tensors missing .* 0 without a place"),
        ({"embed_dim": 48}, "of another shape"),
        ({"num_classes": 7}, "2 of another shape"),
        ({"num_classes": 0}, r"2 without a place \['base_model.model.head.bias', 'base_model.model.head.weight'\]"),
    ],
)
def test_another_network_is_refused_and_left_alone(plain: Path, shape: dict, message: str, images) -> None:
    other = _timm(**shape).eval()
    before, names = outputs(other, images), list(other.state_dict())
    with pytest.raises(petl.PetlError, match=message):
        petl.load(plain, backbone=other)
    assert list(other.state_dict()) == names
    assert torch.equal(outputs(other, images), before)


def test_plain_adapters_need_the_network(plain: Path) -> None:
    with pytest.raises(petl.PetlError, match="does not record the weights"):
        petl.load(plain)
    with pytest.raises(petl.PetlError, match="written by peft alone"):
        read_config(plain)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "PROMPT_TUNING"}, "prompts of language models"),
        ({"peft_type": "LOAR"}, "no method of peft; did you mean 'LORA'"),
        ({"from_the_future": 3}, r"does not know the options \['from_the_future'\]"),
        ({"bias": "all"}, "has bias='all', which petl cannot take"),
        ({"target_modules": ["qvk"]}, "name no layer of this network: did you mean 'qkv'"),
        ({"lora_alpha": 3, "r": -1}, "peft cannot put LORA"),
    ],
)
def test_configs_that_do_not_fit_are_refused(plain: Path, changes: dict, message: str, images) -> None:
    edit(plain, **changes)
    model = build("timm_vit")
    with pytest.raises(petl.PetlError, match=message):
        petl.load(plain, backbone=model)
    assert torch.equal(outputs(model, images), outputs(build("timm_vit"), images))


def test_pickled_tensors_are_not_read(plain: Path) -> None:
    model = get_peft_model(build("timm_vit"), LoraConfig(target_modules=["qkv"]))
    (plain / TENSORS).unlink()
    torch.save({k: v for k, v in model.state_dict().items() if "lora" in k}, plain / "adapter_model.bin")
    with pytest.raises(petl.PetlError, match=r"adapter_model.bin, a pickle.*Convert it"):
        petl.load(plain, backbone=build("timm_vit"))
    (plain / "adapter_model.bin").unlink()
    with pytest.raises(petl.PetlError, match="is missing"):
        petl.load(plain, backbone=build("timm_vit"))


def test_a_cut_file_is_refused(plain: Path) -> None:
    data = (plain / TENSORS).read_bytes()
    (plain / TENSORS).write_bytes(data[: len(data) // 2])
    with pytest.raises(petl.PetlError, match="not a valid safetensors file"):
        petl.load(plain, backbone=build("timm_vit"))


def test_modules_that_are_no_head_have_no_place(tmp_path: Path) -> None:
    written_by_peft(tmp_path, LoraConfig(target_modules=["qkv"], modules_to_save=["norm", "head"]))
    with pytest.raises(petl.PetlError, match=r"2 without a place \['base_model.model.norm.bias'"):
        petl.load(tmp_path, backbone=build("timm_vit"))


def test_saving_over_an_adapter_replaces_it(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    target = tmp_path_factory.mktemp("copy") / "adapter"
    shutil.copytree(plain, target)
    petl.save(moved(petl.attach(build("timm_vit"), petl.LoRA())), target)
    assert read_config(target)["method"]["name"] == "lora"
