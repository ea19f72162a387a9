"""Methods that change what single layers of the backbone compute: one trained part for each, none between them.

A layer keeps its place, its class and its weights; it gets an own ``forward`` that runs the trained part's, and loses
it again when the method is taken off.
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from petl.backbones.base import BackboneView
from petl.errors import PetlError
from petl.methods.base import Method, MethodModule

KINDS = (nn.Linear, nn.Conv2d, nn.LayerNorm)


class LayerPart(nn.Module):
    """The trained tensors of one layer of the backbone, and what the layer computes with them."""

    def merged(self, layer: Any) -> tuple[Tensor, Tensor | None]:
        """Weight and bias (None = none) with which ``layer`` alone computes what `forward` does."""
        raise NotImplementedError

    def forward(self, layer: nn.Module, x: Tensor) -> Tensor:
        """The output of ``layer`` with the trained part; to be overridden where `merged` weights at every step cost
        more than products beside the layer's own (`plain`)."""
        return compute(layer, x, *self.merged(layer))

    def macs(self, layer: Any, positions: int) -> int:
        """Multiply-accumulates per image of the trained part, for a layer that is applied at ``positions``."""
        return 0


class Shift(LayerPart):
    """Shifts of some of a layer's own tensors: ``weight + Δweight``, ``bias + Δbias``. All zero at the start."""

    def __init__(self, layer: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        for name in names:
            setattr(self, name, nn.Parameter(torch.zeros(getattr(layer, name).shape)))

    def merged(self, layer: Any) -> tuple[Tensor, Tensor | None]:
        weight, bias = (getattr(self, n, None) for n in ("weight", "bias"))
        return (
            layer.weight if weight is None else layer.weight + weight,
            layer.bias if bias is None else layer.bias + bias,
        )


def plain(layer: nn.Module, x: Tensor) -> Tensor:
    """What the layer computes on its own."""
    return type(layer).forward(layer, x)


def compute(layer: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What the layer computes with these instead of its own weight and bias, in the dtype of its own."""
    weight, bias = weight.to(layer.weight.dtype), None if bias is None else bias.to(layer.weight.dtype)
    if isinstance(layer, nn.Linear):
        return F.linear(x, weight, bias)
    if isinstance(layer, nn.LayerNorm):
        return F.layer_norm(x, layer.normalized_shape, weight, bias, layer.eps)
    return layer._conv_forward(x, weight, bias)


@torch.no_grad()
def overwrite(layer: Any, weight: Tensor, bias: Tensor | None) -> None:
    """Give the layer this weight and bias for good; a layer without a bias gets one."""
    layer.weight.copy_(weight)
    if layer.bias is not None:
        layer.bias.copy_(bias)
    elif bias is not None:
        layer.bias = nn.Parameter(bias.to(layer.weight.dtype), requires_grad=False)


class _OwnForward:
    """The replacement of a layer's ``forward``. A bound method of it survives deepcopy and pickle."""

    def __init__(self, layer: nn.Module, part: LayerPart) -> None:
        self.layer, self.part = layer, part

    def forward(self, x: Tensor) -> Tensor:
        return self.part(self.layer, x)


class Place(NamedTuple):
    """A layer of the backbone, ``inside`` a block or outside: before block 0 (-1) or behind the last (the depth)."""

    block: int
    name: str
    layer: Any
    inside: bool = True


class LayersModule(MethodModule):
    """Trained parts by place: ``blocks.3.qkv``, ``outer.final_norm``. Subclasses `add` them in their constructor, in
    the order in which the network runs the layers."""

    def __init__(self, method: Method, view: BackboneView) -> None:
        super().__init__(method, view)
        self.outer, self.blocks = nn.ModuleDict(), nn.ModuleList(nn.ModuleDict() for _ in range(view.depth))
        self._places: list[tuple[Place, LayerPart]] = []

    def add(self, place: Place, part: LayerPart) -> None:
        """Register ``part`` as the trained part of the layer at ``place``."""
        parts: Any = self.blocks[place.block] if place.inside else self.outer
        parts[place.name] = part
        self._places.append((place, part))

    def install(self) -> None:
        for place, part in self._places:
            place.layer.forward = _OwnForward(place.layer, part).forward  # type: ignore[method-assign]

    def uninstall(self) -> None:
        for place, _ in self._places:
            del place.layer.forward

    def merge(self) -> None:
        for place, part in self._places:
            overwrite(place.layer, *part.merged(place.layer))

    def macs(self, tokens: list[tuple[int, int]]) -> int:
        patches = tokens[0][0] - self.view.prefix_tokens
        return sum(
            part.macs(place.layer, tokens[place.block][0] if place.inside else patches) for place, part in self._places
        )

    def first_changed(self) -> int:
        return max(0, min(place.block for place, _ in self._places))

    def first_gradient(self) -> tuple[str, str]:
        block, name, layer, inside = min((place for place, _ in self._places), key=lambda place: place.block)
        outer = "patch embedding" if isinstance(layer, nn.Conv2d) else "norm before block 0"
        return f"block {block}, {name}" if inside else outer, "it is the first layer with a trained part"


def parts_of(view: BackboneView, *names: str, blocks: Container[int] | None = None) -> Iterator[tuple[Place, int]]:
    """The layers that compute the parts ``names`` of each block, or of ``blocks``, and how many of them each computes:
    a fused projection is one place, ``"qkv"``, and computes 3."""
    for index, module in enumerate(view.block_modules()):
        if blocks is not None and index not in blocks:
            continue
        layers: dict[nn.Module, list[str]] = {}
        for name, part in view.block_view(module).parts().items():
            if name in names:
                layers.setdefault(part.layer, []).append(name)
        for layer, found in layers.items():
            yield _checked(Place(index, "".join(found), layer)), len(found)


def outer_places(view: BackboneView) -> Iterator[Place]:
    """The layers outside the blocks: ``patch_embedding``, ``pre_norm``, ``final_norm``, as far as there are any."""
    for name, layer in view.outer_layers().items():
        yield _checked(Place(view.depth if name == "final_norm" else -1, name, layer, False))


def places_with(
    view: BackboneView, tensor: str, kind: type[nn.Module] = nn.Module, blocks: Container[int] | None = None
) -> Iterator[Place]:
    """Every layer of this kind whose own ``tensor`` ("weight" or "bias") full fine-tuning trains too, of all places or
    of ``blocks`` (see `Place`)."""
    modules = dict(view.model.named_modules())
    for path, place in view.places(modules).items():
        layer, name = modules[path], f"{path}.{tensor}"
        if not isinstance(layer, kind) or not isinstance(getattr(layer, tensor, None), nn.Parameter):
            continue
        if not view.is_backbone(name) or not view.fine_tuned(name) or (blocks is not None and place not in blocks):
            continue
        inside = path.removeprefix(f"{view.block_path}.{place}.")
        yield _checked(Place(place, inside.replace(".", "_"), layer, inside != path))


def _checked(place: Place) -> Place:
    """``place``, or `PetlError` where its layer is none that a part can be folded into."""
    layer: Any = place.layer
    if isinstance(layer, KINDS) and layer.weight is not None:
        return place
    where = f"{place.name} of block {place.block}" if place.inside else place.name
    raise PetlError(
        f"{where} of this backbone is a {type(layer).__name__}; a trained part of a layer needs a Linear, Conv2d or "
        "LayerNorm with a weight. Adapters between the layers (AdaptFormer, Sparse-Tuning) still work."
    )
