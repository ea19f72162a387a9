"""`petl report` and `petl data`: build what a config describes, without training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from petl.engine.errors import check_class_paths
from petl.errors import PetlError


def _sections(args: Sequence[str], *wanted: str) -> Any:
    """Instantiate the sections ``wanted`` ("model", "data") of a config, with overrides, as `petl fit` would."""
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
    for key, kind in (("run_dir", str), ("overwrite", bool), ("select", str), ("checkpoint_every", int)):
        parser.add_argument(f"--{key}", type=kind, default=None)
    parser.add_lightning_class_args(L.Trainer, "trainer")
    parser.add_lightning_class_args(L.LightningModule, "model", subclass_mode=True)
    parser.add_lightning_class_args(L.LightningDataModule, "data", subclass_mode=True)
    with readable_errors(list(args)):
        config = parser.parse_args(list(args))
        for section in {"trainer", "model", "data"} - set(wanted):
            config[section] = None
        return parser.instantiate_classes(config)


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
    """Print parameters, compute and memory of a config's model."""
    from petl.backbones.classifier import Classifier
    from petl.costs import report as count
    from petl.data.base import LabelledDataModule

    sections = _sections(args, "model", "data")
    task, data = sections.model, sections.data
    if isinstance(data, LabelledDataModule) and not hasattr(data, "num_classes"):
        data.read()  # the lists of the data set say how many classes there are
    if hasattr(task, "source"):
        _report_explanation(task, data)
        return
    if not hasattr(task, "backbone"):  # grounding: the model is whole without the data
        print(count(task.model))
        return
    classes = getattr(data, "num_classes", None) or getattr(task, "num_classes", None)
    model = task.backbone
    if classes:
        from petl.nn.head import Head

        model = Classifier(model, Head(task.head_kind, model.petl.view.width, classes))
    size = getattr(data, "image_size", None)
    print(count(model, (3, size, size) if size else None))


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
