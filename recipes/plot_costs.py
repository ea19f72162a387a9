"""Why parameters are not memory, and memory is not time: the figures of BENCHMARKS.md as one picture.

    python recipes/plot_costs.py --out docs/costs.png

Reads the table of methods (recipes/bench_methods.py) and the rows of the cache (recipes/bench.py).
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import NamedTuple

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from vtab_plot import Mark, name_marks

CACHED = {"the ladder": "ladder_side_tuning", "a linear probe": "linear_probe"}  # words of the rows: method
LORA = "plain `peft` LoRA"
NAMED = ("full_fine_tuning", "lora", "sparse_tuning", "ladder_side_tuning", "linear_probe", "evit", "dtl", "ssf",
         "fourierft", "vpt", "adaptformer", "bitfit",
         *(f"{name}, cached" for name in CACHED.values()))  # fmt: skip


class Cost(NamedTuple):
    trained: int
    speed: float  # training images/s
    kept: float  # MiB for backward per image


def read(text: str) -> dict[str, Cost]:
    """Costs by method, and of those that train from the cache as "NAME, cached"."""
    table = re.search(r"^## Methods.*?(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    cells = [[c.strip() for c in line.strip("|\n ").split("|")] for line in (table[0] if table else "").splitlines()]
    costs = {
        c[0]: Cost(int(c[1].replace(",", "")), float(c[2]), float(c[8]))
        for c in cells
        if len(c) > 8 and c[8][:1].isdigit()
    }
    for words, name in CACHED.items():
        row = re.search(rf"over a cached epoch of {words} \| ([\d.]+)", text)
        if row and name in costs and LORA in costs:
            costs[f"{name}, cached"] = costs[name]._replace(speed=costs[LORA].speed * float(row[1]))
    return costs


def plot(costs: dict[str, Cost]) -> Figure:
    """Memory over trained parameters, and speed over memory; most methods without a name, in grey."""
    figure = Figure(figsize=(16, 6.4), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    live = {n: c for n, c in costs.items() if not n.endswith("cached")}
    color = {name: f"C{NAMED.index(name) % 10}" if name in NAMED else "0.75" for name in costs}
    panels = [
        (left, [Mark(c.trained, c.kept, 0, n, color[n]) for n, c in live.items()]),
        (right, [Mark(c.kept, c.speed, 0, n, color[n]) for n, c in costs.items()]),
    ]
    left.set(xlabel="trained parameters without the head", ylabel="kept for backward, MiB per image",
             title="parameters are not memory", yscale="log")  # fmt: skip
    left.set_xscale("symlog", linthresh=1e4)
    right.set(xlabel="kept for backward, MiB per image", ylabel="training, images/s", title="memory is not time",
              xscale="log", yscale="log")  # fmt: skip
    for ax, marks in panels:
        for mark in marks:
            ax.plot(mark.x, mark.y, "*" if mark.name.endswith("cached") else "o", color=mark.color)
        ax.margins(0.1)
        ax.grid(alpha=0.3)
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    for ax, marks in panels:
        name_marks(ax, [mark for mark in marks if mark.name in NAMED])
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--benchmarks", type=Path, default=Path(__file__).parents[1] / "BENCHMARKS.md")
    parser.add_argument("--out", type=Path, default=Path("docs/costs.png"))
    args = parser.parse_args()
    costs = read(args.benchmarks.read_text())
    if not costs:
        parser.error(f"{args.benchmarks} has no table of methods: run recipes/bench_methods.py first.")
    plot(costs).savefig(args.out)
    print(f"{args.out}: {len(costs)} methods")


if __name__ == "__main__":
    main()
