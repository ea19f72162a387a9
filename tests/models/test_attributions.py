"""Every attribution on a timm ViT, an HF ViT, a CLIP classifier and a BERT: defined properties, model left alone."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import petl
from petl import PetlError
from petl.models import attributions as A
from petl.models.explained import ExplainedClassifier
from petl.nn.head import Head
from petl.nn.shapley import coalitions, exact_shapley
from tests.conftest import build

WORDS = ["good", "bad", "film", "a", "very", "play", "##ing", "##er", "dull"]
SENTENCES = ("a very good film", "playing a player", "", "dull")  # 4, 3, 0 and 1 words
VISION = ("timm_vit", "timm_dinov2", "hf_vit", "hf_clip_vision")


def head_on(backbone: nn.Module, classes: int = 5) -> nn.Module:
    classifier = petl.Classifier(backbone, Head("linear", 24, classes))
    nn.init.normal_(classifier.head.fc.weight)
    return classifier.eval()


def vision(family: str = "timm_vit", players: tuple[int, int] | None = None, **options: Any) -> ExplainedClassifier:
    classifier = build(family)
    if family in ("hf_clip_vision", "timm_dinov2"):
        classifier = head_on(classifier)
    return sided(classifier, petl.AutoGnothi(reduction=4, players=players, **options))


def sided(classifier: nn.Module, method: petl.AutoGnothi, tokenizer: Any = None) -> ExplainedClassifier:
    """With random side networks whose values differ from coalition to coalition."""
    torch.manual_seed(11)
    model = ExplainedClassifier(classifier, method, tokenizer)
    with torch.no_grad():
        for name, p in model.petl.named_parameters():
            p.normal_(1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.4)
    return model.eval()


def text(folder: Path, sentences: tuple[str, ...] = SENTENCES) -> tuple[ExplainedClassifier, Mapping[str, Tensor]]:
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

    vocabulary = folder / "vocab.txt"
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]) + "\n")
    tokenizer = BertTokenizerFast(vocab=str(vocabulary))
    torch.manual_seed(7)
    bert = BertForSequenceClassification(
        BertConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_labels=3,
                   vocab_size=len(tokenizer), max_position_embeddings=16, initializer_range=0.2)
    ).eval()  # fmt: skip
    batch = tokenizer(list(sentences), padding=True, return_tensors="pt")
    return sided(bert, petl.AutoGnothi(reduction=4), tokenizer), {k: batch[k] for k in ("input_ids", "attention_mask")}


def probabilities(model: ExplainedClassifier, x: Any, classes: Tensor) -> Tensor:
    with torch.no_grad():
        return model.link(model.logits(x)).gather(1, classes[:, None])[:, 0]


def predicted(model: ExplainedClassifier, x: Any) -> Tensor:
    with torch.no_grad():
        return model.logits(x).argmax(-1)


def seeded(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def state(model: nn.Module) -> list[Any]:
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in model.modules()]
    modes = [m.training for m in model.modules()]
    return [hooks, modes, [(p.requires_grad, p.grad is None, p._version) for p in model.parameters()]]


def check(model: ExplainedClassifier, x: Any, classes: Tensor) -> None:
    """Every attribution: shape, finite, zero beyond the players, nothing changed, the same from the same seed."""
    valid, before, logits = model.players(x).valid, state(model), model.logits(x).detach()
    for name, attribution in A.ATTRIBUTIONS.items():
        phi = attribution(model, x, classes, seeded())
        assert phi.shape == valid.shape, name
        assert phi.dtype == torch.float32, name
        assert not phi.requires_grad, name
        assert phi.isfinite().all(), name
        assert not phi[~valid].any(), name
        assert all((row != 0).any() for row, there in zip(phi, valid, strict=True) if there.any()), name
        assert torch.equal(attribution(model, x, classes, seeded()), phi), name
        assert state(model) == before, name
    assert torch.equal(model.logits(x), logits)


@pytest.mark.parametrize("family", VISION)
def test_every_attribution_on_images(family: str, images: Tensor) -> None:
    model = vision(family)
    before = images.clone()
    check(model, images, predicted(model, images))
    assert torch.equal(images, before)
    assert not images.requires_grad


def test_every_attribution_beside_an_adapter(images: Tensor) -> None:
    model = adapted(petl.SparseTuning(keep_rate=1.0))
    check(model, images, predicted(model, images))


def adapted(method: Any) -> ExplainedClassifier:
    return sided(head_on(petl.attach(build("timm_vit"), method)), petl.AutoGnothi(reduction=4))


def test_a_classifier_without_gradients_says_so(images: Tensor) -> None:
    model = adapted(petl.LadderSideTuning(reduction=4))  # runs the blocks under no_grad, and has attention beside them
    assert [m.shape for m in A.attention_maps(model, images)] == [(3, 17, 17)] * 4
    before, classes = state(model), predicted(model, images)
    for name in ("gradcam", "integrated gradients"):
        with pytest.raises(PetlError, match="no gradient comes through this classifier"):
            A.ATTRIBUTIONS[name](model, images, classes, None)
    assert state(model) == before


def test_every_attribution_on_texts_of_any_length(tmp_path: Path) -> None:
    model, batch = text(tmp_path)
    assert model.players(batch).counts.tolist() == [4, 3, 0, 1]
    check(model, batch, predicted(model, batch))
    check(model, {k: v[2:3] for k, v in batch.items()}, torch.tensor([1]))  # nobody plays


def test_the_side_networks_may_be_in_training(images: Tensor) -> None:
    model = vision()
    model.train()
    check(model, images, predicted(model, images))
    assert model.training
    assert not model.classifier.training


def test_gradients_work_where_autograd_is_off(images: Tensor, tmp_path: Path) -> None:
    for model, x in ((vision(), images), text(tmp_path)):
        classes = predicted(model, x)
        for name in ("gradcam", "integrated gradients"):
            expected = A.ATTRIBUTIONS[name](model, x, classes, None)
            with torch.inference_mode():
                inside = {k: v + 0 for k, v in x.items()} if isinstance(x, Mapping) else x + 0
                assert torch.equal(A.ATTRIBUTIONS[name](model, inside, classes + 0, None), expected)


def test_texts_alone_and_beside_longer_ones_are_attributed_alike(tmp_path: Path) -> None:
    model, batch = text(tmp_path)
    classes = predicted(model, batch)
    length = int(batch["attention_mask"][0].sum())
    alone = {k: v[:1, :length] for k, v in batch.items()}
    for name in set(A.ATTRIBUTIONS) - {"random", "rise"}:
        phi = A.ATTRIBUTIONS[name](model, batch, classes, None)[0, :4]
        torch.testing.assert_close(A.ATTRIBUTIONS[name](model, alone, classes[:1], None)[0], phi, rtol=1e-4, atol=1e-6)


# ---- attention


def reference_maps(model: ExplainedClassifier, x: Tensor) -> list[Tensor]:
    """Attention of a timm ViT from the weights, another way."""
    maps, tokens = [], {}
    blocks = model.view.block_modules()
    handles = [b.attn.register_forward_pre_hook(lambda m, args: tokens.__setitem__(m, args[0])) for b in blocks]
    with torch.no_grad():
        model.logits(x)
        for handle in handles:
            handle.remove()
        for attn in (b.attn for b in blocks):
            q, k, _ = attn.qkv(tokens[attn]).unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
            q, k = attn.q_norm(q), attn.k_norm(k)
            maps.append((torch.einsum("bhid,bhjd->bhij", q, k) * attn.head_dim**-0.5).softmax(-1).mean(1))
    return maps


@pytest.mark.parametrize("family", ["timm_vit", "timm_dinov2"])
@pytest.mark.parametrize("fused", [True, False])
def test_attention_maps_are_what_the_blocks_use(family: str, fused: bool, images: Tensor) -> None:
    model = vision(family)
    for block in model.view.block_modules():
        block.attn.fused_attn = fused
    maps = A.attention_maps(model, images)
    for seen, expected in zip(maps, reference_maps(model, images), strict=True):
        torch.testing.assert_close(seen, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", ["hf_vit", "hf_bert"])
def test_attention_maps_do_not_depend_on_the_implementation(family: str, images: Tensor, tmp_path: Path) -> None:
    model, x = (vision(family), images) if family == "hf_vit" else text(tmp_path)
    fused = A.attention_maps(model, x)
    model.classifier.set_attn_implementation("eager")
    for seen, expected in zip(A.attention_maps(model, x), fused, strict=True):
        torch.testing.assert_close(seen, expected, rtol=1e-5, atol=1e-6)
    if isinstance(x, Mapping):
        assert not any(m.transpose(1, 2)[x["attention_mask"] == 0].any() for m in fused), "padding is attended to"


def test_an_attention_that_is_not_seen_is_an_error(images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    model = vision()
    block = model.view.block_modules()[1]
    monkeypatch.setattr(block.attn, "forward", lambda x, **kwargs: x)
    with pytest.raises(PetlError, match="3 attention maps were seen in 4 blocks"):
        A.attention_rollout(model, images, torch.zeros(3, dtype=torch.long))


def test_rollout_rows_sum_to_one_and_follow_the_blocks(images: Tensor) -> None:
    model = vision(players=(2, 2))
    maps = A.attention_maps(model, images)
    joint = A.rollout(maps)
    assert joint.shape == (3, 17, 17)
    torch.testing.assert_close(joint.sum(-1), torch.ones(3, 17))
    # one-block rollouts: half of each token's own, half of what it attends to
    torch.testing.assert_close(A.rollout(maps[:1]), maps[0] / 2 + torch.eye(17) / 2)
    first = torch.tensor([[[0.0, 1.0], [0.0, 1.0]]])  # token 0 reads token 1
    second = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]])  # then token 1 reads token 0
    assert A.rollout([first, second]).tolist() == [[[0.5, 0.5], [0.25, 0.75]]]
    # the class token's row, summed over the patches of a player
    phi = A.attention_rollout(model, images, torch.zeros(3, dtype=torch.long))
    expected = joint[:, 0, 1:].unflatten(1, (2, 2, 2, 2)).sum((2, 4)).flatten(1)
    torch.testing.assert_close(phi, expected)
    last = A.attention_last(model, images, torch.zeros(3, dtype=torch.long))
    torch.testing.assert_close(last, maps[-1][:, 0, 1:].unflatten(1, (2, 2, 2, 2)).sum((2, 4)).flatten(1))


# ---- gradients


def test_integrated_gradients_are_complete_on_images(images: Tensor) -> None:
    model = vision(players=(2, 3))
    classes = torch.tensor([4, 0, 2])
    phi = A.integrated_gradients(model, images, classes, steps=100)
    change = probabilities(model, images, classes) - probabilities(model, torch.zeros_like(images), classes)
    assert change.abs().min() > 1e-3
    torch.testing.assert_close(phi.sum(1), change, rtol=1e-3, atol=1e-4)
    # in chunks of few rows as at once
    torch.testing.assert_close(A.integrated_gradients(model, images, classes, steps=100, rows=7), phi)


def test_integrated_gradients_are_complete_on_words(tmp_path: Path) -> None:
    model, batch = text(tmp_path)
    classes = predicted(model, batch)
    phi = A.integrated_gradients(model, batch, classes, steps=200)
    words = (model.players(batch).of >= 0)[..., None]
    handle = model.view.block_modules()[0].register_forward_pre_hook(
        lambda module, args: (args[0].masked_fill(words, 0.0), *args[1:])
    )
    blank = probabilities(model, batch, classes)
    handle.remove()
    change = probabilities(model, batch, classes) - blank
    assert change[[0, 1, 3]].abs().min() > 1e-3
    torch.testing.assert_close(phi.sum(1), change, rtol=1e-2, atol=1e-3)


def test_integrated_gradients_put_each_pixel_to_its_player() -> None:
    model = vision(players=(2, 2))
    x = torch.zeros(1, 3, 32, 32)
    x[0, :, 20:30, 2:9] = 1.0  # lower left; elsewhere the picture is the baseline
    phi = A.integrated_gradients(model, x, torch.tensor([0]))
    assert (phi != 0).tolist() == [[False, False, True, False]]


@pytest.mark.parametrize("family", ["timm_vit", "hf_clip_vision"])
def test_gradcam_is_activation_times_mean_gradient(family: str, images: Tensor) -> None:
    model = vision(family)
    classes = torch.tensor([1, 3, 0])
    phi = A.gradcam(model, images, classes)
    block: Any = model.view.block_modules()[-1]
    norm = block.norm1 if family == "timm_vit" else block.layer_norm1
    kept: list[Tensor] = []
    handle = norm.register_forward_hook(lambda m, args, out: kept.append(out.requires_grad_()) or out)
    model.logits(images).gather(1, classes[:, None]).sum().backward(inputs=kept)
    handle.remove()
    tokens, slope = kept[0].detach()[:, 1:], kept[0].grad[:, 1:]
    assert slope.abs().max() > 1e-3
    torch.testing.assert_close(phi, (tokens * slope.mean(1, keepdim=True)).sum(2), rtol=1e-4, atol=1e-6)


def test_gradcam_of_words_reads_the_last_layer_s_input(tmp_path: Path) -> None:
    model, batch = text(tmp_path, ("very good film",))
    phi = A.gradcam(model, batch, torch.tensor([2]))
    kept: list[Tensor] = []

    def watch(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        kept.append(args[0].detach().requires_grad_())
        return (kept[0], *args[1:])

    handle = model.view.block_modules()[-1].register_forward_pre_hook(watch)
    model.logits(batch)[0, 2].backward(inputs=kept)
    handle.remove()
    tokens, slope = kept[0].detach()[0, 1:4], kept[0].grad[0, 1:4]
    torch.testing.assert_close(phi[0], (tokens * slope.mean(0)).sum(1), rtol=1e-4, atol=1e-6)


# ---- the game


def table(model: ExplainedClassifier, x: Any, classes: Tensor, n: int) -> Tensor:
    everything = coalitions(n).expand(len(classes), -1, -1)
    return model.values(x, everything).gather(2, classes[:, None, None].expand(-1, 2**n, 1))


def recorded(model: ExplainedClassifier, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Gets the coalitions of every later call of ``model.values``."""
    values, asked = model.values, []

    def watched(x: Any, masks: Tensor, players: Any = None) -> Tensor:
        asked.append(masks)
        return values(x, masks, players)

    monkeypatch.setattr(model, "values", watched)
    return asked


