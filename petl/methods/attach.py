"""Attach a method to a frozen backbone, in place, and take it off again.

The model stays the object it was: its class, its weights and their names. What changes is listed here: a submodule
``model.petl``, an own ``forward`` on each block (only for methods that change blocks), an own ``train``.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from petl.backbones import view as find_view
from petl.backbones.base import BlockView, Call, ThreadState
from petl.backbones.identity import identify
from petl.errors import PetlError, nearest
from petl.methods.base import Method, MethodModule


class _Pass:
    """Runs the blocks of one model in order and carries the method's state from one to the next."""

    def __init__(self, module: MethodModule) -> None:
        self.module = module
        self.local = ThreadState()  # (next block, state)

    def step(self, index: int, block: BlockView, x: Tensor, call: Call) -> Tensor:
        module = self.module
        if index == 0:
            self._refuse_library_checkpointing()
            self.local.value = (0, module.begin(x))
        expected, state = self.local.value or (0, None)
        if expected != index:
            raise PetlError(
                f"block {index} was called where block {expected} was due. With {module.method.name!r} attached the "
                "blocks exchange tensors and run only as a whole, in order; call the model itself."
            )
        if module.checkpointing and module.training:
            x, state = checkpoint(module.block, index, block, x, call, state, use_reentrant=False)
        else:
            x, state = module.block(index, block, x, call, state)
        last = index + 1 == module.view.depth
        self.local.value = None if last else (index + 1, state)
        return x

    def _refuse_library_checkpointing(self) -> None:
        if self.module.view.library_checkpointing():
            raise PetlError(
                "the model's own gradient checkpointing is on; it recomputes blocks one by one, which breaks what they "
                f"exchange under {self.module.method.name!r}. Switch it off and set model.petl.checkpointing = True."
            )


class _Site:
    """The replacement of one block's ``forward``. A bound method of it survives deepcopy and pickle."""

    def __init__(self, run: _Pass, index: int, block: BlockView) -> None:
        self.run, self.index, self.block = run, index, block

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.run.step(self.index, self.block, hidden_states, Call(args, kwargs))


class _Mode:
    """Replaces a model's ``train``: frozen modules stay in ``eval()`` (no dropout, DropPath, moving averages)."""

    def __init__(self, model: nn.Module, module: MethodModule) -> None:
        self.model, self.module = model, module

    def train(self, mode: bool = True) -> nn.Module:
        model, module = self.model, self.module
        type(model).train(model, mode and module.trains_backbone)
        module.train(mode)
        for _, head in module.view.head_modules():
            head.train(mode)
        return model


def attach(model: nn.Module, method: Method) -> nn.Module:
    """Freeze ``model`` and attach ``method``. Returns the same object, called as before.

    The backbone no longer requires gradients and stays in ``eval()``; trained are ``model.petl`` and the model's own
    classification head, where it has one.

    Args:
        model: a timm VisionTransformer, HF CLIP vision tower or HF ViT (see `petl.list_backbones`).
        method: options, e.g. ``petl.SparseTuning(keep_rate=0.7)``.

    Raises:
        PetlError: no view of this model, a method is attached already, or the method does not fit the backbone. The
            model is unchanged then.
    """
    if not isinstance(method, Method):
        from petl.methods import entries

        raise PetlError(
            f"petl.attach takes a method such as petl.SparseTuning(), not {method!r}; "
            f"{nearest(str(method), [e.cls for e in entries().values()])}"
        )
    present: Any = getattr(model, "petl", None)
    if present is not None:
        raise PetlError(f"{present.method.name!r} is attached to this model already; petl.detach(model) first.")
    view = find_view(model)
    if view.family not in method.backbones:
        raise PetlError(f"{method.name!r} does not work on {view.family}; it works on {', '.join(method.backbones)}.")
    module = method.build(view)
    blocks = [view.block_view(b) for b in view.block_modules()] if module.changes_blocks else []
    module.identity = identify(view)
    module.to(next(model.parameters()).device)  # trained tensors stay fp32, whatever the dtype of the backbone

    run = _Pass(module)
    module._before = ([p.requires_grad for p in model.parameters()], {n: m.training for n, m in model.named_modules()})
    model.requires_grad_(module.trains_backbone)
    for _, head in view.head_modules():
        head.requires_grad_(True)
    for index, block in enumerate(blocks):
        block.module.forward = _Site(run, index, block).forward
    for index in module.capture_blocks():
        blocks[index].capture()
    training = model.training
    module._blocks = blocks
    model.add_module("petl", module)
    model.train = _Mode(model, module).train  # type: ignore[method-assign]
    model.train(training)
    return model


def detach(model: nn.Module) -> nn.Module:
    """Take the method off: the model computes bit for bit what it did before `attach`. Returns the same object.

    Raises:
        PetlError: nothing is attached, or the method trained the backbone itself (there is nothing to go back to).
    """
    module = attached(model)
    if module.trains_backbone:
        raise PetlError(f"{module.method.name!r} trains the backbone's own weights, so there is no method to take off.")
    take_off(model, module)
    return model


def take_off(model: nn.Module, module: MethodModule) -> None:
    """Undo `attach` apart from what the method did to the backbone's own weights."""
    for block in module._blocks:
        del block.module.forward
        block.release()
    del model.petl, model.train
    requires_grad, training = module._before
    for parameter, flag in zip(model.parameters(), requires_grad, strict=True):
        parameter.requires_grad_(flag)
    for name, child in model.named_modules():
        child.training = training.get(name, child.training)


def merge(model: nn.Module) -> nn.Module:
    """Fold the trained tensors into the backbone's weights and take the method off: no extra cost is left.

    Raises:
        PetlError: nothing is attached, or the method has no exact merge.
    """
    module = attached(model)
    if not module.method.mergeable:
        raise PetlError(
            f"{module.method.name!r} has no exact merge: what it adds is not a linear map of the frozen weights. "
            "Keep it attached."
        )
    module.merge()
    take_off(model, module)
    return model


def attached(model: nn.Module) -> MethodModule:
    """The method module of a model, or `PetlError` where none is attached."""
    module = getattr(model, "petl", None)
    if not isinstance(module, MethodModule):
        raise PetlError("no method is attached to this model; call petl.attach(model, method) first.")
    return module
