"""Every other weight-space method of Hugging Face `peft`, by the name and the options that peft gives it.

Sources are those that peft's documentation names for each type. What cannot be written as a formula for all of them is
counted: parameters and multiply-accumulates in peft's own layers around copies of the target layers.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import warnings
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from petl.backbones.base import BackboneView
from petl.errors import PetlError, nearest
from petl.methods.base import register
from petl.methods.peft_targets import Target
from petl.methods.peft_tuner import ADAPTER, PeftMethod

UNFIT = {
    "ADALORA": "petl.AdaLoRA trains it, with its budget of ranks",
    "ADAPTION_PROMPT": "it puts prompts into the attention of language models",
    "POLY": "it wants the number of a task with every input",
    "SHADOW": "it trains a second decoder beside a language model",
    "TRAINABLE_TOKENS": "it trains the embeddings of single tokens",
    "XLORA": "it mixes finished LoRA adapters",
}
SET_BY_PETL = "petl sets it"
CHOOSING = {
    "target_modules": "give targets=[…]",
    "exclude_modules": "give targets=[…]; a regular expression can leave modules out",
    "layers_to_transform": "give layers=[…]",
    "layers_pattern": "give targets=[…] with a regular expression",
    "modules_to_save": "petl trains and saves the head by itself",
}
OURS = CHOOSING | {
    "target_parameters": "petl names layers, not parameters",
    "bias": "biases of the frozen network stay frozen; petl.BitFit trains them",
    "layer_replication": "it changes the depth of the network",
    "trainable_token_indices": "there is no token embedding",
    **dict.fromkeys(
        ("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
         "inference_mode", "runtime_config"),
        SET_BY_PETL,
    ),
}  # fmt: skip
NO_IDENTITY = {"DEFT", "FOURIERFT", "FROD", "HRA", "OSF", "UNILORA", "SUPERTUNING"}  # with peft's default start


def weight_space_types() -> dict[str, type]:
    """peft's config classes by type, of the methods that change the weights of target layers."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    found = {str(kind.value): cls for kind, cls in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    fields = {name: {f.name for f in dataclasses.fields(cls)} for name, cls in found.items()}
    return {n: c for n, c in found.items() if "target_modules" in fields[n] and n not in UNFIT}


@register("peft")
@dataclass(frozen=True)
class Peft(PeftMethod):
    """Peft: any weight-space method of Hugging Face peft, by its type and options there.

    Args:
        peft_type: peft's name of the method, such as BOFT, HRA, ROAD, MISS, C3A, SHIRA or RANDLORA.
        options: of its config class in peft, apart from those that say where it works and what is saved.
        targets: layers (see petl.LoRA), each as a whole.
        layers: blocks (see petl.LoRA).
    """

    peft_type: str
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    targets: tuple[str, ...] = ("qkv",)
    layers: tuple[int, ...] | None = None

    layer_types: ClassVar[tuple[type[nn.Module], ...]] = (nn.Module,)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "peft_type", str(self.peft_type).upper())
        types = weight_space_types()
        if self.peft_type not in types:
            from peft import PeftType

            reason = UNFIT.get(self.peft_type, "it works on the prompts of language models")
            why = f"is of no use here, {reason};" if self.peft_type in list(PeftType) else "is no method of peft;"
            raise PetlError(f"Peft(peft_type={self.peft_type!r}) {why} {nearest(self.peft_type, types)}")
        if not isinstance(self.options, dict):
            raise PetlError(f"Peft(options={self.options!r}): give a mapping of options of peft's config.")
        fields = {f.name for f in dataclasses.fields(types[self.peft_type])}
        for key in self.options:
            if key in OURS:
                raise PetlError(f"Peft(options={{{key!r}: …}}): {OURS[key]}.")
            if key not in fields:
                raise PetlError(f"Peft: {self.peft_type} has no option {key!r}: {nearest(key, fields - OURS.keys())}")
        try:
            json.dumps(self.options)
        except (TypeError, ValueError) as error:
            raise PetlError(f"Peft(options={self.options!r}): {error}; options are saved as JSON.") from error

    @property
    def identity_at_start(self) -> bool:
        """By peft's default start; one that the options change counts as not."""
        return self.peft_type not in NO_IDENTITY and not any("init" in key for key in self.options)

    def peft_config(self, view: BackboneView, targets: list[Target]) -> Any:
        names: dict[str, Any] = {"target_modules": [t.name for t in targets]}
        needed: dict[str, Any] = {"feedforward_modules": []} if self.peft_type == "IA3" else {}
        try:
            return weight_space_types()[self.peft_type](**(needed | self.options | names))
        except (TypeError, ValueError) as error:
            raise PetlError(f"peft refuses {self.peft_type} with {self.options}: {error}") from error

    def parameter_count(self, view: BackboneView) -> int:
        targets = self.find(view)
        twin = _skeleton(targets)
        config = self.peft_config(view, targets)
        from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type](twin, config, ADAPTER)
        return sum(p.numel() for p in twin.parameters() if p.requires_grad)

    def layer_parameters(self, target: Target) -> int:
        raise NotImplementedError  # shared tensors belong to no layer: see `parameter_count`


def _skeleton(targets: list[Target]) -> nn.Module:
    """Copies of the target layers under their paths, and nothing else."""
    root = nn.Module()
    for target in targets:
        parent = root
        *path, last = target.name.split(".")
        for name in path:
            if name not in parent._modules:
                parent.add_module(name, nn.Module())
            parent = parent.get_submodule(name)
        parent.add_module(last, copy.deepcopy(target.layer))
    return root
