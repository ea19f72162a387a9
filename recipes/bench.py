"""What a frozen backbone saves, side by side in one process.

    python recipes/bench.py --out BENCHMARKS.md            (make bench)
    python recipes/bench.py --only cache --rounds 5

Compared, on ViT-B/16 at 224 x 224 with random weights (speed depends on neither weights nor pictures): a forward pass
of the frozen network; training steps of full fine-tuning and of plain `peft` LoRA (qkv, r 8); ladder side-tuning and a
linear probe, live and from recorded activations, which are read from disk through petl's own loader. They take turns,
and the rows are ratios of medians (recipes/timing.py). --json writes figures, machine, versions and command too.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import numpy as np
import timm
import torch
from bench_grounding import cached_rows
from peft import LoraConfig, get_peft_model
from PIL import Image
from timing import DEVICE, Row, compare, machine, write_section
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import petl
from petl.backbones.classifier import Classifier
from petl.data.base import ImageDataModule, Sample, Split
from petl.data.tap_store import TapStore
from petl.methods.attach import attached
from petl.methods.frozen_dtype import computes_in_bf16
from petl.methods.side_by_side import SideBySide, SideModules
from petl.models.frozen import FrozenFeatures
from petl.nn.head import Head

CLASSES, EPOCHS, MEMBERS = 100, 100, 8
MISSES = """What holds a cached ladder step back on a CPU is attention over 12 heads of 8 channels (7 % of its
multiply-accumulates; its share of the time stands below) and products 96 wide; by multiply-accumulates alone the first
row would be 30. Such small operations gain less from a second thread than LoRA's large products do. For the same reason
little is left to share among eight cached ladders. The ladder on digits is far from converged after 10 epochs, so that
rounding to bf16 acts like another seed. Rows of bf16 frozen weights need hardware that computes in bf16."""
Batch = dict[str, Any]
Step = Callable[[Batch], None]


class Noise(ImageDataModule):
    """Pictures of noise in memory, as large as the network takes them."""

    def __init__(self, count: int, size: int, batch: int, **options: Any) -> None:
        super().__init__(batch_size=batch, image_size=size, mean=(0.5,) * 3, std=(0.5,) * 3, **options)
        self.name, self.count, self.size = "noise", count, size

    def read(self) -> None:
        rng = np.random.default_rng(0)
        pixels = rng.integers(0, 256, (self.count, self.size, self.size, 3), np.uint8)
        samples = [Sample(Image.fromarray(p), i % CLASSES, str(i)) for i, p in enumerate(pixels)]
        self.num_classes, self.labels = CLASSES, [str(i) for i in range(CLASSES)]
        self.splits, self.split_names = {"train": Split(samples)}, {"train": "noise"}


def network(model: str, size: int) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(model, img_size=size, num_classes=0).eval().to(DEVICE)


def trained_step(logits: Callable[[Batch], Tensor], module: nn.Module) -> Step:
    """Forward, backward and optimiser step of the trained tensors, at a learning rate of 0."""
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=0.0)

    def run(batch: Batch) -> None:
        nn.functional.cross_entropy(logits(batch), batch["label"].to(DEVICE)).backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


class Model:
    """A classifier with a method on ``backbone``, and its step live and from taps."""

    def __init__(self, backbone: nn.Module, method: petl.Method) -> None:
        backbone = petl.attach(backbone, method)
        head = Head("linear", attached(backbone).view.width, CLASSES)
        self.whole = Classifier(backbone, head).to(DEVICE).train()
        self.frozen = FrozenFeatures(backbone)
        self.step = trained_step(self.logits, self.whole)

    def logits(self, batch: Batch) -> Tensor:
        if "taps" not in batch:
            return self.whole(batch["image"].to(DEVICE))
        return self.whole.head(self.frozen.features({n: t.to(DEVICE) for n, t in batch["taps"].items()}))

    def fill(self, data: Noise, folder: Path) -> float:
        """Record the taps of all pictures; seconds for each."""
        pictures = data.transform(training=False)

        def record(positions: list[int]) -> dict[str, Tensor]:
            images = torch.stack([pictures(data.splits["train"][i])["image"] for i in positions])
            return self.frozen.record(images.to(DEVICE))

        store = TapStore({"bench": self.frozen.names}, torch.bfloat16, folder)
        digests, began = data.contents("train"), time.perf_counter()
        store.fill(digests, record, data.batch_size)
        data.cached["train"] = {"image": store.reader(digests)}
        return (time.perf_counter() - began) / len(digests)


class Epoch:
    """One epoch of ``step`` through a loader; how long it waited for data in all, and how long it took."""

    def __init__(self, data: Noise, step: Step) -> None:
        self.loader, self.step = data.train_dataloader(), step
        self.waited = self.took = 0.0

    def __call__(self) -> None:
        began = asked = time.perf_counter()
        for batch in self.loader:
            self.waited += time.perf_counter() - asked
            self.step(batch)
            asked = time.perf_counter()
        self.took += time.perf_counter() - began


def cache_rows(model: str, size: int, batch: int, rounds: int) -> list[Row]:
    """Epochs of ``4 batch`` pictures, live and from recorded activations."""
    count, rows = 4 * batch, list[Row]()
    inner = network(model, size)
    lora = get_peft_model(inner, LoraConfig(r=8, lora_alpha=8, target_modules=["qkv"]))
    head = Head("linear", inner.embed_dim, CLASSES).to(DEVICE)
    plain = nn.ModuleList([lora, head])
    plain.train()
    with tempfile.TemporaryDirectory() as name:
        pictures = Noise(count, size, batch)
        pictures.setup("fit")
        epochs = {"lora": Epoch(pictures, trained_step(lambda b: head(lora(b["image"].to(DEVICE))), plain))}
        filling = {}
        for method in (petl.LadderSideTuning(), petl.LinearProbe()):
            own, data = Model(network(model, size), method), Noise(count, size, batch)
            data.setup("fit")
            filling[method.name] = own.fill(data, Path(name))
            epochs[method.name] = Epoch(data, own.step)
            if method.name == "ladder_side_tuning":
                epochs["live"] = Epoch(pictures, own.step)
        seconds = compare(epochs, rounds, warm_up=1)
    ladder, live = seconds["ladder_side_tuning"], seconds["live"]
    target = "≥ 25" if DEVICE == "cuda" else "≥ 15"
    rows += [(f"epoch of plain `peft` LoRA over a cached epoch of {n}", seconds["lora"] / seconds[m], target)
             for n, m in (("the ladder", "ladder_side_tuning"), ("a linear probe", "linear_probe"))]  # fmt: skip
    fill = filling["ladder_side_tuning"] * count
    rows += [
        (f"ladder, {EPOCHS} epochs live over filling and {EPOCHS} cached ones, from the times of one",
         EPOCHS * live / (fill + EPOCHS * ladder), "≥ 8"),
        ("(filling over one live epoch)", fill / live, ""),
        ("(a cached epoch over a live one)", ladder / live, ""),
        ("ladder with cache, share of the time that waits for data",
         epochs["ladder_side_tuning"].waited / epochs["ladder_side_tuning"].took, "≤ 0.05"),
        ("(linear probe with cache, share of the time that waits for data)",
         epochs["linear_probe"].waited / epochs["linear_probe"].took, ""),
        ("(images/s of plain `peft` LoRA in training)", count / seconds["lora"], ""),
    ]  # fmt: skip
    return rows


def step_rows(model: str, size: int, batch: int, rounds: int) -> list[Row]:
    """A step of the ladder on pictures in memory, beside frozen inference, full fine-tuning and bf16 weights."""
    images = {"image": torch.randn(batch, 3, size, size, device=DEVICE), "label": torch.zeros(batch, dtype=torch.long)}
    plain, ladder = network(model, size).requires_grad_(False), Model(network(model, size), petl.LadderSideTuning())
    full = Model(network(model, size), petl.FullFineTuning())

    @torch.inference_mode()
    def frozen() -> None:
        plain(images["image"])

    ways = {"frozen": frozen, "ladder": lambda: ladder.step(images), "full": lambda: full.step(images)}
    bf16 = Model(network(model, size).bfloat16(), petl.LadderSideTuning())
    low = images | {"image": images["image"].bfloat16()}
    if computes_in_bf16(torch.device(DEVICE)):
        ways["bf16"] = lambda: bf16.step(low)
    seconds = compare(ways, rounds, warm_up=1)
    rows = [
        ("uncached ladder step over frozen inference", seconds["ladder"] / seconds["frozen"], "≤ 1.20"),
        ("uncached ladder step over full fine-tuning", seconds["ladder"] / seconds["full"], ""),
    ]  # fmt: skip
    if computes_in_bf16(torch.device(DEVICE)):
        rows.append(("ladder step, bf16 frozen weights over fp32", seconds["bf16"] / seconds["ladder"], "≤ 0.50"))
    return rows


class Together:
    """``MEMBERS`` ladders, each with its head, from one pass; their step live and from taps."""

    def __init__(self, backbone: nn.Module) -> None:
        backbone = petl.attach(backbone, SideBySide((petl.LadderSideTuning(),) * MEMBERS))
        self.module, self.frozen = cast(SideModules, attached(backbone)), FrozenFeatures(backbone)
        self.heads = nn.ModuleList(Head("linear", self.module.view.width, CLASSES) for _ in range(MEMBERS)).to(DEVICE)
        trained = [p for part in (backbone, self.heads) for p in part.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=0.0)
        backbone.train()

    def step(self, batch: Batch) -> None:
        passed = self.frozen.features(batch["taps"]) if "taps" in batch else self.module.view.features(batch["image"])
        logits = [head(f) for head, f in zip(self.heads, self.module.features(passed), strict=True)]
        torch.stack([nn.functional.cross_entropy(found, batch["label"]) for found in logits]).sum().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def sweep_rows(model: str, size: int, batch: int, rounds: int) -> list[Row]:
    """A step of eight ladders from one stream over eight steps of one ladder, live and from taps in memory."""
    live = {"image": torch.randn(batch, 3, size, size, device=DEVICE),
            "label": torch.zeros(batch, dtype=torch.long, device=DEVICE)}  # fmt: skip
    one, many = Model(network(model, size), petl.LadderSideTuning()), Together(network(model, size))
    cached = {"taps": {n: t.bfloat16() for n, t in one.frozen.record(live["image"]).items()}, "label": live["label"]}
    ways = {
        "one": lambda: one.step(live),
        "many": lambda: many.step(live),
        "one cached": lambda: one.step(cached),
        "many cached": lambda: many.step(cached),
    }
    seconds = compare(ways, rounds, warm_up=1)
    what = f"step of {MEMBERS} ladders trained together over {MEMBERS} steps of one"
    return [
        (f"{what}, live", seconds["many"] / (MEMBERS * seconds["one"]), "≤ 0.30"),
        (f"{what}, cached", seconds["many cached"] / (MEMBERS * seconds["one cached"]), "≤ 0.80"),
    ]


def profile_rows(model: str, size: int, batch: int, rounds: int) -> list[Row]:
    """Where the time of a cached ladder step goes, in shares of all operations."""
    own = Model(network(model, size), petl.LadderSideTuning())
    images = torch.randn(batch, 3, size, size, device=DEVICE)
    taps = {name: tap.bfloat16() for name, tap in own.frozen.record(images).items()}
    cached = {"taps": taps, "label": torch.zeros(batch, dtype=torch.long)}
    own.step(cached)
    with profile(activities=[ProfilerActivity.CUDA if DEVICE == "cuda" else ProfilerActivity.CPU]) as found:
        for _ in range(rounds):
            own.step(cached)
    spent = "self_device_time_total" if DEVICE == "cuda" else "self_cpu_time_total"
    times = {event.key: getattr(event, spent) for event in found.key_averages()}
    parts = {"attention": ("scaled_dot_product", "attention", "fmha"), "matrix products": ("mm", "gemm")}
    return [
        (f"(cached ladder step, share of {name})",
         sum(t for key, t in times.items() if any(word in key for word in words)) / sum(times.values()), "")
        for name, words in parts.items()
    ]  # fmt: skip


def same_numbers_rows(epochs: int) -> list[Row]:
    """Final figures of quickstart/classification with and without the cache, from ``petl fit`` and ``petl test``."""
    rows: list[Row] = []
    for method, lr in (("LadderSideTuning", "3.0e-3"), ("LinearProbe", "3.0e-2")):
        found = {}
        with tempfile.TemporaryDirectory() as name:
            for kept in ("off", "float32", "bfloat16"):
                run = Path(name) / kept
                cache = ["--cache", "off"] if kept == "off" else ["--cache", "require", "--cache_dtype", kept]
                common = [
                    "--config",
                    "quickstart/classification",
                    "--run_dir",
                    str(run),
                    "--cache_dir",
                    f"{name}/taps",
                    "--model.method",
                    method,
                    "--model.lr",
                    lr,
                    "--trainer.max_epochs",
                    str(epochs),
                    *cache,
                ]
                for verb in ("fit", "test"):
                    subprocess.run([sys.executable, "-m", "petl", verb, *common], check=True, stdout=subprocess.DEVNULL)
                found[kept] = json.loads((run / "test_metrics.json").read_text())
        exact = max(abs(found["float32"][k] - v) for k, v in found["off"].items())
        rounded = 100 * abs(found["bfloat16"]["test/acc"] - found["off"]["test/acc"])
        rows += [
            (
                f"{method}, digits, {epochs} epochs: largest difference of a test metric, fp32 cache and none",
                exact,
                "0",
            ),
            (f"{method}: points of test accuracy between bf16 cache and none", rounded, "≤ 0.2"),
            (f"(test accuracy of {method} without a cache, %)", 100 * found["off"]["test/acc"], ""),
        ]
    return rows


def main() -> None:
    sections: dict[str, Callable[[argparse.Namespace], list[Row]]] = {
        "cache": lambda a: cache_rows(a.model, a.input, a.batch, a.rounds),
        "step": lambda a: step_rows(a.model, a.input, a.batch, a.rounds),
        "sweep": lambda a: sweep_rows(a.model, a.input, a.batch, a.rounds),
        "profile": lambda a: profile_rows(a.model, a.input, a.batch, a.rounds),
        "grounding": lambda a: cached_rows(a.batch, a.rounds),
        "numbers": lambda a: same_numbers_rows(a.epochs),
    }
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=sections, help="sections; all if left out")
    parser.add_argument("--batch", type=int, default=8 if DEVICE == "cpu" else 64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=10, help="of the runs whose final figures are compared")
    parser.add_argument("--model", default="vit_base_patch16_224", help="a timm ViT")
    parser.add_argument("--input", type=int, default=224, help="side of the images in pixels")
    parser.add_argument("--out", type=Path, help="Markdown file to write to")
    parser.add_argument("--json", type=Path, help="JSON file to write to")
    args = parser.parse_args()
    rows = [row for name in args.only or sections for row in sections[name](args)]
    only = f" --only {' '.join(args.only)}" if args.only else ""
    command = f"python recipes/bench.py{only} --batch {args.batch} --rounds {args.rounds}"
    about = f"{machine()}, timm {timm.__version__}, peft {version('peft')}"
    write_section(
        args.out,
        f"Frozen backbone: cache and sweeps, {args.model} at {args.input} x {args.input}",
        f"`{command}` on {about}. Ratios of medians, taken in turns in one process; the cache is bf16 on "
        f"disk.\n\n{MISSES}",
        rows,
    )
    if args.json:
        figures = [{"what": what, "measured": value, "target": target} for what, value, target in rows]
        args.json.write_text(json.dumps({"command": command, "machine": about, "figures": figures}, indent=2) + "\n")


if __name__ == "__main__":
    main()
