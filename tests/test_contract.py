"""The contract: every registered method on every backbone family it names keeps every clause.

A new method is found by its registry entry; ``pytest -k its_name`` runs its clauses.
"""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import petl
from petl.adapters.artefact import save
from petl.adapters.state import trained_tensors
from petl.backbones.classifier import Classifier
from petl.costs import count_macs
from petl.methods import get_method, list_methods
from petl.methods.attach import attached
from petl.methods.base import Method, from_dict
from petl.nn.head import Head
from tests.conftest import FAMILIES, build, outputs

# options that the tiny networks here (24 wide) need, and further variants of a method beside its defaults
SMALL: dict[str, dict[str, Any]] = {
    "vera": {"r": 16},
    "oft": {"block_size": 8},
    "fourierft": {"n": 50},
    "loha": {"r": 4},
    "lokr": {"r": 2},
    "adalora": {"r": 4, "target_r": 2},
    "peft": {"peft_type": "boft", "options": {"boft_block_size": 4}},
    "vpt": {"prompts": 3},
}
FURTHER: dict[str, list[dict[str, Any]]] = {
    "lora": [{"parts": ("qkv", "out", "fc1", "fc2"), "dropout": 0.3, "layers": (1, -1)}],
    "dora": [{"targets": ("out", "fc1"), "dropout": 0.3, "layers": (-2, -1)}],
    "ia3": [{"targets": ("fc1", "fc2"), "feedforward": ("fc2",), "layers": (2,)}],
    "peft": [{"peft_type": "HRA", "options": {"r": 4}}],
    "vpt": [{"variant": "shallow", "dropout": 0.2}],
    "adapter": [{"variant": "houlsby", "activation": "relu", "layers": (-2, -1)}],
    "adaptformer": [{"layers": (1, 3)}],
    "full_fine_tuning": [{"layers": (-2, -1)}],
    "dtl": [{"variant": "plus"}],
    "ssf": [{"init_std": 0, "layers": (-2, -1)}],
    "rlrr": [{"init": "zero_out", "layers": (3,)}],
    "fact": [{"variant": "tk", "rank": 8, "scale": 0.5, "layers": (-2, -1)}],
    "rep_adapter": [{"bottleneck": 4, "groups": 1, "scale": 0.5, "dropout": 0.0, "layers": (-2, -1)}],
    "sparse_tuning": [{"keep_rate": 1.0}],
    "ladder_side_tuning": [{"reduction": 4, "form": "gate", "layers": (0, 2)}],
}


def variants(name: str) -> list[Method]:
    """The default options of a method, and each further variant."""
    cls, small = get_method(name), SMALL.get(name, {})
    return [cls(**small), *(cls(**(small | options)) for options in FURTHER.get(name, []))]


CASES = [
    pytest.param(method, family, id=f"{name}{i or ''}-{family}")
    for name in list_methods()
    for i, method in enumerate(variants(name))
    for family in FAMILIES
    if ("timm_vit" if family.startswith("timm") else family) in method.backbones
]
every = pytest.mark.parametrize(("method", "family"), CASES)


def classifier(method: Method, family: str) -> Classifier:
    model = petl.attach(build(family), method)
    return Classifier(model, Head("linear", attached(model).view.width, 4))


