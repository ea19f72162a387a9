"""Errors of the configuration, said so that one can act on them; the gate that keeps configs from importing code."""

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
                    "callbacks, loggers, strategies, plugins and profilers only; use the Python API for your own."
                )


_UNKNOWN = re.compile(
    r"(?:Option '([\w.]+)' is not accepted|does not accept option '([\w.]+)'|[Uu]nrecognized arguments?: -*([\w.]+))"
)
_CLASS = re.compile(r"(?:Problem with given class_path '([\w.]+)'|Expected a dot import path string: (\S+))")
_VALUE = re.compile(r"Expected an? (.+?)\. Got value: (.*?)(?= - Expected|$)")
TASKS = ("petl.Classification", "petl.Grounding", "petl.Explanation")
_TOP = ("run_dir", "overwrite", "select", "checkpoint_every", "seed_everything", "ckpt_path", "config", "model", "data")


def explain(message: str, args: Sequence[str]) -> str:
    """jsonargparse's message as one paragraph: file and line, key, what is wrong, the nearest valid names."""
    text = re.sub(r"\s+", " ", message).strip()
    path = ".".join(re.findall(r'Parser key "([\w.]+)"', text))
    if found := _UNKNOWN.search(text):
        key = next(g for g in found.groups() if g)
        return f"{_place(key, args)}{path or 'the config'} has no option {key!r}: {nearest(key, _options(path, args))}"
    known = [*_classes("method"), *_classes("data"), *_classes("model")]
    for found in _CLASS.finditer(text):
        name = next(g for g in found.groups() if g)
        if name not in known:
            hint = nearest(name, _classes(path))
            return f"{_place(name, args)}{path} asks for the class {name!r}, which there is not: {hint}"
    if found := _VALUE.search(text):
        kind = re.sub(r"<class '([\w.]+)'>", r"\1", found.group(1))
        return f"{_place(path, args)}{path} must be of type {kind}, not {found.group(2)!r}."
    return f"{_place('', args)}{text[:600]}"


def _place(key: str, args: Sequence[str]) -> str:
    """``file line n: `` for the line of a config that holds ``key`` (or its last part), as far as it can be told."""
    last, whole = re.escape(key.rpartition(".")[2]), re.escape(key)
    pattern = rf"^\s*(-\s*)?{last}\s*:|class_path:\s*{whole}\b|:\s*{whole}\b"
    for file in config_files(args):
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            if key and re.search(pattern, line):
                return f"{file} line {number}: "
    return "" if any(key and key in a for a in args) else "".join(f"{f}: " for f in config_files(args)[:1])


def _options(path: str, args: Sequence[str]) -> list[str]:
    """Valid keys below ``path``: constructor arguments of the class that the config names there."""
    import inspect
    from importlib import import_module

    if not path:
        import lightning as L

        return [*_TOP, *(f"trainer.{p}" for p in inspect.signature(L.Trainer.__init__).parameters if p != "self")]
    for file in config_files(args):
        node = yaml.safe_load(file.read_text(encoding="utf-8"))
        for part in path.split("."):
            node = node.get(part) or node.get("init_args", {}).get(part) if isinstance(node, dict) else None
        if isinstance(node, dict) and "class_path" in node:
            module, _, name = str(node["class_path"]).rpartition(".")
            cls = getattr(import_module(module), name, None)  # allowed classes only, see check_class_paths
            if cls is not None:
                return [p for p in inspect.signature(cls.__init__).parameters if p != "self"]
    return []


def _classes(path: str) -> list[str]:
    from petl import data
    from petl.methods import entries

    if path.endswith("method"):
        return [f"petl.{e.cls}" for e in entries().values()]
    return [f"petl.data.{n}" for n in data.__all__] if path == "data" else list(TASKS)


def underlying(error: BaseException) -> PetlError | None:
    """The `PetlError` that an error was raised from, however deep."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, PetlError):
            return seen
        seen = seen.__cause__ or seen.__context__
    return None
