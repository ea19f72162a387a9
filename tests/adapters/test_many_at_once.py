"""Several adapters at once: one pass for many, and a batch whose rows have different adapters."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

import petl
from petl.backbones.classifier import Classifier
from petl.nn.head import Head
from tests.adapters.several import MIXTURE, PREPROCESSING, WIDTH, adapter, alone, base, close
from tests.conftest import FAMILIES, _timm


def count_calls(model: nn.Module) -> Iterator[list[int]]:
    """The number of rows of each call of block 0 and of the last block."""
    seen: list[int] = []
    blocks = model.blocks
    handles = [b.register_forward_pre_hook(lambda _, args: seen.append(len(args[0]))) for b in (blocks[0], blocks[-1])]
    yield seen
    for handle in handles:
        handle.remove()


# ---- one pass for many


@pytest.mark.parametrize("family", FAMILIES)
def test_all_logits_of_every_family(tmp_path: Path, family: str, x: torch.Tensor) -> None:
    methods = [MIXTURE["ladder"][0], MIXTURE["gate"][0], petl.LinearProbe()]
    directories = [adapter(tmp_path / f"a{i}", method, 3 + i, family) for i, method in enumerate(methods)]
    found = petl.load(directories, backbone=base(family)).all_logits(x)
    expected = [alone(d, x, family) for d in directories]
    assert all(map(close, found.values(), expected))
    assert torch.equal(found["a2"], expected[2])


@pytest.mark.parametrize("pool", ["token", "avg", "map"])
def test_all_logits_with_every_pooling(tmp_path: Path, pool: str, x: torch.Tensor) -> None:
    torch.manual_seed(0)
    network = _timm(num_classes=0, global_pool=pool, class_token=pool != "map").eval()
    state = network.state_dict()

    def fresh() -> nn.Module:
        model = _timm(num_classes=0, global_pool=pool, class_token=pool != "map").eval()
        model.load_state_dict(state)
        return model

    model = Classifier(petl.attach(fresh(), petl.LadderSideTuning(reduction=4)), Head("linear", WIDTH, 3)).eval()
    nn.init.normal_(model.backbone.petl.up.weight)
    petl.save(model, tmp_path / "a")
    adapters = petl.load([tmp_path / "a"], backbone=fresh())
    with torch.inference_mode():
        assert close(adapters.all_logits(x)["a"], model(x))
        assert torch.equal(adapters.logits(x), model(x))


def test_one_pass_serves_all_that_stand_beside_the_network(mixture: dict[str, Path], x: torch.Tensor) -> None:
    adapters = petl.load(mixture, backbone=base())
    for seen in count_calls(adapters.backbone):
        adapters.all_logits(x, ["probe", "ladder", "gate"])
        assert seen == [6, 6]
        seen.clear()
        adapters.all_logits(x)  # two more passes: sparse and bits change the blocks
        assert seen == [6, 6] * 3
        seen.clear()
        found = adapters.logits(x, ["gate", "bits", "probe", "ladder", "gate", "bits"])
        assert seen == [4, 4, 2, 2]
        seen.clear()
        adapters.logits(x, "ladder")
        assert seen == [6, 6]
    expected = ["gate", "bits", "probe", "ladder", "gate", "bits"]
    assert all(close(row, alone(mixture[name], x)[i]) for i, (name, row) in enumerate(zip(expected, found)))


def test_no_block_output_is_kept_for_the_readers(mixture: dict[str, Path], x: torch.Tensor) -> None:
    """When the last block starts, of the earlier outputs only its own input is still there."""

    adapters = petl.load({n: mixture[n] for n in ("ladder", "gate", "probe")}, backbone=base())
    outs: list[weakref.ref[torch.Tensor]] = []
    alive: list[int] = []
    blocks = adapters.backbone.blocks
    handles = [b.register_forward_hook(lambda m, a, out: outs.append(weakref.ref(out))) for b in blocks[:-1]]

    def count(*_: object) -> None:
        gc.collect()
        alive.append(sum(r() is not None for r in outs))

    handles.append(blocks[-1].register_forward_pre_hook(count))
    adapters.all_logits(x)
    for handle in handles:
        handle.remove()
    assert alive == [1]


def test_a_bf16_backbone(tmp_path: Path, x: torch.Tensor) -> None:
    def half() -> nn.Module:
        return base().to(torch.bfloat16)

    for name, method in (("a", petl.LinearProbe()), ("b", petl.LadderSideTuning(reduction=4))):
        model = Classifier(petl.attach(half(), method), Head("linear", WIDTH, 3))
        nn.init.normal_(model.head.fc.weight)
        petl.save(model, tmp_path / name)
    adapters = petl.load([tmp_path / "a", tmp_path / "b"], backbone=half())
    inputs = x.to(torch.bfloat16)
    found = adapters.all_logits(inputs)
    for name in adapters.names:
        with torch.inference_mode():
            expected = petl.load(tmp_path / name, backbone=half()).model(inputs)
        assert torch.equal(found[name], expected)


def test_heads_of_the_network_itself_travel(tmp_path: Path, x: torch.Tensor) -> None:
    """Without a `petl.Classifier` the network's own head is trained; each adapter brings one of its size."""

    def network(classes: int) -> nn.Module:
        model = base("timm_dinov2")
        model.reset_classifier(classes)
        return model.eval()

    expected = {}
    for name, classes, method in (("a", 3, petl.LadderSideTuning(reduction=4)), ("b", 5, petl.BitFit())):
        model = petl.attach(network(classes), method)
        nn.init.normal_(model.head.weight)
        expected[name] = model(x).detach()
        petl.save(model, tmp_path / name)
    for own in (0, 3):
        adapters = petl.load([tmp_path / "a", tmp_path / "b"], backbone=network(own))
        head = adapters.backbone.head
        assert torch.equal(adapters.logits(x), expected["a"])
        assert torch.equal(adapters.use("b").logits(x), expected["b"])
        assert all(close(found, expected[name]) for name, found in adapters.all_logits(x).items())
        adapters.merge("b")
        assert adapters.logits(x).shape == (6, 5)
        assert adapters.release().head is not head
        assert getattr(adapters.backbone.head, "out_features", 0) == own


