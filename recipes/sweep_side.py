"""Many side networks and probes trained together: one pass of the frozen backbone for all of them.

    python recipes/sweep_side.py                                        (recipes/sweep_side.yaml)
    python recipes/sweep_side.py --sweep mine.yaml --run_dir runs/widths -- --trainer.max_epochs 30 --cache require

Members may differ in method (ladder side-tuning, linear probe), width, learning rate, seed, and in the task: labels of
their own for the same images. Each ends as it would alone (see `petl.SideSweep`). RUN_DIR gets ``MEMBER/adapter``,
which `petl.load` loads, and ``table.md``, ``table.csv``; what follows ``--`` goes to `petl fit`. A sweep that was
stopped continues with the same command.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from vtab_cell import config_file, read_json, write_json

from petl.errors import PetlError, nearest

FILE = Path(__file__).with_name("sweep_side.yaml")
KEYS = ("config", "run_dir", "defaults", "grid", "members")
SHARED = ("backbone", "backbone_args", "weights", "pretrained", "checkpointing", "frozen_dtype", "compile")
OF_MEMBERS = ("head", "lr", "weight_decay", "warmup_epochs", "min_lr", "label_smoothing")
RESULTS = ("trained", "val acc", "test acc", "test mean class acc")  # columns of the table
MARK = "sweep.json"  # what was asked of the run in this folder
Settings = dict[str, Any]


def read_yaml(file: Path) -> Settings:
    try:
        found = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise PetlError(f"{file} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise PetlError(f"{file} is no mapping.")
    return found


def read_sweep(file: Path) -> Settings:
    """The content of a sweep's file, with all ``members`` spelled out in place of defaults and grid."""
    found = {"config": "quickstart/classification", "run_dir": "runs/sweep_side"} | read_yaml(file)
    for key in found:
        if key not in KEYS:
            raise PetlError(f"{file} has a key {key!r}: {nearest(str(key), KEYS)}")
    parts: dict[str, Settings] = {key: found.pop(key, None) or {} for key in ("defaults", "grid", "members")}
    for key, part in parts.items():
        if not isinstance(part, dict):
            raise PetlError(f"{file}: {key} is no mapping.")
    members = grid(parts["grid"], str(file))
    for name, settings in parts["members"].items():
        if name in members:
            raise PetlError(f"{file}: {name!r} is a member of the grid already.")
        members[name] = settings or {}
    return found | {"members": {name: merged(parts["defaults"], s) for name, s in members.items()}}


def grid(lists: Mapping[str, Any], where: str) -> dict[str, Settings]:
    """Every combination of the listed settings, by a name made of them: ``lr0.001-reduction8-seed0``."""
    for key, values in lists.items():
        if not isinstance(values, list) or not values:
            raise PetlError(f"{where}: grid.{key} is {values!r}; give a list of values.")
    found: dict[str, Settings] = {}
    for values in itertools.product(*lists.values()) if lists else ():
        settings: Settings = {}
        for key, value in zip(lists, values, strict=True):
            target = settings.setdefault("options", {}) if key.startswith("options.") else settings
            target[key.removeprefix("options.")] = value
        name = "-".join(f"{key.removeprefix('options.')}{shown(v)}" for key, v in zip(lists, values, strict=True))
        if name in found:
            raise PetlError(f"{where}: two members of the grid are called {name!r}.")
        found[name] = settings
    return found


def shown(value: Any) -> str:
    """A value as a part of a member's name."""
    if isinstance(value, (list, tuple)):
        return "_".join(map(shown, value))
    return f"{value:g}" if isinstance(value, float) else Path(value).stem if isinstance(value, str) else str(value)


def merged(defaults: Settings, settings: Any) -> Any:
    """``settings`` over ``defaults``; options are merged one by one where the method is the same."""
    if not isinstance(settings, dict):
        return settings  # petl.SideSweep says what is wrong
    options = settings.get("options") or {}
    if settings.get("method", defaults.get("method")) == defaults.get("method"):
        options = {**(defaults.get("options") or {}), **options}
    return {**defaults, **settings, "options": options}


