"""Speed and memory of every classification method on ViT-B/16 at 224 x 224, with its default options.

    python recipes/bench_methods.py --out BENCHMARKS.md            (make bench)
    python recipes/bench_methods.py --methods lora ssf --rounds 9

Three networks are in memory: a plain one, one with plain `peft` LoRA on qkv, and one to which the methods are attached
one after the other. Each takes turns with plain peft LoRA (training) and with the plain network (inference), and the
table is made of the ratios of the medians (recipes/timing.py). Random weights and a learning rate of 0: speed depends
on neither, and the shared network stays as it is.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import timm
import torch
from peft import LoraConfig, get_peft_model
from timing import DEVICE, Row, compare, machine, table, write_section
from torch import nn

import petl
from petl.costs import count_macs, count_saved_bytes
from petl.errors import PetlError, nearest
from petl.methods import get_method, list_methods
from petl.methods.attach import remove

FULL = "full_fine_tuning"
ADAPTERS = 19  # as many as VTAB-1k has tasks
Run = Callable[[], object]


class Cost(NamedTuple):
    """Times: ``step`` over plain peft LoRA's, ``inference`` over the plain network's. ``saved``, ``peak``: bytes."""

    trained: int
    step: float
    inference: float
    saved: int
    peak: int


def usable() -> list[str]:
    """Methods that classify with a timm ViT and have a default for each option."""
    names = [n for n in list_methods() if "timm_vit" in get_method(n).backbones]
    return [n for n in names if not any(_required(f) for f in dataclasses.fields(get_method(n)))]


def _required(field: dataclasses.Field[object]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


class Bench:
    """The three networks, and what is measured with them."""

    def __init__(self, model: str, size: int, batch: int, rounds: int) -> None:
        self.model, self.size, self.rounds = model, size, rounds
        self.x = torch.randn(batch, 3, size, size, device=DEVICE)
        self.seconds: dict[str, list[float]] = {"step": [], "inference": []}  # of the references, by the way
        self.plain = self.network().requires_grad_(False)
        before = _allocated()
        inner = self.network()
        self.lora = get_peft_model(inner, LoraConfig(r=8, lora_alpha=8, target_modules=["qkv"]))
        inner.get_submodule("head").requires_grad_(True)
        self.lora_step = self.step(self.lora)
        peak = self.peak(self.lora_step, before)
        self.reference = Cost(_trained(self.lora), 1.0, self.inference(self.lora), self.saved(self.lora), peak)
        self.before = _allocated()
        self.backbone = self.network()

    def network(self) -> nn.Module:
        torch.manual_seed(0)
        return timm.create_model(self.model, img_size=self.size, num_classes=100).eval().to(DEVICE)

    def step(self, model: nn.Module) -> Run:
        """Forward, backward and optimiser step of the trained tensors."""
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0)
        target = torch.zeros(len(self.x), dtype=torch.long, device=DEVICE)

        def run() -> None:
            nn.functional.cross_entropy(model(self.x), target).backward()
            optimizer.step()
            optimizer.zero_grad()

        return run

    def training(self, model: nn.Module, step: Run, times: int = 1) -> float:
        """Time of ``step`` of ``model`` over a step of plain peft LoRA."""
        model.train()
        self.lora.train()
        found = compare({"this": step, "reference": self.lora_step}, times * self.rounds, warm_up=1)
        self.seconds["step"].append(found["reference"])
        return found["this"] / found["reference"]

    def inference(self, model: nn.Module, times: int = 1) -> float:
        """Time of a forward pass over one of the plain network."""
        model.eval()
        with torch.inference_mode():
            ways = {"this": lambda: model(self.x), "reference": lambda: self.plain(self.x)}
            found = compare(ways, times * self.rounds, warm_up=1)
        self.seconds["inference"].append(found["reference"])
        return found["this"] / found["reference"]

    def saved(self, model: nn.Module) -> int:
        """Bytes kept for backward per image."""
        model.train()
        two, three = (count_saved_bytes(model, torch.zeros(n, *self.x.shape[1:], device=DEVICE)) for n in (2, 3))
        return three - two

    def peak(self, step: Run, before: int) -> int:
        """Peak memory of a training step beyond the ``before`` bytes of the other networks; 0 without a GPU."""
        if DEVICE != "cuda":
            return 0
        step()  # makes the optimiser's state
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() - before

    def method(self, name: str) -> tuple[Cost, float | None]:
        """What a method costs, and its inference time over the plain network's once merged, where it merges."""
        gc.collect()  # what was taken off before lies in reference cycles
        method = get_method(name)()
        model = petl.attach(self.backbone, method)
        step = self.step(model.train())
        peak = self.peak(step, self.before)
        steps = self.training(model, step)
        cost = Cost(_trained(model), steps, self.inference(model), self.saved(model), peak)
        if not method.mergeable:
            remove(model)
            return cost, None
        return cost, self.inference(petl.merge(model.eval()), times=2)

    def same_lora(self) -> float:
        """Time of a training step with petl's LoRA on qkv over plain peft's, which is the same method."""
        model = petl.attach(self.backbone, petl.LoRA(r=8, parts=("qkv",)))
        found = self.training(model, self.step(model), times=3)
        remove(model)
        return found

    def serving_rows(self) -> list[Row]:
        """The logits of many ladders from one pass of the backbone, against one ladder and against passes apart."""
        petl.attach(self.backbone, petl.LadderSideTuning(reduction=8))
        plain, one = (count_macs(m, self.x[:1]) for m in (self.plain, self.backbone.eval()))
        with tempfile.TemporaryDirectory() as folder:
            ladder = petl.save(self.backbone, Path(folder) / "ladder")
            petl.detach(self.backbone)
            adapters = petl.load({f"task {i}": ladder for i in range(ADAPTERS)}, backbone=self.backbone, device=DEVICE)
        names = adapters.names
        ways: dict[str, Run] = {
            "one": lambda: adapters.logits(self.x, names[0]),
            "together": lambda: adapters.all_logits(self.x),
            "apart": lambda: [adapters.logits(self.x, name) for name in names],
        }
        seconds = compare(ways, max(2, self.rounds // 2), warm_up=1)
        adapters.release()
        allowed = (plain + ADAPTERS * (one - plain)) / one
        together = f"time of {ADAPTERS} ladder adapters (reduction 8) from one backbone pass"
        return [
            (f"{together} over one adapter", seconds["together"] / seconds["one"],
             f"≤ 1.8 (MACs allow {allowed:.2f})"),
            (f"{together} over {ADAPTERS} passes", seconds["together"] / seconds["apart"], "≤ 0.11"),
        ]  # fmt: skip

    def ladder(self, costs: dict[str, Cost]) -> str:
        """The table, fastest training first."""
        full, lora = costs[FULL], self.reference
        step, inference = (len(self.x) / statistics.median(self.seconds[k]) for k in ("step", "inference"))
        names = ("training img/s", "inference img/s", "MiB kept per image", "peak MiB")[: 4 if DEVICE == "cuda" else 3]
        header = ["method", "trained", *(h for name in names for h in (name, "/ full", "/ LoRA"))]

        def row(name: str, c: Cost) -> list[str]:
            cells = [
                (step / c.step, full.step / c.step, lora.step / c.step),
                (inference / c.inference, full.inference / c.inference, lora.inference / c.inference),
                (c.saved / 2**20, c.saved / full.saved, c.saved / lora.saved),
                (c.peak / 2**20, c.peak / max(full.peak, 1), c.peak / max(lora.peak, 1)),
            ]
            figures = (f"{v:.2f}" for triple, _ in zip(cells, names) for v in triple)
            return [name, f"{c.trained:,}", *figures]

        lines = sorted({**costs, "plain `peft` LoRA": lora}.items(), key=lambda item: item[1].step)
        rows = [row(name, cost) for name, cost in lines]
        frozen = [f"{inference:.2f}", f"{full.inference:.2f}", f"{lora.inference:.2f}"]
        rows.append(["plain network", "0", *[""] * 3, *frozen, *[""] * (3 * len(names) - 6)])
        return table(header, rows)


def _trained(model: nn.Module) -> int:
    """Trained parameters without the network's own head, which is trained everywhere."""
    return sum(p.numel() for n, p in model.named_parameters() if p.requires_grad and "head." not in n)


def _allocated() -> int:
    return torch.cuda.memory_allocated() if DEVICE == "cuda" else 0


def chosen(names: Sequence[str] | None) -> list[str]:
    """Full fine-tuning, which the table compares with, and then ``names``, or every method."""
    known = usable()
    for name in names or ():
        if name not in known:
            raise PetlError(f"--methods {name}: {nearest(name, known)}")
    return list(dict.fromkeys([FULL, *(names or known)]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", metavar="NAME", help="registry names; all methods if left out")
    parser.add_argument("--batch", type=int, default=2 if DEVICE == "cpu" else 64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", default="vit_base_patch16_224", help="a timm ViT")
    parser.add_argument("--input", type=int, default=224, help="side of the images in pixels")
    parser.add_argument("--out", type=Path, help="Markdown file to write to")
    args = parser.parse_args()
    names = chosen(args.methods)
    bench = Bench(args.model, args.input, args.batch, args.rounds)
    found = {name: bench.method(name) for name in names}
    rows: list[Row] = [
        ("training step, time of petl's LoRA on qkv over plain `peft` LoRA on qkv", bench.same_lora(), "≤ 1.02"),
        *((f"inference, time of {n} merged over the plain network", merged, "1.00 ± 0.02")
          for n, (_, merged) in found.items() if merged is not None),
        *bench.serving_rows(),
    ]  # fmt: skip
    options = f"--batch {args.batch} --rounds {args.rounds}"
    write_section(
        args.out,
        f"Methods, {args.model} at {args.input} x {args.input}, fp32",
        f"`python recipes/bench_methods.py {options}` on {machine()}, timm {timm.__version__}. Each method, with its "
        "default options, took turns with plain `peft` LoRA (qkv, r 8) in training and with the plain network in "
        "inference; a speed is that of the reference times the ratio of the medians. Trained parameters are without "
        'the head. "/ full" and "/ LoRA": over full fine-tuning and over plain `peft` LoRA. Inference is before a '
        "merge.\n\n" + bench.ladder({name: cost for name, (cost, _) in found.items()}),
        rows,
    )


if __name__ == "__main__":
    main()
