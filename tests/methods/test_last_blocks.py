"""Option ``layers``: some blocks of the backbone, such as the last ones, in every method that works block by block."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from torch import Tensor, nn

import petl
from petl.methods import get_method, list_methods
from petl.methods.attach import attached
from petl.methods.base import Method, from_dict
from petl.methods.peft_tuner import PeftMethod
from tests.conftest import build, outputs
from tests.methods.by_hand import trained_count, vit_b
from tests.test_contract import SMALL

LAST = (-4, -3, -2, -1)
COUNTS = [  # of the last four blocks of ViT-B/16 (width C = 768, FFN F = 3072), per block, and of the final norm
    (petl.LoRA(layers=LAST), 4 * 2 * 8 * 2 * 768),
    (petl.DoRA(layers=LAST), 4 * (8 * 4 * 768 + 3 * 768)),
    (petl.AdaLoRA(layers=LAST), 4 * 12 * (4 * 768 + 1)),
    (petl.IA3(layers=LAST), 4 * (3 * 768 + 3072)),
    (petl.VeRA(layers=LAST), 4 * (256 + 3 * 768)),
    (petl.OFT(layers=LAST), 4 * 24 * 496),
    (petl.FourierFT(layers=LAST), 4 * 1000),
    (petl.AdaptFormer(layers=LAST), 396_544),  # a third of 1,189,632
    (petl.Adapter(layers=LAST), 4 * (2 * 768 * 8 + 8 + 768)),
    (petl.Convpass(layers=LAST), 4 * 2 * (2 * 768 * 8 + 8 + 768 + 9 * 64 + 8)),
    (petl.RepAdapter(layers=LAST), 79_936),  # a third of 239,808
    (petl.BitFit(layers=LAST), 4 * (7 * 768 + 3072) + 768),
    (petl.LNTuning(layers=LAST), 4 * 4 * 768 + 2 * 768),
    (petl.SSF(layers=LAST), 2 * (4 * (7 * 768 + 3072) + 768)),
    (petl.RLRR(layers=LAST), 4 * (19 * 768 + 3 * 3072)),
    (petl.FacT(layers=LAST), 2 * 16 * 768 + 4 * 12 * 256),
    (petl.FullFineTuning(layers=LAST), 4 * 7_087_872 + 2 * 768),
]
WITH_LAYERS = [n for n in list_methods() if "layers" in {f.name for f in dataclasses.fields(get_method(n))}]
BLOCKWISE = [n for n in WITH_LAYERS if n not in ("ladder_side_tuning", "autognothi")]


def small(name: str, layers: tuple[int, ...] | list[int]) -> Method:
    return get_method(name)(**SMALL.get(name, {}), layers=layers)


@pytest.mark.parametrize(("method", "count"), COUNTS, ids=lambda x: getattr(x, "name", ""))
def test_counts_on_vit_b(method: Method, count: int) -> None:
    view = vit_b()
    assert method.parameter_count(view) == count
    if not isinstance(method, (PeftMethod, petl.FullFineTuning)):  # their tensors are not in the module
        assert trained_count(method, view) == count


def test_the_option_is_where_it_belongs() -> None:
    assert set(BLOCKWISE) == {m.name for m, _ in COUNTS} | {"loha", "lokr", "peft"}


@pytest.mark.parametrize("name", WITH_LAYERS)
def test_numbers_from_the_end_and_from_lists(name: str) -> None:
    method = small(name, [-2, -1])
    assert method.layers == (-2, -1)
    assert from_dict(json.loads(json.dumps(method.to_dict()))) == method
    with pytest.raises(petl.PetlError, match=r"layers=3\): give a list of block numbers"):
        small(name, 3)  # type: ignore[arg-type]
    with pytest.raises(petl.PetlError, match=r"layers=\['3'\]\): give a list of block numbers"):
        small(name, ["3"])  # type: ignore[list-item]


@pytest.mark.parametrize("name", BLOCKWISE)
def test_the_last_two_are_the_last_two(name: str, images: Tensor) -> None:
    counted = []
    for layers in ((-2, -1), (3, 2)):
        torch.manual_seed(0)
        model = petl.attach(build("timm_vit"), small(name, layers))
        module = attached(model)
        assert module.first_changed() == 2
        assert module.first_gradient()[0].startswith("block 2")
        trained = [n for n, p in model.named_parameters() if p.requires_grad and not n.startswith("head")]
        counted.append(sorted(trained))
        assert not [n for n in trained if "blocks.0." in n or "blocks.1." in n]
    assert counted[0] == counted[1]


@pytest.mark.parametrize("name", BLOCKWISE)
@pytest.mark.parametrize(
    ("layers", "what"), [((4,), r"\[4\] are out of range; this network has blocks 0 to 3"), ((), "it is empty"),
                         ((3, -1), "a block stands there twice")],
)  # fmt: skip
def test_blocks_that_are_not_there(name: str, layers: tuple[int, ...], what: str) -> None:
    model = build("timm_vit")
    with pytest.raises(petl.PetlError, match=what):
        petl.attach(model, small(name, layers))
    assert not hasattr(model, "petl")


def test_a_target_outside_the_chosen_blocks_is_an_error() -> None:
    with pytest.raises(petl.PetlError, match=r"lora: target 'patch_embed.proj' names no layer in the blocks that"):
        petl.attach(build("timm_vit"), petl.LoRA(parts=("q", "patch_embed.proj"), layers=(-1,)))
    with pytest.raises(petl.PetlError, match=r"names no layer of this timm_vit"):
        petl.attach(build("timm_vit"), petl.LoRA(parts=("qq",), layers=(-1,)))


def test_partial_fine_tuning_lets_the_other_blocks_rest(images: Tensor) -> None:
    """Dropout and stochastic depth are live in what is trained, and off in what is frozen."""
    model = petl.attach(build("timm_clip"), petl.FullFineTuning(layers=(-1,))).train()
    training = {n for n, m in model.named_modules() if m.training}
    assert {n.split(".")[1] for n in training if n.startswith("blocks.")} == {"3"}
    assert {"", "norm", "head_drop", "head", "petl"} <= training
    assert not {"patch_embed", "pos_drop", "norm_pre"} & training
    assert any(isinstance(m, nn.Dropout) and m.p and m.training for m in model.blocks[3].modules())
    tokens: list[Tensor] = []
    model.blocks[3].register_forward_pre_hook(lambda _, args: tokens.append(args[0]))
    first, second = outputs(model, images), outputs(model, images)
    assert torch.equal(*tokens)
    assert not torch.equal(first, second)
    assert not [m for m in model.eval().modules() if m.training]
