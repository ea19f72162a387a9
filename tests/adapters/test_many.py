"""Several adapters on one backbone: switched, merged, refused."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from PIL import Image

import petl
from petl.adapters.load_set import short_names
from petl.backbones.classifier import Classifier
from petl.methods import get_method, list_methods
from petl.methods.base import Method
from petl.nn.head import Head
from tests.adapters.several import MIXTURE, PREPROCESSING, WIDTH, adapter, alone, base, close
from tests.conftest import _timm, outputs
from tests.test_contract import variants

# ---- switching


def test_method_head_labels_and_preprocessing_switch_together(
    tmp_path: Path, mixture: dict[str, Path], x: torch.Tensor, pictures: list[Image.Image]
) -> None:
    grey = PREPROCESSING | {"mean": [0.1] * 3, "std": [0.9] * 3}
    other = adapter(tmp_path / "grey", petl.SparseTuning(bottleneck=4), 7, preprocessing=grey)
    adapters = petl.load([*mixture.values(), other], backbone=base())
    assert isinstance(adapters, petl.AdapterSet)
    assert adapters.names == [*MIXTURE, "grey"]
    assert adapters.active == "probe"
    for name, directory in [*mixture.items(), ("grey", other), *reversed(mixture.items())]:
        single = petl.load(directory, backbone=base())
        assert adapters.use(name).active == name
        assert torch.equal(adapters.logits(x), alone(directory, x))
        assert adapters.labels == single.labels
        assert torch.equal(adapters.preprocess(pictures[0]), single.preprocess(pictures[0]))
        assert adapters.classify(pictures) == single.classify(pictures)
        assert adapters.classify(pictures[0]).label.startswith(f"{name}-")


def test_a_predictor_keeps_its_adapter_whichever_is_active(
    mixture: dict[str, Path], x: torch.Tensor, pictures: list[Image.Image]
) -> None:
    adapters = petl.load(mixture, backbone=base())
    bits, sparse = adapters.predictor("bits"), adapters.predictor("sparse")
    adapters.use("ladder")
    assert bits.classify(pictures) == petl.load(mixture["bits"], backbone=base()).classify(pictures)
    assert torch.equal(sparse.model(x), alone(mixture["sparse"], x))
    assert adapters.active == "ladder"
    assert torch.equal(adapters.logits(x), alone(mixture["ladder"], x))
    assert bits.labels == [f"bits-{i}" for i in range(4)]


def test_names(tmp_path: Path) -> None:
    assert short_names(["runs/pets/adapter", "runs/cars/adapter", "birds"]) == ["pets", "cars", "birds"]
    assert short_names(["runs/pets/seed0/adapter", "runs/cars/seed0/adapter"]) == ["pets/seed0", "cars/seed0"]
    assert short_names(["user/pets", "other/pets"]) == ["user/pets", "other/pets"]
    assert short_names(["runs/pets/adapter"] * 3) == ["pets", "pets-2", "pets-3"]
    assert short_names(["adapter"]) == ["adapter"]
    directory = adapter(tmp_path / "pets" / "adapter", petl.LinearProbe())
    assert petl.load([directory, directory], backbone=base()).names == ["pets", "pets-2"]
    assert petl.load({"cats": directory}, backbone=base()).names == ["cats"]


def test_an_unknown_name_gives_the_nearest(mixture: dict[str, Path], x: torch.Tensor) -> None:
    adapters = petl.load(mixture, backbone=base())
    for call in (adapters.use, adapters.predictor, adapters.merge, lambda n: adapters.logits(x[:1], [n])):
        with pytest.raises(petl.PetlError, match="no adapter 'lader' is loaded: did you mean 'ladder'"):
            call("lader")
    assert adapters.active == "probe"


def test_threads_may_share_a_set(mixture: dict[str, Path], x: torch.Tensor) -> None:
    adapters = petl.load(mixture, backbone=base())
    expected = {name: alone(d, x) for name, d in mixture.items()}
    wrong: list[str] = []

    def work(name: str) -> None:
        for _ in range(3):
            if not torch.equal(adapters.logits(x, name), expected[name]):
                wrong.append(name)
            if not all(map(close, adapters.all_logits(x).values(), expected.values())):
                wrong.append("all")

    threads = [threading.Thread(target=work, args=(name,)) for name in mixture]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# ---- every method


EVERY = [
    pytest.param(method, family, id=f"{name}{i or ''}-{family}")
    for name in list_methods()
    for i, method in enumerate(variants(name))
    for family in ("timm_clip", "hf_vit")
    if name != "full_fine_tuning" and ("timm_vit" if family == "timm_clip" else family) in method.backbones
]


@pytest.mark.parametrize(("method", "family"), EVERY)
def test_every_method_in_a_set(tmp_path: Path, method: Method, family: str, x: torch.Tensor) -> None:
    """Switched to, mixed with another method in a batch, merged where it can be; the backbone comes back."""
    directories = {
        "one": adapter(tmp_path / "one", method, 4, family),
        "two": adapter(tmp_path / "two", method, 5, family),
        "ladder": adapter(tmp_path / "ladder", petl.LadderSideTuning(reduction=4), 3, family),
    }
    expected = {name: alone(d, x, family) for name, d in directories.items()}
    backbone = base(family)
    before = {k: v.clone() for k, v in backbone.state_dict().items()}
    parts = [type(m) for m in backbone.modules()]
    flags = [p.requires_grad for p in backbone.parameters()]
    adapters = petl.load(directories, backbone=backbone)
    for name in ("one", "two", "ladder", "one"):
        assert torch.equal(adapters.use(name).logits(x), expected[name])
    rows = ["two", "ladder", "one", "one", "ladder", "two"]
    for i, row in enumerate(adapters.logits(x, rows)):
        assert close(row, expected[rows[i]][i])
    assert all(close(found, expected[name]) for name, found in adapters.all_logits(x).items())
    assert torch.equal(adapters.logits(x), expected["one"])
    if method.mergeable:
        merged = adapters.merge("two")
        with torch.inference_mode():
            assert (merged(x) - expected["two"]).abs().max() < 1e-4
        with pytest.raises(petl.PetlError, match="'two' is merged into the backbone"):
            adapters.logits(x, "one")
        adapters.unmerge()
        assert torch.equal(adapters.logits(x), expected["two"])
        assert torch.equal(adapters.logits(x, "one"), expected["one"])
    else:
        with pytest.raises(petl.PetlError, match="no exact merge"):
            adapters.merge("two")
        assert torch.equal(adapters.logits(x, "two"), expected["two"])
    assert adapters.release() is backbone
    after = backbone.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[k], before[k]) for k in before)
    assert [type(m) for m in backbone.modules()] == parts
    assert [p.requires_grad for p in backbone.parameters()] == flags
    assert not any("forward" in m.__dict__ or m._forward_hooks or m._forward_pre_hooks for m in backbone.modules())


# ---- merging


def test_what_a_merge_refuses(mixture: dict[str, Path], x: torch.Tensor, pictures: list[Image.Image]) -> None:
    adapters = petl.load(mixture, backbone=base())
    with pytest.raises(petl.PetlError, match="no adapter is merged"):
        adapters.unmerge()
    merged = adapters.merge("bits")
    assert adapters.merge("bits") is merged
    assert adapters.active == "bits"
    assert close(adapters.logits(x), alone(mixture["bits"], x))
    assert adapters.classify(pictures)[0].label.startswith("bits-")
    for call in (
        lambda: adapters.use("probe"),
        lambda: adapters.merge("probe"),
        lambda: adapters.all_logits(x),
        lambda: adapters.logits(x[:2], ["bits", "ladder"]),
        lambda: adapters.classify(pictures[:2], ["bits", "ladder"]),
        lambda: adapters.predictor("ladder").classify(pictures[0]),
    ):
        with pytest.raises(petl.PetlError, match=r"'bits' is merged into the backbone.*unmerge\(\) first"):
            call()
    adapters.unmerge()
    assert torch.equal(adapters.use("probe").logits(x), alone(mixture["probe"], x))
    assert adapters.predictor("bits").merge() is not None
    assert close(adapters.logits(x), alone(mixture["bits"], x))


# ---- refused


def test_adapters_of_different_backbones_are_refused_before_any_is_loaded(
    tmp_path: Path, mixture: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(11)
    other = Classifier(petl.attach(_timm(pre_norm=True), petl.LinearProbe()), Head("linear", WIDTH, 3))
    deeper = Classifier(petl.attach(_timm(depth=6), petl.LinearProbe()), Head("linear", WIDTH, 3))
    petl.save(other, tmp_path / "other")
    petl.save(deeper, tmp_path / "deeper")
    monkeypatch.setattr("petl.adapters.load_set.read_tensors", lambda *_: pytest.fail("tensors were read"))
    others = {"cars": tmp_path / "other", "deep": tmp_path / "deeper"}
    sources = {"pets": mixture["probe"], "same": mixture["ladder"]} | others
    with pytest.raises(petl.PetlError) as error:
        petl.load(sources)
    message = str(error.value)
    assert "Compared with that of 'pets'" in message
    assert "'cars' on the right architecture with other weights" in message
    assert "'deep' on another architecture" in message
    assert "same" not in message
    assert "\n" not in message


def test_another_backbone_than_that_of_the_set_is_refused_and_left_alone(mixture: dict[str, Path]) -> None:
    torch.manual_seed(4)
    other = _timm(pre_norm=True)
    with pytest.raises(petl.PetlError, match="right architecture with other weights"):
        petl.load(mixture, backbone=other)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in other.modules())


def test_a_damaged_adapter_leaves_the_backbone_alone(mixture: dict[str, Path], tmp_path: Path, x: torch.Tensor) -> None:
    wrong = adapter(tmp_path / "wrong", petl.BitFit())
    text = (wrong / "adapter_config.json").read_text()
    (wrong / "adapter_config.json").write_text(text.replace('"num_classes": 4', '"num_classes": 9'))
    backbone = base()
    with pytest.raises(petl.PetlError, match="do not fit the model"):
        petl.load([mixture["ladder"], wrong], backbone=backbone)
    assert not any("forward" in m.__dict__ or m._forward_hooks or m._forward_pre_hooks for m in backbone.modules())
    assert not hasattr(backbone, "petl")
    assert torch.equal(outputs(petl.attach(backbone, petl.LinearProbe()), x), outputs(base(), x))


def test_full_fine_tuning_carries_its_own_backbone(tmp_path: Path, mixture: dict[str, Path]) -> None:
    full = adapter(tmp_path / "full", petl.FullFineTuning())
    with pytest.raises(petl.PetlError, match=r"'full' .* was fully fine-tuned: it carries a backbone of its own"):
        petl.load([mixture["probe"], full], backbone=base())


def test_other_tasks_are_refused(tmp_path: Path, mixture: dict[str, Path]) -> None:
    text = (mixture["probe"] / "adapter_config.json").read_text()
    other = adapter(tmp_path / "finds", petl.LinearProbe())
    (other / "adapter_config.json").write_text(text.replace('"task": "classification"', '"task": "grounding"'))
    with pytest.raises(petl.PetlError, match=r"'finds' .* trained for 'grounding', and a set holds image classifiers"):
        petl.load([mixture["probe"], other], backbone=base())


def test_other_bad_input(mixture: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(petl.PetlError, match="no adapter to load"):
        petl.load([])
    with pytest.raises(petl.PetlError, match="is not an adapter"):
        petl.load([mixture["probe"], tmp_path])
    with pytest.raises(petl.PetlError, match="without a backbone name"):
        petl.load(mixture)
    with pytest.raises(petl.PetlError, match="one model, not a pair"):
        petl.load(mixture, backbone=(base(), base()))  # type: ignore[call-overload]
    with pytest.raises(petl.PetlError, match="attached to this model already"):
        petl.load(mixture, backbone=petl.attach(base(), petl.EViT()))


def test_the_registry_method_of_a_probe_and_a_ladder_alone_stand_beside_the_network() -> None:
    beside = {"linear_probe", "ladder_side_tuning"}
    for name in list_methods():
        method = get_method(name)
        if "timm_vit" in method.backbones and name != "full_fine_tuning":
            module = variants(name)[0].build(petl.backbones.view(base()))
            assert module.beside == (name in beside), name
