"""What a model costs: trained parameters, multiply-accumulates, and bytes kept for the backward pass.

Counted, not estimated: MACs by running torch's flop counter once, bytes by looking at what autograd keeps for batches
of two and three images (at one image some copies vanish that every larger batch makes).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from petl.errors import PetlError
from petl.methods.attach import attached
from petl.methods.base import Method


@dataclass(frozen=True)
class SavedBytes:
    """Bytes kept for backward: ``per_image`` (slope over the batch size) and ``constant``."""

    per_image: int
    constant: int


@dataclass(frozen=True)
class Report:
    """Counts of a model with a method attached.

    ``trainable``: parameters of the method; ``head``: of the classification head, or of the vision-language part of a
    grounding model, whose ``macs`` and ``saved_bytes`` are those of an image with its expression; ``total``: of
    everything. ``macs``: multiply-accumulates of one image, forward ("GFLOPs" in most papers are 10^9 of these).
    ``first_gradient``: where the backward pass ends in the backbone, and why.
    """

    method: str
    input_size: tuple[int, int, int]
    trainable: int
    head: int
    total: int
    macs: int
    saved_bytes: SavedBytes
    first_gradient: tuple[str, str]

    def __str__(self) -> str:
        backbone = self.total - self.head - (0 if self.method == "full_fine_tuning" else self.trainable)
        share = 100 * self.trainable / backbone
        saved = self.saved_bytes
        return "\n".join(
            [
                f"method      {self.method}, input {'x'.join(map(str, self.input_size))}",
                f"parameters  {self.trainable:,} trained ({share:.2f} % of the backbone's {backbone:,}) "
                f"+ {self.head:,} in the head",
                f"compute     {self.macs / 1e9:.3f} GMACs per image, forward",
                f"memory      {saved.per_image / 2**20:.2f} MiB per image kept for backward"
                f" + {saved.constant / 2**20:.2f} MiB whatever the batch",
                f"gradient    goes back to {self.first_gradient[0]}: {self.first_gradient[1]}",
            ]
        )


def count_macs(model: nn.Module, *inputs: Tensor) -> int:
    """Multiply-accumulates of one forward pass on ``inputs`` (matrix products and convolutions, as papers count)."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(*inputs)
    return counter.get_total_flops() // 2


def count_saved_bytes(model: nn.Module, *inputs: Tensor) -> int:
    """Bytes of distinct storages that autograd keeps for backward after a forward pass, without parameters."""
    weights = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = model(*inputs)
    del out  # held until here, so that no storage was freed and counted twice
    return sum(kept.values())


def report(model: nn.Module, input_size: tuple[int, int, int] | None = None) -> Report:
    """Count what ``model`` costs.

    Args:
        model: a model after `petl.attach`, a `petl.Classifier` around one, or a `petl.GroundingModel`.
        input_size: (3, H, W) in pixels; None = what the backbone was trained on.

    Raises:
        PetlError: no method is attached.
    """
    from petl.models.grounding import GroundingModel

    if isinstance(model, GroundingModel):
        if input_size not in (None, (3, model.image_size, model.image_size)):
            raise PetlError(
                f"this grounding model was built for images of {model.image_size} pixels, not {input_size}."
            )
        size, method, gradient = (3, model.image_size, model.image_size), model.petl.method, model.petl.first_gradient()
        heads: list[nn.Module] = [model.head]
        inputs: list[tuple[Tensor, ...]] = [model.example(n) for n in (1, 2, 3)]
    else:
        size, method, gradient, heads = _single(model, input_size)
        like = next(model.parameters())
        inputs = [(torch.zeros(n, *size, device=like.device, dtype=like.dtype),) for n in (1, 2, 3)]
    head = sum(p.numel() for m in heads for p in m.parameters())
    total = sum(p.numel() for p in model.parameters())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad) - head
    mode = model.training
    model.train()
    two, three = (count_saved_bytes(model, *inputs[n]) for n in (1, 2))
    model.eval()
    macs = count_macs(model, *inputs[0])
    model.train(mode)
    saved = SavedBytes(per_image=three - two, constant=3 * two - 2 * three)
    return Report(method.name, size, trainable, head, total, macs, saved, gradient)


def _single(
    model: nn.Module, input_size: tuple[int, int, int] | None
) -> tuple[tuple[int, int, int], Method, tuple[str, str], list[nn.Module]]:
    """Input size, method, first gradient and heads of a backbone with a method, or of a classifier around one."""
    from petl.backbones.classifier import Classifier

    module = attached(model.backbone if isinstance(model, Classifier) else model)
    heads = [m for _, m in module.view.head_modules()] + ([model.head] if isinstance(model, Classifier) else [])
    size = input_size or tuple(module.view.preprocessing["input_size"])
    return size, module.method, module.first_gradient(), heads
