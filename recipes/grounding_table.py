"""Acc@0.5 of M²IST and DARA beside what they must beat, on generated scenes with the bundled pair of encoders.

    python recipes/grounding_table.py --out runs/grounding_table

Runs ``petl fit`` and ``petl test`` with quickstart/grounding for each method, adds the best constant box, and prints
one table. Finished runs are not run again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor

METHODS = {
    "vision-language part only": ["--model.method", "LinearProbe"],
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


def run(name: str, overrides: list[str], folder: Path, seed: int) -> dict[str, float]:
    """Train and test one row; its numbers."""
    common = ["--config", "quickstart/grounding", "--run_dir", str(folder), "--seed_everything", str(seed), *overrides]
    if not (folder / "test_metrics.json").is_file():
        for verb in (["fit", "--overwrite", "true"], ["test"]):
            subprocess.run([sys.executable, "-m", "petl", verb[0], *common, *verb[1:]], check=True)
    fitted, tested = (json.loads((folder / f"{verb}_metrics.json").read_text()) for verb in ("fit", "test"))
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    return {"acc": tested["test/acc"], "iou": tested["test/iou"], "seconds": fitted["seconds"],
            "parameters": config["tensors"]["parameters"]}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/grounding_table"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("rest", nargs="*", help="further overrides for every row, after --")
    args = parser.parse_args()
    from petl.data import Scenes

    rows = {}
    for name, what in METHODS.items():
        rows[name] = run(name, [*what, *args.rest], args.out / name.replace(" ", "_"), args.seed)
    data = Scenes(3600, 0, 500, 4, max_things=3, zoom=1.5, image_size=64, mean=(0.5,) * 3, std=(0.5,) * 3)
    data.setup("fit")
    boxes = [torch.stack([data.transform(False)(s)["box"] for s in data.splits[k].samples]) for k in ("train", "test")]
    acc, iou = best_constant(boxes[0], boxes[1])
    table = [
        "| method | Acc@0.5 | mean IoU | trained | seconds |",
        "|---|---:|---:|---:|---:|",
        f"| best constant box | {100 * acc:.1f} % | {iou:.3f} | 0 | |",
        *(
            f"| {name} | {100 * r['acc']:.1f} % | {r['iou']:.3f} | {r['parameters']:,} | {r['seconds']:.0f} |"
            for name, r in rows.items()
        ),
    ]
    print("\n" + "\n".join(table))
    (args.out / "table.md").write_text("\n".join(table) + "\n")


if __name__ == "__main__":
    main()
