"""Data modules, one file per data set family; imported when first used."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from petl.data.digits import Digits
    from petl.data.expressions import Expressions
    from petl.data.folder import ImageFolder
    from petl.data.refcoco import RefCOCO
    from petl.data.scene_data import Scenes
    from petl.data.sentences import Sentences
    from petl.data.vtab import VTAB

_MODULES = {
    "Digits": "petl.data.digits",
    "Expressions": "petl.data.expressions",
    "ImageFolder": "petl.data.folder",
    "RefCOCO": "petl.data.refcoco",
    "Scenes": "petl.data.scene_data",
    "Sentences": "petl.data.sentences",
    "VTAB": "petl.data.vtab",
}
__all__ = ["VTAB", "Digits", "Expressions", "ImageFolder", "RefCOCO", "Scenes", "Sentences"]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module 'petl.data' has no attribute {name!r}")
