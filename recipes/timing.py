"""What the benchmarks share: timing of things that take turns, and a section of BENCHMARKS.md each."""

from __future__ import annotations

import platform
import re
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Row = tuple[str, float, str]  # what, measured, target


def clock(function: Callable[[], object]) -> float:
    """Seconds of one call; on a GPU by CUDA events."""
    if DEVICE == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1000
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def compare(functions: dict[str, Callable[[], object]], rounds: int, warm_up: int = 2) -> dict[str, float]:
    """Median seconds of each function; they take turns, so that a busy machine disturbs all alike."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(rounds + warm_up):
        names = list(functions) if turn % 2 else list(functions)[::-1]
        for name in names:
            seconds = clock(functions[name])
            if turn >= warm_up:
                times[name].append(seconds)
    return {name: statistics.median(values) for name, values in times.items()}


def machine() -> str:
    name = torch.cuda.get_device_name() if DEVICE == "cuda" else platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first column stands left, the others right."""
    first, *others = (f"| {' | '.join(row)} |" for row in (header, *rows))
    return "\n".join([first, "|---|" + "---:|" * (len(header) - 1), *others])


def write_section(file: Path | None, title: str, text: str, rows: Sequence[Row]) -> None:
    """Print a section with a table, and put it into ``file`` in place of an older one of this title."""
    figures = table(("what", "measured", "target"), [(what, f"{value:.3f}", target) for what, value, target in rows])
    section = "\n".join([f"## {title}", "", text, "", figures, ""])
    print(section)
    if file is None:
        return
    before = file.read_text() if file.is_file() else "# Benchmarks\n\n"
    old = re.compile(rf"^## {re.escape(title)}\n.*?(?=^## |\Z)", re.MULTILINE | re.DOTALL)
    if old.search(before):
        file.write_text(old.sub(lambda _: section, before))
    else:
        file.write_text(f"{before.rstrip()}\n\n{section}")
