"""Adapters that Hugging Face `peft` reads too, and adapters that it wrote.

For a method that peft computes, ``adapter_config.json`` is peft's config with petl's own record under the key ``petl``,
and the tensors have peft's names; a head that is a layer of the plain network is one of peft's ``modules_to_save``. The
record says under ``tensors.names`` which tensor of the file, or which part of one, is which tensor of the model:
matrices of q and v inside a fused qkv lie in one block-structured pair, of as many times the rank and alpha.

A directory of plain peft records no fingerprint: it is loaded onto a model that is passed in, strictly as always.
"""

from __future__ import annotations

import dataclasses
import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from torch import Tensor, nn

from petl.adapters.state import set_trained_tensors, trained_tensors
from petl.backbones import view as find_view
from petl.backbones.base import BackboneView
from petl.backbones.classifier import Classifier
from petl.errors import PetlError, nearest
from petl.methods.adalora import AdaLoRA
from petl.methods.attach import attach, attached, remove
from petl.methods.lora import LoRA
from petl.methods.peft_generic import CHOOSING, OURS, SET_BY_PETL, Peft, weight_space_types
from petl.methods.peft_targets import layers
from petl.methods.peft_tuner import ADAPTER, PeftMethod, PeftModule

RECORD = "petl"
CONFIG, TENSORS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."  # of every tensor inside the network, in peft's files


class Place(NamedTuple):
    """Where a tensor of the model lies in the file: in ``name``, or in ``rows`` and ``columns`` of it, of ``shape``."""

    name: str
    shape: tuple[int, ...] | None = None
    rows: tuple[int, ...] = ()
    columns: tuple[int, ...] = ()

    def of(self, tensor: Tensor) -> Tensor:
        rows = tensor[slice(*self.rows)] if self.rows else tensor
        return rows[:, slice(*self.columns)] if self.columns else rows


# ---- adapters of petl


class Layout(NamedTuple):
    """An adapter as peft reads it: ``tensors``, and the `Place` of each of petl's in them; ``config``: peft's."""

    tensors: dict[str, Tensor]
    names: dict[str, list[Any]]
    config: dict[str, Any]


def peft_layout(model: nn.Module, tensors: Mapping[str, Tensor]) -> Layout | None:
    """The layout of `trained_tensors`, None where peft does not know the method or the task.

    ``model``: whatever `petl.save` takes.
    """
    inner = model.backbone if isinstance(model, Classifier) else model
    module = getattr(inner, "petl", None)
    if not isinstance(module, PeftModule):
        return None
    heads = _head_places(model, module)
    places = _places(module) | heads
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        place = places.setdefault(name, Place(name))  # peft passes over what it does not know
        if place.shape is None:
            found[place.name] = tensor
        else:
            place.of(found.setdefault(place.name, tensor.new_zeros(place.shape))).copy_(tensor)
    saved = sorted({p.name.removeprefix(PREFIX).rpartition(".")[0] for p in heads.values()})
    return Layout(found, {name: list(places[name]) for name in tensors}, _config(module, saved))


def petl_tensors(tensors: Mapping[str, Tensor], names: Any, source: str) -> dict[str, Tensor]:
    """The inverse of `peft_layout`, from the ``tensors.names`` of the record; `PetlError` where these do not fit."""
    filled = dict.fromkeys(tensors, 0)
    found = {}
    try:
        for name, entry in names.items():
            place = Place(*entry)
            if place.shape is not None and tensors[place.name].shape != tuple(place.shape):
                raise ValueError(f"{place.name} is {tuple(tensors[place.name].shape)}")
            found[name] = place.of(tensors[place.name]).clone()
            filled[place.name] += int(found[name].count_nonzero())
    except (AttributeError, KeyError, TypeError, ValueError, IndexError) as error:
        raise PetlError(f"{source}: tensors.names does not fit the tensors ({error!r}); a file was changed.") from error
    if lost := [n for n, t in tensors.items() if int(t.count_nonzero()) > filled[n]]:
        raise PetlError(f"{source}: {lost[0]} has entries that no tensor of the model takes; a file was changed.")
    return found


def _places(module: PeftModule) -> dict[str, Place]:
    """Where peft saves the tensors of a method, by their paths in a `Classifier`."""
    found: dict[str, Place] = {}
    for name, own in _names(module).items():
        found.setdefault(own, _in_fused(module, name))
    return found


def _names(module: PeftModule) -> dict[str, str]:
    """peft's names of a method's tensors, and their paths in a `Classifier`. One that layers share may have several."""
    from peft.utils import get_peft_model_state_dict

    model: Any = nn.Module()  # what peft's naming asks of its PeftModel
    model.base_model = module.tuners[0]
    model.peft_config = {ADAPTER: module.method.peft_config(module.view, module.targets)}
    state = model.state_dict()
    keys: Any = {key: key for key in state}  # in the place of the tensors: what comes back is key by name
    named: dict[str, Any] = get_peft_model_state_dict(model, keys, ADAPTER, save_embedding_layers=False)
    ours = {t.data_ptr(): n for n, t in trained_tensors(module.view.model).items()}
    places = {n: (k if isinstance(k, Tensor) else state[k]).data_ptr() for n, k in named.items()}
    shared_first = sorted(places, key=lambda name: name.startswith(PREFIX))
    return {name: ours[places[name]] for name in shared_first if places[name] in ours}