# ---- a mixed batch of pictures


def test_classify_with_an_adapter_for_each_image(mixture: dict[str, Path], pictures: list[Image.Image]) -> None:
    adapters = petl.load(mixture, backbone=base())
    names = ["sparse", "ladder", "probe", "ladder"]
    found = adapters.classify(pictures, adapters=names)
    for image, name, one in zip(pictures, names, found, strict=True):
        expected = petl.load(mixture[name], backbone=base()).classify(image)
        assert one.label == expected.label
        assert one.probabilities == pytest.approx(expected.probabilities, abs=1e-5)
    assert adapters.classify(pictures, "bits") == petl.load(mixture["bits"], backbone=base()).classify(pictures)
    with pytest.raises(petl.PetlError, match="2 names for 4 images"):
        adapters.classify(pictures, ["sparse", "ladder"])


def test_images_of_two_sizes_share_no_batch(tmp_path: Path, x: torch.Tensor, pictures: list[Image.Image]) -> None:
    small = adapter(tmp_path / "small", petl.LinearProbe(), family="timm_dinov2")
    large = adapter(tmp_path / "large", petl.LinearProbe(), family="timm_dinov2",
                    preprocessing=PREPROCESSING | {"image_size": [64, 64]})  # fmt: skip
    adapters = petl.load([small, large], backbone=base("timm_dinov2"))
    reason = r"'small' and 'large' prepare images differently \(image_size \[32, 32\] and \[64, 64\]\)"
    for call in (
        lambda: adapters.classify(pictures[:2], ["small", "large"]),
        lambda: adapters.logits(x[:2], ["small", "large"]),
        lambda: adapters.all_logits(x),
    ):
        with pytest.raises(petl.PetlError, match=reason):
            call()
    assert adapters.use("large").preprocess(pictures[0]).shape == (3, 64, 64)
    assert adapters.classify(pictures)[0].label.startswith("large-")


def test_images_of_two_normalisations(tmp_path: Path, x: torch.Tensor, pictures: list[Image.Image]) -> None:
    """One tensor cannot serve both, but rows that are prepared each for its own adapter can share a batch."""
    mine, other = adapter(tmp_path / "mine", petl.LinearProbe()), tmp_path / "other"
    adapter(other, MIXTURE["ladder"][0], preprocessing=PREPROCESSING | {"mean": [0.1] * 3})
    adapters = petl.load([mine, other], backbone=base())
    with pytest.raises(petl.PetlError, match=r"differently \(mean \[0.5, 0.5, 0.5\] and \[0.1, 0.1, 0.1\]\)"):
        adapters.all_logits(x)
    assert list(adapters.all_logits(x, ["other"])) == ["other"]
    found = adapters.classify(pictures[:2], ["mine", "other"])
    for directory, image, one in zip((mine, other), pictures, found):
        expected = petl.load(directory, backbone=base()).classify(image)
        assert one.probabilities == pytest.approx(expected.probabilities, abs=1e-5)
