"""The contract for pairs of encoders: every method that works on pairs, on every pair of families.

A new method is found by its registry entry and its ``towers``; ``pytest -k its_name`` runs its clauses.
"""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

import petl
from petl.adapters.artefact import save
from petl.adapters.state import trained_tensors
from petl.costs import count_macs
from petl.methods import get_method, list_methods
from petl.methods.base import Method, from_dict
from tests.conftest import PAIRS, build, expressions_and_images, grounding

OPTIONS = {
    "adapter": [{}, {"variant": "houlsby", "layers": (-2, -1)}],
    "full_fine_tuning": [{}, {"layers": (-1,)}],
    "dara": [{}, {"variant": "paper"}, {"pairs": 2, "text_layers": "last", "vision_layers": "first"}],
    "m2ist": [{}, {"side_seed": "zero"}, {"pairs": 2, "text_layers": "even", "vision_layers": "last"}],
    "ladder_side_tuning": [{"reduction": 1}, {"reduction": 1, "form": "gate", "layers": (0, 2), "init": "prune"}],
}
SMALL = {name: {"bottleneck": 6, "relation_dim": 5, "shared_dim": 24} for name in ("dara", "m2ist")}


def variants(name: str) -> list[Method]:
    cls = get_method(name)
    return [cls(**(SMALL.get(name, {}) | options)) for options in OPTIONS[name]] if name in OPTIONS else [cls()]


CASES = [
    pytest.param(method, pair, id=f"{name}{i or ''}-{pair}")
    for name in list_methods()
    if get_method(name).towers
    for i, method in enumerate(variants(name))
    for pair in PAIRS
]
every = pytest.mark.parametrize(("method", "pair"), CASES)


