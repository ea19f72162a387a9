"""Several methods beside one frozen network, which computes each block once for all of them.

A linear probe or a ladder leaves the network as it is, so the block outputs that one member reads are those that every
member reads. Each member runs its own code on them and computes bit for bit what it would alone; what is saved is the
network itself, from which no gradient comes back. Built by `petl.SideSweep`; no method of the registry.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from petl.backbones.base import BackboneView, BlockView, Call
from petl.backbones.replay import ReplayedBlock
from petl.errors import PetlError
from petl.methods.base import Method, MethodModule


class SideModules(MethodModule):
    """The modules of the members. The state is theirs; after the last block, what the network hands on with each."""

    changes_blocks: ClassVar[bool] = True
    has_output: ClassVar[bool] = True

    def __init__(self, method: SideBySide, view: BackboneView, members: Sequence[MethodModule]) -> None:
        super().__init__(method, view)
        for member in members:
            if not member.beside:
                raise PetlError(
                    f"{member.method.name!r} changes what the frozen blocks compute, so it cannot share their pass "
                    "with others. Methods beside the network can: linear_probe, ladder_side_tuning."
                )
        self.members = nn.ModuleList(members)

    def each(self) -> list[MethodModule]:
        return cast(list[MethodModule], list(self.members))

    def reads(self) -> tuple[str, ...]:
        wanted = {name for member in self.each() for name in member.reads() or ()}
        return tuple(n for n in ("embedded", *(f"block.{i}" for i in range(self.view.depth))) if n in wanted)

    def begin(self, x: Tensor) -> Any:
        return tuple(member.begin(x) for member in self.each())

    def block(self, index: int, block: BlockView, x: Tensor, call: Call, state: Any) -> tuple[Tensor, Any]:
        with torch.no_grad():
            h = block.forward(x, call)
        last = index + 1 == self.view.depth
        shared = h if last else h.float()  # as members read it: one copy for all instead of one for each
        seen = ReplayedBlock(index, {f"block.{index}": shared}, shared.dtype)
        outputs = [m.block(index, seen, x, call, own) for m, own in zip(self.each(), state, strict=True)]
        return h, tuple(out[0] if last else out[1] for out in outputs)

    def features(self, frozen: Tensor) -> list[Tensor]:
        """Pooled features (B, C) of each member, behind a pass that gave the ``frozen`` ones (B, C)."""
        outputs = self.run.take()  # None where recorded features replace the pass
        return [self.view.pool(outputs[i]) if m.reads() else frozen for i, m in enumerate(self.each())]


@dataclass(frozen=True)
class SideBySide(Method):
    """Methods beside the network, from one pass of it.

    Args:
        members: the methods.
    """

    members: tuple[Method, ...]

    name: ClassVar[str] = "side_by_side"

    def build(self, view: BackboneView) -> SideModules:
        return SideModules(self, view, [member.build(view) for member in self.members])

    def parameter_count(self, view: BackboneView) -> int:
        return sum(member.parameter_count(view) for member in self.members)
