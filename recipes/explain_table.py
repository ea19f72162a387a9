"""Explanations of one classifier compared: train AutoGnothi on it, evaluate it beside every baseline, draw maps.

    python recipes/explain_table.py --out runs/explain_table                       (the quickstart's digits)
    python recipes/explain_table.py --out runs/real -- --model.classifier DIRECTORY --data.root IMAGES …

Everything after ``--`` overrides the config. Runs ``petl fit`` and ``petl test``; a finished training is not run again.
Writes ``table.md`` and ``comparison.png``: the test images with the best and the worst AutoGnothi maps, by correlation
with the true values where these are known, else by the insertion area.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

COLUMNS = {"insertion": "insertion ↑", "deletion": "deletion ↓", "faithfulness": "faithfulness ↑",
           "sensitivity_n": "sensitivity-n ↑", "pearson": "Pearson ↑", "relative_l2": "relative L2 ↓",
           "efficiency_gap": "efficiency gap"}  # fmt: skip
DRAWN = ("autognothi", "kernelshap", "integrated gradients", "gradcam", "attention rollout", "leave-one-out")


def table(metrics: dict[str, float]) -> str:
    """Markdown of ``test/<explanation>/<metric>``."""
    names = dict.fromkeys(key.split("/")[1] for key in metrics if key.count("/") == 2)
    lines = ["| explanation | " + " | ".join(COLUMNS.values()) + " |", "|---|" + "---:|" * len(COLUMNS)]
    for name in names:
        cells = []
        for metric in COLUMNS:
            value = metrics.get(f"test/{name}/{metric}", float("nan"))
            cells.append("" if value != value else f"{value:.1e}" if metric == "efficiency_gap" else f"{value:.3f}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def comparison(model: Any, images: Tensor, shown: Tensor, labels: list[str], count: int, file: Path) -> None:
    """The ``count`` best and worst of ``images``, each with its map from every method."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from petl.heatmaps import draw_map
    from petl.models.attributions import ATTRIBUTIONS
    from petl.models.explanation_metrics import evaluate
    from petl.models.games import value_table
    from petl.nn.shapley import exact_shapley

    found = evaluate(model, images, ["autognothi"], torch.Generator().manual_seed(0), subsets_truth=0)["autognothi"]
    score = found["insertion"] if bool(found["pearson"].isnan().all()) else found["pearson"]
    order = score.nan_to_num(-1).argsort(descending=True)
    chosen = torch.cat([order[:count], order[-count:]])
    x, logits = images[chosen], model.logits(images[chosen])
    classes, grid = logits.argmax(-1), model.grid(images)
    maps: dict[str, Tensor] = {}
    if model.players(x).most <= 12:
        exact = exact_shapley(value_table(model, x))
        maps["exact Shapley"] = exact.gather(2, classes[:, None, None].expand(-1, exact.shape[1], 1))[..., 0]
    for name in DRAWN:
        maps[name] = ATTRIBUTIONS[name](model, x, classes, torch.Generator().manual_seed(0)).detach()
    rows, columns = len(x), 1 + len(maps)
    figure = Figure(figsize=(1.45 * columns, 1.6 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False)
    for i, row in enumerate(axes):
        picture = shown[chosen[i]]
        row[0].imshow(picture.permute(1, 2, 0).numpy())
        mark = "best" if i < count else "worst"
        row[0].set_ylabel(f"{mark}: {labels[int(classes[i])]} {logits[i].softmax(-1).max():.0%}", fontsize=8)
        for ax, (name, values) in zip(row[1:], maps.items(), strict=True):
            draw_map(ax, picture, values[i].unflatten(0, grid))
            if i == 0:
                ax.set_title(name, fontsize=8)
        for ax in row:
            ax.set_xticks([])
            ax.set_yticks([])
    figure.savefig(file, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="quickstart/explain")
    parser.add_argument("--out", type=Path, default=Path("runs/explain_table"))
    parser.add_argument("--count", type=int, default=3, help="best and worst images to draw, each")
    parser.add_argument("--candidates", type=int, default=100, help="test images to choose them from")
    parser.add_argument("--maps_only", action="store_true", help="leave the pictures out, where they may not be shown")
    parser.add_argument("rest", nargs="*", help="overrides of the config, after --")
    args = parser.parse_args()
    from petl.cli import find_config
    from petl.engine.lightning_cli import run
    from petl.pictures import unnormalise

    config = args.config if Path(args.config).is_file() else str(find_config(args.config))
    folder = args.out / "run"
    common = ["--config", config, "--run_dir", str(folder), *args.rest]
    if not (folder / "fit_metrics.json").is_file():
        run(["fit", "--overwrite", "true", *common])
    cli = run(["test", *common])
    text = table(json.loads((folder / "test_metrics.json").read_text()))
    print("\n" + text)
    (args.out / "table.md").write_text(text + "\n")
    data: Any = cli.datamodule
    batches = [batch["image"] for batch in data.evaluation_loader(data.test_split, whole=True)]
    images = torch.cat(batches)
    images = images[:: max(1, len(images) // args.candidates)][
        : args.candidates
    ]  # from every class: files lie by class
    shown = unnormalise(images, data.preprocessing["mean"], data.preprocessing["std"]).clamp(0, 1)
    model: Any = cli.model
    with torch.no_grad():
        shown = torch.ones_like(shown) if args.maps_only else shown
        comparison(model.model.cpu(), images, shown, model.labels, args.count, args.out / "comparison.png")
    print(f"\n{args.out / 'table.md'}, {args.out / 'comparison.png'}")


if __name__ == "__main__":
    main()