def _in_fused(module: PeftModule, name: str) -> Place:
    """The place of peft's tensor ``name``, inside that of the whole layer where the target is a part of one."""
    target = next((t for t in module.targets if t.of > 1 and name.startswith(f"{PREFIX}{t.name}.")), None)
    if target is None:
        return Place(name)
    parts = [t.name for t in module.targets if t.whole == target.whole]
    r, index = cast(LoRA, module.method).r, parts.index(target.name)
    kind = name.removeprefix(f"{PREFIX}{target.name}.")  # lora_A.weight or lora_B.weight
    mine, full = (index * r, (index + 1) * r), f"{PREFIX}{target.whole}.{kind}"
    if kind.startswith("lora_A"):
        return Place(full, (len(parts) * r, target.fan_in), mine)
    first = target.slice * target.fan_out
    return Place(full, (target.of * target.fan_out, len(parts) * r), (first, first + target.fan_out), mine)


def _head_places(model: nn.Module, module: PeftModule) -> dict[str, Place]:
    """Places of the head that the plain network itself would have: its own, or a linear one on its features."""
    view = module.view
    if not isinstance(model, Classifier):
        heads = [(f"{path}.{n}") for path, m in view.head_modules() for n in m.state_dict()]
        return {f"backbone.{name}": Place(PREFIX + name) for name in heads}
    if model.head.kind != "linear" or not view.head_names or not hasattr(view.model, view.head_names[0]):
        return {}
    return {f"head.fc.{n}": Place(f"{PREFIX}{view.head_names[0]}.{n}") for n in ("weight", "bias")}


def _config(module: PeftModule, saved: list[str]) -> dict[str, Any]:
    """peft's config of a method on whole layers, as JSON."""
    config = module.method.peft_config(module.view, module.targets)
    counts: dict[str, int] = {}
    for target in module.targets:
        counts[target.whole] = counts.get(target.whole, 0) + 1
    config.target_modules, config.modules_to_save, config.inference_mode = list(counts), saved or None, True
    if any(t.of > 1 for t in module.targets):
        r, alpha = config.r, config.lora_alpha
        config.rank_pattern = {re.escape(n): r * c for n, c in counts.items() if c > 1}
        config.alpha_pattern = {re.escape(n): alpha * c for n, c in counts.items() if c > 1}
    return {k: sorted(v) if isinstance(v, set) else v for k, v in config.to_dict().items()}


# ---- adapters of plain peft


def is_plain(directory: Path) -> bool:
    """Whether peft wrote ``directory``, without petl."""
    try:
        config = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and "peft_type" in config and RECORD not in config


def load_plain(directory: Path, backbone: Any) -> tuple[nn.Module, dict[str, Any]]:
    """Attach the adapter that peft wrote to ``backbone``; returns it, and a config as petl would have written it.

    Raises:
        PetlError: no backbone given, a type or an option that has no place here, pickled tensors, a target or a tensor
            without a home. The backbone is left as it was.
    """
    if not isinstance(backbone, nn.Module):
        raise PetlError(
            f"{directory} was written by peft, which does not record the weights it was trained on: pass the network, "
            "petl.load(…, backbone=model). Saved again with petl.save, the adapter knows it."
        )
    config = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
    tensors = _read(directory)
    view = find_view(backbone)
    method = _method(directory, config, view)
    attach(backbone, method)
    try:
        module = attached(backbone)
        assert isinstance(module, PeftModule)
        _fill(directory, module, tensors, config)
    except PetlError:
        remove(backbone)
        raise
    return backbone, _record(module, tensors)


def _read(directory: Path) -> dict[str, Tensor]:
    if not (directory / TENSORS).is_file():
        if (directory / PICKLED).is_file():
            raise PetlError(
                f"{directory} has its tensors in {PICKLED}, a pickle, which can run code when it is read. Convert it "
                f"where you trust it: PeftModel.from_pretrained(…).save_pretrained(…) writes {TENSORS}."
            )
        raise PetlError(f"{directory} is incomplete: {TENSORS} is missing.")
    try:
        return load_tensors((directory / TENSORS).read_bytes())
    except (SafetensorError, ValueError) as error:
        raise PetlError(f"{directory / TENSORS} is not a valid safetensors file: {error}") from error


