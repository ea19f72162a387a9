"""`petl report` and `petl data`: build what a config describes, without training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from petl.engine.errors import check_class_paths
from petl.errors import PetlError


def _sections(args: Sequence[str], *wanted: str) -> Any:
    """Instantiate the sections ``wanted`` ("model", "data") of a config, with overrides, as `petl fit` would.

    ``precision`` of the result is the trainer's.
    """
    import lightning as L

    from petl.engine.lightning_cli import Parser, readable_errors, register_methods

    if not any(a.partition("=")[0] in ("--config", "-c") for a in args):
        raise PetlError("give a config: --config FILE or the name of a shipped one ('petl ls').")
    check_class_paths(args)
    register_methods()
    from jsonargparse import ActionConfigFile

    parser = Parser()
    parser.add_argument("-c", "--config", action=ActionConfigFile)
    parser.add_argument("--seed_everything", type=int | bool, default=0)
    for key, kind in (("run_dir", str), ("overwrite", bool), ("select", str), ("checkpoint_every", int),
                      ("cache", str), ("cache_dir", str), ("cache_limit", str), ("cache_dtype", str)):  # fmt: skip
        parser.add_argument(f"--{key}", type=kind, default=None)
    if "model" in wanted:
        parser.add_argument("--memory", type=str, default=None, help="Also print the largest batch that fits into it.")
    parser.add_lightning_class_args(L.Trainer, "trainer")
    parser.add_lightning_class_args(L.LightningModule, "model", subclass_mode=True)
    parser.add_lightning_class_args(L.LightningDataModule, "data", subclass_mode=True)
    with readable_errors(list(args)):
        config = parser.parse_args(list(args))
        precision = str(config["trainer"]["precision"] or "32-true")
        for section in {"trainer", "model", "data"} - set(wanted):
            config[section] = None
        built = parser.instantiate_classes(config)
    built["precision"] = precision
    return built


def _report_explanation(task: Any, data: Any) -> None:
    """What is trained beside a classifier to explain it."""
    model = task.source.explained(task.method, data)
    frozen = sum(p.numel() for p in model.classifier.parameters())
    surrogate, explainer = task.method.explainer_parameter_count(model.view, model.petl.classes)
    print(f"method      {task.method.name} beside a {model.view.family} classifier of {model.petl.classes} classes")
    parts = [f"{n:,} in the {name} ({100 * n / frozen:.2f} %)" for name, n in
             (("surrogate", surrogate), ("explainer", explainer))]  # fmt: skip
    print(f"parameters  {' + '.join(parts)} beside the classifier's {frozen:,}")


def report(args: Sequence[str]) -> None:
    """Print parameters, compute and memory of a config's model, and the largest batch in ``--memory``."""
    from petl.costs import parse_memory
    from petl.costs import report as count
    from petl.data.base import LabelledDataModule

    sections = _sections(args, "model", "data")
    memory = None if sections.memory is None else parse_memory(sections.memory)
    task, data = sections.model, sections.data
    if isinstance(data, LabelledDataModule) and not hasattr(data, "num_classes"):
        data.read()  # the lists of the data set say how many classes there are
    if hasattr(task, "source"):
        if memory is not None:
            raise PetlError("--memory: an explainer's report has no forecast of memory; leave it out.")
        _report_explanation(task, data)
        return
    import torch

    task.hold_frozen(sections.precision, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    model, size = _network(task, data)
    model, autocast = _in_precision(model, sections.precision)
    found = count(model, (3, size, size) if size else None, autocast)
    print(found)
    if memory is not None:
        print(found.batch_line(memory))
    print(f"parameters by module\n{found.table()}")


def _network(task: Any, data: Any) -> tuple[Any, int | None]:
    """The network that ``task`` trains, and the side of its images where the data set one."""
    from petl.backbones.classifier import Classifier
    from petl.nn.head import Head

    if not hasattr(task, "backbone"):  # grounding: the model is whole without the data
        return task.model, None
    model, size = task.backbone, getattr(data, "image_size", None)
    classes = getattr(data, "num_classes", None) or getattr(task, "num_classes", None)
    return Classifier(model, Head(task.head_kind, model.petl.view.width, classes)) if classes else model, size


def _in_precision(model: Any, precision: str) -> tuple[Any, Any]:
    """``model`` as the trainer would hold it under its ``precision``, and the dtype of autocast or None."""
    import torch

    kind, _, way = precision.partition("-")
    dtype = {"16": torch.float16, "bf16": torch.bfloat16, "64": torch.float64}.get(kind)
    if dtype is None:
        return model, None
    mixed = way == "mixed" or (way == "" and kind != "64")  # "16" and "bf16" are Lightning's older names
    return (model, dtype) if mixed else (model.to(dtype), None)


def check_data(args: Sequence[str]) -> None:
    """`petl data check`: print what a config's data set holds and what is wrong with it; bad data is an error.

    `petl data prepare` converts a data set (see `petl.engine.prepare_cli`).
    """
    if args and args[0] == "prepare":
        from petl.engine.prepare_cli import prepare

        prepare(args[1:])
        return
    if not args or args[0] != "check":
        raise PetlError("usage: petl data check --config FILE [--data.key value …], or petl data prepare KIND …")
    sections = _sections(args[1:], "data")
    found = sections.data.check()
    print("\n".join(found.lines))
    if found.problems:
        shown = "\n  ".join(found.problems[:20])
        raise PetlError(f"{len(found.problems)} problems:\n  {shown}")
    print("no problems found")
