"""Which layers of a backbone a weight-space method changes: named as block parts, or as peft names modules.

A fused projection (timm's qkv) is one layer. Where a method wants its q or v alone, `split` gives the fused layer a
child for each such part, on which peft works as on any linear layer; the product with the fused weight stays one.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from petl.backbones.base import BackboneView, Part
from petl.errors import PetlError, nearest

PARTS = ("norm1", "q", "k", "v", "out", "norm2", "fc1", "fc2")


class Target(NamedTuple):
    """A layer, or the ``slice``-th of ``of`` slices of a fused one, in block ``block`` (None = outside the blocks)."""

    name: str  # path for peft: "blocks.0.attn.qkv", of a slice "blocks.0.attn.qkv.q"
    layer: nn.Module
    block: int | None
    slice: int = 0
    of: int = 1

    @property
    def weight(self) -> Tensor:
        """Of the whole layer."""
        weight = self.layer.weight
        assert isinstance(weight, Tensor)
        return weight

    @property
    def fan_in(self) -> int:
        return self.weight[0].numel()

    @property
    def fan_out(self) -> int:
        return len(self.weight) // self.of

    @property
    def whole(self) -> str:
        """Path of the layer itself."""
        return self.name if self.of == 1 else self.name.rpartition(".")[0]


def find_targets(
    view: BackboneView, entries: Sequence[str], method: str, blocks: Container[int | None] | None = None
) -> list[Target]:
    """The layers that ``entries`` name, of the whole network or of ``blocks``, in its order.

    An entry is a block part (`PARTS`), ``"qkv"`` (q, k and v as the network has them: one fused layer or three), the
    end of a module path as in peft (``"attn.proj"``), or a regular expression for whole paths.

    Raises:
        PetlError: an entry that names nothing, though others may; a layer that is named whole and in part.
    """
    paths = {id(m): n for n, m in view.model.named_modules()}
    found: dict[str, Target] = {}
    for entry in entries:
        hits = list(_parts(view, entry, paths) if entry in (*PARTS, "qkv") else _modules(view, entry))
        if not hits:
            paths_of_layers = [n for n, _ in layers(view)]
            valid = {*PARTS, *(n.rpartition(".")[2] for n in paths_of_layers), *paths_of_layers}
            raise PetlError(
                f"{method}: target {entry!r} names no layer of this {view.family}: {nearest(entry, valid)} "
                "A target is a block part, the end of a module path, or a regular expression for whole paths."
            )
        chosen = {t.name: t for t in hits if blocks is None or t.block in blocks}
        if not chosen:
            raise PetlError(f"{method}: target {entry!r} names no layer in the blocks that layers=[…] chooses.")
        found |= chosen
    for target in found.values():
        if target.of > 1 and target.whole in found:
            raise PetlError(f"{method}: {target.whole!r} is a target, so its part {target.name!r} cannot be another.")
    order = {id(m): i for i, m in enumerate(view.model.modules())}
    return sorted(found.values(), key=lambda t: (order[id(t.layer)], t.slice))


def _parts(view: BackboneView, entry: str, paths: dict[int, str]) -> Iterator[Target]:
    for index, block in enumerate(view.block_modules()):
        parts = view.block_view(block).parts()
        wanted = {entry: parts[entry]} if entry != "qkv" else {p: Part(parts[p].layer) for p in "qkv"}
        for part, (layer, piece, of) in wanted.items():
            path = paths[id(layer)]
            yield Target(path if of == 1 else f"{path}.{part}", layer, index, piece, of)


def _modules(view: BackboneView, entry: str) -> Iterator[Target]:
    known = dict(layers(view))
    names = [n for n in known if n == entry or n.endswith(f".{entry}")]
    if not names:
        try:
            names = [n for n in known if re.fullmatch(entry, n)]
        except re.error:
            return
    block = re.compile(rf"{re.escape(view.block_path)}\.(\d+)\.")
    for name in names:
        inside = block.match(name)
        yield Target(name, known[name], int(inside[1]) if inside else None)


def layers(view: BackboneView) -> Iterator[tuple[str, nn.Module]]:
    """Modules of the backbone that have a weight of their own."""
    for name, module in view.model.named_modules():
        if name and view.is_backbone(f"{name}.") and isinstance(getattr(module, "weight", None), Tensor):
            yield name, module


class Slice(nn.Linear):
    """Rows of a fused projection as a linear layer without tensors of its own; peft's layer around it adds to them."""

    def __init__(self, fused: nn.Linear, index: int, of: int) -> None:
        nn.Module.__init__(self)
        self._fused = [fused]  # in a list: not a submodule
        self.in_features, self.out_features = fused.in_features, fused.out_features // of
        self.rows = slice(index * self.out_features, (index + 1) * self.out_features)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]  # in place of the parameter; writing into it is lasting
        return self._fused[0].weight[self.rows]

    @property
    def bias(self) -> Tensor | None:  # type: ignore[override]
        bias = self._fused[0].bias
        return None if bias is None else bias[self.rows]

    def forward(self, x: Tensor, product: Tensor) -> Tensor:  # type: ignore[override]
        """``product``: these rows of the fused layer's output, which is all that is left to compute."""
        return product


class _Split:
    """The ``forward`` of a fused layer some of whose parts are children. Survives deepcopy and pickle as its method."""

    def __init__(self, layer: nn.Linear, parts: list[str | None]) -> None:
        self.layer, self.parts = layer, parts

    def forward(self, x: Tensor) -> Tensor:
        layer: Any = self.layer
        pieces = F.linear(x, layer.weight, layer.bias).chunk(len(self.parts), -1)
        done = [y if p is None else getattr(layer, p)(x, y) for p, y in zip(self.parts, pieces, strict=True)]
        return torch.cat(done, -1)


def split(targets: Sequence[Target]) -> None:
    """Give every fused layer a child for each of its parts among ``targets``, and a forward that uses them."""
    for layer, parts in _fused(targets):
        children: list[str | None] = [None] * parts[0].of
        for target in parts:
            children[target.slice] = child = target.name.rpartition(".")[2]
            layer.add_module(child, Slice(layer, target.slice, target.of))
        layer.forward = _Split(layer, children).forward  # type: ignore[method-assign,assignment]


def unsplit(targets: Sequence[Target]) -> None:
    """Undo `split`."""
    for layer, parts in _fused(targets):
        layer.__dict__.pop("forward", None)
        for target in parts:
            layer._modules.pop(target.name.rpartition(".")[2], None)


def _fused(targets: Sequence[Target]) -> list[tuple[nn.Linear, list[Target]]]:
    found: dict[int, tuple[Any, list[Target]]] = {}
    for target in targets:
        if target.of > 1:
            found.setdefault(id(target.layer), (target.layer, []))[1].append(target)
    return list(found.values())
