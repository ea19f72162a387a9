"""What AutoGnothi costs on ViT-B/16 at 224 pixels with 10 classes, as ratios in one process.

    python recipes/bench_explain.py --out BENCHMARKS.md            (make bench)

Prediction with and without explanation; one explanation against KernelSHAP on the same surrogate; bytes kept for the
backward pass of the surrogate's training against full fine-tuning; key masks against running the kept tokens alone.
Random weights (speed does not depend on them). How good the explanations are is the business of
recipes/explain_table.py, which trains them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import timm
import torch
from timing import DEVICE, Row, compare, machine, write_section
from torch import Tensor, nn

import petl
from petl.costs import count_macs, count_saved_bytes
from petl.nn.ladder import ladder_macs
from petl.nn.shapley import kernel_masks, uniform_size_masks

BUDGET = 10_000  # evaluations of KernelSHAP for 196 players: about 50 per player, what the sheet asks of a ground truth


def classifier() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("vit_base_patch16_224", num_classes=10).eval().to(DEVICE)


class _Call(nn.Module):
    """A loss as a module, for the counters."""

    def __init__(self, model: nn.Module, stage: str) -> None:
        super().__init__()
        self.model, self.stage = model, stage

    def forward(self, x: Tensor) -> Tensor:
        if self.stage == "full":
            return self.model(x)
        model: petl.ExplainedClassifier = self.model  # type: ignore[assignment]
        if self.stage == "surrogate":
            return model.surrogate_logits(x, uniform_size_masks(model.players(x).counts))
        known = torch.zeros(len(x), 10, device=x.device)
        return model.explain(x, known, known + 0.1).values


def saved_per_image(model: nn.Module, stage: str) -> int:
    call = _Call(model, stage).train()
    two, three = (count_saved_bytes(call, torch.randn(n, 3, 224, 224, device=DEVICE)) for n in (2, 3))
    return three - two


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8 if DEVICE == "cpu" else 128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="Markdown file to write to")
    args = parser.parse_args()
    x = torch.randn(args.batch, 3, 224, 224, device=DEVICE)
    plain, model = classifier(), petl.ExplainedClassifier(classifier(), petl.AutoGnothi())
    model.measure_null(x)
    with torch.inference_mode():
        seconds = compare({"predict": lambda: plain(x), "explain": lambda: petl.explain(model, x)}, args.rounds)
        one = x[:1]
        masks = kernel_masks(model.players(one).counts, 64)

        def evaluate(gather: bool) -> None:
            model.gather = gather
            model.values(one, masks)

        ways = {"kept tokens alone": lambda: evaluate(True), "key masks": lambda: evaluate(False)}
        keeps = compare(ways, max(1, args.rounds // 2), 1)
        model.gather = True
        single = compare({"one": lambda: petl.explain(model, one)}, args.rounds)["one"]
    tokens, e = 197, 96
    macs = count_macs(plain, one)
    side = ladder_macs(768, 12, 8, tokens, "sum", None) + tokens * (e * 4 * e + 16 * e * e + 4 * e * 10)  # and the MLP
    full = saved_per_image(classifier().requires_grad_(True), "full")
    rows: list[Row] = [
        ("time of prediction and explanation over prediction alone", seconds["explain"] / seconds["predict"], "≤ 1.10"),
        ("multiply-accumulates of classifier and explainer over the classifier's", 1 + side / macs, "≤ 1.032"),
        *peak_rows(plain, model, x),
        (f"time of KernelSHAP with {BUDGET:,} evaluations (64 timed) over one explanation",
         keeps["kept tokens alone"] / 64 * BUDGET / single, "≥ 300"),
        ("time of coalitions, key masks over running the kept tokens alone",
         keeps["key masks"] / keeps["kept tokens alone"], ""),
        ("bytes saved for backward per image, surrogate over full fine-tuning",
         saved_per_image(model, "surrogate") / full, "≤ 0.20"),
        ("bytes saved for backward per image, explainer over full fine-tuning",
         saved_per_image(model, "explainer") / full, ""),
        ("(MiB per image, full fine-tuning)", full / 2**20, ""),
    ]  # fmt: skip
    write_section(
        args.out,
        "Explanations (AutoGnothi), ViT-B/16 at 224 pixels, 10 classes, reduction 8, fp32",
        f"`python recipes/bench_explain.py --batch {args.batch} --rounds {args.rounds}` on {machine()}. "
        "Ratios of medians, taken in turns in one process.",
        rows,
    )


def peak_rows(plain: nn.Module, model: nn.Module, x: Tensor) -> list[Row]:
    """Peak memory of both, on a GPU only."""
    if DEVICE != "cuda":
        return []
    peaks = []
    for call in (lambda: plain(x), lambda: petl.explain(model, x)):
        torch.cuda.reset_peak_memory_stats()
        with torch.inference_mode():
            call()
        peaks.append(torch.cuda.max_memory_allocated())
    return [("peak memory of prediction and explanation over prediction alone", peaks[1] / peaks[0], "≤ 1.10")]


if __name__ == "__main__":
    main()
