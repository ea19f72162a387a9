"""Data modules, one file per data set family; imported when first used."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from petl.data.digits import Digits
    from petl.data.folder import ImageFolder
    from petl.data.vtab import VTAB

_MODULES = {"Digits": "petl.data.digits", "ImageFolder": "petl.data.folder", "VTAB": "petl.data.vtab"}
__all__ = ["VTAB", "Digits", "ImageFolder"]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module 'petl.data' has no attribute {name!r}")
