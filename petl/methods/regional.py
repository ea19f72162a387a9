"""Regional `torch.compile`: the blocks of an encoder are compiled, the network around them is not.

Blocks that compute the same on other weights share one compiled code. A method with code of its own for a block (tokens
are dropped there, adapters read earlier ones) has it compiled for each block, so that no block's code is specialised
for another one's number. Nothing is renamed: `state_dict`, adapters and checkpoints are the same with and without.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import nn

from petl.methods.base import TowerModule

VERSIONS = 32  # of one compiled code: training and evaluation, batch sizes, autocast


class Compiled:
    """``function``, compiled at its first call. A copy of it, or what comes out of a pickle, compiles anew."""

    def __init__(self, function: Callable[..., Any], backend: str, fullgraph: bool) -> None:
        self.function, self.backend, self.fullgraph = function, backend, fullgraph
        self._call: Callable[..., Any] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._call is None:
            own = _with_own_code(self.function)
            options = {"fullgraph": self.fullgraph, "backend": self.backend, "recompile_limit": VERSIONS}
            self._call = torch.compile(own, **options)  # type: ignore[call-overload]  # they lack recompile_limit
        return self._call(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_call": None}


def _with_own_code(function: Callable[..., Any]) -> FunctionType:
    """A copy whose compiled versions are kept, counted and freed apart: torch does that by code object."""
    code = function.__code__
    copy = FunctionType(
        code.replace(), function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


class _CompiledForward:
    """The replacement of a block's ``forward``: the one it had, compiled. ``owner``: whose method that is."""

    def __init__(self, owner: Any, compiled: Compiled) -> None:
        self.owner, self.compiled = owner, compiled

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.compiled(self.owner, *args, **kwargs)


def compile_blocks(module: TowerModule, backend: str = "inductor", fullgraph: bool = False) -> None:
    """Compile what ``module`` and its encoder compute in each block; nothing happens where that was done before.

    With ``fullgraph`` it is an error where that takes more than one graph.
    """
    blocks = module.view.block_modules()
    if module.run.compiled or isinstance(_owner(blocks[0]), _CompiledForward):
        return
    if module.changes_blocks:
        own = type(module).block
        shared = Compiled(own, backend, fullgraph)
        same = own is TowerModule.block
        module.run.compiled = [shared if same else Compiled(own, backend, fullgraph) for _ in blocks]
        return
    codes: dict[Callable[..., Any], Compiled] = {}
    for block in blocks:
        if isinstance(block.forward, MethodType):  # and not what somebody else put there
            function = block.forward.__func__
            code = codes.setdefault(function, Compiled(function, backend, fullgraph))
            block.forward = _CompiledForward(_owner(block), code).forward  # type: ignore[method-assign]


def undo(module: TowerModule) -> None:
    """Take back what `compile_blocks` did."""
    module.run.compiled = []
    for block in module.view.block_modules():
        replaced = _owner(block)
        if isinstance(replaced, _CompiledForward):
            del block.forward
            if replaced.owner is not block:
                block.forward = replaced.compiled.function.__get__(replaced.owner)  # type: ignore[method-assign]


def _owner(block: nn.Module) -> Any:
    """Whose method stands as the block's ``forward``: the block itself, or what replaced it."""
    return getattr(block.forward, "__self__", None)
