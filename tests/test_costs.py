"""The report: what it forecasts is what a run on real tensors keeps, and its figures add up."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import petl
from petl.backbones import view as find_view
from petl.costs import SavedBytes, count_macs, count_saved_bytes, parse_memory
from petl.methods.base import Method
from petl.nn.head import Head
from tests.conftest import PAIRS, build, expressions_and_images, grounding
from tests.test_contract import CASES, classifier
from tests.test_contract_pairs import SMALL

TWO = [case for case in CASES if case.values[1] in ("timm_vit", "hf_vit")]
every = pytest.mark.parametrize(("method", "family"), TWO)
WITHOUT_DATA = "on tensors without data"


def blank(count: int, **options: object) -> Tensor:
    return torch.zeros(count, 3, 32, 32, **options)  # type: ignore[arg-type]


@every
def test_the_forecast_is_what_a_real_run_keeps_and_its_figures_add_up(method: Method, family: str) -> None:
    model, frozen = classifier(method, family).train(), find_view(build(family))
    found = petl.report(model)
    two, three, five = (count_saved_bytes(model, blank(n)) for n in (2, 3, 5))
    assert found.saved_bytes == SavedBytes(three - two, 3 * two - 2 * three)
    forecast = found.saved_bytes.per_image * 5 + found.saved_bytes.constant
    assert abs(forecast - five) <= 0.03 * five
    assert found.macs == count_macs(model.eval(), blank(1))
    own_head = sum(p.numel() for _, m in frozen.head_modules() for p in m.parameters())
    assert found.trainable == method.parameter_count(frozen)
    assert found.head == own_head + sum(p.numel() for p in model.head.parameters())
    assert found.total == sum(p.numel() for p in model.parameters())
    assert found.backbone == sum(p.numel() for p in frozen.model.parameters()) - own_head
    *rows, last = [line.replace(",", "").split() for line in found.table().splitlines()[1:]]
    assert [sum(int(row[i]) for row in rows) for i in (1, 2)] == [int(last[1]), int(last[2])]
    assert (int(last[1]), int(last[2])) == (found.total, found.trainable + found.head)


def padded(model: petl.GroundingModel, count: int) -> tuple[Tensor, ...]:
    """Half of each picture and of each expression is padding."""
    images, seen, ids, words = model.example(count)
    seen[:, : model.image_size // 2], words[:, 4:] = False, 0
    return images, seen, ids, words


@pytest.mark.parametrize("method", [petl.FullFineTuning(), petl.M2IST(**SMALL["m2ist"])], ids=lambda m: m.name)
@pytest.mark.parametrize("pair", PAIRS)
def test_pairs_count_the_same_and_stay_as_they_were(method: Method, pair: str) -> None:
    model = grounding(pair, method)
    inputs = expressions_and_images(model)
    before, state = model(*inputs), {k: v.clone() for k, v in model.state_dict().items()}
    found = petl.report(model)
    looks = pair == "detr+bert" and model.petl.trains_backbone  # a DETR encoder in training looks for infinities
    assert found.counted.endswith(WITHOUT_DATA) != looks
    twin = copy.deepcopy(model).train()
    two, three = (count_saved_bytes(twin, *(twin.example(n) if looks else padded(twin, n))) for n in (2, 3))
    assert found.saved_bytes == SavedBytes(three - two, 3 * two - 2 * three)
    assert found.macs == count_macs(twin.eval(), *twin.example(1))
    assert sum(p.parameters for p in found.parts) == found.total == sum(p.numel() for p in model.parameters())
    assert torch.equal(model(*inputs), before), "a tensor without data stayed behind"
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_a_model_is_not_run_nor_changed() -> None:
    backbone = petl.attach(build("timm_vit"), petl.SparseTuning(bottleneck=4))
    model = petl.Classifier(backbone, Head("bn_linear", 24, 4)).train()  # its BatchNorm moves in training
    modes = [m.training for m in model.modules()]
    state = {k: v.clone() for k, v in model.state_dict().items()}
    found = petl.report(model)
    assert found.counted.endswith(WITHOUT_DATA)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes


class _Reads(nn.Module):
    """A backbone's norm that reads a value, which only a real run has."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x) if x.sum().item() < 1e9 else x


