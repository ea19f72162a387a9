"""Methods beside one network from one pass: the numbers of each alone, in every family and dtype."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import petl
from petl.backbones import view
from petl.methods.attach import attach, attached, fit, mount
from petl.methods.regional import compile_blocks
from petl.methods.side_by_side import SideBySide, SideModules
from petl.models.frozen import FrozenFeatures
from tests.conftest import FAMILIES, build

METHODS = (
    petl.LadderSideTuning(reduction=2),
    petl.LadderSideTuning(reduction=4, form="gate", layers=(0, 2)),
    petl.LinearProbe(),
)


def modules(backbone: nn.Module) -> list[nn.Module]:
    """The same random module of each method at every call; up-projections are not zero."""
    found = []
    for seed, method in enumerate(METHODS):
        torch.manual_seed(seed)
        found.append(fit(backbone, method))
        for p in found[-1].parameters():
            nn.init.normal_(p, std=0.2)
    return found


def gradients(module: nn.Module) -> list[Tensor]:
    return [p.grad for p in module.parameters() if p.grad is not None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_each_member_computes_what_it_does_alone(family: str, dtype: torch.dtype, images: Tensor) -> None:
    x = images.to(dtype)
    together = build(family).to(dtype)
    side = SideModules(SideBySide(METHODS), view(together), modules(together))
    mount(side)
    found = side.features(view(together).features(x))
    sum(f.float().square().sum() for f in found if f.requires_grad).backward()
    for i, method in enumerate(METHODS):
        alone = build(family).to(dtype)
        module = mount(modules(alone)[i]).petl
        expected = view(alone).features(x)
        assert torch.equal(found[i], expected), method
        if expected.requires_grad:
            expected.float().square().sum().backward()
        ours, theirs = gradients(side.members[i]), gradients(module)
        assert len(ours) == len(list(module.parameters()))
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    petl.detach(together)
    assert torch.equal(view(together).features(x), view(build(family).to(dtype)).features(x))


def test_recorded_activations_give_the_same(images: Tensor) -> None:
    backbone = build("timm_vit")
    side = SideModules(SideBySide(METHODS), view(backbone), modules(backbone))
    part = FrozenFeatures(mount(side))
    assert part.names == ("embedded", *(f"block.{i}" for i in range(4)))
    live = side.features(part.view.features(images))
    assert all(map(torch.equal, side.features(part.features(part.record(images))), live))


def test_compiled_blocks_compute_the_same(images: Tensor) -> None:
    backbone = build("timm_vit")
    side = SideModules(SideBySide(METHODS), view(backbone), modules(backbone))
    mount(side)
    expected = side.features(side.view.features(images))
    compile_blocks(side, backend="eager")  # graphs without a break, run as they are
    assert all(map(torch.equal, side.features(side.view.features(images)), expected))


def test_what_is_recorded_is_the_union_of_what_members_read() -> None:
    def names(*methods: petl.Method) -> tuple[str, ...]:
        return FrozenFeatures(attach(build("timm_vit"), SideBySide(methods))).names

    one, two = petl.LadderSideTuning(layers=(2,), reduction=8), petl.LadderSideTuning(layers=(0,), reduction=8)
    assert names(one) == ("block.2", "block.3")
    assert names(two, one, petl.LinearProbe()) == ("block.0", "block.2", "block.3")
    assert names(petl.LinearProbe(), petl.LinearProbe()) == ("features",)


def test_probes_alone_need_the_pooled_features_only(images: Tensor) -> None:
    part = FrozenFeatures(attach(build("timm_vit"), SideBySide((petl.LinearProbe(),) * 2)))
    side: SideModules = attached(part.view.model)  # type: ignore[assignment]
    frozen = view(build("timm_vit")).features(images)
    for found in (side.features(part.features(part.record(images))), side.features(part.view.features(images))):
        assert len(found) == 2
        assert all(torch.equal(f, frozen) for f in found)


def test_a_method_inside_the_network_is_refused() -> None:
    backbone = build("timm_vit")
    with pytest.raises(petl.PetlError, match="'bitfit' changes what the frozen blocks compute"):
        attach(backbone, SideBySide((petl.LinearProbe(), petl.BitFit())))
    assert not hasattr(backbone, "petl")


def test_parameters_are_those_of_the_members() -> None:
    encoder = view(build("timm_vit"))
    assert SideBySide(METHODS).parameter_count(encoder) == sum(m.parameter_count(encoder) for m in METHODS)
