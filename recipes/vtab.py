"""Methods compared on tasks in the VTAB-1k layout: every method x task x seed trained, tested, and put into one table.

    python recipes/vtab.py --methods linear bitfit lora full --tasks dtd svhn --seeds 0 1 2 --root DIR --out OUT
    python recipes/vtab.py --out OUT --table-only

Each cell is `petl fit` on train800val200 (last epoch) and `petl test`, with --config (what all methods share) and the
settings of its method in --methods_file; what follows ``--`` overrides both. With ``--select`` the settings are first
chosen on train800 / val200, once for each method and task. Cells run in worker processes; one that fails is reported
and the others go on. A finished cell is not run again, a killed one continues. OUT gets a record of each run
(``METHOD/TASK/seed0.json``) and ``table.md``, ``table.csv``, ``table.png``; runs of different protocols are refused.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from vtab_cell import FAILED, GIVEN, Cell, failure, is_finished, read_json, run_cell, write_json
from vtab_methods import FILE, arguments, pick, read_methods
from vtab_pool import DIED, run_all
from vtab_search import Search, require_optuna, run_search

from petl.errors import PetlError


class Job(Protocol):
    """A `Cell` or a `Search`."""

    @property
    def name(self) -> str: ...
    @property
    def file(self) -> Path: ...
    @property
    def asked(self) -> dict[str, Any]: ...
    @property
    def key(self) -> dict[str, Any]: ...


J = TypeVar("J", bound=Job)


def environments(jobs: int | None) -> list[dict[str, str]]:
    """Variables of each worker: its GPU, or its share of the cores."""
    import torch

    count = torch.cuda.device_count()
    if count:
        named = os.environ.get("CUDA_VISIBLE_DEVICES")
        devices = named.split(",") if named else [str(i) for i in range(count)]
        return [{"CUDA_VISIBLE_DEVICES": devices[i % count]} for i in range(jobs or count)]
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // (jobs or 1)))
    return [{"OMP_NUM_THREADS": threads}] * (jobs or 1)


def sweep(jobs: Sequence[J], work: Callable[[J], str], workers: Sequence[dict[str, str]]) -> list[str]:
    """Do the jobs that are not finished; returns a line about each that failed."""
    left = [job for job in jobs if not is_finished(job.file, job.asked)]
    print(f"{len(jobs)} jobs, {len(jobs) - len(left)} finished before, {len(workers)} at a time", flush=True)
    failures, began = [], time.perf_counter()
    for done, (job, line) in enumerate(run_all(left, work, workers), 1):
        if line is None:
            write_json(job.file, failure(job.key, DIED))
            line = f"{job.name}: {FAILED}: {DIED}"
        if f": {FAILED}: " in line:
            failures.append(line)
        eta = (time.perf_counter() - began) / done * (len(left) - done)
        print(f"[{done}/{len(left)}, {eta / 60:.0f} min left] {line}", flush=True)
    return failures


def run_everything(args: argparse.Namespace) -> list[str]:
    """Search where asked for, train and test every cell; returns a line about each failure."""
    from petl.data import VTAB

    methods = pick(args.methods, read_methods(args.methods_file))
    for task in args.tasks:  # all names are checked before the first job starts
        VTAB(str(args.root), task)
    workers = environments(args.jobs)
    before = [x for key in ("backbone", "backbone_args", "weights") if (value := getattr(args, key)) is not None
              for x in (f"--model.{key}", value)]  # fmt: skip
    if args.epochs is not None:
        before += ["--trainer.max_epochs", str(args.epochs), "--model.warmup_epochs", str(args.epochs / 10)]
    failures: list[str] = []
    searches: dict[tuple[str, str], Search] = {}
    for task in args.tasks if args.select else ():
        data = ("--data.root", str(args.root), "--data.task", task)
        for name, settings in methods.items():
            searches[name, task] = Search(args.out, name, task, args.config, (*data, *before), settings,
                                          tuple(args.rest), args.trials)  # fmt: skip
    if searches:
        require_optuna()
        failures += sweep(list(searches.values()), run_search, workers)
    cells = []
    for seed in args.seeds:  # outermost: a sweep that was stopped has the first seed of everything
        for task in args.tasks:
            data = ("--data.root", str(args.root), "--data.task", task)
            for name, settings in methods.items():
                search = searches.get((name, task))
                if search and (read_json(search.file) or {}).get("status") != "done":
                    continue  # in `failures`, and missing in the table
                found = arguments(search.chosen() if search else settings)
                cells.append(Cell(args.out, name, task, seed, args.config, (*data, *before, *found, *args.rest),
                                  search.rule if search else GIVEN, len(workers)))  # fmt: skip
    return failures + sweep(cells, run_cell, workers)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", help="names in the methods file")
    parser.add_argument("--tasks", nargs="+", help="task folders under --root")
    parser.add_argument("--seeds", nargs="+", type=int, default=None, help="default: 0")
    parser.add_argument("--root", type=Path, help="folder of the task folders")
    parser.add_argument("--out", type=Path, default=Path("runs/vtab_compare"))
    parser.add_argument("--config", default="vtab/compare", help="what all methods share: a file or a shipped config")
    parser.add_argument("--methods_file", type=Path, default=FILE)
    parser.add_argument("--backbone", help="instead of the config's")
    parser.add_argument("--backbone_args", help="e.g. '{img_size: 32, patch_size: 4}'")
    parser.add_argument("--weights", help="a local .safetensors file")
    parser.add_argument("--epochs", type=int, help="instead of the config's; a tenth of them is warm-up")
    parser.add_argument("--select", action="store_true", help="choose settings on val200 first (needs optuna)")
    parser.add_argument("--trials", type=int, default=12, help="of each choice, pruned ones among them")
    parser.add_argument("--jobs", type=int, help="runs side by side; default: one for each GPU, or one")
    parser.add_argument("--table-only", action="store_true", help="make the table again, from the records in --out")
    parser.add_argument("--wandb", action="store_true", help="also log the table to W&B (offline without a key)")
    parser.add_argument("rest", nargs="*", help="overrides for every run, after --: --trainer.precision bf16-mixed …")
    args = parser.parse_args(argv)
    missing = [f"--{key}" for key in ("methods", "tasks", "root") if not getattr(args, key)]
    if missing and not args.table_only:
        parser.error(f"give {', '.join(missing)}, or --table-only")
    for key in ("jobs", "trials", "epochs"):
        if getattr(args, key) is not None and getattr(args, key) < 1:
            parser.error(f"--{key} is at least 1")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, 1 when a run failed, 2 for bad input."""
    from vtab_table import write

    args = parse(argv)
    failures: list[str] = []
    try:
        if not args.table_only:
            args.seeds = args.seeds or [0]
            failures = run_everything(args)
        print("\n" + write(args.out, read_methods(args.methods_file), args.methods, args.tasks, args.seeds, args.wandb))
    except PetlError as error:
        print(f"vtab: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("vtab: interrupted. The same command continues.", file=sys.stderr)
        return 130
    for line in failures:
        print(line, file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
