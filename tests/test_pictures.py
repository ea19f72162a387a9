"""Pictures of grounding: what is dark can be seen."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from petl.pictures import box_grid, exposed


def test_dark_images_are_drawn_brighter() -> None:
    image = torch.rand(3, 4, 4)
    image[0, 0, 0] = 1
    assert torch.equal(exposed(image), image)
    torch.testing.assert_close(exposed(0.1 * image), image)
    assert torch.equal(exposed(torch.zeros(3, 4, 4)), torch.zeros(3, 4, 4))


def test_boxes_on_a_dark_image(tmp_path: Path) -> None:
    dark = torch.full((1, 3, 32, 32), 0.05)
    dark[:, 0, 8:24, 8:24] = 0.1  # a red square
    truth, predicted = torch.tensor([[0.5, 0.5, 0.5, 0.5]]), torch.tensor([[0.5, 0.5, 0.45, 0.5]])
    drawn = np.asarray(
        Image.open(box_grid(dark, predicted, truth, ["the square"], tmp_path / "boxes.png")).convert("RGB")
    )
    colours = {tuple(c) for c in drawn.reshape(-1, 3).tolist()}
    assert (255, 128, 128) in colours or (255, 127, 127) in colours, "the square, in full light"
    assert (13, 13, 13) not in colours
