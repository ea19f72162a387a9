"""petl: parameter-efficient transfer learning on frozen vision backbones.

Nothing heavy is imported before it is used: ``import petl`` and ``petl --help`` load neither torch nor timm.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

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
    "Classification": "petl.tasks.classification",
    "Method": "petl.methods.base",
    "load": "petl.adapters",
    "save": "petl.adapters",
    "Predictor": "petl.adapters.predictor",
    "WandbLogger": "petl.engine.loggers",
}

__all__ = ["PetlError", "__version__", *sorted(_PUBLIC)]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    if name in ("adapters", "backbones", "data", "engine", "methods", "nn", "tasks"):
        return import_module(f"petl.{name}")
    from petl.methods import entries

    for entry in entries().values():  # petl.SparseTuning, petl.EViT, …: every registered method
        if entry.cls == name:
            return getattr(import_module(entry.module), name)
    raise AttributeError(f"module 'petl' has no attribute {name!r}")


def __dir__() -> list[str]:
    from petl.methods import entries

    return sorted([*__all__, *(e.cls for e in entries().values())])
