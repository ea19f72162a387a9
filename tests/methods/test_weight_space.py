"""The bridge to peft: counts, targets, equality with plain peft and with the formulas, dropout, precision, merging."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import peft
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

import petl
from petl.adapters.state import set_trained_tensors, trained_tensors
from petl.backbones import view as find_view
from petl.costs import count_saved_bytes
from petl.methods import get_method
from petl.methods.attach import attached
from petl.methods.base import from_dict
from petl.methods.peft_generic import UNFIT, weight_space_types
from petl.methods.peft_tuner import MERGE_LOSS, PeftModule
from tests.conftest import build, outputs


@pytest.fixture(scope="module")
def vit_b() -> nn.Module:
    with torch.device("meta"):
        return timm.create_model("vit_base_patch16_224", num_classes=0)


@pytest.fixture(scope="module")
def hf_vit_b() -> nn.Module:
    from transformers import ViTConfig, ViTModel

    with torch.device("meta"):
        return ViTModel(ViTConfig())


COUNTS = [
    ("lora", {}, 294_912),
    ("lora", {"parts": ("qkv",)}, 294_912),
    ("lora", {"parts": ("qkv", "proj", "fc1", "fc2")}, 1_191_936),  # the end "proj" names the patch embedding too
    ("lora", {"parts": ("qkv", "out", "fc1", "fc2")}, 1_179_648),
    ("dora", {}, 322_560),
    ("adalora", {}, 442_512),
    ("ia3", {}, 64_512),
    ("vera", {}, 30_720),
    ("oft", {}, 142_848),
    ("loha", {}, 589_824),
    ("lokr", {}, 21_504),
    ("fourierft", {}, 12_000),
]


@pytest.mark.parametrize(("name", "options", "count"), COUNTS)
def test_parameter_counts_on_vit_b(vit_b: nn.Module, name: str, options: dict[str, Any], count: int) -> None:
    assert get_method(name)(**options).parameter_count(find_view(vit_b)) == count  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("name", "count"),
    [("lora", 2 * 8 * 2 * 768 * 12), ("dora", 3 * (8 * 2 * 768 + 768) * 12), ("vera", 3 * (256 + 768) * 12),
     ("oft", 3 * 24 * 496 * 12), ("ia3", (3 * 768 + 3072) * 12)],
)  # fmt: skip
def test_parameter_counts_on_split_projections(hf_vit_b: nn.Module, name: str, count: int) -> None:
    assert get_method(name)().parameter_count(find_view(hf_vit_b)) == count


def perturbed(model: nn.Module, scale: float = 0.1) -> nn.Module:
    """Every trained tensor moved, the same way in every model with the same trained tensors."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(scale * torch.randn(p.shape, generator=generator))
    return model


def test_lora_on_parts_of_a_fused_layer_is_the_formula(images: torch.Tensor) -> None:
    model = build("timm_vit")
    frozen = copy.deepcopy(model.blocks[1].attn.qkv)
    perturbed(petl.attach(model, petl.LoRA(r=3, alpha=6, parts=("q", "v"))))
    layer = model.blocks[1].attn.qkv
    x = torch.randn(2, 5, 24)
    expected = frozen(x)
    for i, part in ((0, layer.q), (2, layer.v)):
        rows = slice(24 * i, 24 * (i + 1))
        expected[..., rows] += 2 * x @ part.lora_A["default"].weight.T @ part.lora_B["default"].weight.T
    torch.testing.assert_close(layer(x), expected)
    assert torch.equal(layer(x)[..., 24:48], frozen(x)[..., 24:48]), "k is not adapted"
    assert list(layer.state_dict())[:2] == ["weight", "bias"], "the fused layer keeps its names"
    before = outputs(model, images)
    petl.merge(model)
    torch.testing.assert_close(outputs(model, images), before, atol=1e-5, rtol=0)
    assert list(model.state_dict()) == list(build("timm_vit").state_dict())
    assert torch.equal(model.blocks[1].attn.qkv.weight[24:48], frozen.weight[24:48])


