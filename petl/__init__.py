"""petl: parameter-efficient transfer learning on frozen vision and vision-language backbones.

Nothing heavy is imported before it is used: ``import petl`` and ``petl --help`` load neither torch nor timm.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import Any

if any(os.path.isfile(f"{__path__[0]}/{other}/__init__.py") for other in ("io", "transform", "util")):
    raise ImportError(  # these folders belong to the other project, which also has an __init__.py and an errors.py
        f"two projects share the import name petl, and their files are mixed in {__path__[0]}: the table tool 'petl' "
        "and 'petl-tuning'. Run 'pip uninstall petl petl-tuning', then 'pip install petl-tuning'; keep the table tool "
        "in an environment of its own."
    )

from petl.errors import PetlError

__version__ = "0.1.0"

_PUBLIC = {
    "attach": "petl.methods.attach",
    "detach": "petl.methods.attach",
    "merge": "petl.methods.attach",
    "list_methods": "petl.methods",
    "list_backbones": "petl.backbones",
    "load_backbone": "petl.backbones",
    "report": "petl.costs",
    "Report": "petl.costs",
    "Classifier": "petl.backbones.classifier",
    "GroundingModel": "petl.models.grounding",
    "Grounding": "petl.tasks.grounding",
    "Explanation": "petl.tasks.explanation",
    "ExplainedClassifier": "petl.models.explained",
    "explain": "petl.models.explained",
    "Classification": "petl.tasks.classification",
    "SideSweep": "petl.tasks.sweep",
    "Method": "petl.methods.base",
    "load": "petl.adapters",
    "save": "petl.adapters",
    "Predictor": "petl.adapters.predictor",
    "AdapterSet": "petl.adapters.many",
    "TapCache": "petl.engine.tap_cache",
    "WandbLogger": "petl.engine.loggers",
}

__all__ = ["PetlError", "__version__", *sorted(_PUBLIC)]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    if name in ("adapters", "backbones", "data", "engine", "methods", "models", "nn", "tasks"):
        return import_module(f"petl.{name}")
    from petl.methods import entries

    for entry in entries().values():  # petl.SparseTuning, petl.EViT, …: every registered method
        if entry.cls == name:
            return getattr(import_module(entry.module), name)
    raise AttributeError(f"module 'petl' has no attribute {name!r}")


def __dir__() -> list[str]:
    from petl.methods import entries

    return sorted([*__all__, *(e.cls for e in entries().values())])
