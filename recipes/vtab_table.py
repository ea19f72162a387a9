"""The table of a comparison: records of runs -> rows -> Markdown, CSV and a plot. Refuses runs of different protocols.

A mean over seeds is written only where every seed is there. Two means over tasks, since papers use both: the mean of
all tasks and the mean of the group means (Natural, Specialized, Structured of VTAB-1k; tasks of your own are "Other").
The spread is the sample standard deviation over seeds, of a mean that of the means of each seed.
"""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from vtab_cell import read_json

from petl.data.vtab import TASKS
from petl.errors import PetlError

Record = dict[str, Any]
OTHER = "Other"
PUBLISHED_ON = ("timm/vit_base_patch16_224.orig_in21k", "timm/vit_base_patch16_224.augreg_in21k")
FOR_ALL = {"weights of the backbone": ("weights",), "mean": ("preprocessing", "mean"), "std": ("preprocessing", "std"),
           "input size": ("preprocessing", "image_size"), "resizing": ("preprocessing", "interpolation"),
           "augmentation": ("augmentation",), "selection of the epoch": ("selection",),
           "choice of hyper-parameters": ("settings",), "epochs": ("epochs",)}  # fmt: skip
FOR_A_TASK = {f"{split} split": ("splits", split) for split in ("train", "val", "test")}
COSTS = {"method_parameters": "trained, method", "head_parameters": "trained, head", "macs": "GMACs",
         "saved_bytes_per_image": "kept for backward, MiB per image", "saved_bytes_constant": "+ constant, MiB",
         "train_images_per_second": "training img/s", "inference_images_per_second": "inference img/s",
         "peak_memory_bytes": "peak GPU memory, MiB", "seconds": "seconds per run"}  # fmt: skip

CONDITIONS: dict[str, Callable[[dict[str, Any]], Any]] = {  # what speed and memory depend on, in a protocol
    "Device": lambda p: p["device"],
    "precision": lambda p: p["training"]["precision"],
    "batch size": lambda p: p["batch_size"],
    "runs side by side": lambda p: p["side_by_side"],
}


class Value(NamedTuple):
    """Mean and spread over seeds, in [0, 1]; or what is missing."""

    mean: float | None
    std: float | None = None
    note: str = ""


@dataclass
class Row:
    """A method of the table."""

    name: str
    label: str
    tasks: dict[str, Value]
    groups: dict[str, Value]
    mean_of_groups: Value
    mean_of_tasks: Value
    costs: dict[str, float | None]  # means over the runs of all tasks and seeds; of memory, the largest


def read_records(out: Path) -> list[Record]:
    """Every record under ``out``."""
    found = [r for file in sorted(out.glob("*/*/seed*.json")) if (r := read_json(file)) is not None]
    if not found:
        raise PetlError(f"{out} holds no record of a run: check --out, or run the comparison first.")
    return found


# ---- one protocol


def _at(record: Record, path: Sequence[str]) -> str:
    found: Any = record["protocol"]
    for key in path:
        found = found.get(key) if isinstance(found, dict) else None
    return json.dumps(found, sort_keys=True)


def require_one_protocol(records: Iterable[Record]) -> None:
    """Raise `PetlError` that says which runs differ in what, unless all finished runs share their protocol."""
    done = [r for r in records if r["status"] == "done"]
    checks = [(what, path, done) for what, path in FOR_ALL.items()]
    for task in dict.fromkeys(r["task"] for r in done):
        of_task = [r for r in done if r["task"] == task]
        checks += [(f"{what} of {task}", path, of_task) for what, path in FOR_A_TASK.items()]
    problems = []
    for what, path, runs in checks:
        values: dict[str, list[str]] = {}
        for run in runs:
            values.setdefault(_at(run, path), []).append(f"{run['method']}/{run['task']}/{run['seed']}")
        if len(values) > 1:
            parts = [f"{_short(value)} in {_some(names)}" for value, names in values.items()]
            problems.append(f"{what}: {'; '.join(parts)}")
    if problems:
        listed = "\n  ".join(problems)
        raise PetlError(
            f"these runs do not share one protocol, so their numbers do not belong into one table:\n  {listed}\n"
            "Compare them in folders of their own (--out), or name the --methods, --tasks and --seeds that belong "
            "together."
        )


def _short(value: str) -> str:
    return value if len(value) <= 60 else f"{value[:57]}…"


def _some(names: Sequence[str], count: int = 4) -> str:
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return f"{', '.join(names[:count])}{more}"


# ---- rows


def _spread(values: Sequence[float] | None) -> Value:
    """Mean and sample standard deviation (None of a single value) over seeds."""
    if values is None:
        return Value(None, note="incomplete")
    return Value(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)


def _by_seed(runs: dict[int, Record], seeds: Sequence[int]) -> list[float] | None:
    """Accuracy of each seed; None unless every one is there."""
    done = [runs[s]["test"]["acc"] for s in seeds if s in runs and runs[s]["status"] == "done"]
    return done if len(done) == len(seeds) else None