def _method(directory: Path, config: dict[str, Any], view: BackboneView) -> PeftMethod:
    """The method of peft's config, with the layers that peft itself would choose in this network."""
    from peft import AdaLoraConfig
    from peft.tuners.ia3 import IA3Model
    from peft.tuners.tuners_utils import check_target_module_exists

    kind = str(config["peft_type"])
    cls: Any = AdaLoraConfig if kind == "ADALORA" else weight_space_types().get(kind)
    if cls is None:
        return Peft(kind)  # says why it does not fit
    defaults = {f.name: f.default for f in dataclasses.fields(cls)}
    given = {k: v for k, v in config.items() if v not in (None, [], {}) and v != defaults.get(k)}
    if unknown := sorted(given.keys() - defaults.keys()):
        raise PetlError(f"{directory}: this peft does not know the options {unknown} of {kind}; update peft.")
    if "target_modules" not in given:
        raise PetlError(f"{directory}: its config has no target_modules, so which layers it changes is not known.")
    for key in given.keys() & OURS.keys() - CHOOSING:
        if OURS[key] != SET_BY_PETL:
            raise PetlError(f"{directory}: the adapter has {key}={given[key]!r}, which petl cannot take: {OURS[key]}.")
    try:
        parsed = cls(**given)
    except (TypeError, ValueError) as error:
        raise PetlError(f"{directory}: peft refuses its config: {error}") from error
    found = tuple(name for name, _ in layers(view) if check_target_module_exists(parsed, name))
    if not found:
        wanted = given["target_modules"]
        first = wanted if isinstance(wanted, str) else str(wanted[0])
        ends = {name.rpartition(".")[2] for name, _ in layers(view)}
        raise PetlError(f"{directory}: its targets {wanted} name no layer of this network: {nearest(first, ends)}")
    if kind == "ADALORA":
        return AdaLoRA(parsed.init_r, parsed.target_r, parsed.lora_alpha, found, parsed.lora_dropout)
    options = {k: v for k, v in given.items() if k not in OURS}
    if kind == "IA3":
        inner = [n for n in found if IA3Model._check_target_module_feedforward(parsed, n)]
        options["feedforward_modules"] = inner
    return Peft(kind, options, found)


def _fill(directory: Path, module: PeftModule, tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    """Copy peft's tensors into the model. Raises `PetlError` unless every one has its place and every place its one."""
    model = module.view.model
    own = trained_tensors(model)
    places, heads = _places(module), _head_places(model, module)
    if any(place.name in tensors for place in heads.values()):
        places |= heads
    elif heads:
        warnings.warn(
            f"{directory} brings no head: the logits are those of the head that the network has.", stacklevel=4
        )
    if config["peft_type"] == "ADALORA":
        tensors = _padded(tensors, config.get("rank_pattern") or {})
    names: dict[str, list[str]] = {path: [place.name] for path, place in places.items()}
    for name, path in _names(module).items():
        names[path].append(name)
    given = {path: tensors[n] for path, known in names.items() for n in reversed(known) if n in tensors}
    missing = sorted(places[path].name for path in names.keys() - given.keys())
    extra = sorted(tensors.keys() - {n for known in names.values() for n in known})
    if missing or extra:
        raise PetlError(
            f"{directory} does not fit this {module.view.family}: {len(missing)} tensors missing {missing[:3]}, "
            f"{len(extra)} without a place {extra[:3]}. It was trained on another network, or on one with another "
            "head. Nothing was loaded."
        )
    set_trained_tensors(model, own | given, str(directory))


def _padded(tensors: dict[str, Tensor], kept: Mapping[str, Any]) -> dict[str, Tensor]:
    """AdaLoRA's tensors with the pruned triplets, which peft cuts off, as zeros again."""
    found = dict(tensors)
    for name, flags in kept.items():
        mask = torch.tensor(flags, dtype=torch.bool)
        path = name.removesuffix(f".{ADAPTER}").rpartition(".")[0]
        for part, axis in (("lora_A", 0), ("lora_E", 0), ("lora_B", 1)):
            key = f"{PREFIX}{path}.{part}"
            if key in tensors and tensors[key].shape[axis] == int(mask.sum()):
                shape = list(tensors[key].shape)
                shape[axis] = len(mask)
                found[key] = tensors[key].new_zeros(shape).index_copy_(axis, mask.nonzero()[:, 0], tensors[key])
    return found


def _record(module: PeftModule, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """What petl would have recorded of an adapter of peft."""
    from petl import __version__
    from petl.adapters.artefact import SCHEMA

    classes = next((p.shape[0] for _, m in module.view.head_modules() for p in m.parameters()), 0)
    size = sum(t.numel() for t in tensors.values())
    return {
        "schema": SCHEMA,
        "petl_version": __version__,
        "task": "classification" if classes else "features",
        "method": module.method.to_dict(),
        "backbone": {
            "name": None,
            "args": {},
            "weights_file": None,
            "own_head_classes": classes,
            **module.identity.to_dict(),
        },
        **dict.fromkeys(("text_backbone", "classifier", "head", "labels", "preprocessing")),
        "protocol": {},
        "tensors": {"sha256": None, "count": len(tensors), "parameters": size, "bytes": None},
    }