def train(model: nn.Module, x: torch.Tensor, steps: int = 2, lr: float = 1e-2) -> list[dict[str, torch.Tensor]]:
    """A few optimiser steps; returns the gradients of each."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    seen = []
    for step in range(steps):
        torch.manual_seed(step)  # of a method's own dropout
        optimizer.zero_grad()
        loss = (outputs(model, x + step) * torch.linspace(-1, 1, 4)).pow(2).sum() * 10
        loss.backward()
        seen.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        optimizer.step()
    return seen


@every
def test_identity_at_start_or_declared_not(method: Method, family: str, images: torch.Tensor) -> None:
    model = build(family)
    before = outputs(model, images)
    after = outputs(petl.attach(model, method), images)
    assert torch.equal(before, after) == method.identity_at_start


@every
def test_frozen_weights_are_bit_identical_after_steps(method: Method, family: str, images: torch.Tensor) -> None:
    model = classifier(method, family)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    trained = trained_tensors(model).keys()
    train(model, images)
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed <= trained, "a frozen tensor moved"
    assert "head.fc.weight" in changed


@every
def test_every_trained_tensor_gets_a_gradient_by_step_two(method: Method, family: str, images: torch.Tensor) -> None:
    model = classifier(method, family)
    first, second = train(model, images)
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    unused = {"backbone.cls_token", "backbone.norm", "backbone.classifier", "backbone.head"}  # not on the feature path
    expected = {n for n in names if not n.startswith(tuple(unused))}
    assert expected <= second.keys(), "a trained tensor takes no part in the forward pass"
    dead = [n for n in expected if not second[n].any() and not first[n].any()]
    if attached(model.backbone).trains_backbone:
        # the key bias cannot matter in softmax
        dead = [n for n in dead if not n.endswith("mask_token")]
    dead = [n for n in dead if not n.endswith(("k_proj.bias", ".k.bias"))]
    assert not dead


@every
def test_only_declared_parameters_are_trained_and_the_formula_counts_them(method: Method, family: str) -> None:
    model = petl.attach(build(family), method)
    module = attached(model)
    head = sum(p.numel() for _, m in module.view.head_modules() for p in m.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad) - head
    assert trained == method.parameter_count(module.view)


@every
def test_counted_macs_equal_the_formula(method: Method, family: str, images: torch.Tensor) -> None:
    model = petl.attach(build(family), method)
    module = attached(model)
    rows, columns = module.view.grid((3, 32, 32))
    tokens = module.token_counts(rows * columns)
    assert count_macs(model, images[:1]) == module.view.macs(tokens, rows * columns) + module.macs(tokens)


@every
def test_backbone_stays_in_eval_through_train(method: Method, family: str, images: torch.Tensor) -> None:
    model = classifier(method, family).train()
    module = attached(model.backbone)
    training = [n for n, m in model.named_modules() if m.training]
    if module.trains_backbone:
        assert any(n.startswith("backbone.") for n in training)
        return
    heads = tuple(f"backbone.{n}" for n, _ in module.view.head_modules())
    kept = [n for n in training if n not in ("", "head", "head.fc") and not n.startswith(("backbone.petl", *heads))]
    assert all(module.owns(n.removeprefix("backbone.")) for n in kept)
    module.eval()  # a method's own dropout may be live
    assert torch.equal(model(images), model(images)), "dropout or DropPath is live in a frozen network"


FRESH = [case for case in CASES if case.values[1] in ("timm_vit", "hf_vit")]  # loading the others is tested below


@pytest.fixture(scope="module")
def fresh_logits(request, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """By selected case: logits of a trained model, and those of its saved adapter in another process."""
    folder = tmp_path_factory.mktemp("fresh")
    selected = {str(i.callspec.params.get("case")) for i in request.session.items if hasattr(i, "callspec")}
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    torch.save(images, folder / "x.pt")
    here, names = {}, []
    for case in (c for c in FRESH if str(c.id) in selected):
        method, family = case.values
        torch.manual_seed(0)
        model = classifier(method, family)
        train(model, images)
        save(model, folder / str(case.id), labels=list("abcd"))
        here[str(case.id)] = model.eval()(images).detach()
        names.append(f"{case.id}={family}")
    script = (
        "import sys, torch, petl; sys.path.insert(0, sys.argv[2]); from tests.conftest import build\n"
        "folder = sys.argv[1]; x = torch.load(folder + '/x.pt', weights_only=True)\n"
        "for name, family in (a.split('=') for a in sys.argv[3:]):\n"
        "    p = petl.load(folder + '/' + name, backbone=build(family))\n"
        "    torch.save(p.model(x).detach(), folder + '/' + name + '.pt')"
    )
    root = str(Path(__file__).parents[1])
    subprocess.run([sys.executable, "-c", script, str(folder), root, *names], check=True, timeout=600)
    return {n: (y, torch.load(folder / f"{n}.pt", weights_only=True)) for n, y in here.items()}


@pytest.mark.parametrize("case", [str(c.id) for c in FRESH])
def test_saved_adapter_gives_equal_logits_in_a_fresh_process(case: str, fresh_logits) -> None:
    here, there = fresh_logits[case]
    torch.testing.assert_close(there, here, rtol=0, atol=0)


@every
def test_load_here_is_exact_and_other_weights_are_refused(
    method: Method, family: str, images: torch.Tensor, tmp_path
) -> None:
    model = classifier(method, family)
    train(model, images)
    save(model, tmp_path / "adapter", labels=list("abcd"))
    loaded = petl.load(tmp_path / "adapter", backbone=build(family))
    assert torch.equal(loaded.model(images), model.eval()(images))
    other = build(family)
    with torch.no_grad():
        next(other.parameters()).view(-1)[0] += 1e-3
    before = outputs(other, images)
    with pytest.raises(petl.PetlError, match="other weights"):
        petl.load(tmp_path / "adapter", backbone=other)
    assert torch.equal(outputs(other, images), before)
    assert not hasattr(other, "petl"), "a refused backbone must stay as it was"


@every
def test_merge_equals_unmerged_or_refuses(method: Method, family: str, images: torch.Tensor) -> None:
    model = classifier(method, family)
    train(model, images)
    model.eval()
    before = model(images)
    if not method.mergeable:
        with pytest.raises(petl.PetlError, match="no exact merge"):
            petl.merge(model.backbone)
        return
    petl.merge(model.backbone)
    assert not hasattr(model.backbone, "petl")
    torch.testing.assert_close(model(images), before, atol=1e-5, rtol=0)


@every
def test_detach_restores_outputs_flags_and_names(method: Method, family: str, images: torch.Tensor) -> None:
    model = build(family)
    model.train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    flags, modes = [p.requires_grad for p in model.parameters()], [m.training for m in model.modules()]
    petl.attach(model, method)
    if attached(model).trains_backbone:
        with pytest.raises(petl.PetlError, match="own weights"):
            petl.detach(model)
        return
    outputs(model, images)
    petl.detach(model)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[k], before[k]) for k in before)
    assert flags == [p.requires_grad for p in model.parameters()]
    assert modes == [m.training for m in model.modules()]
    assert torch.equal(outputs(model.eval(), images), outputs(build(family), images))


@every
def test_checkpointing_gives_equal_gradients(method: Method, family: str, images: torch.Tensor) -> None:
    plain, recomputing = classifier(method, family), classifier(method, family)
    recomputing.head.load_state_dict(plain.head.state_dict())
    recomputing.backbone.petl.load_state_dict(plain.backbone.petl.state_dict())
    attached(recomputing.backbone).checkpointing = True
    if attached(plain.backbone).trains_backbone:
        for m in (plain, recomputing):  # random depth differs between two forward passes
            m.train = lambda mode=True, m=m: m  # type: ignore[method-assign]
    for one, two in zip(train(plain, images), train(recomputing, images), strict=True):
        assert one.keys() == two.keys()
        for name, gradient in one.items():
            torch.testing.assert_close(two[name], gradient, atol=1e-6, rtol=1e-5)


@every
def test_compiles_without_graph_breaks(method: Method, family: str, images: torch.Tensor) -> None:
    if family.startswith("hf"):
        pytest.skip("the HF wrappers around the blocks break graphs by themselves in this transformers version")
    model = classifier(method, family).eval()
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(images), model(images), atol=1e-5, rtol=1e-5)


@every
def test_bf16_backbone_runs_without_nan_and_trained_tensors_stay_fp32(
    method: Method, family: str, images: torch.Tensor
) -> None:
    model = petl.attach(build(family).bfloat16(), method)
    module = attached(model)
    assert all(p.dtype == torch.float32 for p in module.parameters())
    classified = Classifier(model, Head("linear", module.view.width, 4)).train()
    out = classified(images.bfloat16())
    assert out.dtype == torch.bfloat16
    out.float().pow(2).sum().backward()
    gradients = [p.grad for p in classified.parameters() if p.grad is not None]
    assert gradients
    assert all(g.isfinite().all() for g in gradients)


@every
def test_batch_of_one_and_non_square_input(method: Method, family: str, images: torch.Tensor) -> None:
    model = classifier(method, family).eval()
    whole = model(images)
    single = torch.cat([model(x[None]) for x in images])
    torch.testing.assert_close(single, whole, atol=2e-5, rtol=1e-4)  # selection is per sample
    if family == "timm_dinov2":  # dynamic image size
        assert model(images[:, :, :16]).shape == (3, 4)


@every
def test_deepcopy_and_pickle_are_independent(method: Method, family: str, images: torch.Tensor) -> None:
    model = classifier(method, family).eval()
    before = model(images)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(images), before)
        with torch.no_grad():
            for p in twin.parameters():
                p.mul_(1.5)
        assert not torch.equal(twin(images), before)
        assert torch.equal(model(images), before)


@every
def test_threads_do_not_mix_their_passes(method: Method, family: str, images: torch.Tensor) -> None:
    model = classifier(method, family).eval()
    inputs = [images + i for i in range(4)]
    expected = [model(x) for x in inputs]
    found: list[list[torch.Tensor]] = [[] for _ in inputs]

    def work(i: int) -> None:
        with torch.no_grad():
            found[i].extend(model(inputs[i]) for _ in range(5))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert all(torch.equal(y, expected[i]) for i, ys in enumerate(found) for y in ys)
    assert [len(ys) for ys in found] == [5] * 4


@pytest.mark.parametrize("name", list_methods())
def test_options_survive_the_config_and_unknown_ones_are_refused(name: str) -> None:
    method = variants(name)[0]
    import json

    spec = json.loads(json.dumps(method.to_dict()))
    assert from_dict(spec) == method
    with pytest.raises(petl.PetlError, match="has no option 'keep_rat'"):
        from_dict({"name": name, "options": {"keep_rat": 0.5}})


def test_attach_twice_and_detach_without_attach_are_errors() -> None:
    model = petl.attach(build("timm_vit"), petl.SparseTuning())
    with pytest.raises(petl.PetlError, match="attached to this model already"):
        petl.attach(model, petl.LinearProbe())
    petl.detach(model)
    with pytest.raises(petl.PetlError, match="no method is attached"):
        petl.detach(model)
    with pytest.raises(petl.PetlError, match="no view of"):
        petl.attach(nn.Linear(2, 2), petl.LinearProbe())
    with pytest.raises(petl.PetlError, match="takes a method"):
        petl.attach(model, "SparseTuning")