def _task_value(runs: dict[int, Record], seeds: Sequence[int]) -> Value:
    lost = [f"seed {s} {runs[s]['status'] if s in runs else 'missing'}" for s in seeds
            if s not in runs or runs[s]["status"] != "done"]  # fmt: skip
    return Value(None, note=", ".join(lost)) if lost else _spread(_by_seed(runs, seeds))


def _mean(parts: Sequence[list[float] | None]) -> list[float] | None:
    """Mean over ``parts`` (tasks or groups) for each seed; None where a part is not whole."""
    whole = [part for part in parts if part is not None]
    return [statistics.fmean(values) for values in zip(*whole, strict=True)] if len(whole) == len(parts) else None


def group_of(task: str) -> str:
    return TASKS[task].group if task in TASKS else OTHER


def make_row(name: str, label: str, records: Sequence[Record], tasks: Sequence[str], seeds: Sequence[int]) -> Row:
    """The row of one method from its records."""
    runs = {task: {r["seed"]: r for r in records if r["task"] == task} for task in tasks}
    values = {task: _task_value(runs[task], seeds) for task in tasks}
    by_seed = {task: _by_seed(runs[task], seeds) for task in tasks}
    groups = {g: _mean([by_seed[t] for t in tasks if group_of(t) == g]) for g in dict.fromkeys(map(group_of, tasks))}
    costs: dict[str, float | None] = {}
    for cost in COSTS:
        found = [c for r in records if r["status"] == "done" and (c := r["cost"][cost]) is not None]
        costs[cost] = None if not found else max(found) if cost == "peak_memory_bytes" else statistics.fmean(found)
    return Row(name, label, values, {g: _spread(v) for g, v in groups.items()},
               _spread(_mean(list(groups.values()))), _spread(_mean(list(by_seed.values()))), costs)  # fmt: skip


class Choice(NamedTuple):
    """What a table holds, and its records."""

    methods: list[str]
    tasks: list[str]
    seeds: list[int]
    records: list[Record]


def choose(records: Sequence[Record], methods: Any = None, tasks: Any = None, seeds: Any = None) -> Choice:
    """These methods, tasks and seeds (None = all that have a record), tasks of VTAB-1k in its order."""
    methods, tasks, seeds = (
        list(wanted or dict.fromkeys(r[key] for r in records))
        for wanted, key in ((methods, "method"), (tasks, "task"), (seeds, "seed"))
    )
    tasks.sort(key=lambda t: list(TASKS).index(t) if t in TASKS else len(TASKS))
    used = [r for r in records if r["method"] in methods and r["task"] in tasks and r["seed"] in seeds]
    return Choice(methods, tasks, sorted(seeds), used)


def make_rows(choice: Choice, known: dict[str, dict[str, Any]]) -> list[Row]:
    """A row for every method; one protocol is required. ``known``: settings of methods by name, with their labels."""
    require_one_protocol(choice.records)
    return [
        make_row(name, known.get(name, {}).get("label", name), [r for r in choice.records if r["method"] == name],
                 choice.tasks, choice.seeds) for name in choice.methods
    ]  # fmt: skip


# ---- Markdown and CSV


def _percent(value: Value, digits: int = 1) -> str:
    if value.mean is None:
        return f"– ({value.note})"
    std = "" if value.std is None else f" ± {100 * value.std:.{digits}f}"
    return f"{100 * value.mean:.{digits}f}{std}"


def _cost(key: str, value: float | None) -> str:
    if value is None:
        return "–"
    if key == "macs":
        return f"{value / 1e9:.3f}"
    if "bytes" in key:
        return f"{value / 2**20:.2f}" if "saved" in key else f"{value / 2**20:.0f}"
    return f"{value:,.0f}"


