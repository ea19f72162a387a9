"""Which tensors of a model were trained, and setting them, strict both ways."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from petl.backbones.classifier import Classifier
from petl.errors import PetlError
from petl.methods.attach import attached
from petl.models.explained import ExplainedClassifier
from petl.models.grounding import GroundingModel


def trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Everything that training changed, by module path: parameters that require gradients, and buffers beside them.

    What a method keeps inside the backbone's modules belongs to it, frozen tensors too (VeRA's random matrices).

    ``model`` is a `Classifier`, a `GroundingModel`, an `ExplainedClassifier` (whose classifier's own trained tensors
    are among them) or a model with a method attached; the paths of the latter are those inside a `Classifier`
    (``backbone.petl.blocks.0.down.weight``, ``head.fc.weight``). A tensor shared by several modules appears once.
    """
    if isinstance(model, ExplainedClassifier):
        state = model.state_dict()
        return {
            k: state[k]
            for k in (*(f"classifier.{n}" for n in model.carried), *(k for k in state if k.startswith("petl.")))
        }
    if isinstance(model, GroundingModel):
        prefix, ours = "", ("petl.", "head.", *(("vision.", "text.") if model.petl.trains_backbone else ()))
        inside: frozenset[str] = frozenset()
    else:
        prefix = "" if isinstance(model, Classifier) else "backbone."
        module = attached(model.backbone if isinstance(model, Classifier) else model)
        heads = tuple(f"backbone.{name}." for name, _ in module.view.head_modules())
        ours = ("backbone.", "head.") if module.trains_backbone else ("backbone.petl.", "head.", *heads)
        inside = frozenset(f"backbone.{n}" for n in module.view.model.state_dict() if module.owns(n))
    parameters = ((prefix + n, p) for n, p in model.named_parameters())
    found = {n: p.detach() for n, p in parameters if p.requires_grad or n in inside}
    persistent = model.state_dict().keys()
    for name, buffer in model.named_buffers():
        if name in persistent and ((prefix + name).startswith(ours) or prefix + name in inside):
            found[prefix + name] = buffer
    return found


@torch.no_grad()
def set_trained_tensors(model: nn.Module, tensors: dict[str, Tensor], source: str) -> None:
    """Copy ``tensors`` into ``model``. Raises `PetlError` (nothing is copied) unless names and shapes match exactly."""
    own = trained_tensors(model)
    missing, extra = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    shapes = [f"{k} {tuple(tensors[k].shape)} for {tuple(own[k].shape)}" for k in own.keys() & tensors.keys()
              if own[k].shape != tensors[k].shape]  # fmt: skip
    if missing or extra or shapes:
        raise PetlError(
            f"{source}: its tensors do not fit the model: {len(missing)} missing {missing[:3]}, {len(extra)} without a "
            f"place {extra[:3]}, {len(shapes)} of another shape {sorted(shapes)[:3]}. Nothing was loaded."
        )
    for name, tensor in own.items():
        tensor.copy_(tensors[name])
    if isinstance(model, ExplainedClassifier):
        model.petl.knows_null = bool(model.petl.null.isfinite().all())