@pytest.mark.parametrize("family", ["timm_vit", "hf_vit"])
def test_computes_what_plain_peft_does(family: str, images: torch.Tensor) -> None:
    targets = ["qkv", "fc1"] if family == "timm_vit" else ["q_proj", "v_proj"]
    plain, model = build(family).requires_grad_(False), build(family)
    torch.manual_seed(0)
    perturbed(peft.inject_adapter_in_model(peft.LoraConfig(r=8, target_modules=targets), plain))
    torch.manual_seed(0)
    petl.attach(model, petl.LoRA(parts=tuple(targets)))
    for _, head in attached(model).view.head_modules():
        head.requires_grad_(False)
    perturbed(model)
    assert torch.equal(outputs(model, images), outputs(plain, images))
    mine, theirs = dict(model.named_modules()), dict(plain.named_modules())
    assert {n: type(m) for n, m in mine.items() if n != "petl"} == {n: type(m) for n, m in theirs.items()}


@pytest.mark.parametrize("entry", ["fc1x", "attn.qvk", r"blocks\.[01\.attn", "layers.3.fc1"])
def test_an_entry_without_a_match_is_an_error_though_others_match(entry: str) -> None:
    model = build("timm_vit")
    before = list(model.state_dict())
    with pytest.raises(petl.PetlError, match="names no layer of this timm_vit") as caught:
        petl.attach(model, petl.LoRA(parts=("qkv", entry)))
    assert list(model.state_dict()) == before
    if entry == "fc1x":
        assert "did you mean 'fc1' or" in str(caught.value)
        assert str(caught.value).count(" or ") == 2, "the three nearest"


def test_targets_by_path_regular_expression_and_part(vit_b: nn.Module) -> None:
    view = find_view(vit_b)

    def names(*parts: str) -> list[str]:
        return [t.name for t in petl.LoRA(parts=parts).find(view)]

    assert names("blocks.3.mlp.fc1") == ["blocks.3.mlp.fc1"]
    assert names(r"blocks\.(10|11)\.attn\.qkv") == ["blocks.10.attn.qkv", "blocks.11.attn.qkv"]
    assert len(names("out")) == 12
    assert len(names("proj")) == 13
    assert names("q")[:2] == ["blocks.0.attn.qkv.q", "blocks.1.attn.qkv.q"]
    assert len(names("q", "k", "q")) == 24


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (lambda: petl.LoRA(parts=("q", "qkv")), "is a target, so its part"),
        (lambda: petl.LoRA(parts=("norm1",)), "changes Linear and Conv2d"),
        (lambda: petl.VeRA(targets=("q",)), "only petl.LoRA splits"),
        (lambda: petl.VeRA(targets=("patch_embed.proj",)), "changes Linear"),
        (lambda: petl.LoRA(parts=("head",)), "names no layer"),
        (lambda: petl.OFT(block_size=7), "does not divide the 24 inputs"),
        (lambda: petl.FourierFT(n=2000), "has no 2000 places"),
        (lambda: petl.Peft("C3A"), "The block size should be a factor"),
        (lambda: petl.Peft("FROD"), "keeps tensors outside the layers"),
        (lambda: petl.Peft("LORA", {"init_lora_weights": "pissa"}), "changes the frozen weights"),
    ],
)
def test_what_does_not_fit_leaves_the_model_as_it_was(method: Any, message: str, images: torch.Tensor) -> None:
    model = build("timm_vit")
    with pytest.raises(petl.PetlError, match=message):
        petl.attach(model, method())
    assert not hasattr(model, "peft_config")
    assert {n: type(m) for n, m in model.named_modules()} == {n: type(m) for n, m in build("timm_vit").named_modules()}
    if "frozen weights" not in message:
        assert torch.equal(outputs(model, images), outputs(build("timm_vit"), images))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: petl.LoRA(parts="qkv"), "give a list"),
        (lambda: petl.LoRA(parts=()), "give a list"),
        (lambda: petl.LoRA(r=0), "r must be"),
        (lambda: petl.DoRA(dropout=1.0), "dropout must be"),
        (lambda: petl.AdaLoRA(target_r=12), "smaller target_r"),
        (lambda: petl.AdaLoRA(start=0.8), "start < end"),
        (lambda: petl.IA3(feedforward=("fc1",)), "none of the targets"),
        (lambda: petl.Peft("PROMPT_TUNING"), "prompts of language models"),
        (lambda: petl.Peft("TRAINABLE_TOKENS"), "embeddings of single tokens"),
        (lambda: petl.Peft("ADALORA"), "petl.AdaLoRA"),
        (lambda: petl.Peft("LOAR"), "no method of peft; did you mean 'LORA'"),
        (lambda: petl.Peft("HRA", {"rr": 4}), "has no option 'rr': did you mean 'r'"),
        (lambda: petl.Peft("HRA", {"target_modules": ["qkv"]}), "give targets"),
        (lambda: petl.Peft("HRA", {"bias": "all"}), "petl.BitFit"),
        (lambda: petl.Peft("HRA", {"r": {1}}), "saved as JSON"),
    ],
)
def test_options_out_of_range_are_refused(make: Any, message: str) -> None:
    with pytest.raises(petl.PetlError, match=message):
        make()


