"""A tiny YAML run and the real command line in a subprocess."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CONFIG = """\
seed_everything: 3
run_dir: {run_dir}
checkpoint_every: 3
model:
  class_path: petl.Classification
  init_args:
    backbone: timm/vit_tiny_patch16_224
    backbone_args: {{img_size: 32, patch_size: 8, embed_dim: 24, depth: 4, num_heads: 3, mlp_ratio: 2}}
    pretrained: false
    method:
      class_path: petl.SparseTuning
      init_args: {{keep_rate: 0.6, bottleneck: 4}}
    lr: 1.0e-2
    mixup: 0.5
data:
  class_path: petl.data.Digits
  init_args: {{train_size: 64, val_size: 37, test_size: 41, batch_size: 8, augmentation: shift}}
trainer:
  max_epochs: 3
  accelerator: cpu
"""


def petl_command(*args: str, cwd: Path, check: bool = True, **env: str) -> subprocess.CompletedProcess[str]:
    """Run ``petl …`` as a person would; with ``check`` a failure shows its output."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB", "PL_"))}
    environment |= {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "WANDB_MODE": "offline",
        "WANDB_SILENT": "true",
    } | env
    done = subprocess.run(
        [sys.executable, "-m", "petl", *args], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture
def config(tmp_path: Path) -> Path:
    file = tmp_path / "tiny.yaml"
    file.write_text(CONFIG.format(run_dir=tmp_path / "run"))
    return file