def train(model: nn.Module, inputs: tuple[torch.Tensor, ...], steps: int = 2) -> list[dict[str, torch.Tensor]]:
    """A few optimiser steps; returns the gradients of each."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    seen = []
    for _ in range(steps):
        optimizer.zero_grad()
        torch.manual_seed(0)  # dropout of the vision-language part
        (model(*inputs) - torch.linspace(0, 1, 4)).pow(2).sum().mul(30).backward()
        seen.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        optimizer.step()
    return seen


def test_the_suite_covers_both_systems_on_four_pairs() -> None:
    ids = {str(case.id) for case in CASES}
    assert {f"{m}-{p}" for m in ("dara", "m2ist", "linear_probe", "full_fine_tuning") for p in PAIRS} <= ids


@every
def test_identity_at_start_or_declared_not(method: Method, pair: str) -> None:
    plain, model = grounding(pair), grounding(pair, method)
    inputs = expressions_and_images(model)
    model.head.load_state_dict(plain.head.state_dict())
    same = [torch.equal(a, b) for a, b in zip(plain.encode(*inputs), model.encode(*inputs), strict=True)]
    assert same == [method.identity_at_start] * 2
    assert torch.equal(plain(*inputs), model(*inputs)) == method.identity_at_start


@every
def test_frozen_weights_are_bit_identical_after_steps(method: Method, pair: str) -> None:
    model = grounding(pair, method)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    trained = trained_tensors(model).keys()
    train(model, expressions_and_images(model))
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed <= trained, "a frozen tensor moved"
    assert "head.box.0.weight" in changed
    assert any(k.startswith(("petl.", "vision.")) for k in changed) == (method.pair_parameter_count(
        model.vision_view, model.text_view) > 0)  # fmt: skip


@every
def test_every_trained_tensor_gets_a_gradient_by_step_two(method: Method, pair: str) -> None:
    model = grounding(pair, method)
    first, second = train(model, expressions_and_images(model))
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    assert names == second.keys(), "a trained tensor takes no part in the forward pass"
    dead = {n for n in names if not second[n].any() and not first[n].any()}
    if model.petl.trains_backbone:  # a key bias cannot matter in softmax, an unseen word has no gradient
        dead = {n for n in dead if not n.endswith(("k_proj.bias", "key.bias", "mask_token"))}
    assert not dead


@every
def test_the_formula_counts_the_parameters(method: Method, pair: str) -> None:
    model = grounding(pair, method)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    head = sum(p.numel() for p in model.head.parameters())
    assert trained - head == method.pair_parameter_count(model.vision_view, model.text_view)
    report = petl.report(model)
    assert (report.trainable, report.head) == (trained - head, head)


@every
def test_counted_macs_equal_the_formula(method: Method, pair: str) -> None:
    plain, model = grounding(pair), grounding(pair, method)
    inputs = expressions_and_images(model, 1)
    visual = model.head.visual_tokens + model.vision_view.prefix_tokens
    assert count_macs(model, *inputs) - count_macs(plain, *inputs) == model.petl.macs(visual, model.head.query_length)


@every
def test_encoders_stay_in_eval_through_train(method: Method, pair: str) -> None:
    model = grounding(pair, method).train()
    if model.petl.trains_backbone:
        assert model.vision.training
        return
    training = {n for n, m in model.named_modules() if m.training}
    assert all(n.startswith(("head", "petl")) for n in training if n)
    inputs = expressions_and_images(model)
    one, two = model.encode(*inputs), model.encode(*inputs)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True)), "dropout is live in a frozen encoder"


@every
def test_saved_adapter_gives_equal_boxes_in_a_fresh_process(method: Method, pair: str, tmp_path: Path) -> None:
    if pair not in ("detr+bert", "bundled"):
        pytest.skip("two pairs are enough for the slow clause; loading here is tested below")
    model = grounding(pair, method)
    inputs = expressions_and_images(model)
    train(model, inputs)
    save(model, tmp_path / "adapter", preprocessing={"image_size": [model.image_size] * 2})
    torch.save(inputs, tmp_path / "x.pt")
    script = (
        "import sys, torch, petl; sys.path.insert(0, sys.argv[3]); from tests.conftest import PAIRS, build;"
        "p = petl.load(sys.argv[1] + '/adapter', backbone=tuple(build(n) for n in PAIRS[sys.argv[2]]));"
        "torch.save(p.model(*torch.load(sys.argv[1] + '/x.pt', weights_only=True)).detach(), sys.argv[1] + '/y.pt')"
    )
    root = str(Path(__file__).parents[1])
    subprocess.run([sys.executable, "-c", script, str(tmp_path), pair, root], check=True, timeout=120)
    assert torch.equal(torch.load(tmp_path / "y.pt", weights_only=True), model.eval()(*inputs))


@every
def test_load_here_is_exact_and_another_pair_is_refused(method: Method, pair: str, tmp_path: Path) -> None:
    model = grounding(pair, method)
    inputs = expressions_and_images(model)
    train(model, inputs)
    save(model, tmp_path / "adapter", preprocessing={"image_size": [model.image_size] * 2})
    towers = [build(n) for n in PAIRS[pair]]
    loaded = petl.load(tmp_path / "adapter", backbone=(towers[0], towers[1]))
    assert torch.equal(loaded.model(*inputs), model.eval()(*inputs))
    for i, what in enumerate(("image encoder", "text encoder")):
        towers = [build(n) for n in PAIRS[pair]]
        with torch.no_grad():
            list(towers[i].parameters())[2].view(-1)[0] += 1e-2
        flags = [[p.requires_grad for p in t.parameters()] for t in towers]
        with pytest.raises(petl.PetlError, match=f"this {what} is the right architecture with other weights"):
            petl.load(tmp_path / "adapter", backbone=(towers[0], towers[1]))
        assert flags == [[p.requires_grad for p in t.parameters()] for t in towers], (
            "a refused encoder must stay as it was"
        )
        assert not any("train" in t.__dict__ for t in towers)


@every
def test_merge_equals_unmerged_or_refuses(method: Method, pair: str) -> None:
    model = grounding(pair, method)
    inputs = expressions_and_images(model)
    train(model, inputs)
    before = model.eval()(*inputs)
    if method.mergeable:
        assert torch.equal(petl.merge(model)(*inputs), before)
    else:
        with pytest.raises(petl.PetlError, match="no exact merge"):
            petl.merge(model)


@every
def test_detach_restores_encoders_bit_for_bit(method: Method, pair: str) -> None:
    model = grounding(pair, method)
    if model.petl.trains_backbone:
        with pytest.raises(petl.PetlError, match="own weights"):
            petl.detach(model)
        return
    inputs = expressions_and_images(model)
    model.train()(*inputs)
    petl.detach(model)
    vision, text = (build(n) for n in PAIRS[pair])
    expected = petl.GroundingModel(vision, text, None, model.image_size, **{
        k: v for k, v in model.head.sizes.items() if k.startswith(("query", "fusion"))}).eval()  # fmt: skip
    for a, b in zip(model.encode(*inputs), expected.encode(*inputs), strict=True):
        assert torch.equal(a, b)
    assert all(p.requires_grad for p in model.text.parameters())
    petl.GroundingModel(model.vision, model.text, method, model.image_size, query_length=7)  # free again


@every
def test_checkpointing_gives_equal_gradients(method: Method, pair: str) -> None:
    plain, recomputing = grounding(pair, method), grounding(pair, method)
    recomputing.load_state_dict(plain.state_dict())
    recomputing.checkpointing = True
    for model in (plain, recomputing) if plain.petl.trains_backbone else ():
        model.vision.eval(), model.text.eval()  # live dropout draws differently when recomputed elsewhere
        model.vision.train = model.text.train = lambda mode=True, m=model: m  # type: ignore[method-assign]
    inputs = expressions_and_images(plain)
    for one, two in zip(train(plain, inputs), train(recomputing, inputs), strict=True):
        assert one.keys() == two.keys()
        for name, gradient in one.items():
            torch.testing.assert_close(two[name], gradient, atol=1e-5, rtol=1e-4)


@every
def test_compiles_without_graph_breaks(method: Method, pair: str) -> None:
    model = grounding(pair, method)
    inputs = expressions_and_images(model)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*inputs), model(*inputs), atol=1e-5, rtol=1e-5)


@every
def test_bf16_encoders_run_without_nan_and_trained_tensors_stay_fp32(method: Method, pair: str) -> None:
    vision, text = (build(n).bfloat16() for n in PAIRS[pair])
    like = grounding(pair)
    model = petl.GroundingModel(vision, text, method, like.image_size, query_length=7, fusion_dim=16, fusion_heads=2,
                                fusion_hidden=24, fusion_layers=2).train()  # fmt: skip
    assert all(p.dtype == torch.float32 for m in (model.petl, model.head) for p in m.parameters())
    images, *rest = expressions_and_images(model)
    boxes = model(images.bfloat16(), *rest)
    assert boxes.dtype == torch.float32
    boxes.pow(2).sum().backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients
    assert all(g.isfinite().all() for g in gradients)


@every
def test_batch_of_one_equals_its_row_of_a_batch(method: Method, pair: str) -> None:
    model = grounding(pair, method)
    inputs = expressions_and_images(model)
    whole = model(*inputs)
    single = torch.cat([model(*(t[i : i + 1] for t in inputs)) for i in range(3)])
    torch.testing.assert_close(single, whole, atol=2e-5, rtol=1e-4)


@every
def test_deepcopy_and_pickle_are_independent(method: Method, pair: str) -> None:
    model = grounding(pair, method)
    inputs = expressions_and_images(model)
    before = model(*inputs)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(*inputs), before)
        with torch.no_grad():
            for p in twin.parameters():
                p.mul_(1.5)
        assert not torch.equal(twin(*inputs), before)
        assert torch.equal(model(*inputs), before)


@every
def test_threads_do_not_mix_their_passes(method: Method, pair: str) -> None:
    model = grounding(pair, method)
    images, *rest = expressions_and_images(model)
    expected = [model(images + i, *rest) for i in range(3)]
    found: list[list[torch.Tensor]] = [[] for _ in expected]

    def work(i: int) -> None:
        with torch.no_grad():
            found[i].extend(model(images + i, *rest) for _ in range(3))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(expected))]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert all(torch.equal(y, expected[i]) for i, ys in enumerate(found) for y in ys)
    assert [len(ys) for ys in found] == [3] * 3


@pytest.mark.parametrize("name", list(OPTIONS))
def test_options_survive_the_config(name: str) -> None:
    for method in variants(name):
        assert from_dict(method.to_dict()) == method
