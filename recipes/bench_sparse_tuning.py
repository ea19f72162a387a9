"""Speed and memory of Sparse-Tuning on ViT-B/16 at 224 x 224, as ratios of two things in one process.

    python recipes/bench_sparse_tuning.py --out BENCHMARKS.md            (make bench)

Random weights (speed does not depend on them). The things compared take turns, after a warm-up, and medians of their
times are divided (recipes/timing.py).
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import timm
import torch
from timing import DEVICE, clock, compare, machine, write_section
from torch import nn

import petl
from petl.costs import count_macs, count_saved_bytes


def network(method: petl.Method | None = None) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model("vit_base_patch16_224", num_classes=100).eval().to(DEVICE)
    return petl.attach(model, method) if method else model.requires_grad_(False)


def step(model: nn.Module, x: torch.Tensor) -> Callable[[], None]:
    """Forward, backward and optimiser step of the trained tensors."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    target = torch.zeros(len(x), dtype=torch.long, device=DEVICE)

    def run() -> None:
        nn.functional.cross_entropy(model(x), target).backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def inference(model: nn.Module, x: torch.Tensor) -> Callable[[], None]:
    def run() -> None:
        with torch.inference_mode():
            model(x)

    return run


def speed_rows(batch: int, rounds: int) -> list[tuple[str, float, str]]:
    x = torch.randn(batch, 3, 224, 224, device=DEVICE)
    plain, sparse, dense = network(), network(petl.SparseTuning()), network(petl.SparseTuning(keep_rate=1.0))
    seconds = compare({n: inference(m, x) for n, m in {"plain": plain, "0.7": sparse, "1.0": dense}.items()}, rounds)
    macs = {n: count_macs(m, x[:1]) for n, m in {"plain": plain, "0.7": sparse, "1.0": dense}.items()}
    over = seconds["1.0"] / seconds["plain"] - macs["1.0"] / macs["plain"]
    steps = compare({"0.7": step(sparse, x), "1.0": step(dense, x)}, rounds)
    saved = {n: count_saved_bytes(m.train(), x[:2]) for n, m in {"0.7": sparse, "1.0": dense}.items()}
    return [
        ("inference, images/s at keep 0.7 over plain ViT", seconds["plain"] / seconds["0.7"], "≥ 1.40 (MACs allow "
         f"{macs['plain'] / macs['0.7']:.2f})"),
        ("training step, time at keep 0.7 over keep 1.0", steps["0.7"] / steps["1.0"], "≤ 0.72"),
        ("bytes saved for backward, keep 0.7 over keep 1.0", saved["0.7"] / saved["1.0"], "≤ 0.70"),
        ("inference time at keep 1.0 over plain ViT, beyond the adapters' own MACs", over, "≤ 0.03"),
        ("(images/s of the plain ViT, for orientation)", batch / seconds["plain"], ""),
    ]  # fmt: skip


def start_rows() -> list[tuple[str, float, str]]:
    """Seconds to start the command line, and what loading an adapter adds to building its backbone."""
    rows = []
    for verb in ("--help", "ls"):
        command = partial(subprocess.run, [sys.executable, "-m", "petl", verb], capture_output=True, check=True)
        times = [clock(command) for _ in range(5)]
        rows.append((f"`petl {verb}`, seconds", statistics.median(times), "< 0.5"))
    with tempfile.TemporaryDirectory() as folder:
        petl.save(network(petl.SparseTuning()), Path(folder) / "adapter")
        times = []
        for _ in range(3):
            model = network().requires_grad_(True)
            times.append(clock(partial(petl.load, Path(folder) / "adapter", backbone=model, device=DEVICE)))
    rows.append(("`petl.load` of a ViT-B adapter, seconds beside the backbone", statistics.median(times), "< 1"))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8 if DEVICE == "cpu" else 128)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, help="Markdown file to write")
    args = parser.parse_args()
    write_section(
        args.out,
        "Sparse-Tuning, ViT-B/16 at 224 x 224, bottleneck 32, fp32",
        f"`python recipes/bench_sparse_tuning.py --batch {args.batch} --rounds {args.rounds}` on {machine()}, "
        f"timm {timm.__version__}. Ratios of medians, taken in turns in one process.",
        speed_rows(args.batch, args.rounds) + start_rows(),
    )


if __name__ == "__main__":
    main()
