"""Errors of the configuration, said so that they can be acted on; and the gate that keeps configs from importing code."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from petl.errors import PetlError, nearest

ALLOWED = (
    "petl.",
    "lightning.pytorch.callbacks.",
    "lightning.pytorch.loggers.",
    "lightning.pytorch.strategies.",
    "lightning.pytorch.plugins.",
    "lightning.pytorch.profilers.",
)
REFUSED = ("LambdaCallback",)  # takes any importable function


def config_files(args: Sequence[str]) -> list[Path]:
    """The files given with --config or -c."""
    files = []
    for i, arg in enumerate(args):
        flag, equals, value = arg.partition("=")
        if flag in ("--config", "-c"):
            files.append(Path(value if equals else args[i + 1] if i + 1 < len(args) else ""))
    return files


def _class_paths(node: Any, key: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(node, dict):
        for name, value in node.items():
            if name == "class_path":
                yield key or "top level", str(value)
            else:
                yield from _class_paths(value, f"{key}.{name}".strip("."))
    elif isinstance(node, list):
        for i, value in enumerate(node):
            yield from _class_paths(value, f"{key}[{i}]")


def check_class_paths(args: Sequence[str]) -> None:
    """Refuse config files whose class paths lie outside petl and Lightning: a config from a stranger must not run code.

    Raises:
        PetlError: an unreadable file, a YAML tag that builds objects, or a class path that is not allowed.
    """
    for file in config_files(args):
        try:
            content = yaml.safe_load(file.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise PetlError(f"config {file} cannot be read: {error}") from error
        except yaml.YAMLError as error:
            raise PetlError(f"config {file} is not plain YAML: {' '.join(str(error).split())}") from error
        if not isinstance(content, dict):
            raise PetlError(f"config {file} is not a mapping of keys to values.")
        for key, path in _class_paths(content):
            name = path.rpartition(".")[2]
            if "." in path and (not path.startswith(ALLOWED) or name in REFUSED):
                raise PetlError(
                    f"{file}: {key} asks for the class {path!r}. A config may name classes of petl and Lightning's "
                    "callbacks, loggers, strategies, plugins and profilers only; use the Python API for your own classes."
                )


def explain(message: str, args: Sequence[str], options: Sequence[str] = ()) -> str:
    """jsonargparse's message as one paragraph with the place and the nearest valid names."""
    text = re.sub(r"\s+", " ", message).strip()
    where = ", ".join(str(f) for f in config_files(args))
    return f"{where + ': ' if where else ''}{text}{_hint(text, options)}"


def _hint(text: str, options: Sequence[str]) -> str:
    unknown = re.search(r"(?:Key|Option|option|argument[s]?:?) '?-*([\w.]+)'? (?:is not expected|not accepted)", text)
    unknown = unknown or re.search(r"(?:Unrecognized arguments:|does not accept option) '?-*([\w.]+)", text)
    if unknown and options:
        return f" ({nearest(unknown.group(1), options)})"
    return ""