def test_every_type_of_peft_is_offered_or_refused_with_a_reason() -> None:
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    prompts = {"PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CPT", "CARTRIDGE"}
    assert {t.value for t in PEFT_TYPE_TO_CONFIG_MAPPING} == weight_space_types().keys() | UNFIT.keys() | prompts


GENERIC = {
    "BOFT": {"boft_block_size": 4}, "C3A": {"block_size": 8}, "DELORA": {}, "HRA": {"r": 4}, "LN_TUNING": {},
    "MISS": {"r": 4}, "PSOFT": {"r": 4}, "RANDLORA": {}, "ROAD": {"group_size": 8}, "SHIRA": {"r": 4},
    "TINYLORA": {}, "UNILORA": {}, "VBLORA": {"vector_length": 8, "num_vectors": 16}, "WAVEFT": {"n_frequency": 50},
}  # fmt: skip


@pytest.mark.parametrize("kind", GENERIC)
def test_other_types_train_travel_and_merge(kind: str, images: torch.Tensor, tmp_path) -> None:
    method = petl.Peft(kind.lower(), GENERIC[kind], targets=("norm1",) if kind == "LN_TUNING" else ("qkv",))
    assert from_dict(method.to_dict()) == method
    model = petl.attach(build("timm_vit"), method)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad and not n.startswith("head")}
    assert sum(p.numel() for p in trained.values()) == method.parameter_count(attached(model).view)
    before = outputs(perturbed(model, 0.02), images)
    assert not torch.allclose(before, outputs(build("timm_vit"), images), atol=1e-4)
    petl.save(model, tmp_path / "adapter")
    assert torch.equal(outputs(petl.load(tmp_path / "adapter", build("timm_vit")).model, images), before)
    petl.merge(model)
    torch.testing.assert_close(outputs(model, images), before, atol=2e-5, rtol=0)


def test_a_type_without_merge_says_so_and_stays(images: torch.Tensor) -> None:
    model = perturbed(petl.attach(build("timm_vit"), petl.Peft("LILY")))
    before = outputs(model, images)
    with pytest.raises(petl.PetlError, match="no exact merge"):
        petl.merge(model)
    assert torch.equal(outputs(model, images), before)


