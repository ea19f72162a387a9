"""Several adapters of one backbone, and images for them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.adapters.several import MIXTURE, adapter


@pytest.fixture(scope="session")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("mixture")
    return {name: adapter(root / name, method, classes) for name, (method, classes) in MIXTURE.items()}


@pytest.fixture
def pictures() -> list[Image.Image]:
    generator = np.random.default_rng(0)
    return [Image.fromarray(generator.integers(0, 255, (40, 50, 3), np.uint8)) for _ in range(4)]


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(1))