def test_leave_one_out_is_the_difference_to_the_grand_coalition(images: Tensor) -> None:
    model = vision(players=(2, 2))
    classes = torch.tensor([1, 0, 4])
    phi = A.leave_one_out(model, images, classes)
    v = table(model, images, classes, 4)[..., 0]
    torch.testing.assert_close(phi, torch.stack([v[:, 15] - v[:, 15 - 2**i] for i in range(4)], 1))
    assert phi.abs().max() > 1e-3


def test_rise_is_the_mean_value_with_a_player(images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    model = vision(players=(2, 2))
    asked = recorded(model, monkeypatch)
    classes = torch.tensor([1, 0, 4])
    phi = A.rise(model, images, classes, seeded(), subsets=400)
    masks = asked.pop()
    assert masks.shape == (3, 400, 4)
    assert 0.45 < masks.float().mean() < 0.55
    assert not torch.equal(masks[0], masks[1])
    v = model.values(images, masks)
    expected = [[v[b, masks[b, :, i], c].mean() for i in range(4)] for b, c in enumerate(classes)]
    torch.testing.assert_close(phi, torch.tensor(expected))
    assert not A.rise(model, images, classes, seeded(), keep=0.0).any()  # a player that was never there


def test_kernelshap_on_all_coalitions_is_exact(images: Tensor) -> None:
    model = vision(players=(2, 3))
    classes = torch.tensor([1, 0, 4])
    exact = exact_shapley(table(model, images, classes, 6))[..., 0]
    torch.testing.assert_close(A.kernelshap(model, images, classes, subsets=2**6 - 2), exact, rtol=1e-4, atol=1e-6)
    sampled = A.kernelshap(model, images, classes, seeded(), subsets=2**6 - 4)
    assert 1e-5 < (sampled - exact).abs().max() < 0.1


def test_kernelshap_takes_the_budget_of_a_training_input(images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(A, "BUDGET", 2)
    model = vision(subsets=6)
    asked, values = recorded(model, monkeypatch), model.values
    phi = A.kernelshap(model, images, torch.zeros(3, dtype=torch.long), seeded())
    (masks,) = asked.copy()
    assert masks.shape == (3, 2 + 6, 16)
    assert not masks[:, 0].any()
    assert masks[:, 1].all()
    assert torch.equal(masks[:, 3::2], ~masks[:, 2::2])
    null, grand = (v[:, 0] for v in values(images, masks[:, :2]).unbind(1))
    torch.testing.assert_close(phi.sum(1), grand - null, rtol=1e-5, atol=1e-6)  # efficiency for any number of draws
    with pytest.raises(PetlError, match="even"):
        A.kernelshap(model, images, torch.zeros(3, dtype=torch.long), subsets=7)


def test_kernelshap_of_texts_is_exact_for_each_length(tmp_path: Path) -> None:
    model, batch = text(tmp_path)
    classes = predicted(model, batch)
    phi = A.kernelshap(model, batch, classes, subsets=14)  # 2^4 - 2
    exact = exact_shapley(table(model, batch, classes, 4))[..., 0]  # players that are not there change nothing
    torch.testing.assert_close(phi, exact, rtol=1e-4, atol=1e-6)


def test_autognothi_gives_the_class_asked_for(images: Tensor) -> None:
    model = vision(players=(2, 2))
    classes = torch.tensor([1, 0, 4])
    values = model.explain(images).values.detach()
    assert torch.equal(
        A.autognothi(model, images, classes), torch.stack([values[i, :, c] for i, c in enumerate(classes)])
    )


def test_names_and_options() -> None:
    assert A.find("rise") is A.rise
    with pytest.raises(PetlError, match="did you mean 'gradcam'"):
        A.find("grad-cam")
    mine = partial(A.rise, subsets=8)
    assert A.find("rise", A.ATTRIBUTIONS | {"rise": mine}) is mine
    assert set(A.SHAPLEY) <= set(A.ATTRIBUTIONS)