def test_what_needs_values_is_run_and_the_report_says_so() -> None:
    plain, reading = (petl.attach(build("timm_vit"), petl.LinearProbe()) for _ in range(2))
    reading.norm = _Reads(reading.norm)
    expected, found = petl.report(plain), petl.report(reading)
    assert expected.counted == f"in float32, {WITHOUT_DATA}"
    assert found.counted.startswith("in float32, by running it on cpu (DataDependentOutputException")
    same = {"counted": "", "parts": ()}
    assert replace(found, **same) == replace(expected, **same)  # type: ignore[arg-type]


@pytest.mark.parametrize("method", [petl.SparseTuning(bottleneck=4), petl.FullFineTuning()], ids=lambda m: m.name)
def test_mixed_and_low_precision_are_counted_as_they_run(method: Method) -> None:
    mixed, low = classifier(method, "timm_vit").train(), classifier(method, "timm_vit").bfloat16().train()
    with torch.autocast("cpu", torch.bfloat16):
        two, three = (count_saved_bytes(mixed, blank(n)) for n in (2, 3))
    found = petl.report(mixed, autocast=torch.bfloat16)
    assert found.counted == f"under autocast to bfloat16, {WITHOUT_DATA}"
    assert found.saved_bytes == SavedBytes(three - two, 3 * two - 2 * three)
    assert found.saved_bytes.constant > 0, "bf16 copies of the weights do not depend on the batch"
    found = petl.report(low)
    two, three = (count_saved_bytes(low, blank(n, dtype=torch.bfloat16)) for n in (2, 3))
    assert found.counted == f"in bfloat16, {WITHOUT_DATA}"
    assert found.saved_bytes == SavedBytes(three - two, 3 * two - 2 * three)
    assert found.weight_bytes == 2 * found.total


def test_saved_bytes_and_peak_by_hand() -> None:
    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(10))

        def forward(self, x: Tensor) -> Tensor:
            h = (x + 1).exp().sin().mean(0)  # four results, each dead once the next is made
            return h * self.weight  # keeps h, (10,) fp32

    from petl.costs import _Live

    model, x = Chain(), torch.zeros(6, 10)
    assert count_saved_bytes(model, x) == 40
    with _Live(model, (x,)) as live:
        model(x)
    assert live.peak == 480  # two of (6, 10) fp32 at once


def test_largest_batch() -> None:
    found = replace(
        petl.report(petl.attach(build("timm_vit"), petl.LinearProbe())),
        weight_bytes=1000, trained_bytes=100, saved_bytes=SavedBytes(10, 50), peak_bytes=SavedBytes(20, 0),
    )  # fmt: skip
    assert found.fixed_bytes == 1300  # weights, gradients, two moments of AdamW
    assert found.largest_batch(1300 + 99) == 4  # the peak counts where it is more than what is kept
    assert found.largest_batch(1300 + 19) == 0
    assert replace(found, peak_bytes=SavedBytes(10, 0)).largest_batch(1300 + 99) == 4  # (99 - 50) // 10
    assert found.batch_line(1399).startswith("batch       at most 4 images in 1.399e-06 GB: weights")
    assert found.batch_line(1200).startswith("batch       not even one image in")


def test_memory_with_units() -> None:
    assert [parse_memory(t) for t in ("8GB", "8 gib", "1.5MB", "2MiB")] == [8 * 10**9, 8 * 2**30, 1_500_000, 2**21]
    for text in ("8", "GB", "8G", "-8GB", "8GB!", "1e3GB"):
        with pytest.raises(petl.PetlError, match=r"GB, GiB, MB or MiB"):
            parse_memory(text)
