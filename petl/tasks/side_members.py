"""The members of a sweep: their settings, checked one by one, and labels of their own from a file."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from petl.errors import PetlError, nearest
from petl.methods.base import Method, from_dict
from petl.nn.head import HEADS

NUMBERS = ("lr", "weight_decay", "warmup_epochs", "min_lr", "label_smoothing")
TAKEN = ("adapter", "checkpoints", "metrics", "pictures", "wandb")  # folders of a run


@dataclass(frozen=True)
class Member:
    """What is trained under one name; see `petl.SideSweep`."""

    method: Method
    head: str
    lr: float
    weight_decay: float
    warmup_epochs: float
    min_lr: float
    label_smoothing: float
    seed: int | None = None  # None = that of the run
    labels: str | None = None  # file; None = the data's own

    def __post_init__(self) -> None:
        for name in NUMBERS:
            value = _number(getattr(self, name))
            if value is None or value < 0 or (name == "label_smoothing" and value >= 1):
                low = "a number in [0, 1)" if name == "label_smoothing" else "a number of at least 0"
                raise PetlError(f"{name}={getattr(self, name)!r} must be {low}.")
            object.__setattr__(self, name, value)
        if self.head not in HEADS:
            raise PetlError(f"head={self.head!r}: {nearest(str(self.head), HEADS)}")
        if self.seed is not None and (isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0):
            raise PetlError(f"seed={self.seed!r} must be an integer of at least 0.")


KEYS = {f.name for f in dataclasses.fields(Member)} | {"options"}


def _number(value: Any) -> float | None:
    """A finite number, also where YAML reads ``1e-3`` as text."""
    try:
        found = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        return None
    return found if math.isfinite(found) else None


def read_members(given: Mapping[str, Any], default: Member) -> dict[str, Member]:
    """The members by name, with what they leave out from ``default``. Raises `PetlError` naming member and key."""
    if not given:
        raise PetlError("a sweep has no members: give at least one, by name.")
    found = {}
    for name, settings in given.items():
        if not re.fullmatch(r"[\w+-][\w.+=-]*", str(name)) or name in TAKEN:
            raise PetlError(
                f"member {name!r}: a name is the name of a folder, of letters, digits and '_.+=-', and none of "
                f"{', '.join(TAKEN)}."
            )
        try:
            found[str(name)] = _member(settings or {}, default)
        except PetlError as error:
            raise PetlError(f"member {name!r}: {error}") from error
    return found


def _member(settings: Any, default: Member) -> Member:
    if not isinstance(settings, Mapping):
        raise PetlError(f"its settings are a mapping of {', '.join(sorted(KEYS))}, not {settings!r}.")
    for key in settings:
        if key not in KEYS:
            raise PetlError(f"there is no setting {key!r}: {nearest(str(key), KEYS)}")
    values, method, options = dict(settings), settings.get("method"), settings.get("options") or {}
    values.pop("options", None)
    if not isinstance(options, Mapping):
        raise PetlError(f"options={options!r} must be a mapping of options of its method.")
    if isinstance(method, str):
        values["method"] = from_dict({"name": method, "options": dict(options)})
    else:
        values["method"] = own = default.method if method is None else method
        if not isinstance(own, Method):
            raise PetlError(f"method={method!r} must be the name of a method, or in Python a method.")
        if options:
            spec = own.to_dict()
            values["method"] = from_dict({"name": spec["name"], "options": spec["options"] | dict(options)})
    return dataclasses.replace(default, **values)


@dataclass(frozen=True)
class Labels:
    """Labels of samples by their name, from a file: a JSON object, or CSV with the columns ``name`` and ``label``."""

    file: Path
    of: dict[str, str]
    classes: list[str]  # sorted, whole numbers by value
    digest: str

    @classmethod
    def read(cls, file: str) -> Labels:
        """Raises `PetlError` for a file that cannot be read as such, or has one class only."""
        path = Path(file)
        try:
            content = path.read_bytes()
            of = _parse(path, content.decode())
        except (OSError, ValueError, csv.Error) as error:
            raise PetlError(f"labels {file} cannot be read: {error}") from error
        classes = sorted(set(of.values()), key=lambda c: (0, int(c), c) if re.fullmatch(r"-?\d+", c) else (1, 0, c))
        if len(classes) < 2:
            raise PetlError(f"labels {file} has {len(of)} samples of {len(classes)} classes; a task has two or more.")
        return cls(path, of, classes, hashlib.sha256(content).hexdigest())

    def indices(self, names: Sequence[str], split: str) -> Tensor:
        """Class (n,) of each sample of a split. Raises `PetlError` where one has no label."""
        missing = [name for name in names if name not in self.of]
        if missing:
            raise PetlError(
                f"labels {self.file} has no label for {len(missing)} of {len(names)} samples of the {split} split, "
                f"such as {missing[0]!r}: {nearest(missing[0], self.of)}"
            )
        number = {c: i for i, c in enumerate(self.classes)}
        return torch.tensor([number[self.of[name]] for name in names])


def _parse(path: Path, text: str) -> dict[str, str]:
    if path.suffix.lower() == ".json":
        found = json.loads(text)
        if not isinstance(found, dict) or any(isinstance(v, (dict, list, type(None))) for v in found.values()):
            raise ValueError('it is no JSON object of {"name": label}')
        return {name: str(label) for name, label in found.items()}
    rows = csv.DictReader(text.splitlines())
    if not {"name", "label"} <= set(rows.fieldnames or ()):
        raise ValueError(f"a CSV file has the columns 'name' and 'label' in its first line, not {rows.fieldnames}")
    return {row["name"]: row["label"] for row in rows}