@pytest.mark.parametrize("parts", [("q", "v"), ("qkv",)])
def test_dropout_is_live_in_training_alone_though_the_backbone_rests(parts: tuple[str, ...], images) -> None:
    model = perturbed(petl.attach(build("timm_vit"), petl.LoRA(parts=parts, dropout=0.5)))
    assert not torch.equal(outputs(model.train(), images), outputs(model, images))
    resting = [n for n, m in model.named_modules() if isinstance(m, nn.Dropout) and not m.training]
    assert resting, "the backbone's own dropout is off"
    assert torch.equal(outputs(model.eval(), images), outputs(model, images))


def test_checkpointing_is_off_in_the_forward_pass_until_wanted(images: torch.Tensor) -> None:
    model = petl.attach(build("timm_vit"), petl.LoRA()).train()
    assert "forward" not in vars(model.blocks[0]), "blocks run as they are"
    plain = count_saved_bytes(model, images)
    attached(model).checkpointing = True
    assert count_saved_bytes(model, images) < plain / 2
    petl.detach(model)
    assert "forward" not in vars(model.blocks[0])


# ---- precision


@pytest.mark.parametrize("name", ["lora", "dora", "adalora", "ia3", "loha", "lokr", "oft", "vera", "fourierft"])
def test_bf16_backbone_keeps_fp32_tensors_and_hands_on_bf16(name: str, images: torch.Tensor) -> None:
    from tests.test_contract import SMALL

    model = petl.attach(build("timm_vit").bfloat16(), get_method(name)(**SMALL.get(name, {})))
    module = attached(model)
    inside = {n: p for n, p in model.named_parameters() if p.requires_grad and not n.startswith("head")}
    assert inside
    assert {p.dtype for p in inside.values()} == {torch.float32}
    assert {t.dtype for n, t in model.state_dict().items() if not module.owns(n)} == {torch.bfloat16}
    assert module.view.features(images.bfloat16()).dtype == torch.bfloat16


def test_lora_on_bf16_keeps_bf16_activations_for_backward(images: torch.Tensor) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    mine = petl.attach(build("timm_vit").bfloat16(), petl.LoRA(parts=("qkv", "fc1", "fc2")))
    plain = build("timm_vit").bfloat16().requires_grad_(False)
    inject_adapter_in_model(LoraConfig(r=8, target_modules=["qkv", "fc1", "fc2"]), plain)
    for layer in (m for m in plain.modules() if hasattr(m, "lora_A")):
        layer.lora_A.float(), layer.lora_B.float()
    mine.head.requires_grad_(False)
    slopes = [
        count_saved_bytes(m, images.bfloat16()) - count_saved_bytes(m, images[:2].bfloat16()) for m in (mine, plain)
    ]
    assert slopes[0] < 0.75 * slopes[1]


@pytest.mark.parametrize("name", ["lora", "ia3", "dora"])
def test_merging_small_changes_into_bf16_is_refused(name: str, images: torch.Tensor) -> None:
    model = perturbed(petl.attach(build("timm_vit").bfloat16(), get_method(name)()), 1e-3)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    before = outputs(model, images.bfloat16())
    with pytest.raises(petl.PetlError, match=r"weights in bfloat16 change .* by up to .*%.* of all") as caught:
        petl.merge(model)
    share = int(str(caught.value).split("%")[0].split()[-1])
    assert share > 100 * MERGE_LOSS
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(v, state[k]) and v.dtype == state[k].dtype for k, v in model.state_dict().items())
    assert torch.equal(outputs(model, images.bfloat16()), before)
    wanted = outputs(model.float(), images)
    torch.testing.assert_close(outputs(petl.merge(model), images), wanted, atol=1e-5, rtol=0)


def test_merging_large_changes_into_bf16_rounds_once() -> None:
    model = perturbed(petl.attach(build("timm_vit").bfloat16(), petl.LoRA()), 0.5)
    frozen = build("timm_vit").bfloat16().blocks[0].attn.qkv.weight
    part = model.blocks[0].attn.qkv.v
    change = (part.lora_B["default"].weight @ part.lora_A["default"].weight).detach()
    petl.merge(model)
    weight = model.blocks[0].attn.qkv.weight
    assert weight.dtype == torch.bfloat16
    assert torch.equal(weight[48:], (frozen[48:].float() + change).bfloat16())


