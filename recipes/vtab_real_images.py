"""Linear probe, Sparse-Tuning and full fine-tuning on real images in the VTAB layout, end to end through `petl`.

    python recipes/vtab_real_images.py --data DIR --out runs/vtab_real

Builds the task with ``recipes/make_vtab_layout.py``, then runs ``petl fit`` (train800val200, last epoch, no search) and
``petl test`` with ``configs/vtab/sparse_tuning.yaml`` for each method on the bundled backbone and on the small ViT
pre-trained on CIFAR-10 in DIR/weights. Finished runs are not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

BACKBONES = {
    "bundled, 64 px": ["--model.backbone", "bundled/tiny_clip_vision"],
    "CIFAR-10 ViT, 32 px": ["--model.backbone", "timm/vit_tiny_patch16_224", "--model.backbone_args",
                            "{img_size: 32, patch_size: 4, embed_dim: 128, depth: 6, num_heads: 4, mlp_ratio: 2, "
                            "norm_eps: 1.0e-5}", "--model.weights", "{data}/weights/vit_cifar10.safetensors"],
}  # fmt: skip
METHODS = {
    "linear probe": ["--model.method", "LinearProbe", "--model.lr", "1.0e-2"],
    "Sparse-Tuning, keep 0.7": ["--model.method.bottleneck", "32", "--model.lr", "5.0e-3"],
    "full fine-tuning": ["--model.method", "FullFineTuning", "--model.lr", "5.0e-4"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("PETL_TEST_DATA") or "../shared/data"))
    parser.add_argument("--out", type=Path, default=Path("runs/vtab_real"))
    parser.add_argument("--task", default="sign_digits")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    args = parser.parse_args()
    layout = args.out / "layout"
    if not (layout / args.task).is_dir():
        maker = Path(__file__).with_name("make_vtab_layout.py")
        command = [sys.executable, str(maker), "--data", str(args.data), "--out", str(layout), "--tasks", args.task]
        subprocess.run(command, check=True)
    lines = [
        f"| {args.task}, test accuracy, {args.epochs} epochs | {' | '.join(METHODS)} |",
        "|---|" + "---:|" * len(METHODS),
    ]
    for backbone, where in BACKBONES.items():
        cells = []
        for method, what in METHODS.items():
            found = []
            for seed in args.seeds:
                run = args.out / f"{args.task}-{backbone}-{method}-{args.epochs}-{seed}".replace(" ", "_").replace(
                    ",", ""
                )
                common = ["--config", "vtab/sparse_tuning", "--data.root", str(layout), "--data.task", args.task,
                          "--data.train_split", "train800val200", "--data.num_workers", "0", "--data.batch_size", "32",
                          "--data.seed", str(seed), "--seed_everything", str(seed), "--model.warmup_epochs", "2",
                          "--trainer.max_epochs", str(args.epochs), "--run_dir", str(run),
                          *(w.replace("{data}", str(args.data)) for w in where), *what]  # fmt: skip
                if not (run / "test_metrics.json").is_file():
                    subprocess.run([sys.executable, "-m", "petl", "fit", *common, "--overwrite", "true"], check=True)
                    subprocess.run([sys.executable, "-m", "petl", "test", *common], check=True)
                found.append(json.loads((run / "test_metrics.json").read_text())["test/acc"])
            spread = f" ± {50 * (max(found) - min(found)):.1f}" if len(found) > 1 else ""
            cells.append(f"{100 * sum(found) / len(found):.1f} %{spread}")
        lines.append(f"| {backbone} | {' | '.join(cells)} |")
        print("\n".join(lines), flush=True)
    (args.out / f"{args.task}.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
