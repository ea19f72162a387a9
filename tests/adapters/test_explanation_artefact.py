"""Adapters of explained classifiers: found again in a fresh process, refused on another classifier, older schemas."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import petl
from petl.adapters import artefact
from petl.methods.attach import attached
from tests.adapters.explained import (
    ARGS,
    VISION,
    classifier,
    explained,
    explained_text,
    picture,
    save,
    shaken,
    text_classifier,
)  # fmt: skip
from tests.adapters.test_artefact import edit
from tests.conftest import build
from tests.conftest import grounding as grounding_model


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(explained(), tmp_path_factory.mktemp("saved") / "a")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An explanation of a text classifier; the folder ``bert`` lies beside it."""
    folder = tmp_path_factory.mktemp("text")
    name = text_classifier(folder / "bert")
    return petl.save(explained_text(name), folder / "a", name, labels=["bad", "good"])


@pytest.fixture
def adapter(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "a"))


def config_of(adapter: Path) -> dict[str, Any]:
    return json.loads((adapter / artefact.CONFIG).read_text())


def untouched(network: nn.Module) -> bool:
    """Whether no method and no tap is left on a network that was passed in."""
    hooks = [m for m in network.modules() if m._forward_hooks or m._forward_pre_hooks]
    return not hooks and "train" not in network.__dict__ and not hasattr(network, "petl")


# ---- round trip

FRESH = """
import sys, torch, petl
from safetensors.torch import load_file, save_file
torch.set_num_threads(1)
given = load_file(sys.argv[2])
found = petl.explain(petl.load(sys.argv[1]).model, given.get("x", given))
save_file({k: getattr(found, k).contiguous() for k in ("logits", "values", "null", "grand")}, sys.argv[3])
"""


