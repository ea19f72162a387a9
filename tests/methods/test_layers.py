"""Parts of single layers: which layers are found, what stays of them, what is refused."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from timm.layers import RmsNorm, SwiGLU
from torch import Tensor, nn
from transformers import ViTConfig, ViTModel

import petl
from petl.backbones import view as find_view
from petl.methods.layers import Shift, compute, outer_places, overwrite, parts_of, places_with, plain
from tests.conftest import FAMILIES, HF_SHAPE, _timm, build, outputs
from tests.methods.by_hand import moved

METHODS = [petl.BitFit(), petl.LNTuning(), petl.SSF(), petl.RLRR(), petl.FacT(), petl.RepAdapter()]
LINEAR = ("q", "k", "v", "out", "fc1", "fc2")


def test_a_fused_projection_is_one_place() -> None:
    fused, split = (find_view(build(f)) for f in ("timm_vit", "hf_clip_vision"))
    found = [(p.block, p.name, count) for p, count in parts_of(fused, *LINEAR)]
    assert found == [(i, *row) for i in range(4) for row in (("qkv", 3), ("out", 1), ("fc1", 1), ("fc2", 1))]
    assert [(p.block, p.name, count) for p, count in parts_of(split, "norm2", "q")] == [
        (i, name, 1) for i in range(4) for name in ("q", "norm2")
    ]
    assert [(p.name, count) for p, count in parts_of(fused, "q", "v")][:1] == [("qv", 2)]
    assert [p.name for p in outer_places(fused)] == ["patch_embedding", "final_norm"]


def test_places_by_tensor_leave_heads_and_poolers_out() -> None:
    for family in FAMILIES:
        model = build(family)
        found = list(places_with(find_view(model), "bias"))
        paths = {id(m): n for n, m in model.named_modules()}
        names = [paths[id(p.layer)] for p in found]
        assert names == [n for n, m in model.named_modules() if getattr(m, "bias", None) is not None and n not in (
            "head", "classifier")]  # fmt: skip
        inside = [p.block for p in found if p.inside]
        assert inside == sorted(inside)
        assert set(inside) == {0, 1, 2, 3}
    pooled = ViTModel(ViTConfig(**HF_SHAPE))
    assert pooled.pooler is not None
    assert "pooler_dense" not in [p.name for p in places_with(find_view(pooled), "bias")]


@pytest.mark.parametrize(
    "layer", [nn.Linear(6, 5), nn.Conv2d(6, 4, 2, stride=2), nn.LayerNorm(6), nn.Linear(6, 5, bias=False)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_with_its_own_weights_computes_what_it_did(layer: nn.Module, dtype: torch.dtype) -> None:
    layer = copy.deepcopy(layer).to(dtype)
    x = torch.randn(2, 6, 4, 4, dtype=dtype) if isinstance(layer, nn.Conv2d) else torch.randn(2, 6, dtype=dtype)
    names = tuple(n for n, _ in layer.named_parameters())
    shift = Shift(layer, names)
    assert torch.equal(compute(layer, x, layer.weight, layer.bias), layer(x))
    assert torch.equal(shift(layer, x), layer(x))
    with torch.no_grad():
        for p in shift.parameters():
            p.normal_()
    expected = shift(layer, x)
    assert expected.dtype == dtype
    overwrite(layer, *shift.merged(layer))
    assert torch.equal(plain(layer, x), expected), "the sum is rounded to the dtype of the layer in the same way"


def test_overwriting_adds_a_bias_only_where_one_is_given() -> None:
    layer = nn.Linear(3, 2, bias=False).bfloat16()
    overwrite(layer, torch.ones(2, 3), None)
    assert layer.bias is None
    overwrite(layer, torch.ones(2, 3), torch.tensor([1.0, 2.0]))
    assert layer.bias.dtype == torch.bfloat16
    assert layer(torch.ones(3, dtype=torch.bfloat16)).tolist() == [4.0, 5.0]


@pytest.mark.parametrize("end", [petl.detach, petl.merge])
def test_a_layer_is_itself_again(end, images: Tensor) -> None:
    model = petl.attach(build("timm_clip"), petl.SSF())
    changed = [n for n, m in model.named_modules() if "forward" in m.__dict__ and not n.startswith("petl")]
    assert len([n for n in changed if not n.removeprefix("blocks.").isdigit()]) == 3 + 4 * 6
    classes = {n: type(m) for n, m in build("timm_clip").named_modules()}
    assert all(type(model.get_submodule(n)) is cls for n, cls in classes.items())
    end(model)
    assert not [n for n, m in model.named_modules() if "forward" in m.__dict__]
    assert all(p.requires_grad for p in model.parameters())


def test_adapters_can_be_taken_off_and_put_on_again(images: Tensor) -> None:
    model = build("timm_vit")
    before = model(images)
    for method in (petl.SSF(), petl.RLRR(), petl.BitFit(), petl.RepAdapter()):
        moved(petl.attach(model, method))
        assert not torch.equal(model.eval()(images), before)
        assert torch.equal(petl.detach(model)(images), before)


@pytest.mark.parametrize("method", METHODS)
def test_trained_tensors_learn_in_fp32_under_autocast(method: petl.Method, images: Tensor) -> None:
    model = moved(petl.attach(build("timm_vit"), method)).train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(images).float().pow(2).sum()
    loss.backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.petl.parameters())


@pytest.mark.parametrize("method", METHODS)
def test_merging_into_bf16_errs_by_rounding_alone(method: petl.Method) -> None:
    """The fold is summed up in fp32 and rounded once, so that it is as near to the exact sum as bf16 allows."""
    exact = moved(petl.attach(build("timm_vit").bfloat16().float(), method), 0.05)
    rounded = moved(petl.attach(build("timm_vit").bfloat16(), method), 0.05)
    petl.merge(exact)
    petl.merge(rounded)
    assert all(t.dtype == torch.bfloat16 for t in rounded.state_dict().values())
    for name, weight in rounded.state_dict().items():
        torch.testing.assert_close(weight.float(), exact.state_dict()[name], rtol=2**-8, atol=1e-6, msg=name)


def test_layers_that_no_part_folds_into_are_refused() -> None:
    model = _timm(norm_layer=RmsNorm)
    with pytest.raises(petl.PetlError, match="final_norm of this backbone is a RmsNorm"):
        petl.attach(model, petl.SSF())
    with pytest.raises(petl.PetlError, match="norm1 of block 0 of this backbone is a RmsNorm"):
        petl.attach(model, petl.RLRR())
    bare = _timm(norm_layer=partial(nn.LayerNorm, elementwise_affine=False))
    with pytest.raises(petl.PetlError, match="with a weight"):
        petl.attach(bare, petl.RLRR())
    assert not [m for m in (*model.modules(), *bare.modules()) if "forward" in m.__dict__]
    assert petl.attach(model, petl.FacT()) is model, "it leaves the norms alone"


def test_gated_ffns_are_refused_except_by_methods_that_know_no_parts(images: Tensor) -> None:
    model = _timm(mlp_layer=SwiGLU).eval()
    with pytest.raises(petl.PetlError, match="are not known one by one"):
        petl.attach(model, petl.RLRR())
    before = outputs(model, images)
    assert torch.equal(outputs(petl.attach(model, petl.BitFit()), images), before)
    assert "mlp_fc1_g" in model.petl.blocks[0]
