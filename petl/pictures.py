"""Pictures: which patches kept a token of their own, beside the predicted label."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from petl.methods.attach import attached
from petl.methods.evit import ReducingModule
from petl.nn.token_reduction import kept_masks


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
                color = "black" if right is None else "#1a7f37" if right[i] else "#cf222e"
                ax.set_title(titles[i], fontsize=8, color=color)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)
    return file


def unnormalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Preprocessed images back to [0, 1]."""
    m, s = (torch.tensor(v, device=images.device).view(3, 1, 1) for v in (mean, std))
    return (images * s + m).clamp(0, 1)