def _grid(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rule = "|---|" + "---:|" * (len(head) - 1)
    return "\n".join([f"| {' | '.join(head)} |", rule, *(f"| {' | '.join(cells)} |" for cells in lines)])


def group_names(row: Row) -> dict[str, str]:
    """Headings of the groups; of VTAB-1k's, how many of their tasks are there where not all are.

    None where all tasks are your own: the mean of that one group is the mean of all.
    """
    if list(row.groups) == [OTHER]:
        return {}
    heads = {}
    for group in row.groups:
        there, whole = (sum(group_of(t) == group for t in tasks) for tasks in (row.tasks, TASKS))
        heads[group] = group if group == OTHER or there == whole else f"{group} ({there} of {whole})"
    return heads


def markdown(rows: Sequence[Row], records: Sequence[Record], known: dict[str, dict[str, Any]]) -> str:
    """The comparison as Markdown: accuracy, cost, what failed, the protocol."""
    groups = group_names(rows[0])
    head = ["method", *rows[0].tasks, *groups.values(), *(["mean of groups"] if groups else [])]
    head.append(f"mean of {len(rows[0].tasks)}")
    lines = []
    for r in rows:
        means = [r.mean_of_groups, r.mean_of_tasks] if groups else [r.mean_of_tasks]
        values = [*r.tasks.values(), *(r.groups[group] for group in groups)]
        lines.append([r.label, *map(_percent, values), *(_percent(mean, 2) for mean in means)])
    done = [r for r in records if r["status"] == "done"]
    if set(rows[0].tasks) == set(TASKS) and all(r["protocol"]["backbone"]["name"] in PUBLISHED_ON for r in done):
        head += ["published, groups", f"published, {len(TASKS)}", "source"]
        for row, cells in zip(rows, lines, strict=True):
            published = known.get(row.name, {}).get("published", {})
            cells += [str(published.get(key, "–")) for key in ("groups", "mean", "source")]
    parts = ["Test accuracy in per cent, mean ± standard deviation over seeds.", _grid(head, lines),
             "Cost: counted (`petl.report`) and measured, means over the runs.",
             _grid(["method", *COSTS.values()], ([r.label, *(_cost(k, v) for k, v in r.costs.items())] for r in rows)),
             *_remarks(records)]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def _remarks(records: Sequence[Record]) -> list[str]:
    """What one has to know to read the table."""
    bad = [f"- {r['method']} / {r['task']} / seed {r['seed']}: {r['reason']}" for r in records if r["status"] != "done"]
    found = ["Failed runs, in no mean:\n\n" + "\n".join(bad)] if bad else []
    done = [r["protocol"] for r in records if r["status"] == "done"]
    if not done:
        return found
    p, prepared = done[0], done[0]["preprocessing"]
    found.append(
        f"Protocol: {p['backbone']['name']}"
        + (f" with {p['backbone']['weights_file']}" if p["backbone"]["weights_file"] else "")
        + f", weights {p['weights'][:12]}; images {'x'.join(map(str, prepared['image_size']))}, {prepared['mode']}, "
        f"{prepared['interpolation']}, mean {prepared['mean']}, std {prepared['std']}; trained on "
        f"{p['splits']['train']['name']}, {p['selection']}, {p['epochs']} epochs; hyper-parameters {p['settings']}."
    )
    conditions = []
    for what, get in CONDITIONS.items():
        values = list(dict.fromkeys(str(get(p)) for p in done))
        mixed = " (**mixed: speed and memory are not comparable**)" if len(values) > 1 else ""
        conditions.append(f"{what}: {', '.join(values)}{mixed}")
    return [*found, "; ".join(conditions) + "."]


def as_csv(rows: Sequence[Row]) -> str:
    """One line for each method: accuracies in [0, 1] with their spread, what is missing, and costs in units of one."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    means = ["mean_of_groups", "mean_of_tasks"]
    names = [*rows[0].tasks, *rows[0].groups, *means]
    writer.writerow(["method", "label", *(f"{n}{end}" for n in names for end in ("", "_std")), *COSTS, "missing"])
    for r in rows:
        values = [*r.tasks.values(), *r.groups.values(), r.mean_of_groups, r.mean_of_tasks]
        missing = "; ".join(f"{task}: {v.note}" for task, v in r.tasks.items() if v.note)
        writer.writerow([r.name, r.label, *(x for v in values for x in (v.mean, v.std)), *r.costs.values(), missing])
    return stream.getvalue()


def write(
    out: Path,
    known: dict[str, dict[str, Any]],
    methods: Sequence[str] | None = None,
    tasks: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    wandb: bool = False,
) -> str:
    """Make ``table.md``, ``table.csv`` and ``table.png`` in ``out`` from its records; returns the Markdown.

    ``known``: settings of methods by name, with label and published numbers. ``wandb``: log them to W&B as well.
    """
    from vtab_plot import plot

    choice = choose(read_records(out), methods, tasks, seeds)
    rows = make_rows(choice, known)
    text = markdown(rows, choice.records, known)
    (out / "table.md").write_text(text, encoding="utf-8")
    (out / "table.csv").write_text(as_csv(rows), encoding="utf-8")
    plot(rows).savefig(out / "table.png")
    if wandb:
        log_wandb(out)
    return text


def log_wandb(out: Path) -> None:
    """The CSV as a W&B table, and the plot."""
    import wandb

    from petl.engine.loggers import WandbLogger

    head, *lines = csv.reader(io.StringIO((out / "table.csv").read_text(encoding="utf-8")))
    table = wandb.Table(columns=list(head))
    for line in lines:
        table.add_data(*map(_number, line))
    run = WandbLogger(save_dir=str(out), name=out.name, tags=["comparison"]).experiment
    run.log({"comparison": table, "plot": wandb.Image(str(out / "table.png"))})
    run.finish()


def _number(text: str) -> float | str | None:
    try:
        return float(text) if text else None
    except ValueError:
        return text
