"""Full fine-tuning: learning rates by layer, activation checkpointing of blocks whatever they are."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from timm.models.vision_transformer import ParallelScalingBlock
from torch import nn

import petl
from petl.backbones import image_encoder, text_encoder
from petl.costs import count_saved_bytes
from petl.methods.attach import attached
from tests.conftest import SMALL_FUSION, _timm, build, outputs


@pytest.mark.parametrize(
    ("family", "layers"),
    [
        ("timm_clip", {"cls_token": 0, "pos_embed": 0, "patch_embed.proj.weight": 0, "norm_pre.bias": 0,
                       "blocks.0.norm1.weight": 1, "blocks.3.mlp.fc2.bias": 4, "norm.weight": 5, "head.weight": 5}),
        ("timm_dinov2", {"reg_token": 0, "blocks.2.ls1.gamma": 3, "norm.bias": 5}),
        ("hf_vit", {"vit.embeddings.cls_token": 0, "vit.layers.1.mlp.fc1.weight": 2, "vit.layernorm.bias": 5,
                    "classifier.weight": 5}),
        ("hf_clip_vision", {"embeddings.class_embedding": 0, "pre_layrnorm.weight": 0,
                            "encoder.layers.0.layer_norm1.bias": 1, "post_layernorm.weight": 5}),
    ],
)  # fmt: skip
def test_learning_rates_fall_towards_the_embeddings(family: str, layers: dict[str, int]) -> None:
    net = petl.attach(build(family), petl.FullFineTuning(layer_decay=0.5))
    module = attached(net)
    names = {n for n, _ in net.named_parameters()}
    assert layers.keys() <= names
    assert {n: module.lr_scale(n) for n in layers} == {n: 0.5 ** (5 - layer) for n, layer in layers.items()}


@pytest.mark.parametrize(("family", "encoder", "layers"), [
    ("hf_bert", text_encoder, {"embeddings.LayerNorm.weight": 0, "encoder.layer.3.output.dense.weight": 4}),
    ("detr", image_encoder, {"input_projection.weight": 0, "encoder.layers.0.mlp.fc1.weight": 1}),
])  # fmt: skip
def test_learning_rates_of_the_encoders_of_a_pair(family: str, encoder: object, layers: dict[str, int]) -> None:
    from petl.models.grounding import _without_decoder

    view = encoder(_without_decoder(build(family)))
    module = petl.FullFineTuning(layer_decay=0.5).build(view)
    assert layers.keys() <= {n for n, _ in view.model.named_parameters()}
    assert {n: module.lr_scale(n) for n in layers} == {n: 0.5 ** (view.depth + 1 - k) for n, k in layers.items()}


def task(**options: object) -> petl.Classification:
    module = petl.Classification(_timm(num_classes=0), petl.FullFineTuning(**options), lr=0.1, num_classes=3)
    module.trainer = SimpleNamespace(datamodule=None)
    module.setup("fit")
    return module


def test_one_group_without_decay_so_that_older_run_states_still_fit() -> None:
    module = task()
    [group] = module.parameter_groups()
    assert [id(p) for p in group["params"]] == [id(p) for p in module.model.parameters() if p.requires_grad]
    assert group["lr"] == 0.1


def test_groups_of_the_optimiser() -> None:
    module = task(layer_decay=0.5)
    groups = module.parameter_groups()
    rate = {id(p): g["lr"] for g in groups for p in g["params"]}
    assert rate.keys() == {id(p) for p in module.model.parameters() if p.requires_grad}
    assert sum(len(g["params"]) for g in groups) == len(rate)
    assert sorted(g["lr"] for g in groups) == pytest.approx([0.1 * 0.5**k for k in range(5, -1, -1)])
    model = module.model
    for parameter, expected in (
        (model.head.fc.weight, 0.1),
        (model.backbone.norm.weight, 0.1),
        (model.backbone.blocks[3].norm1.weight, 0.05),
        (model.backbone.cls_token, 0.1 / 32),
    ):
        assert rate[id(parameter)] == pytest.approx(expected)  # fmt: skip


def test_groups_of_a_grounding_model() -> None:
    module = petl.Grounding(
        build("detr"), build("hf_bert"), petl.FullFineTuning(layer_decay=0.5), 96, tokenizer=SimpleNamespace(),
        lr=0.1, method_lr=0.01, **SMALL_FUSION,
    )  # fmt: skip
    head, *rest = module.parameter_groups()
    assert {id(p) for p in head["params"]} == {id(p) for p in module.model.head.parameters()}
    rate = {id(p): g["lr"] for g in rest for p in g["params"]}
    assert rate[id(module.model.text.encoder.layer[0].output.dense.weight)] == pytest.approx(0.01 / 16)
    assert rate[id(module.model.vision.encoder.layers[2].mlp.fc1.weight)] == pytest.approx(0.005)
    assert len(rest) == 5  # 1/2 to 1/32: layers of 4 and 3 blocks below a final norm that neither has


def plain_and_recomputing(family: str) -> list[nn.Module]:
    found = []
    for checkpointing in (False, True):
        net = petl.attach(_timm_parallel() if family == "parallel" else build(family), petl.FullFineTuning())
        attached(net).checkpointing = checkpointing
        found.append(net.train())
    return found


def _timm_parallel() -> nn.Module:
    torch.manual_seed(7)
    return _timm(block_fn=ParallelScalingBlock, drop_path_rate=0.3)


@pytest.mark.parametrize("family", ["timm_clip", "timm_dinov2", "hf_vit", "hf_clip_vision", "parallel"])
def test_checkpointing_gives_equal_gradients_with_live_dropout_and_keeps_less(
    family: str, images: torch.Tensor
) -> None:
    gradients, kept = [], []
    for net in plain_and_recomputing(family):
        torch.manual_seed(3)
        outputs(net, images).square().sum().backward()
        gradients.append({n: p.grad for n, p in net.named_parameters() if p.grad is not None})
        kept.append(count_saved_bytes(net, images))
    plain, recomputed = gradients
    assert plain.keys() == recomputed.keys()
    assert any(n.startswith(("blocks.0", "vit.layers.0", "encoder.layers.0")) for n in plain)
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient, atol=1e-6, rtol=1e-5)
    assert kept[1] < 0.5 * kept[0]


def test_blocks_get_their_own_forward_back(images: torch.Tensor) -> None:
    net = petl.attach(build("timm_vit"), petl.FullFineTuning(layers=(1, 3)))
    attached(net).checkpointing = True
    assert ["forward" in b.__dict__ for b in net.blocks] == [False, True, True, True]
    before = net(images)
    assert torch.equal(petl.merge(net)(images), before)
    assert not any("forward" in b.__dict__ for b in net.blocks)


@pytest.mark.parametrize("decay", [0, 1.5, -1, "0.5", float("nan")])
def test_bad_decays(decay: object) -> None:
    with pytest.raises(petl.PetlError, match="layer_decay"):
        petl.FullFineTuning(layer_decay=decay)