def test_a_quantised_base_is_not_merged(images: torch.Tensor) -> None:
    class Int8(nn.Linear):
        """Weights in 256 levels."""

        def __init__(self, layer: nn.Linear) -> None:
            super().__init__(layer.in_features, layer.out_features, device="meta")
            self.scale = layer.weight.detach().abs().max() / 127
            self.weight = nn.Parameter((layer.weight.detach() / self.scale).round().to(torch.int8), False)
            self.bias = nn.Parameter(layer.bias.detach())

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.linear(x, self.weight.float() * self.scale, self.bias)

    model = build("timm_vit")
    for block in model.blocks:
        block.mlp.fc1 = Int8(block.mlp.fc1)
    perturbed(petl.attach(model, petl.LoRA(parts=("fc1",))))
    before = outputs(model, images)
    with pytest.raises(petl.PetlError, match=r"'blocks.0.mlp.fc1' is quantised \(Int8, torch.int8\)"):
        petl.merge(model)
    assert torch.equal(outputs(model, images), before)


# ---- inside other things


def test_trained_tensors_are_those_inside_the_backbone(images: torch.Tensor) -> None:
    model = petl.attach(build("timm_vit"), petl.VeRA(r=4))
    names = trained_tensors(model).keys()
    assert "backbone.blocks.0.attn.qkv.vera_lambda_b.default" in names
    assert "backbone.blocks.0.attn.qkv.vera_A.default" in names, "the random matrices travel"
    assert "backbone.blocks.1.attn.qkv.vera_A.default" not in names, "once"
    assert not any("base_layer" in n for n in names)
    fewer = {n: t for n, t in trained_tensors(model).items() if "3.attn.qkv.vera_lambda_b" not in n}
    with pytest.raises(petl.PetlError, match="1 missing"):
        set_trained_tensors(model, fewer, "a file")


def test_an_explained_classifier_may_have_lora_inside(images: torch.Tensor, tmp_path) -> None:
    from petl.backbones.classifier import Classifier
    from petl.nn.head import Head

    def explained() -> petl.ExplainedClassifier:
        torch.manual_seed(3)
        inner = Classifier(petl.attach(build("timm_vit"), petl.LoRA(dropout=0.5)), Head("linear", 24, 3))
        return petl.ExplainedClassifier(perturbed(inner), petl.AutoGnothi(reduction=4))

    model = explained()
    assert any("lora_A" in name for name in model.carried)
    logits = model(images)
    assert torch.equal(model.train()(images), logits), "a frozen classifier has no dropout"
    petl.save(model, tmp_path / "adapter")
    loaded = petl.load(tmp_path / "adapter", backbone=build("timm_vit"))
    assert torch.equal(loaded.model(images), logits)
    other = build("timm_vit")
    with torch.no_grad():
        other.blocks[0].attn.qkv.weight[0, 0] += 1
    with pytest.raises(petl.PetlError, match="other weights"):
        petl.load(tmp_path / "adapter", backbone=other)


def test_side_blocks_are_pruned_from_the_weights_under_lora() -> None:
    plain, adapted = build("timm_vit"), petl.attach(build("timm_vit"), petl.LoRA(parts=("q", "fc1")))
    views = find_view(plain), attached(adapted).view
    mine, theirs = (v.block_view(v.block_modules()[2]).block_weights() for v in views)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(t, theirs[n]) for n, t in mine.items())


def test_no_warning_of_peft_reaches_the_user() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = petl.attach(build("timm_vit"), petl.OFT(block_size=8))
        petl.merge(model)
        assert isinstance(attached(petl.attach(build("timm_vit"), petl.AdaLoRA())), PeftModule)
