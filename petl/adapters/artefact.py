"""The directory format: ``adapter_config.json``, ``adapter_model.safetensors``, ``README.md``.

Schema 3; schema 2 had no ``classifier`` (what an explanation explains), schema 1 no ``text_backbone`` either. The
config is JSON and is resolved through registry names only; tensors are safetensors; nothing in an adapter can run code.
Methods that peft computes are saved so that peft reads them too (see peft_format.py).
A directory is written under another name and renamed, so that a reader sees the old one or the new one.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as dump_tensors
from torch import Tensor, nn

from petl.adapters.card import model_card
from petl.adapters.peft_format import RECORD, peft_layout, petl_tensors
from petl.adapters.state import trained_tensors
from petl.backbones.classifier import Classifier
from petl.backbones.identity import identify
from petl.errors import PetlError
from petl.methods.attach import attached
from petl.methods.base import MethodModule
from petl.models.explained import ExplainedClassifier
from petl.models.grounding import GroundingModel

SCHEMA = 3
CONFIG, TENSORS, CARD = "adapter_config.json", "adapter_model.safetensors", "README.md"
_KEYS = {"schema", "petl_version", "task", "method", "backbone", "text_backbone", "classifier", "head", "labels",
         "preprocessing", "protocol", "tensors"}  # fmt: skip


def save(
    model: nn.Module,
    directory: str | Path,
    backbone: str | None = None,
    *,
    text_backbone: str | None = None,
    backbone_args: Mapping[str, Any] | None = None,
    weights_file: str | None = None,
    labels: Sequence[str] | None = None,
    preprocessing: Mapping[str, Any] | None = None,
    protocol: Mapping[str, Any] | None = None,
) -> Path:
    """Write the adapter of ``model`` to ``directory``; an adapter that lies there is replaced in one step.

    Args:
        model: a `petl.Classifier`, a `petl.GroundingModel`, a `petl.ExplainedClassifier`, or a model with a method
            attached.
        directory: where to; parents are created.
        backbone: the name under which `petl.load` finds the frozen network again (``timm/…``, ``hf/…``, ``bundled/…``);
            None = `petl.load` needs the model itself. Of a grounding model, the image encoder.
        text_backbone: the same for the text encoder of a grounding model.
        backbone_args: constructor arguments that the name alone does not tell.
        weights_file: name of the local weights file, where the backbone's weights came from one.
        labels: class names in the order of the logits.
        preprocessing: how evaluation images were prepared (see `petl.data.transforms.evaluation_transform`).
        protocol: how the adapter was trained and measured; any JSON value.

    Raises:
        PetlError: nothing attached, labels that do not fit the head, or the disk refuses (the old adapter survives).
    """
    from petl import __version__

    head: dict[str, Any] | None = None
    own_classes, text_record, explained_record = 0, None, None
    if isinstance(model, GroundingModel):
        pair = model.petl
        task, method, identity, head = "grounding", pair.method, pair.vision.identity, model.describe()
        text_record = {"name": text_backbone, **pair.text.identity.to_dict()}
    elif isinstance(model, ExplainedClassifier):
        inner: Any = model.classifier
        within = getattr(model.view.model, "petl", None)  # a method may have its tensors inside the backbone's modules
        identity = within.identity if isinstance(within, MethodModule) else identify(model.view)
        task, method = "explanation", model.method
        head = inner.head.describe() if isinstance(inner, Classifier) else None
        own_classes = 0 if head else model.petl.classes
        explained_record = {
            "name": backbone,
            "method": model.adapter.to_dict() if model.adapter else None,
            "classes": model.petl.classes,
            **model.identity.to_dict(),
        }
        if labels is not None and len(labels) != model.petl.classes:
            raise PetlError(f"petl.save: {len(labels)} labels for a classifier of {model.petl.classes} classes.")
    else:
        module = attached(model.backbone if isinstance(model, Classifier) else model)
        method, identity = module.method, module.identity
        head = model.head.describe() if isinstance(model, Classifier) else None
        own_classes = next((p.shape[0] for _, m in module.view.head_modules() for p in m.parameters()), 0)
        task = "classification" if head or own_classes else "features"
        if head and labels is not None and len(labels) != head["num_classes"]:
            raise PetlError(f"petl.save: {len(labels)} labels for a head of {head['num_classes']} classes.")
    tensors = {k: v.detach().cpu().contiguous() for k, v in trained_tensors(model).items()}
    layout = peft_layout(model, tensors)
    data = dump_tensors(layout.tensors if layout else tensors, metadata={"format": "pt"})  # one key: several shuffle
    config: dict[str, Any] = {
        "schema": SCHEMA,
        "petl_version": __version__,
        "task": task,
        "method": method.to_dict(),
        "backbone": {
            "name": backbone,
            "args": dict(backbone_args or {}),
            "weights_file": weights_file,
            "own_head_classes": own_classes,
            **identity.to_dict(),
        },
        "text_backbone": text_record,
        "classifier": explained_record,
        "head": head,
        "labels": None if labels is None else [str(v) for v in labels],
        "preprocessing": None if preprocessing is None else dict(preprocessing),
        "protocol": dict(protocol or {}),
        "tensors": {
            "sha256": hashlib.sha256(data).hexdigest(),
            "count": len(tensors),
            "parameters": sum(v.numel() for v in tensors.values()),
            "bytes": len(data),
        },
    }
    if layout:
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)  # frozen ones are saved too
        config["tensors"] |= {"parameters": trained, "names": layout.names}
    text = json.dumps({**layout.config, RECORD: config} if layout else config, indent=2) + "\n"
    write_directory(Path(directory), {TENSORS: data, CARD: model_card(config).encode(), CONFIG: text.encode()})
    return Path(directory)


def write_directory(path: Path, files: Mapping[str, bytes]) -> None:
    """Write ``files`` as the directory ``path``, all or nothing; raises `PetlError` where the disk refuses."""
    path = path.absolute()
    temporary, previous = path.with_name(f".{path.name}.tmp-{os.getpid()}"), _previous(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        recover(path)
        if path.exists() and not (path / CONFIG).is_file() and (not path.is_dir() or any(path.iterdir())):
            raise PetlError(
                f"{path} exists and is not an adapter; petl does not overwrite it. Choose another directory."
            )
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        for name, data in files.items():
            with open(temporary / name, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        if path.exists():
            shutil.rmtree(previous, ignore_errors=True)
            os.rename(path, previous)  # between these two renames `recover` finds the old adapter
        os.rename(temporary, path)
        shutil.rmtree(previous, ignore_errors=True)
    except OSError as error:
        recover(path)
        raise PetlError(
            f"the adapter could not be written to {path}: {error}. What was there before is untouched."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _previous(path: Path) -> Path:
    return path.with_name(f".{path.name}.previous")


def recover(path: Path) -> None:
    """Put the old adapter back where a process was killed between moving it away and moving the new one in."""
    path = path.absolute()
    if not path.exists() and _previous(path).is_dir():
        os.rename(_previous(path), path)


def read_config(directory: Path) -> dict[str, Any]:
    """The config of an adapter directory, checked for schema and keys."""
    file = directory / CONFIG
    if not file.is_file():
        there = sorted(p.name for p in directory.iterdir())[:5] if directory.is_dir() else "no such directory"
        raise PetlError(f"{directory} is not an adapter: it has no {CONFIG} ({there}).")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise PetlError(f"{file} cannot be read as JSON: {error}") from error
    if isinstance(config, dict) and "peft_type" in config:
        if RECORD not in config:
            raise PetlError(f"{directory} was written by peft alone; petl.load(…, backbone=model) reads it.")
        config = config[RECORD]
    if not isinstance(config, dict) or not isinstance(config.get("schema"), int):
        raise PetlError(f"{file} has no integer 'schema': it was not written by petl.")
    if config["schema"] > SCHEMA:
        raise PetlError(
            f"{file} has schema {config['schema']}, written by petl {config.get('petl_version')}; this petl reads "
            f"up to schema {SCHEMA}. Update petl."
        )
    if config["schema"] < SCHEMA:
        added = {"text_backbone": None, "classifier": None} if config["schema"] == 1 else {"classifier": None}
        config |= {"schema": SCHEMA, **added}
    if config.keys() != _KEYS:
        raise PetlError(
            f"{file}: keys missing {sorted(_KEYS - config.keys())}, unknown {sorted(config.keys() - _KEYS)}; "
            "the file was changed or cut."
        )
    kinds: dict[str, type | tuple[type, ...]] = dict.fromkeys(("method", "backbone", "tensors", "protocol"), dict)
    kinds |= dict.fromkeys(("head", "preprocessing", "text_backbone", "classifier"), (dict, type(None)))
    kinds |= {"labels": (list, type(None))}
    for key, kind in kinds.items():
        if not isinstance(config[key], kind):
            raise PetlError(f"{file}: {key!r} is a {type(config[key]).__name__}; the file was changed.")
    return config


def read_tensors(directory: Path, config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of an adapter; `PetlError` where the file is missing, cut, or not the one the config describes."""
    file = directory / TENSORS
    if not file.is_file():
        raise PetlError(f"{directory} is incomplete: {TENSORS} is missing.")
    data = file.read_bytes()
    digest, expected = hashlib.sha256(data).hexdigest(), config["tensors"].get("sha256")
    if digest != expected:
        raise PetlError(
            f"{file} is damaged or was changed: {len(data):,} bytes with SHA-256 {digest[:12]}…, the config records "
            f"{config['tensors'].get('bytes'):,} bytes with {str(expected)[:12]}…. "
            "Get the adapter again from its source."
        )
    try:
        tensors = load_tensors(data)
    except (SafetensorError, ValueError) as error:
        raise PetlError(f"{file} is not a valid safetensors file: {error}") from error
    names = config["tensors"].get("names")
    return tensors if names is None else petl_tensors(tensors, names, str(directory))
