"""Compiled blocks: no graph break under any method, the same numbers, the same names, one code for equal blocks."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

import petl
from petl.adapters.artefact import save
from petl.backbones.classifier import Classifier
from petl.methods.attach import attached
from petl.methods.base import Method
from petl.methods.regional import compile_blocks
from petl.models.frozen import FrozenFeatures
from tests.conftest import _timm, expressions_and_images, grounding
from tests.test_contract import CASES, classifier, train

ON_TIMM = [case for case in CASES if case.values[1] == "timm_vit"]
KINDS = ("lora-", "sparse_tuning-", "evit-", "ladder_side_tuning-", "linear_probe-", "adaptformer-", "vpt-", "ssf-")
ELSEWHERE = [c for c in CASES if str(c.id).startswith(KINDS) and c.values[1] in ("hf_vit", "timm_dinov2")]
SOME = [petl.LoRA(), petl.SparseTuning(bottleneck=4), petl.LadderSideTuning(), petl.FullFineTuning(), petl.BitFit()]
some = pytest.mark.parametrize("method", SOME, ids=lambda m: m.name)


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def two(method: Method, family: str = "timm_vit") -> tuple[Classifier, Classifier]:
    """The same model twice, random depth off."""
    plain, other = classifier(method, family), classifier(method, family)
    other.load_state_dict(plain.state_dict())
    if attached(plain.backbone).trains_backbone:
        for m in (plain, other):
            m.train = lambda mode=True, m=m: m  # type: ignore[method-assign]
    return plain, other


def close(found: list[dict[str, Tensor]], wanted: list[dict[str, Tensor]]) -> None:
    for one, two in zip(found, wanted, strict=True):
        assert one.keys() == two.keys()
        for name, gradient in two.items():
            torch.testing.assert_close(one[name], gradient, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("method", "family"), [*ON_TIMM, *ELSEWHERE])
def test_no_graph_break_and_equal_gradients(method: Method, family: str, images: Tensor) -> None:
    plain, compiled = two(method, family)
    compile_blocks(attached(compiled.backbone), "eager", fullgraph=True)
    close(train(compiled, images, steps=1), train(plain, images, steps=1))
    assert 1 <= graphs() <= 4, "more than one code for a block"


SHARED = {"bottleneck": 4, "relation_dim": 4, "shared_dim": 8}


@pytest.mark.parametrize(
    "method", [petl.DARA(**SHARED), petl.M2IST(**SHARED), petl.LinearProbe()], ids=lambda m: m.name
)
@pytest.mark.parametrize("pair", ["detr+bert", "clip"])
def test_pairs(method: Method, pair: str) -> None:
    plain, compiled = grounding(pair, method), grounding(pair, method)
    compiled.load_state_dict(plain.state_dict())
    for tower in (compiled.petl.vision, compiled.petl.text):
        compile_blocks(tower, "eager", fullgraph=True)
    found = []
    for model in (compiled, plain):
        torch.manual_seed(0)
        model.train()(*expressions_and_images(model)).square().sum().backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    close(found[:1], found[1:])
    assert graphs() >= 2


@some
def test_checkpointing_and_compilation_together(method: Method, images: Tensor) -> None:
    plain, compiled = two(method)
    attached(compiled.backbone).checkpointing = True
    compile_blocks(attached(compiled.backbone), "aot_eager", fullgraph=True)
    close(train(compiled, images), train(plain, images))
    assert graphs() >= 1


def test_equal_blocks_share_their_code_and_others_do_not_meet_the_recompile_limit() -> None:
    x = torch.randn(2, 3, 32, 32)
    counts = []
    for method in (petl.LoRA(), petl.LinearProbe(), petl.AdaptFormer(bottleneck=4)):
        counters.clear()
        model = petl.attach(_timm(depth=10, num_classes=0), method)
        compile_blocks(attached(model), "eager", fullgraph=True)
        model.train()(x)
        counts.append(graphs())
    assert counts == [2, 1, 10]  # LoRA: only block 0 has an input without gradient. Dynamo gives up at 8 versions


def test_models_do_not_use_up_each_others_versions() -> None:
    x = torch.randn(2, 3, 32, 32)
    for _ in range(10):
        model = petl.attach(_timm(depth=1, num_classes=0), petl.LinearProbe())
        compile_blocks(attached(model), "eager", fullgraph=True)
        model(x)
    assert graphs() == 10


def test_batch_sizes_need_few_versions() -> None:
    model = petl.attach(_timm(depth=2, num_classes=0), petl.LinearProbe())
    compile_blocks(attached(model), "eager", fullgraph=True)
    for count in (4, 3, 5, 6, 7, 8, 9):
        model(torch.randn(count, 3, 32, 32))
    assert graphs() == 2  # the second serves every size


@pytest.mark.parametrize("method", [petl.LoRA(), petl.LadderSideTuning(layers=(3,)), petl.FullFineTuning()],
                         ids=lambda m: m.name)  # fmt: skip
def test_names_adapters_and_copies_are_those_of_the_plain_model(method: Method, images: Tensor, tmp_path) -> None:
    plain, compiled = (classifier(method, "timm_vit") for _ in range(2))
    compiled.load_state_dict(plain.state_dict())
    compile_blocks(attached(compiled.backbone), "eager", fullgraph=True)
    before = compiled.eval()(images)
    assert list(compiled.state_dict()) == list(plain.state_dict())
    assert [n for n, _ in compiled.named_modules()] == [n for n, _ in plain.named_modules()]
    for model, name in ((plain, "plain"), (compiled, "compiled")):
        save(model, tmp_path / name, labels=list("abcd"))
    files = [(tmp_path / n / "adapter_model.safetensors").read_bytes() for n in ("plain", "compiled")]
    assert files[0] == files[1]
    for twin in (copy.deepcopy(compiled), pickle.loads(pickle.dumps(compiled))):
        assert torch.equal(twin(images), before)
        with torch.no_grad():
            for p in twin.parameters():
                p.mul_(1.5)
        assert not torch.equal(twin(images), before)
        assert torch.equal(compiled(images), before)


@some
def test_taking_the_method_off_leaves_no_trace(method: Method, images: Tensor) -> None:
    model: nn.Module = _timm(num_classes=0).eval()
    before = model(images)
    petl.attach(model, method)
    compile_blocks(attached(model), "eager", fullgraph=True)
    compile_blocks(attached(model), "eager", fullgraph=True)  # as in a second run of a trainer
    model(images)
    (petl.merge if attached(model).trains_backbone else petl.detach)(model)
    assert not [n for n, m in model.named_modules() if "forward" in m.__dict__]
    assert torch.equal(model(images), before)


def test_recorded_taps_run_through_compiled_code(images: Tensor) -> None:
    model = petl.attach(_timm(num_classes=0), petl.LadderSideTuning())
    torch.nn.init.normal_(attached(model).up.weight)
    frozen = FrozenFeatures(model)
    taps, wanted = frozen.record(images), model(images)
    compile_blocks(attached(model), "eager", fullgraph=True)
    torch.testing.assert_close(frozen.features(taps), wanted)
    assert graphs() == 4


def test_inductor() -> None:
    x = torch.randn(2, 3, 32, 32)
    found = []
    for compiles in (True, False):
        torch.manual_seed(0)
        model = petl.attach(_timm(depth=1, num_classes=0), petl.LoRA())
        if compiles:
            compile_blocks(attached(model))
        model(x).square().sum().backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    close(found[:1], found[1:])
