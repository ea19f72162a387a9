"""The methods file of a comparison: settings by name, and the arguments of `petl fit` that they stand for."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from petl.errors import PetlError, nearest

FILE = Path(__file__).with_name("vtab_methods.yaml")
KEYS = {"label", "method", "options", "lr", "weight_decay", "search", "published"}
Settings = dict[str, Any]


def read_methods(file: Path = FILE) -> dict[str, Settings]:
    """Settings by name, with label, options and search filled in; `PetlError` names what is wrong with the file."""
    try:
        found = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise PetlError(f"the methods file {file} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise PetlError(f"{file} is no mapping from names to settings.")
    search = found.pop("default_search", {})
    for name, settings in found.items():
        if not re.fullmatch(r"[\w.+-]+", str(name)) or not isinstance(settings, dict):
            raise PetlError(f"{file}: {name!r} is not a name of letters, digits and '_.+-' with settings below it.")
        for key in settings:
            if key not in KEYS:
                raise PetlError(f"{file}: {name} has a key {key!r}: {nearest(key, KEYS)}")
        missing = [key for key in ("method", "lr", "weight_decay") if key not in settings]
        if missing:
            raise PetlError(f"{file}: {name} lacks {', '.join(missing)}.")
        found[name] = {"label": name, "options": {}, "search": search, **settings}
        for key in found[name]["search"]:
            check_key(key, f"{file}: {name}")
    return found


def pick(names: Sequence[str], methods: dict[str, Settings]) -> dict[str, Settings]:
    """The settings of these names, in their order."""
    for name in names:
        if name not in methods:
            raise PetlError(f"no method {name!r} in the methods file: {nearest(name, methods)}")
    return {name: methods[name] for name in names}


def arguments(settings: Settings) -> list[str]:
    """Arguments of `petl fit` for a method with its settings."""
    from petl.methods import get_method

    method = {"class_path": f"petl.{get_method(settings['method']).__name__}", "init_args": settings["options"]}
    return ["--model.method", json.dumps(method), "--model.lr", str(settings["lr"]), "--model.weight_decay",
            str(settings["weight_decay"])]  # fmt: skip


# ---- single settings by their key in ``search``


def check_key(key: str, where: str) -> None:
    if key not in ("lr", "weight_decay") and not key.startswith("options."):
        raise PetlError(f"{where} searches {key!r}: it is lr, weight_decay, or options.NAME.")


def get(settings: Settings, key: str) -> Any:
    """The value that the file gives for a key, None where the method's own default holds."""
    option = key.removeprefix("options.")
    return settings["options"].get(option) if option != key else settings[key]


def changed(settings: Settings, values: dict[str, Any]) -> Settings:
    """The settings with these values in place of their own."""
    new = copy.deepcopy(settings)
    for key, value in values.items():
        option = key.removeprefix("options.")
        (new["options"] if option != key else new)[option] = value
    return new
