"""Drawing of explanations: signed maps over pictures, and sentences with coloured words. Red: against, blue: for."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from petl.errors import PetlError

Color = tuple[int, int, int]
# red to white to blue: told apart with every kind of colour vision
AGAINST, FOR, NEUTRAL, WHITE = (178, 24, 43), (33, 102, 172), (112, 112, 112), (255, 255, 255)
SHARE, PALE = 0.65, 0.3  # of the map in the blend with the picture; how far the picture's black is lifted
SIDE, GAP, BAR, MARGIN, LINE = 1.9, 0.07, 0.8, 0.12, 0.165  # inches: picture, space, bar with figures, edge, title


# ---- pictures


def heatmap_grid(
    images: Tensor,
    values: Sequence[Tensor] | Tensor,
    titles: Sequence[str],
    file: Path,
    columns: int = 3,
) -> Path:
    """Draw each picture beside its map of signed values. Every map has its own scale, symmetric about zero.

    Args:
        images: (B, 3, H, W) in [0, 1].
        values: one map (rows, columns) per image; the players' cells are shown as they are, without smoothing.
        titles: one per image.
        file: PNG to write.
        columns: images in a row.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    maps = [_map(v, i) for i, v in enumerate(values)]
    if not len(images) == len(maps) == len(titles) or not maps:
        raise PetlError(
            f"heatmap_grid: {len(images)} images, {len(maps)} maps, {len(titles)} titles: give as many of each."
        )
    columns = max(1, min(columns, len(maps)))
    names = [textwrap.wrap(str(t), 52) for t in titles]
    lines = [max(map(len, names[i : i + columns])) for i in range(0, len(names), columns)]
    high = SIDE * images.shape[-2] / images.shape[-1]
    tops = [MARGIN + sum(MARGIN + high + LINE * n for n in lines[:row]) for row in range(len(lines) + 1)]
    panel = 2 * SIDE + GAP + BAR  # all in inches: every picture has the same size, whatever stands at its bar
    figure = Figure(figsize=(MARGIN + panel * columns, tops[-1]))
    FigureCanvasAgg(figure)
    width, height = figure.get_size_inches()

    def axes(x: float, top: float, wide: float) -> Any:
        ax = figure.add_axes((x / width, 1 - (top + high) / height, wide / width, high / height))
        ax.set_xticks([])
        ax.set_yticks([])
        return ax

    for i, (image, cells) in enumerate(zip(images.float().cpu(), maps)):
        row, x = i // columns, MARGIN + panel * (i % columns)
        top = tops[row] + LINE * lines[row]
        axes(x, top, SIDE).imshow(image.clamp(0, 1).permute(1, 2, 0).numpy())
        drawn = draw_map(axes(x + SIDE + GAP, top, SIDE), image, cells)
        bar = figure.colorbar(drawn, cax=axes(x + 2 * SIDE + 2 * GAP, top, 0.09))
        limit = drawn.norm.vmax
        bar.set_ticks([-limit, 0, limit], labels=[f"\N{MINUS SIGN}{limit:.2g}", "0", f"{limit:.2g}"])
        if not cells.any():
            bar.set_ticks([0], labels=["0"])
        bar.ax.tick_params(labelsize=7, length=2, width=0.5, pad=2)
        bar.outline.set_linewidth(0.5)
        figure.text(
            x / width, 1 - (top - 0.05) / height, "\n".join(names[i]), fontsize=9, va="bottom", linespacing=1.15
        )
    for ax in figure.axes:
        ax.spines[:].set_linewidth(0.5)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)
    return file


