"""IoU of boxes in pairs, against torchvision's all-against-all."""

from __future__ import annotations

import pytest
import torch
from torchvision.ops import box_convert, box_iou

from petl.nn.boxes import paired_iou
from petl.tasks.grounding import HIT


def corners(*boxes: tuple[float, float, float, float]) -> torch.Tensor:
    return box_convert(torch.tensor(boxes), "xyxy", "cxcywh")


def random_boxes(count: int) -> torch.Tensor:
    x0y0 = torch.rand(count, 2) * 0.7
    return box_convert(torch.cat([x0y0, x0y0 + torch.rand(count, 2) * 0.3], 1), "xyxy", "cxcywh")


def test_it_is_the_diagonal_of_torchvisions_matrix() -> None:
    predicted, truth = random_boxes(500), random_boxes(500)
    truth[:50] = predicted[:50]
    matrix = box_iou(*(box_convert(b, "cxcywh", "xyxy") for b in (predicted, truth)))
    found = paired_iou(predicted, truth)
    torch.testing.assert_close(found, matrix.diagonal(), atol=1e-5, rtol=1e-5)
    assert 0.1 < (found > 0).float().mean() < 0.9
    torch.testing.assert_close(paired_iou(truth, predicted), found)


@pytest.mark.parametrize(
    ("predicted", "truth", "iou"),
    [
        ((0, 0, 0.5, 0.5), (0, 0, 0.5, 0.25), 0.5),  # all exact in binary: 1/8 over 1/4
        ((0.25, 0.25, 0.75, 0.75), (0.25, 0.25, 0.75, 0.75), 1.0),
        ((0, 0, 0.5, 0.5), (0.5, 0, 1, 0.5), 0.0),  # they touch
        ((0, 0, 0.25, 0.25), (0.5, 0.5, 1, 1), 0.0),
        ((0, 0, 0.5, 0.5), (0.25, 0.25, 0.75, 0.75), 1 / 7),
        ((-0.5, -0.5, 0.5, 0.5), (0, 0, 0.5, 0.5), 1.0),  # what lies outside the canvas does not count
        ((0.5, 0.5, 3, 3), (0.5, 0.5, 1, 1), 1.0),
        ((-2, -2, -1, -1), (0, 0, 0.5, 0.5), 0.0),  # wholly outside
        ((1.25, 0, 2, 1), (0.5, 0, 1, 1), 0.0),
        ((0.5, 0.5, 0.5, 0.5), (0.25, 0.25, 0.75, 0.75), 0.0),  # a point
        ((0.5, 0.5, 0.5, 0.5), (0.5, 0.5, 0.5, 0.5), 0.0),
    ],
)
def test_values(predicted: tuple, truth: tuple, iou: float) -> None:
    found = paired_iou(corners(predicted), corners(truth))
    assert found.shape == (1,)
    assert found.item() == pytest.approx(iou, abs=1e-6)
    assert torch.equal(found >= HIT, torch.tensor([iou >= 0.5]))


def test_exactly_one_half_is_a_hit() -> None:
    exact = paired_iou(corners((0, 0, 0.5, 0.5)), corners((0, 0, 0.5, 0.25)))
    assert (HIT, exact.item()) == (0.5, 0.5)
    below = paired_iou(corners((0, 0, 0.5, 0.5)), corners((0, 0, 0.5, 0.2499)))
    assert below.item() < HIT


def test_half_precision_is_computed_in_fp32() -> None:
    boxes = random_boxes(20).bfloat16()
    found = paired_iou(boxes, boxes)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, paired_iou(boxes.float(), boxes.float()))