def compose(sweep: Settings) -> Settings:
    """The config of `petl fit`: that of the sweep's ``config`` with petl.SideSweep in place of its task."""
    file = config_file(sweep["config"])
    config = read_yaml(file)
    model = config.get("model") or {}
    if model.get("class_path") not in ("petl.Classification", "Classification"):
        raise PetlError(f"{file} trains {model.get('class_path')}; a sweep takes a config of petl.Classification.")
    options = model.get("init_args") or {}
    mixing = [key for key in ("mixup", "cutmix") if options.get(key)]
    if mixing:
        raise PetlError(f"{file} has {' and '.join(mixing)}, which members of a sweep cannot share: set it to 0.")
    if config.get("select", "last") != "last":
        raise PetlError(f"{file}: select is {config['select']!r}, and a sweep keeps the last epoch of each member.")
    kept = {key: options[key] for key in (*SHARED, *OF_MEMBERS) if key in options}
    task = {"class_path": "petl.SideSweep", "init_args": {"members": sweep["members"], **kept}}
    return config | {"run_dir": str(sweep["run_dir"]), "model": task}


def run_sweep(config: Settings, rest: Sequence[str], overwrite: bool) -> Any:
    """Train, or go on, and test; returns petl's CLI after that."""
    from lightning.pytorch.callbacks import Callback

    from petl.engine.lightning_cli import run

    folder, asked = Path(config["run_dir"]), {"config": config, "rest": list(rest)}
    before = read_json(folder / MARK)
    if before is not None and before != asked and not overwrite:
        raise PetlError(f"{folder} holds another sweep: choose another --run_dir, or replace it with --overwrite.")
    same = before is not None and not overwrite

    class Mark(Callback):
        def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
            if trainer.is_global_zero and stage == "fit":
                write_json(folder / MARK, asked)

    with tempfile.TemporaryDirectory() as temporary:
        file = Path(temporary) / "sweep.yaml"
        file.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
        resumed = same and (folder / "checkpoints" / "last.ckpt").is_file()
        how = ["--ckpt_path", "last"] if resumed else ["--overwrite", "true"] if overwrite or same else []
        cli = run(["fit", "--config", str(file), *rest, *how], [Mark()])
    cli.trainer.test(cli.model, cli.datamodule, verbose=False)
    return cli


def rows(sweep: Settings, cli: Any) -> list[Settings]:
    """A row for each member: its settings, trained parameters, and accuracies."""
    from petl.adapters.artefact import read_config

    side, model, folder = cli.model.side, cli.model.model, Path(cli.trainer.default_root_dir)
    test, found = read_json(folder / "test_metrics.json") or {}, []
    for i, (name, settings) in enumerate(sweep["members"].items()):
        row = {"member": name, "method": cli.model.members[name].method.name}
        row |= {f"options.{k}": v for k, v in settings["options"].items()}
        row |= {k: v for k, v in settings.items() if k not in ("method", "options")}
        row["trained"] = sum(p.numel() for m in (side.members[i], model.heads[i]) for p in m.parameters())
        row["val acc"] = read_config(folder / name / "adapter")["protocol"]["metrics"].get("val/acc")
        row["test acc"] = test.get(f"test/{name}/acc")
        row["test mean class acc"] = test.get(f"test/{name}/mean_class_acc")
        found.append(row)
    return found


def write_tables(folder: Path, found: list[Settings]) -> str:
    """``table.csv`` with every setting, and ``table.md`` with those in which members differ, which is returned."""
    from timing import table

    columns = list(dict.fromkeys(key for row in found for key in row if key not in RESULTS)) + list(RESULTS)
    with open(folder / "table.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(found)
    shown = [c for c in columns if c in ("member", *RESULTS) or len({str(row.get(c)) for row in found}) > 1]
    text = table(shown, [[cell(c, row.get(c)) for c in shown] for row in found]) + "\n"
    (folder / "table.md").write_text(text, encoding="utf-8")
    return text


def cell(column: str, value: Any) -> str:
    if value is None:
        return ""
    return f"{value:,}" if column == "trained" else f"{value:.1%}" if column in RESULTS else str(value)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 for bad input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweep", type=Path, default=FILE, help="YAML file of the sweep; default: the one beside this")
    parser.add_argument("--run_dir", help="instead of that in the file")
    parser.add_argument("--overwrite", action="store_true", help="delete what an earlier sweep left in run_dir")
    parser.add_argument("rest", nargs="*", help="arguments of `petl fit`, after --")
    args = parser.parse_args(argv)
    try:
        sweep = read_sweep(args.sweep) | ({"run_dir": args.run_dir} if args.run_dir else {})
        cli = run_sweep(compose(sweep), args.rest, args.overwrite)
        if cli.trainer.is_global_zero:
            print("\n" + write_tables(Path(sweep["run_dir"]), rows(sweep, cli)))
    except PetlError as error:
        print(f"sweep_side: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("sweep_side: interrupted. The same command continues.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