def draw_map(ax: Any, image: Tensor, cells: Tensor) -> Any:
    """One map (rows, columns) over the pale grey picture (3, H, W), on matplotlib axes; returns it, for a bar."""
    from matplotlib.colors import LinearSegmentedColormap

    height, width = image.shape[-2:]
    grey = (image.clamp(0, 1) * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(0)
    limit = float(cells.abs().max()) or 1.0
    colors = LinearSegmentedColormap.from_list("signed", [_hex(c) for c in (AGAINST, WHITE, FOR)])
    ax.imshow(PALE + (1 - PALE) * grey.numpy(), cmap="gray", vmin=0, vmax=1)
    return ax.imshow(
        cells.numpy(), cmap=colors, vmin=-limit, vmax=limit, alpha=SHARE, interpolation="nearest",
        extent=(-0.5, width - 0.5, height - 0.5, -0.5),
    )  # fmt: skip


def _map(values: Tensor, number: int) -> Tensor:
    cells = torch.as_tensor(values).detach().float().cpu()
    if cells.ndim != 2 or not cells.numel():
        raise PetlError(f"heatmap_grid: map {number} has the shape {tuple(cells.shape)}, not (rows, columns).")
    if not cells.isfinite().all():
        raise PetlError(f"heatmap_grid: map {number} holds values that are not finite.")
    return cells


# ---- sentences


def sentence_terminal(words: Sequence[str], values: Sequence[float] | Tensor, colour: bool = True) -> str:
    """One line for a terminal: words on red (negative) or blue (positive), as strong as their share of the largest.

    ``colour=False``: the value in parentheses behind each word.
    """
    shares, numbers = _scaled(words, values, "sentence_terminal")
    shown = ["".join(c if c.isprintable() else "\ufffd" for c in w) for w in words]  # no escape codes of the word's own
    if not colour:
        return " ".join(f"{w} ({n})" for w, n in zip(shown, numbers))
    return " ".join(_painted(w, s) for w, s in zip(shown, shares))


def _painted(word: str, share: float) -> str:
    """White on a colour of one lightness, from grey to full: it reads on dark and on light terminals."""
    if abs(share) < 0.05:
        return word
    red, green, blue = _mix(NEUTRAL, share)
    return f"\x1b[48;2;{red};{green};{blue}m\x1b[38;2;255;255;255m{word}\x1b[0m"


def sentence_html(
    words: Sequence[str], values: Sequence[float] | Tensor, title: str = "", numbers: bool = False
) -> str:
    """A piece of HTML that needs nothing else: coloured words, their values on hovering, a key.

    Args:
        words: of the sentence; any text, it is escaped.
        values: one per word.
        title: a line above it, escaped too.
        numbers: print the values under the words.
    """
    shares, texts = _scaled(words, values, "sentence_html")
    spans = []
    for word, share, number in zip(words, shares, texts):
        ground = _mix(WHITE, share)
        style = f"background:{_hex(ground)};color:{_text_on(ground)};padding:.1em .25em;border-radius:.2em"
        below = f'<br><small style="font-size:.7em">{number}</small>' if numbers else ""
        style += ";display:inline-block;text-align:center;line-height:1.2" if numbers else ""
        spans.append(f'<span style="{style}" title="{number}">{escape(word)}{below}</span>')
    head = f'<figcaption style="font-weight:600;margin-bottom:.3em">{escape(title)}</figcaption>' if title else ""
    key = " ".join(
        f'<span style="background:{_hex(c)};color:{_text_on(c)};padding:0 .4em;border-radius:.2em">{name}</span>'
        for c, name in ((AGAINST, "against"), (FOR, "for"))
    )
    return (
        '<figure style="font-family:sans-serif;background:#ffffff;color:#000000;margin:.5em 0;padding:.6em;'
        f'max-width:60em">{head}<div style="line-height:1.9">{" ".join(spans)}</div>'
        f'<div style="font-size:.75em;margin-top:.5em">{key}</div></figure>\n'
    )


def _scaled(words: Sequence[str], values: Sequence[float] | Tensor, name: str) -> tuple[list[float], list[str]]:
    """Values as shares of the largest, in [-1, 1], and in figures: two that count in the largest."""
    given = torch.as_tensor(values).detach().double().cpu()
    if given.ndim != 1 or len(given) != len(words):
        raise PetlError(
            f"{name}: {len(words)} words and values of shape {tuple(given.shape)}: give one value per word."
        )
    if not given.isfinite().all():
        raise PetlError(f"{name}: value {int((~given.isfinite()).nonzero()[0, 0])} is not finite.")
    largest = float(given.abs().max()) if len(given) else 0.0
    digits = max(2, 1 - math.floor(math.log10(largest))) if largest else 2
    numbers = [f"{v:+.{digits}f}" for v in given.tolist()]
    zero = {f"{sign}{0:.{digits}f}" for sign in "+-"}
    return (given / (largest or 1.0)).tolist(), [f"{0:.{digits}f}" if n in zero else n for n in numbers]


def _mix(start: Color, share: float) -> Color:
    """From ``start`` (0) to red (-1) or blue (1)."""
    end, t = (FOR if share > 0 else AGAINST), abs(share)
    red, green, blue = (round(a + (b - a) * t) for a, b in zip(start, end))
    return red, green, blue


def _hex(color: Color) -> str:
    return "#{:02x}{:02x}{:02x}".format(*color)


def luminance(color: Color) -> float:
    """Relative luminance of WCAG 2.2."""
    linear = [c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in color]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _text_on(color: Color) -> str:
    """Black or white, whichever stands out more: a contrast of 4.5 at least, on any colour."""
    return "#000000" if (luminance(color) + 0.05) ** 2 > 0.05 * 1.05 else "#ffffff"
