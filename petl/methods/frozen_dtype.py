"""Frozen weights in bf16: half their memory, activations in bf16 too, and no copies of weights as autocast makes them.

Trained tensors, their gradients and the optimiser's moments stay fp32. The fingerprint of the backbone is taken in
`petl.attach`, before this, so it is that of the original weights; an adapter loads on these as on rounded ones. The
originals are not kept: to merge a method into them, merge what `petl.load` gives.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from petl.backbones.base import ImageEncoder
from petl.methods.base import TowerModule

FROZEN_DTYPES = ("auto", "float32", "bfloat16")


def computes_in_bf16(device: torch.device) -> bool:
    """Whether the hardware has instructions for matrix products in bf16."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    found = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return bool(found.get("avx512_bf16") or found.get("amx_bf16"))


def cast_frozen(module: TowerModule, dtype: torch.dtype) -> None:
    """Hold the frozen weights of the encoder in ``dtype``, for good; images are cast to it as they enter.

    Weights and floating buffers of the backbone alike: statistics of a frozen BatchNorm in fp32 would make fp32 of its
    output. A method that trains the backbone itself keeps it as it is.
    """
    view = module.view
    if module.trains_backbone:
        return
    for name, tensor in (*view.model.named_parameters(), *view.model.named_buffers()):
        if tensor.is_floating_point() and view.is_backbone(name) and not (module.owns(name) or tensor.requires_grad):
            tensor.data = tensor.data.to(dtype)
    module.frozen_cast()
    if isinstance(view, ImageEncoder):
        first = next(m for m in view.model.modules() if isinstance(m, nn.Conv2d))
        if _enter not in first._forward_pre_hooks.values():
            first.register_forward_pre_hook(_enter)


def _enter(layer: nn.Module, args: tuple[Tensor, ...]) -> Any:
    """Pixels in the dtype of the layer that reads them."""
    return args[0].to(layer.weight.dtype), *args[1:]  # type: ignore[arg-type]
