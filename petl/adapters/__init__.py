"""The adapter: a small directory that knows which backbone it belongs to."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from petl.adapters.artefact import save
    from petl.adapters.predictor import load

__all__ = ["load", "save"]


def __getattr__(name: str) -> Any:
    if name == "save":
        from petl.adapters.artefact import save

        return save
    if name == "load":
        from petl.adapters.predictor import load

        return load
    raise AttributeError(f"module 'petl.adapters' has no attribute {name!r}")
