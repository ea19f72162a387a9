"""Pictures: which patches kept a token of their own, and where an expression was found."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from petl.methods.attach import attached
from petl.methods.evit import ReducingModule
from petl.nn.boxes import paired_iou
from petl.nn.token_reduction import kept_masks

RIGHT, WRONG, PREDICTED = "#1a7f37", "#cf222e", "#0969da"


@torch.inference_mode()
def kept_patches(backbone: nn.Module, model: nn.Module, images: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Logits of ``model`` and, after each event, the grid of patches that kept their token: bool (B, rows, columns).

    The list is empty for methods that drop nothing. ``images`` (B, 3, H, W), preprocessed.
    """
    module = attached(backbone)
    if not isinstance(module, ReducingModule):
        return model(images), []
    rows, columns = module.view.grid((3, *images.shape[2:]))
    module.record = []
    try:
        logits = model(images)
        masks = kept_masks(list(module.record[0]), rows * columns)
    finally:
        module.record = None
    return logits, [m.unflatten(1, (rows, columns)) for m in masks]


def token_grid(
    images: Tensor,
    masks: Sequence[Tensor],
    events: Sequence[int],
    titles: Sequence[str],
    right: Sequence[bool] | None,
    file: Path,
) -> Path:
    """Draw one row per image: the image, then what is left of it after each event. Titles: green = right, red = wrong.

    Args:
        images: (B, 3, H, W) in [0, 1].
        masks: after each event, bool (B, rows, columns).
        events: block numbers of the events, for the column heads.
        titles: one line per image.
        right: whether the prediction was right, per image; None where the truth is not known.
        file: PNG to write.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = 1 + len(masks)
    figure = Figure(figsize=(2.1 * columns, 2.35 * len(images)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(images), columns, squeeze=False)
    for i, image in enumerate(images.cpu()):
        for j, ax in enumerate(axes[i]):
            shown = image
            if j:
                mask = masks[j - 1][i].cpu().float()[None, None]
                mask = torch.nn.functional.interpolate(mask, size=image.shape[-2:], mode="nearest")[0]
                shown = image * mask + (0.15 * image + 0.8) * (1 - mask)
            ax.imshow(shown.clamp(0, 1).permute(1, 2, 0).numpy(), interpolation="nearest")
            ax.set_xticks([])
            ax.set_yticks([])
            if j:
                kept = int(masks[j - 1][i].sum())
                ax.set_title(f"block {events[j - 1]}: {kept}/{masks[j - 1][i].numel()} patches", fontsize=7)
            else:
                color = "black" if right is None else RIGHT if right[i] else WRONG
                ax.set_title(titles[i], fontsize=8, color=color)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)
    return file


def exposed(image: Tensor) -> Tensor:
    """An image in [0, 1] for the eye: a dark one is scaled until its brightest value is 1."""
    brightest = image.max().clamp(min=1 / 255)
    return (image / brightest if brightest < 0.5 else image).clamp(0, 1)


def box_grid(
    images: Tensor, predicted: Tensor, truth: Tensor | None, expressions: Sequence[str], file: Path, columns: int = 4
) -> Path:
    """Draw images with boxes: truth in white, a prediction in green where it is a hit, in red where not, else in blue.

    An image without any pixel of half the full brightness is drawn brighter, see `exposed`.

    Args:
        images: (B, 3, H, W) in [0, 1].
        predicted: (B, 4), cxcywh in [0, 1] of the image.
        truth: (B, 4) likewise; None where it is not known.
        expressions: one per image.
        file: PNG to write.
        columns: images in a row.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    ious = None if truth is None else paired_iou(predicted, truth).tolist()
    figure = Figure(figsize=(2.6 * columns, 2.9 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for ax in axes:
        ax.set_axis_off()
    for i, (ax, image) in enumerate(zip(axes, images.float().cpu())):
        ax.imshow(exposed(image).permute(1, 2, 0).numpy(), interpolation="nearest")
        title = "\n".join(textwrap.wrap(expressions[i], 34))
        color = PREDICTED
        if truth is not None and ious is not None:
            color = RIGHT if ious[i] >= 0.5 else WRONG
            _frame(ax, truth[i], image, "white", "black")
            title += f"\nIoU {ious[i]:.2f}"
        _frame(ax, predicted[i], image, color, "white")
        ax.set_title(title, fontsize=8, color="black" if truth is None else color)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)
    return file


def _frame(ax: Any, box: Tensor, image: Tensor, color: str, halo: str) -> None:
    """One box (cxcywh in [0, 1]), with a halo so that it stands out on any picture."""
    from matplotlib.patches import Rectangle

    height, width = image.shape[-2:]
    cx, cy, w, h = box.float().tolist()
    corner = (cx - w / 2) * width - 0.5, (cy - h / 2) * height - 0.5
    for edge, line in ((halo, 3.4), (color, 1.8)):
        ax.add_patch(Rectangle(corner, w * width, h * height, fill=False, edgecolor=edge, linewidth=line))


def unnormalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Preprocessed images back to [0, 1]."""
    m, s = (torch.tensor(v, device=images.device).view(3, 1, 1) for v in (mean, std))
    return (images * s + m).clamp(0, 1)
