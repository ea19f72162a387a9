"""The plot of a comparison: accuracy over trained parameters, over bytes kept for backward, over training time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

if TYPE_CHECKING:
    from vtab_table import Row

PANELS = (
    ("trained parameters, head included", lambda c: c["method_parameters"] + c["head_parameters"], "log"),
    ("kept for backward, MiB per image", lambda c: c["saved_bytes_per_image"] / 2**20, "log"),
    ("training, seconds per run", lambda c: c["seconds"], "linear"),
)
NEAR = [(7, 0), (-7, 0), (0, 8), (0, -8)]  # places of a name, in points from its mark; farther ones get a line
PLACES = NEAR + [(dx, sign * dy) for dy in (12, 24, 36, 48, 60) for dx in (8, -8) for sign in (1, -1)]


class Mark(NamedTuple):
    x: float
    y: float
    spread: float
    name: str
    color: str


def plot(rows: Sequence[Row]) -> Figure:
    """Three panels of marks with names; methods of which a run is missing are left out and named above."""
    figure = Figure(figsize=(18, 6.2), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(PANELS), sharey=True)
    axes[0].set_ylabel(f"test accuracy, mean of {len(rows[0].tasks)} tasks, %")
    if left_out := [r.label for r in rows if r.mean_of_tasks.mean is None]:
        figure.suptitle(f"not shown, since runs are missing: {', '.join(left_out)}", fontsize=9)
    panels = []
    for ax, (title, cost, scale) in zip(axes, PANELS, strict=True):
        marks = []
        for i, row in enumerate(rows):
            mean, std, _ = row.mean_of_tasks
            if mean is not None and (scale == "log" or row.costs["seconds"] is not None):
                marks.append(Mark(cost(row.costs), 100 * mean, 100 * (std or 0.0), row.label, f"C{i % 10}"))
        for mark in marks:
            ax.errorbar(mark.x, mark.y, mark.spread, fmt="o", color=mark.color, ecolor="0.75")
        ax.set_xscale(scale)
        ax.set_xlabel(title)
        ax.margins(0.12)
        ax.grid(alpha=0.3)
        panels.append(marks)
    figure.draw_without_rendering()  # now the axes have their places and limits, which the names need
    figure.set_layout_engine("none")
    for ax, marks in zip(axes, panels, strict=True):
        name_marks(ax, marks)
    return figure


def name_marks(ax: Any, marks: Sequence[Mark]) -> None:
    """Write the names beside their marks, where they hide no other name and no mark (or where they hide least)."""
    renderer = ax.figure.canvas.get_renderer()
    points = [ax.transData.transform((m.x, m.y)) for m in marks]
    taken: list[Any] = []
    for mark in marks:
        tried = []
        for dx, dy in PLACES:
            side = "left" if dx > 0 else "right" if dx < 0 else "center"
            line = None if (dx, dy) in NEAR else {"arrowstyle": "-", "color": "0.6", "lw": 0.6}
            note = ax.annotate(mark.name, (mark.x, mark.y), (dx, dy), textcoords="offset points", ha=side, va="center",
                               fontsize=8, color=mark.color, arrowprops=line)  # fmt: skip
            note.update_positions(renderer)
            box = Text.get_window_extent(note)  # without the line
            hidden = sum(box.overlaps(other) for other in taken) + sum(bool(box.contains(*p)) for p in points)
            hidden += not (ax.bbox.contains(box.x0, box.y0) and ax.bbox.contains(box.x1, box.y1))
            tried.append((hidden, note, box))
            if not hidden:
                break
        best = min(tried, key=lambda t: t[0])
        for place in tried:
            if place is not best:
                place[1].remove()
        taken.append(best[2])
