"""SIGKILL at random steps: every resumed run ends with the bit-identical adapter; no half-written one is ever seen."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

# Forks one process per run after importing everything once: forty runs in a minute instead of ten.
DRIVER = """
import json, os, shutil, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
import petl.engine.lightning_cli
from petl.cli import main
from petl.adapters.artefact import read_config, read_tensors
from petl.tasks.classification import Classification

config, work, workers, moments = sys.argv[1], Path(sys.argv[2]), sys.argv[3], json.loads(sys.argv[4])

def run(args, kill_at=None, where=None):
    child = os.fork()
    if child == 0:
        os.dup2(os.open(work / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
        os.dup2(1, 2)
        hook = getattr(Classification, where or "on_train_batch_start")
        def dying(self, *a, **k):
            if kill_at is not None and self.global_step >= kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return hook(self, *a, **k)
        setattr(Classification, where or "on_train_batch_start", dying)
        sys.argv = ["petl"]
        os._exit(main(args))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

def files(run_dir):
    return {p.name: p.read_bytes() for p in sorted((run_dir / "adapter").iterdir())}

common = ["fit", "--config", config, "--data.num_workers", workers]
assert run([*common, "--run_dir", str(work / "whole")]) == 0
whole = files(work / "whole")
for kill_at, where in moments:
    target = work / f"{kill_at}-{where}"
    args = [*common, "--run_dir", str(target)]
    assert run(args, kill_at, where) == -9, "was not killed"
    if (target / "adapter").exists():
        read_tensors(target / "adapter", read_config(target / "adapter"))
    assert run([*args, "--ckpt_path", "last"]) == 0
    assert files(target) == whole, f"killed at step {kill_at} in {where}"
    shutil.rmtree(target)
print("identical", len(moments))
"""


@pytest.mark.parametrize(("workers", "count"), [("0", 16), ("2", 4)])
def test_killed_at_random_steps(workers: str, count: int, config: Path, tmp_path: Path) -> None:
    rng = random.Random(int(workers))
    hooks = (
        "on_train_batch_start",
        "training_step",
        "on_save_checkpoint",
        "validation_step",
        "on_before_optimizer_step",
    )
    moments = [(rng.randrange(1, 24), hooks[i % len(hooks)]) for i in range(count - 3)]
    # in the last validation, when training has ended, and while the adapter is written
    moments += [(24, "validation_step"), (24, "on_save_checkpoint"), (24, "protocol")]
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, str(config), str(tmp_path), workers, json.dumps(moments)],
        capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    log = (tmp_path / "log.txt").read_text()[-3000:] if (tmp_path / "log.txt").exists() else ""
    assert done.stdout.strip() == f"identical {count}", done.stderr[-3000:] + log
