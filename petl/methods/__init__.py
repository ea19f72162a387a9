"""Methods, one file per paper. The registry is read off the files, so that listing imports nothing heavy."""

from __future__ import annotations

import ast
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from petl.errors import PetlError, nearest

if TYPE_CHECKING:
    from petl.methods.base import Method


class Entry(NamedTuple):
    name: str  # registry name, e.g. "sparse_tuning"
    cls: str  # class name, e.g. "SparseTuning"
    module: str
    summary: str  # first line of the class docstring


@cache
def entries() -> dict[str, Entry]:
    """Registered methods by name: every class in this folder that carries ``@register("name")``."""
    found = {}
    for file in sorted(Path(__file__).parent.glob("*.py")):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if not isinstance(node, ast.ClassDef):
                continue
            for mark in node.decorator_list:
                if isinstance(mark, ast.Call) and isinstance(mark.func, ast.Name) and mark.func.id == "register":
                    name = ast.literal_eval(mark.args[0])
                    summary = (ast.get_docstring(node) or "").partition("\n")[0]
                    found[name] = Entry(name, node.name, f"petl.methods.{file.stem}", summary)
    return found


def list_methods() -> list[str]:
    """Names of all methods."""
    return list(entries())


def get_method(name: str) -> type[Method]:
    """The class of a method by its registry name or class name."""
    for entry in entries().values():
        if name in (entry.name, entry.cls):
            return getattr(import_module(entry.module), entry.cls)
    known = [*entries(), *(e.cls for e in entries().values())]
    raise PetlError(f"method {name!r} is not known: {nearest(name, known)}")
