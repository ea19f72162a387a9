"""Acc@0.5 of M²IST and DARA beside what they must beat, on generated scenes with the bundled pair of encoders.

    python recipes/grounding_table.py --out runs/grounding_table --seeds 0 1 2

Runs ``petl fit`` and ``petl test`` with quickstart/grounding for each method and seed, adds the best constant box, and
prints one table: means, and standard deviations where there are several seeds. Finished runs are not run again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

import torch
import yaml
from torch import Tensor

METHODS = {
    "vision-language part only": ["--model.method", "LinearProbe", "--model.head_epochs", "0"],
    "DARA": ["--model.method", "DARA", "--model.method.scale", "1.0", "--model.method_lr", "1.0e-3"],
    "M²IST": [],
}


def best_constant(train: Tensor, test: Tensor) -> tuple[float, float]:
    """Acc@0.5 and mean IoU on ``test`` of the training box that hits most training boxes; boxes are cxcywh (N, 4)."""
    from petl.nn.boxes import paired_iou

    candidates = train[torch.randperm(len(train), generator=torch.Generator().manual_seed(0))[:1000]]
    hits = torch.stack([(paired_iou(box.expand_as(train), train) >= 0.5).float().mean() for box in candidates])
    ious = paired_iou(candidates[hits.argmax()].expand_as(test), test)
    return (ious >= 0.5).float().mean().item(), ious.mean().item()


def run(overrides: list[str], folder: Path, seed: int) -> dict[str, float]:
    """Train and test one row; its numbers."""
    seeds = ["--seed_everything", str(seed), "--data.seed", str(seed)]
    common = ["--config", "quickstart/grounding", "--run_dir", str(folder), *seeds, *overrides]
    if not (folder / "test_metrics.json").is_file():
        for verb in (["fit", "--overwrite", "true"], ["test"]):
            subprocess.run([sys.executable, "-m", "petl", verb[0], *common, *verb[1:]], check=True)
    fitted, tested = (json.loads((folder / f"{verb}_metrics.json").read_text()) for verb in ("fit", "test"))
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    return {"acc": tested["test/acc"], "iou": tested["test/iou"], "seconds": fitted["seconds"],
            "parameters": config["tensors"]["parameters"]}  # fmt: skip


def spread(values: list[float], scale: float = 1.0, digits: int = 1) -> str:
    """Mean ± standard deviation of a sample; the value alone where there is one."""
    scaled = [scale * v for v in values]
    deviation = f" ± {statistics.stdev(scaled):.{digits}f}" if len(scaled) > 1 else ""
    return f"{statistics.mean(scaled):.{digits}f}{deviation}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/grounding_table"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("rest", nargs="*", help="further overrides for every row, after --")
    args = parser.parse_args()
    from petl.data import Scenes

    rows, folder = {}, args.out
    for name, what in METHODS.items():
        for seed in args.seeds:
            folder = args.out / f"{name.replace(' ', '_')}_seed{seed}"
            rows[name, seed] = run([*what, *args.rest], folder, seed)
    drawn = yaml.safe_load((folder / "config.yaml").read_text())["data"]["init_args"]
    data = Scenes(**drawn | {"image_size": 64, "mean": (0.5,) * 3, "std": (0.5,) * 3})
    data.setup("fit")
    boxes = [torch.stack([data.transform(False)(s)["box"] for s in data.splits[k].samples]) for k in ("train", "test")]
    acc, iou = best_constant(boxes[0], boxes[1])
    table = [
        "| method | Acc@0.5, % | mean IoU | trained | seconds |",
        "|---|---:|---:|---:|---:|",
        f"| best constant box | {100 * acc:.1f} | {iou:.3f} | 0 | |",
    ]
    for name in METHODS:
        of = {key: [rows[name, seed][key] for seed in args.seeds] for key in ("acc", "iou", "parameters", "seconds")}
        table.append(
            f"| {name} | {spread(of['acc'], 100)} | {spread(of['iou'], digits=3)} | {of['parameters'][0]:,} "
            f"| {statistics.mean(of['seconds']):.0f} |"
        )
    print("\n" + "\n".join(table))
    (args.out / "table.md").write_text("\n".join(table) + "\n")


if __name__ == "__main__":
    main()