def in_a_fresh_process(adapter: Path, given: dict[str, Tensor], folder: Path) -> dict[str, Tensor]:
    save_file(given, folder / "in.safetensors")
    command = [
        sys.executable,
        "-c",
        FRESH,
        str(adapter),
        str(folder / "in.safetensors"),
        str(folder / "out.safetensors"),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return load_file(folder / "out.safetensors")


def assert_same(found: petl.models.explained.ShapleyExplanation, again: dict[str, Tensor]) -> None:
    for name, tensor in again.items():
        assert torch.equal(tensor, getattr(found, name)), name
    assert again["values"].abs().sum() > 0.1, "there is something to compare"


def test_values_are_equal_in_a_fresh_process(adapter: Path, tmp_path: Path, images: Tensor) -> None:
    found = petl.explain(explained(), images)
    assert found.values.shape == (3, 8, 4)
    assert_same(found, in_a_fresh_process(adapter, {"x": images}, tmp_path))
    assert torch.equal(found.logits, classifier()(images))


def test_values_of_a_text_are_equal_in_a_fresh_process(text: Path, tmp_path: Path) -> None:
    net = explained_text(f"hf/{text.parent / 'bert'}")
    given = net.tokenizer(["a stirring film", "not dull and not a play !"], padding=True, return_tensors="pt")
    given = {k: given[k] for k in ("input_ids", "attention_mask")}
    found = petl.explain(net, given)
    assert found.players.counts.tolist() == [3, 7], "stir and ##ring are one word"
    assert_same(found, in_a_fresh_process(text, given, tmp_path))
    assert torch.equal(found.logits, net.classifier(**given).logits)


@pytest.mark.parametrize("name", ["sparse_tuning", "full_fine_tuning"])
def test_methods_of_the_classifier_travel(name: str, tmp_path: Path, images: Tensor) -> None:
    methods = {
        "sparse_tuning": petl.SparseTuning(keep_rate=1.0, bottleneck=4),
        "full_fine_tuning": petl.FullFineTuning(),
    }
    model = classifier(methods[name])
    if name == "full_fine_tuning":
        with torch.no_grad():
            model.backbone.blocks[3].mlp.fc1.weight.mul_(1.5)
    expected = model(images)
    net = explained(model)
    where = save(net, tmp_path / "a")
    loaded = petl.load(where)
    assert torch.equal(loaded.model(images), expected)
    assert torch.equal(petl.explain(loaded.model, images).values, petl.explain(net, images).values)
    assert config_of(where)["classifier"]["method"]["name"] == name
    backbone = petl.load_backbone(VISION, ARGS)
    assert torch.equal(petl.load(where, backbone=backbone).model(images), expected)


@pytest.mark.parametrize("method", [None, petl.SparseTuning(keep_rate=1.0, bottleneck=4)], ids=["plain", "adapted"])
def test_a_classifier_with_a_head_of_its_own(method: petl.Method | None, tmp_path: Path, images: Tensor) -> None:
    def network() -> nn.Module:
        return build("timm_vit") if method is None else petl.attach(build("timm_vit"), method)

    model = network()
    if method is not None:
        shaken(attached(model), 0.1)
        with torch.no_grad():
            model.head.weight.mul_(3)  # type: ignore[union-attr]
    expected, net = model(images), explained(model, reduction=4)
    where = petl.save(net, tmp_path / "a", labels=list("abcde"))
    with pytest.raises(petl.PetlError, match=r"without (a backbone|the classifier's) name"):
        petl.load(where)
    loaded = petl.load(where, backbone=build("timm_vit"))
    assert torch.equal(loaded.model(images), expected)
    assert torch.equal(petl.explain(loaded.model, images).values, petl.explain(net, images).values)
    other = build("timm_vit")
    with torch.no_grad():
        other.blocks[0].norm1.bias.add_(0.01)  # type: ignore[union-attr,index]
    with pytest.raises(petl.PetlError, match="this classifier is the right architecture with other weights"):
        petl.load(where, backbone=other)
    assert untouched(other)


def test_what_the_directory_says(adapter: Path, text: Path) -> None:
    config = config_of(adapter)
    assert (config["schema"], config["task"], config["method"]["name"]) == (3, "explanation", "autognothi")
    assert config["head"] == {"kind": "linear", "in_features": 128, "num_classes": 4}
    record = config["classifier"]
    assert (record["method"], record["classes"]) == ({"name": "linear_probe", "options": {}}, 4)
    assert record["parameters"] == config["backbone"]["parameters"] + 4 * 129
    assert record["weights"] == explained().identity.weights != config["backbone"]["weights"]
    assert {n.partition(".")[0] for n in load_file(adapter / artefact.TENSORS)} == {"classifier", "petl"}
    card = (adapter / artefact.CARD).read_text()
    for part in ('predictor.explain("image.jpg")', 'petl.load("path/to/this/directory")', "`linear_probe`", "4 classes",
                 record["weights"][:16], "tags: [petl, autognothi, explanation]"):  # fmt: skip
        assert part in card
    card = (text / artefact.CARD).read_text()
    assert 'predictor.explain("a sentence")' in card
    assert "a classifier of 2 classes, with a head of its own" in card


def test_equal_bytes_and_labels_that_fit(adapter: Path, tmp_path: Path) -> None:
    again = save(explained(), tmp_path / "b")
    for name in (artefact.CONFIG, artefact.TENSORS, artefact.CARD):
        assert (again / name).read_bytes() == (adapter / name).read_bytes()
    with pytest.raises(petl.PetlError, match="3 labels for a classifier of 4 classes"):
        save(explained(), tmp_path / "b", labels=["a", "b", "c"])


def test_the_empty_game_is_kept(tmp_path: Path, images: Tensor) -> None:
    net = explained()
    assert not petl.load(save(net, tmp_path / "a")).model.petl.knows_null
    net.measure_null(images)
    loaded = petl.load(save(net, tmp_path / "b")).model
    assert loaded.petl.knows_null
    assert torch.equal(loaded.petl.null, petl.explain(explained(), images).null[0])
    assert torch.equal(petl.explain(loaded, images).values, petl.explain(explained(), images).values)


# ---- use


def test_classifying_is_not_changed_by_the_explanation(adapter: Path, tmp_path: Path) -> None:
    plain, explains = petl.load(save(classifier(), tmp_path / "plain")), petl.load(adapter)
    pictures = [picture(40), picture(31), picture(90)]
    assert plain.classify(pictures) == explains.classify(pictures)
    picture(40).save(tmp_path / "x.png")
    for given in (picture(40), tmp_path / "x.png", str(tmp_path / "x.png")):
        found = explains.explain(given)
        assert explains.predictions(found.logits)[0] == plain.classify(given) == plain.classify(pictures[0])
        assert found.values.shape == (1, 8, 4)
        assert float(found.efficiency_gap) < 1e-6
    assert explains.backbone is explains.model.classifier.backbone  # type: ignore[union-attr]


def test_text_is_classified_and_explained(text: Path) -> None:
    predictor = petl.load(text)
    assert predictor.reads_text
    found = predictor.explain("A stirring film")
    one, two = predictor.classify(["a stirring film", "not dull"])
    assert predictor.predictions(found.logits)[0].probabilities == pytest.approx(one.probabilities, abs=1e-6)
    assert predictor.classify("not dull").probabilities == pytest.approx(two.probabilities, abs=1e-6)
    assert [*one.probabilities] == ["bad", "good"]
    assert predictor.tokens("a " * 99)["input_ids"].shape == (1, 16), "no more than there are positions"
    edit(text, protocol={"training": {"max_length": 7}})
    assert petl.load(text).tokens("a " * 99)["input_ids"].shape == (1, 7), "as in training"
    edit(text, protocol={})


def test_the_classifier_may_be_passed_in(adapter: Path, text: Path, images: Tensor) -> None:
    mine = classifier()
    loaded = petl.load(adapter, backbone=mine)
    assert loaded.model.classifier is mine
    assert torch.equal(petl.explain(loaded.model, images).values, petl.explain(explained(), images).values)
    model, tokenizer = petl.backbones.load_classifier(f"hf/{text.parent / 'bert'}")
    assert petl.load(text, backbone=model, tokenizer=tokenizer).explain("a film").values.shape == (1, 2, 2)
    with pytest.raises(petl.PetlError, match="explained with its tokenizer"):
        petl.load(text, backbone=petl.backbones.load_classifier(f"hf/{text.parent / 'bert'}")[0])


# ---- refused


def with_another_head() -> nn.Module:
    model = classifier()
    with torch.no_grad():
        model.head.fc.bias[2] += 1e-3  # type: ignore[union-attr]
    return model


OTHERS: dict[str, tuple[Callable[[], Any], str]] = {
    "another head": (with_another_head, "this classifier is the right architecture with other weights"),
    "another method": (lambda: classifier(petl.SparseTuning(keep_rate=1.0)), "another architecture"),
    "another backbone": (
        lambda: petl.load_backbone(VISION, ARGS, pretrained=False),
        "this classifier is the right arc",
    ),
    "another size": (lambda: petl.load_backbone(VISION), "this classifier is another architecture"),
    "another family": (lambda: build("hf_clip_vision"), "do not fit the model"),
    "a pair": (lambda: (build("timm_vit"), build("hf_bert")), "explains one classifier: pass that as backbone="),
    "no classifier": (lambda: nn.Linear(2, 2), "petl has no view of"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_classifier_is_refused_and_left_alone(adapter: Path, name: str) -> None:
    make, message = OTHERS[name]
    other = make()
    before = {k: v.clone() for k, v in other.state_dict().items()} if isinstance(other, nn.Module) else {}
    with pytest.raises(petl.PetlError, match=message) as error:
        petl.load(adapter, backbone=other)
    assert str(error.value).count("\n") == 0
    if isinstance(other, petl.Classifier):
        assert attached(other.backbone), "its method stays"
        assert not [m for m in other.modules() if m._forward_hooks]
    elif isinstance(other, nn.Module):
        assert untouched(other)
    assert all(torch.equal(v, before[k]) for k, v in (other.state_dict() if before else {}).items())


def test_only_what_was_trained_to_explain_explains(adapter: Path, tmp_path: Path) -> None:
    plain = petl.load(save(classifier(), tmp_path / "plain"))
    with pytest.raises(
        petl.PetlError, match=r"trained for 'classification'.*petl fit --config \S+ --model\.classifier"
    ):
        plain.explain(picture())
    with pytest.raises(petl.PetlError, match=r"needs a petl\.ExplainedClassifier, not a Classifier"):
        petl.explain(plain.model, torch.zeros(1, 3, 32, 32))
    net = grounding_model("bundled", petl.M2IST(bottleneck=4, relation_dim=4, shared_dim=8))
    pair = petl.save(net, tmp_path / "pair", VISION, text_backbone="bundled/tiny_clip_text")
    with pytest.raises(petl.PetlError, match="trained for 'grounding', not to explain: only classifiers are explained"):
        petl.load(pair).explain(picture())
    with pytest.raises(petl.PetlError, match="not for grounding"):
        petl.load(adapter).ground(picture(), "an ant")
    with pytest.raises(petl.PetlError, match="it is not merged"):
        petl.load(adapter).merge()


def test_images_and_sentences_are_told_apart(adapter: Path, text: Path, tmp_path: Path) -> None:
    looks, reads = petl.load(adapter), petl.load(text)
    picture().save(tmp_path / "x.png")
    for sentence in ("a stirring film", "a dull play " * 300):
        with pytest.raises(petl.PetlError, match="looks at images, and there is no file 'a ") as error:
            looks.explain(sentence)
        assert len(str(error.value)) < 200
    for given in (tmp_path / "x.png", str(tmp_path / "x.png"), picture(), "  ", 3):
        with pytest.raises(petl.PetlError, match="reads text: pass a sentence, not "):
            reads.explain(given)
    with pytest.raises(petl.PetlError, match="reads text: pass a sentence, not the file"):
        reads.classify(tmp_path / "x.png")
    with pytest.raises(petl.PetlError, match="reads text: pass a sentence, not an image"):
        reads.preprocess(tmp_path / "x.png")
    (tmp_path / "y.png").write_text("hello")
    with pytest.raises(petl.PetlError, match=r"y\.png is cut short or not an image"):
        looks.explain(tmp_path / "y.png")
    edit(adapter, preprocessing=None)
    with pytest.raises(petl.PetlError, match="without preprocessing"):
        petl.load(adapter).explain(picture())


# ---- integrity and schemas


def forge(adapter: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(adapter / artefact.TENSORS)
    change(tensors)
    save_file(tensors, adapter / artefact.TENSORS)
    digest = hashlib.sha256((adapter / artefact.TENSORS).read_bytes()).hexdigest()
    edit(adapter, tensors={"sha256": digest, "count": 1, "parameters": 1, "bytes": 1})


def test_cut_and_forged_tensors(adapter: Path) -> None:
    file = adapter / artefact.TENSORS
    data = file.read_bytes()
    for length in (len(data) - 4, 100, 0):
        file.write_bytes(data[:length])
        with pytest.raises(petl.PetlError, match="damaged or was changed"):
            petl.load(adapter)
    file.write_bytes(data)
    network = petl.load_backbone(VISION, ARGS)
    forge(adapter, lambda t: t.pop("petl.explainer.mlp.0.weight"))
    with pytest.raises(petl.PetlError, match=r"1 missing .*Nothing was loaded"):
        petl.load(adapter, backbone=network)
    file.write_bytes(data)
    forge(adapter, lambda t: t["classifier.head.fc.bias"].add_(0.1))
    with pytest.raises(petl.PetlError, match="this classifier is the right architecture with other weights"):
        petl.load(adapter, backbone=network)
    assert untouched(network)


CHANGES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no classifier": lambda c: c.update(classifier=None),
    "an empty classifier": lambda c: c.update(classifier={}),
    "another digest": lambda c: c["classifier"].update(weights="0" * 64),
    "no digest": lambda c: c["classifier"].pop("weights"),
    "no method": lambda c: c["classifier"].update(method=None),
    "an unknown method": lambda c: c["classifier"].update(method={"name": "os.system", "options": {}}),
    "no mapping": lambda c: c["classifier"].update(method="linear_probe"),
    "itself": lambda c: c["classifier"].update(method=c["method"]),
    "no head": lambda c: c.update(head=None),
    "a wider head": lambda c: c["head"].update(num_classes=5),
    "another task": lambda c: c.update(task="classification"),
    "a method that does not explain": lambda c: c.update(method={"name": "linear_probe", "options": {}}),
    "a reduction that does not divide": lambda c: c["method"]["options"].update(reduction=7),
    "another reduction": lambda c: c["method"]["options"].update(reduction=4),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_config_is_one_clear_error(adapter: Path, name: str) -> None:
    config = config_of(adapter)
    CHANGES[name](config)
    (adapter / artefact.CONFIG).write_text(json.dumps(config))
    network = petl.load_backbone(VISION, ARGS)
    for backbone in (network, None):
        with pytest.raises(petl.PetlError) as error:
            petl.load(adapter, backbone=backbone)
        assert str(error.value).count("\n") == 0
    assert untouched(network)


def test_schema_2_still_loads_and_4_is_refused(tmp_path: Path, adapter: Path, images: Tensor) -> None:
    old = save(classifier(), tmp_path / "old")
    config = config_of(old)
    assert config.pop("classifier") is None
    (old / artefact.CONFIG).write_text(json.dumps(config | {"schema": 2}))
    loaded = petl.load(old)
    assert torch.equal(loaded.model(images), classifier()(images))
    assert loaded.classify(picture()) == petl.load(adapter).classify(picture())
    (old / artefact.CONFIG).write_text(json.dumps(config | {"schema": 3}))
    with pytest.raises(petl.PetlError, match=r"keys missing \['classifier'\]"):
        petl.load(old)
    edit(adapter, schema=4)
    with pytest.raises(petl.PetlError, match=r"has schema 4.*reads up to schema 3\. Update petl"):
        petl.load(adapter)
    edit(adapter, schema=2)
    with pytest.raises(petl.PetlError, match="an explanation has a classifier"):
        petl.load(adapter)
