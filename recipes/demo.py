"""The main job on what comes with petl: three methods on the bundled backbone and real handwritten digits.

    python recipes/demo.py            (make demo)

Trains linear probe, Sparse-Tuning and full fine-tuning through the code of ``petl fit``, each in a process of its own,
prints one table, loads the Sparse-Tuning adapter in a fresh process and compares logits, and shows where the token
picture lies. ``--random`` adds a linear probe on the same network with random weights.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

METHODS = {  # name: (row of the table, overrides of quickstart/classification)
    "linear": ("linear probe", ["--model.method", "LinearProbe", "--model.lr", "3.0e-2"]),
    "sparse_tuning": ("Sparse-Tuning, keep 0.7", []),
    "full": ("full fine-tuning", ["--model.method", "FullFineTuning", "--model.lr", "3.0e-4"]),
    "random": ("linear probe, random weights",
               ["--model.method", "LinearProbe", "--model.lr", "3.0e-2", "--model.pretrained", "false"]),
}  # fmt: skip


def train(name: str, run_dir: Path) -> None:
    """One row of the table, in this process: train, test, count, and keep the logits of the test images."""
    import torch
    from safetensors.torch import save_file

    import petl
    from petl.cli import find_config
    from petl.engine.lightning_cli import run

    common = ["--config", str(find_config("quickstart/classification")), "--run_dir", str(run_dir), *METHODS[name][1]]
    cli = run(["fit", *common])
    model = cli.model.model.eval()
    cli.datamodule.setup("test")
    with torch.no_grad():
        logits = torch.cat([model(batch["image"]) for batch in cli.datamodule.test_dataloader()])
    save_file({"logits": logits}, run_dir / "logits.safetensors")
    labels = torch.tensor([label for _, label, _ in cli.datamodule.splits["test"].samples])
    report = petl.report(model)
    row = {
        "accuracy": (logits.argmax(1) == labels).float().mean().item(),
        "trained": report.trainable,
        "head": report.head,
        "gmacs": report.macs / 1e9,
        "saved_mib_per_image": report.saved_bytes.per_image / 2**20,
        **{k: v for k, v in json.loads((run_dir / "fit_metrics.json").read_text()).items() if "/" not in k},
    }
    (run_dir / "row.json").write_text(json.dumps(row, indent=2) + "\n")


def reload(run_dir: Path) -> None:
    """In a fresh process: load the adapter as a user would, and compare the logits with those of the training."""
    import torch
    from safetensors.torch import load_file

    import petl
    from petl.data import Digits

    predictor = petl.load(run_dir / "adapter")
    record = predictor.config["preprocessing"]
    data = Digits(image_size=record["image_size"][0], mean=record["mean"], std=record["std"])
    data.setup("test")
    with torch.inference_mode():
        logits = torch.cat([predictor.model(batch["image"]) for batch in data.test_dataloader()])
    same = torch.equal(logits, load_file(run_dir / "logits.safetensors")["logits"])
    print(f"adapter loaded in a fresh process: logits of {len(logits)} test images {'equal' if same else 'DIFFER'}")
    sys.exit(0 if same else 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"))
    parser.add_argument("--random", action="store_true", help="add a linear probe on random weights")
    parser.add_argument("--train", choices=METHODS, help=argparse.SUPPRESS)
    parser.add_argument("--reload", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.train:
        train(args.train, args.out)
    elif args.reload:
        reload(args.out)
    else:
        compare(args.out, [n for n in METHODS if n != "random" or args.random])


def compare(out: Path, names: list[str]) -> None:
    """Every row in a process of its own, the table, the reload, and where the picture lies."""
    began = time.perf_counter()
    shutil.rmtree(out, ignore_errors=True)
    for name in names:
        print(f"\n--- {METHODS[name][0]}", flush=True)
        command = [sys.executable, __file__, "--train", name, "--out", str(out / name)]
        subprocess.run(command, check=True)
    rows = {n: json.loads((out / n / "row.json").read_text()) for n in names}
    table = [
        "| method | test accuracy | trained (+ head) | GMACs | kept for backward, MiB/image | seconds | peak memory |",
        "|---|---:|---:|---:|---:|---:|---:|",
        *(
            f"| {METHODS[n][0]} | {100 * r['accuracy']:.1f} % | {r['trained']:,} (+ {r['head']:,}) "
            f"| {r['gmacs']:.3f} | {r['saved_mib_per_image']:.2f} | {r['seconds']:.0f} "
            f"| {r['peak_memory_bytes'] / 2**20:.0f} MiB |"
            for n, r in rows.items()
        ),
    ]
    print("\n" + "\n".join(table))
    (out / "table.md").write_text("\n".join(table) + "\n")
    print(flush=True)
    sparse = out / "sparse_tuning"
    subprocess.run([sys.executable, __file__, "--reload", "--out", str(sparse)], check=True)
    picture = max((sparse / "pictures").glob("tokens_step*.png"))
    print(f"adapter:        {sparse / 'adapter'}   (petl info {sparse / 'adapter'})")
    print(f"token picture:  {picture}")
    print(f"whole demo:     {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
