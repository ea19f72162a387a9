"""The contract of side networks that explain: every kind of classifier keeps every clause."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import petl
from petl.adapters.artefact import save
from petl.backbones.classifier import Classifier
from petl.methods.attach import attached
from petl.methods.autognothi import AutoGnothi
from petl.models.explained import ExplainedClassifier, Inputs
from petl.nn.head import Head
from petl.nn.shapley import kernel_masks, shapley_loss, uniform_size_masks
from tests.conftest import build, tiny_bert_classifier


def _headed(family: str, method: Any = None) -> nn.Module:
    torch.manual_seed(5)
    model = petl.attach(build(family), method or petl.LinearProbe())
    return Classifier(model, Head("linear", attached(model).view.width, 4))


def _pooling() -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(2)
    return VisionTransformer(img_size=32, patch_size=8, embed_dim=24, depth=3, num_heads=3, mlp_ratio=2, num_classes=4,
                             class_token=False, global_pool="avg").eval()  # fmt: skip


CLASSIFIERS: dict[str, Callable[[], nn.Module]] = {
    "timm_vit": lambda: build("timm_vit"),
    "timm_average_pool": _pooling,
    "timm_dinov2": lambda: _headed("timm_dinov2"),
    "timm_clip": lambda: build("timm_clip"),
    "hf_vit": lambda: build("hf_vit"),
    "hf_clip_vision": lambda: _headed("hf_clip_vision"),
    "sparse_tuning": lambda: _headed("timm_vit", petl.SparseTuning(keep_rate=1.0)),
    "ladder_side_tuning": lambda: _headed("timm_vit", petl.LadderSideTuning(reduction=4)),
    "ladder_on_clip": lambda: _headed("hf_clip_vision", petl.LadderSideTuning(reduction=4)),
    "full_fine_tuning": lambda: _headed("hf_vit", petl.FullFineTuning()),
    "hf_bert": lambda: tiny_bert_classifier()[0],
}
every = pytest.mark.parametrize("kind", CLASSIFIERS)


def explained(kind: str, **options: Any) -> ExplainedClassifier:
    torch.manual_seed(11)
    tokenizer = tiny_bert_classifier()[1] if kind == "hf_bert" else None
    model = ExplainedClassifier(CLASSIFIERS[kind](), AutoGnothi(**({"reduction": 4} | options)), tokenizer)
    with torch.no_grad():
        for p in model.petl.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model.eval()


def batch(kind: str, count: int = 3) -> Inputs:
    generator = torch.Generator().manual_seed(4)
    if kind != "hf_bert":
        return torch.randn(count, 3, 32, 32, generator=generator)
    texts = ["a fine film", "dull", "a dull and empty film with a fine ending"]
    found = tiny_bert_classifier()[1](texts[:count], padding=True, return_tensors="pt")
    return {k: found[k] for k in ("input_ids", "attention_mask")}


def coalitions(model: ExplainedClassifier, x: Inputs, count: int = 6) -> Tensor:
    players = model.players(x)
    masks = kernel_masks(players.counts, count, torch.Generator().manual_seed(9), players=players.most)
    masks[:, 0], masks[:, 1] = False, players.valid
    return masks


def loss(model: ExplainedClassifier, x: Inputs, stage: str) -> Tensor:
    players = model.players(x)
    if stage == "surrogate":
        return model.surrogate_logits(x, uniform_size_masks(players.counts)).square().sum()
    masks = coalitions(model, x)
    found = model.explain(x)
    return shapley_loss(found.values, masks, model.values(x, masks) + 0.1, found.null, players.counts)


@every
def test_the_prediction_is_bit_identical_before_during_and_after_training(kind: str) -> None:
    x, plain = batch(kind), CLASSIFIERS[kind]()
    out = plain(**x) if isinstance(x, dict) else plain(x)
    before = getattr(out, "logits", out)
    model = explained(kind)
    state = {k: v.clone() for k, v in model.classifier.state_dict().items()}
    assert torch.equal(before, model.logits(x))
    model.train()
    optimizer = torch.optim.AdamW(model.petl.parameters(), lr=1e-2)
    for stage in ("surrogate", "explainer", "surrogate", "explainer"):
        optimizer.zero_grad()
        loss(model, x, stage).backward()
        optimizer.step()
        assert torch.equal(before, model.logits(x))
        assert torch.equal(before, model.explain(x).logits)
    assert all(torch.equal(v, state[k]) for k, v in model.classifier.state_dict().items())
    assert all(p.grad is None for p in model.classifier.parameters())


@every
def test_each_stage_gives_its_tensors_gradients_and_no_others(kind: str) -> None:
    model, x = explained(kind), batch(kind)
    for stage, other in (("surrogate", "explainer"), ("explainer", "surrogate")):
        model.zero_grad()
        loss(model, x, stage).backward()
        silent = [n for n, p in getattr(model.petl, stage).named_parameters() if p.grad is None or not p.grad.any()]
        silent = [n for n in silent if not n.endswith("qkv.bias")]  # its key part cannot matter in softmax
        assert not silent, stage
        assert all(p.grad is None for p in getattr(model.petl, other).parameters())


@every
@pytest.mark.parametrize("gather", [True, False])
def test_a_removed_player_influences_nothing(kind: str, gather: bool) -> None:
    model, x = explained(kind), batch(kind)
    model.gather = gather
    masks = coalitions(model, x)
    masks[:, :, 0] = False
    before, changed = model.values(x, masks), copy.deepcopy(x)
    of = model.players(x).of
    if isinstance(changed, dict):
        changed["input_ids"] = torch.where(of == 0, 9, changed["input_ids"])
        if bool((model.players(changed).counts != model.players(x).counts).any()):
            pytest.fail("the changed word is no player any more")
    else:
        patches = (of[:, model.view.prefix_tokens :] == 0).unflatten(1, (4, 4))
        pixels = patches.repeat_interleave(8, 1).repeat_interleave(8, 2)[:, None].expand_as(changed)
        changed[pixels] = 17.0
    assert not torch.equal(model.logits(x), model.logits(changed))
    assert torch.equal(before, model.values(changed, masks))


@every
def test_running_the_kept_tokens_alone_equals_masking_the_others(kind: str) -> None:
    model, x = explained(kind), batch(kind)
    masks = coalitions(model, x, 10)
    gathered = model.values(x, masks)
    model.gather = False
    torch.testing.assert_close(gathered, model.values(x, masks), atol=2e-6, rtol=1e-5)


@every
def test_the_ends_of_the_game(kind: str) -> None:
    model, x = explained(kind), batch(kind)
    masks, found = coalitions(model, x), model.explain(x)
    values = model.values(x, masks)
    torch.testing.assert_close(values[:, 0], found.null, atol=1e-6, rtol=0)
    torch.testing.assert_close(values[:, 1], found.grand, atol=1e-6, rtol=0)
    assert bool(values.isfinite().all())
    if isinstance(x, Tensor):
        assert torch.equal(found.null[0], found.null[1])


@every
def test_efficiency_over_the_players_alone(kind: str) -> None:
    model, x = explained(kind), batch(kind)
    with torch.no_grad():
        bias: Tensor = model.petl.explainer.mlp[-1].bias.mul_(1e3)  # type: ignore[operator,union-attr,assignment]
        found = model.explain(x)
    assert found.efficiency_gap.max() <= 1e-5 * (1 + bias.abs().max())
    assert not found.values[~found.players.valid].any()


@every
def test_the_formula_counts_the_parameters(kind: str) -> None:
    model = explained(kind)
    found = tuple(sum(p.numel() for p in m.parameters()) for m in (model.petl.surrogate, model.petl.explainer))
    assert found == model.method.explainer_parameter_count(model.view, model.petl.classes)


@every
def test_the_classifier_stays_in_eval(kind: str) -> None:
    model = explained(kind).train()
    assert model.petl.training
    assert not [n for n, m in model.classifier.named_modules() if m.training]


@every
def test_release_gives_the_classifier_back(kind: str) -> None:
    plain, x = CLASSIFIERS[kind](), batch(kind)
    flags = [p.requires_grad for p in plain.parameters()]
    training = [m.training for m in plain.modules()]
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in plain.modules())
    tokenizer = tiny_bert_classifier()[1] if kind == "hf_bert" else None
    model = ExplainedClassifier(plain, AutoGnothi(reduction=4), tokenizer)
    model.explain(x)
    assert model.release() is plain
    assert [p.requires_grad for p in plain.parameters()] == flags
    assert [m.training for m in plain.modules()] == training
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in plain.modules()) == hooks


@every
def test_saved_and_loaded_on_the_same_classifier_it_explains_alike(kind: str, tmp_path) -> None:
    model, x = explained(kind), batch(kind)
    model.measure_null(x)
    save(model, tmp_path / "adapter")
    tokenizer = tiny_bert_classifier()[1] if kind == "hf_bert" else None
    loaded = petl.load(tmp_path / "adapter", backbone=CLASSIFIERS[kind](), tokenizer=tokenizer)
    with torch.no_grad():
        assert torch.equal(petl.explain(loaded.model, x).values, model.explain(x).values)


@every
def test_it_is_refused_on_another_classifier(kind: str, tmp_path) -> None:
    model = explained(kind)
    save(model, tmp_path / "adapter")
    other = CLASSIFIERS[kind]()
    with torch.no_grad():  # the head: the backbone is the same
        head = [p for n, p in other.named_parameters() if n.startswith(("head.", "classifier."))]
        head[0].add_(1e-3)
    flags = [p.requires_grad for p in other.parameters()]
    tokenizer = tiny_bert_classifier()[1] if kind == "hf_bert" else None
    with pytest.raises(petl.PetlError, match="other weights"):
        petl.load(tmp_path / "adapter", backbone=other, tokenizer=tokenizer)
    assert [p.requires_grad for p in other.parameters()] == flags


@every
def test_copies_and_threads_do_not_disturb_each_other(kind: str) -> None:
    model, x = explained(kind), batch(kind)
    twin = copy.deepcopy(model)
    expected, results = model.explain(x).values, {}
    assert torch.equal(twin.explain(x).values, expected)

    def work(i: int) -> None:
        for _ in range(5):
            results[i] = (model.explain(x).values, model.logits(x), model.values(x, coalitions(model, x)))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 3
    assert all(torch.equal(v[0], expected) and torch.equal(v[1], model.logits(x)) for v in results.values())


@every
def test_bf16_classifier_runs_without_nan(kind: str) -> None:
    model, x = explained(kind), batch(kind)
    for name, tensor in (*model.classifier.named_parameters(), *model.classifier.named_buffers()):
        if "petl." not in name and tensor.is_floating_point():  # trained tensors stay fp32, as after petl.attach
            tensor.data = tensor.data.bfloat16()
    x = x.bfloat16() if isinstance(x, Tensor) else x
    found = model.explain(x)
    assert bool(found.values.isfinite().all())
    assert found.values.dtype == torch.float32
    assert found.efficiency_gap.max() <= 1e-5
    assert bool(model.values(x, coalitions(model, x)).isfinite().all())


@every
def test_one_input_is_enough(kind: str) -> None:
    model, x = explained(kind), batch(kind, 1)
    loss(model, x, "surrogate").backward()
    loss(model, x, "explainer").backward()


def test_prediction_compiles_without_graph_breaks() -> None:
    model, x = explained("timm_vit"), batch("timm_vit")
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), model(x))


def test_explaining_retains_the_taps_and_little_else() -> None:
    """What autograd keeps per image: block outputs and narrow side activations, nothing of the classifier's blocks."""
    from petl.costs import count_saved_bytes

    class Full(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = build("timm_vit").requires_grad_(True)

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

    class Side(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = explained("timm_vit", reduction=8)

        def forward(self, x: Tensor) -> Tensor:
            return self.model.explain(x, self.model.petl.null.nan_to_num(), torch.ones(len(x), 5)).values

    x = torch.randn(8, 3, 32, 32)
    assert count_saved_bytes(Side(), x) < 0.6 * count_saved_bytes(Full(), x)  # 0.2 at ViT-B: recipes/bench_explain.py


def test_token_dropping_is_refused_with_the_reason() -> None:
    with pytest.raises(petl.PetlError, match="drops tokens"):
        ExplainedClassifier(_headed("timm_vit", petl.SparseTuning(keep_rate=0.7)))
    with pytest.raises(petl.PetlError, match="drops tokens"):
        ExplainedClassifier(_headed("timm_vit", petl.EViT()))


def test_mean_removal_replaces_the_pixels() -> None:
    model, x = explained("timm_vit", removal="mean"), batch("timm_vit")
    masks = coalitions(model, x)
    masks[:, :, 0] = False
    changed = x.clone()
    changed[:, :, :8, :8] = 5.0
    assert torch.equal(model.values(x, masks), model.values(changed, masks))
    torch.testing.assert_close(model.values(x, masks)[:, 1:2], model.values(x * 1, masks)[:, 1:2])


def test_players_are_words_and_pieces_belong_together() -> None:
    model, tokenizer = explained("hf_bert"), tiny_bert_classifier()[1]
    found = tokenizer(["dull endings", "film"], padding=True, return_tensors="pt")
    pieces = tokenizer.convert_ids_to_tokens(found["input_ids"][0])
    assert pieces == ["[CLS]", "dull", "ending", "##s", "[SEP]"]
    players = model.players(dict(found))
    assert players.of.tolist() == [[-1, 0, 1, 1, -1], [-1, 0, -1, -2, -2]]
    assert players.counts.tolist() == [2, 1]
    single = explained("hf_bert", whole_words=False).players(dict(found))
    assert single.counts.tolist() == [3, 1]


def test_texts_without_a_word_have_no_values() -> None:
    model, tokenizer = explained("hf_bert"), tiny_bert_classifier()[1]
    found = model.explain(dict(tokenizer(["", ""], padding=True, return_tensors="pt")))
    assert found.values.shape == (2, 0, 2)
    torch.testing.assert_close(found.null, found.grand)
