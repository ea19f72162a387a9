"""Where a method begins: the first block it changes, the first that keeps activations, and how many bytes are kept.

``python -m tests.test_gradient`` prints the table of bytes as it is counted now.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

import petl
from petl.backbones import view as find_view
from petl.backbones.base import EncoderView
from petl.methods.attach import attached
from petl.methods.base import Method, TowerModule
from tests.conftest import build, expressions_and_images, grounding, outputs
from tests.test_contract import CASES, classifier
from tests.test_contract_pairs import CASES as PAIR_CASES

TINY = {str(case.id).removesuffix("-timm_vit"): case.values[0] for case in CASES if case.values[1] == "timm_vit"}

# Kept for backward per image on the tiny timm_vit, head included: without and with activation checkpointing.
BYTES: dict[str, tuple[int, int]] = {
    "adalora": (61_840, 8_392),
    "adapter": (53_340, 8_392),
    "adapter1": (29_132, 5_128),
    "adaptformer": (96_316, 8_392),
    "adaptformer1": (56_672, 6_760),
    "bitfit": (68_280, 20_680),
    "convpass": (91_012, 8_392),
    "dtl": (24_100, 8_664),
    "dtl1": (27_364, 8_664),
    "evit": (96, 96),
    "fact": (163_024, 8_392),
    "fact1": (60_888, 5_128),
    "full_fine_tuning": (94_392, 20_680),
    "full_fine_tuning1": (41_984, 5_128),
    "ladder_side_tuning": (24_712, 9_548),
    "ladder_side_tuning1": (23_352, 8_528),
    "linear_probe": (96, 96),
    "ln_tuning": (55_992, 8_392),
    "lora": (65_104, 8_392),
    "lora1": (76_052, 6_760),
    "dora": (102_096, 8_392),
    "dora1": (53_612, 5_128),
    "peft": (80_336, 8_392),
    "peft1": (60_752, 8_392),
    "rep_adapter": (75_984, 8_392),
    "rep_adapter1": (34_776, 5_128),
    "rlrr": (82_104, 8_392),
    "rlrr1": (21_924, 3_496),
    "sparse_tuning": (55_604, 6_896),
    "sparse_tuning1": (57_692, 8_392),
    "ssf": (103_224, 9_928),
    "ssf1": (51_776, 5_128),
    "vpt": (65_544, 9_256),
    "vpt1": (65_832, 9_256),
    "ia3": (86_864, 8_392),
    "ia31": (25_188, 5_128),
    "vera": (78_160, 8_392),
    "oft": (60_752, 8_392),
    "loha": (60_752, 8_392),
    "lokr": (60_752, 8_392),
    "fourierft": (60_752, 8_392),
}  # fmt: skip


def perturbed(model: nn.Module) -> nn.Module:
    """The same model in evaluation, with every trained tensor somewhere else."""
    torch.manual_seed(11)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    return model.eval()


def block_outputs(views: tuple[EncoderView, ...], run: Callable[[], object]) -> list[list[Tensor]]:
    """What the blocks of each encoder hand on during ``run``."""
    found: list[list[Tensor]] = [[] for _ in views]

    def keep(into: list[Tensor], block: nn.Module, args: object, out: Tensor | tuple[Tensor, ...]) -> None:
        into.append(out[0] if isinstance(out, tuple) else out)

    hooks = [
        b.register_forward_hook(partial(keep, f)) for v, f in zip(views, found, strict=True) for b in v.block_modules()
    ]
    with torch.no_grad():
        run()
    for hook in hooks:
        hook.remove()
    return found


def check_first_changed(tower: TowerModule, frozen: list[Tensor], found: list[Tensor]) -> None:
    first, depth = tower.first_changed(), tower.view.depth
    same = [a.shape == b.shape and torch.equal(a, b) for a, b in zip(frozen, found, strict=True)]
    if tower.reads() is None:
        assert same == [True] * first + [False] * (depth - first)
    else:  # a ladder is added to the output of the last block
        assert first == depth
        assert all(same[:-1])


@pytest.mark.parametrize(("method", "family"), CASES)
def test_blocks_are_the_frozen_ones_up_to_the_first_changed(method: Method, family: str, images: Tensor) -> None:
    plain, model = build(family), perturbed(petl.attach(build(family), method))
    module = attached(model)
    [frozen] = block_outputs((find_view(plain),), lambda: outputs(plain, images))
    [found] = block_outputs((module.view,), lambda: outputs(model, images))
    check_first_changed(module, frozen, found)


@pytest.mark.parametrize(("method", "pair"), PAIR_CASES)
def test_layers_of_a_pair_are_the_frozen_ones_up_to_the_first_changed(method: Method, pair: str) -> None:
    plain, model = grounding(pair), perturbed(grounding(pair, method))
    inputs = expressions_and_images(model)
    frozen, found = (block_outputs((m.vision_view, m.text_view), lambda m=m: m.encode(*inputs)) for m in (plain, model))
    for tower, before, after in zip((model.petl.vision, model.petl.text), frozen, found, strict=True):
        check_first_changed(tower, before, after)


def expected_first(method: Method, tower: TowerModule) -> int | None:
    """The first block that keeps activations: the first changed, but for those that read blocks from beside."""
    first = tower.first_changed()
    if method.name == "dtl":  # the side stream keeps what it reads, from block 0 on
        return 0
    if method.name == "ladder_side_tuning":
        return tower.ladder.layers[0]
    if method.name == "m2ist":
        return min(tower.pair_of)
    if method.name == "evit":  # it drops tokens and trains nothing
        return None
    return first if first < tower.view.depth else None


@pytest.mark.parametrize("name", TINY)
def test_bytes_kept_and_where_they_begin(name: str) -> None:
    model = classifier(TINY[name], "timm_vit")
    module = attached(model.backbone)
    plain = petl.report(model)
    module.checkpointing = True
    recomputing = petl.report(model)
    [kept] = plain.kept_from
    assert (kept.first, kept.depth) == (expected_first(TINY[name], module), 4)
    assert recomputing.kept_from == plain.kept_from
    assert (plain.saved_bytes.per_image, recomputing.saved_bytes.per_image) == BYTES[name]
    assert (BYTES[name][1] < BYTES[name][0]) == (kept.first is not None)


@pytest.mark.parametrize(("method", "pair"), [c for c in PAIR_CASES if c.values[1] in ("clip", "vit+bert")])
def test_first_layers_of_a_pair_that_keep_activations(method: Method, pair: str) -> None:
    model = grounding(pair, method)
    towers = {"image encoder": model.petl.vision, "text encoder": model.petl.text}
    plain = petl.report(model)
    expected = [(name, expected_first(method, t), t.view.depth) for name, t in towers.items()]
    assert [tuple(kept) for kept in plain.kept_from] == expected
    model.petl.vision.checkpointing = model.petl.text.checkpointing = True  # not that of the vision-language part
    recomputing = petl.report(model)
    less = recomputing.saved_bytes.per_image < plain.saved_bytes.per_image
    assert less == (expected[0][1] is not None and method.name != "m2ist")  # M²IST keeps its taps alone anyhow


def test_the_report_says_it_in_words() -> None:
    last = petl.report(petl.attach(build("timm_vit"), petl.LoRA(layers=(-2, -1))))
    probe = petl.report(petl.attach(build("timm_vit"), petl.LinearProbe()))
    pair = petl.report(grounding("clip", petl.AdaptFormer(4, layers=(-1,))))
    lines = [next(line for line in str(r).splitlines() if line.startswith("gradient")) for r in (last, probe, pair)]
    assert lines[0].endswith("; activations are kept in the backbone from block 2 on (of 0 to 3)")
    assert lines[1].endswith("; activations are kept in no block of the backbone")
    assert lines[2].endswith(
        "kept in the image encoder from block 3 on (of 0 to 3) and in the text encoder from block 2 on (of 0 to 2)"
    )


def test_checkpointing_leaves_blocks_alone_that_keep_nothing(images: Tensor) -> None:
    runs = [0] * 4

    def count(index: int, *_: object) -> None:
        runs[index] += 1

    for method, expected in (
        (petl.LoRA(layers=(2,)), [1, 1, 2, 2]),
        (petl.AdaptFormer(4, layers=(-1,)), [1, 1, 1, 2]),
        (petl.BitFit(layers=(3,)), [1, 1, 1, 2]),
        (petl.FullFineTuning(layers=(1, 3)), [1, 2, 2, 2]),
        (petl.DTL(), [1, 1, 2, 2]),
        (petl.LinearProbe(), [1, 1, 1, 1]),
    ):
        model = petl.attach(build("timm_vit"), method).train()
        attached(model).checkpointing = True
        handles = [b.norm1.register_forward_hook(partial(count, i)) for i, b in enumerate(model.blocks)]
        outputs(model, images).square().sum().backward()
        for handle in handles:
            handle.remove()
        assert runs == expected, method.name
        runs[:] = [0] * 4


if __name__ == "__main__":
    for case, small in TINY.items():
        torch.manual_seed(0)
        net = classifier(small, "timm_vit")
        before = petl.report(net).saved_bytes.per_image
        attached(net.backbone).checkpointing = True
        print(f'    "{case}": ({before:_}, {petl.report(net).saved_bytes.per_image:_}),')
