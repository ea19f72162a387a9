"""Attach a method to a frozen backbone, in place, and take it off again.

The model stays the object it was: its class, its weights and their names. What changes is listed here: a submodule
``model.petl``, an own ``forward`` on each block (only for methods that change blocks), an own ``train``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from petl.backbones import image_encoder, text_encoder
from petl.backbones import view as find_view
from petl.backbones.base import BlockView, Call, RankingBlock, ThreadState
from petl.backbones.identity import Identity, identify
from petl.backbones.replay import MASK, Recorder, ReplayedBlock, replayed_call
from petl.errors import PetlError, nearest
from petl.methods.base import Method, MethodModule, PairModule, TowerModule
from petl.methods.regional import Compiled, undo


class Pass:
    """Runs the blocks of one model in order and carries the method's state from one to the next."""

    def __init__(self, module: TowerModule) -> None:
        self.module = module
        self.local = ThreadState()  # (next block, state)
        self.final = ThreadState()  # state after the last block, until `take`
        self.recorder = ThreadState()  # runs the blocks instead of the method, see `recording`
        self.compiled: list[Compiled] = []  # `TowerModule.block` of each block, see petl/methods/regional.py

    def step(self, index: int, block: BlockView, x: Tensor, call: Call) -> Tensor:
        if self.recorder.value is not None:
            return self.recorder.value.step(index, block, x, call)
        module = self.module
        if index == 0:
            self._refuse_library_checkpointing()
            self.local.value = (0, module.begin(x))
        expected, state = self.local.value or (0, None)
        run = partial(self.compiled[index], module) if self.compiled else module.block
        if expected != index:
            raise PetlError(
                f"block {index} was called where block {expected} was due. With {module.method.name!r} attached the "
                "blocks exchange tensors and run only as a whole, in order; call the model itself."
            )
        if index in module.recomputed and module.training:
            x, state = checkpoint(run, index, block, x, call, state, use_reentrant=False)
        else:
            x, state = run(index, block, x, call, state)
        last = index + 1 == module.view.depth
        self.local.value = None if last else (index + 1, state)
        if last and module.has_output:
            self.final.value = state
        return x

    @contextmanager
    def recording(self, recorder: Recorder) -> Iterator[None]:
        """Passes of this thread in here are those of the frozen network, and ``recorder`` runs their blocks."""
        self.recorder.value = recorder
        try:
            yield
        finally:
            self.recorder.value = None

    def replay(self, taps: Mapping[str, Tensor]) -> Tensor:
        """What the last block hands on, from what a `Recorder` kept of `TowerModule.reads`."""
        dtype = next(self.module.view.model.parameters()).dtype
        x = taps.get("embedded", next(t for name, t in taps.items() if name != MASK)).to(dtype)
        call = replayed_call(taps)
        for index in range(self.module.view.depth):
            x = self.step(index, ReplayedBlock(index, taps, dtype), x, call)
        return x

    def resume(self, index: int, x: Tensor) -> None:
        """The next block that runs is ``index``, on ``x``; the method has changed none before it."""
        self.local.value = (index, self.module.begin(x))

    def take(self) -> Any:
        """The state of the pass that has just ended."""
        state, self.final.value = self.final.value, None
        return state

    def _refuse_library_checkpointing(self) -> None:
        if self.module.view.library_checkpointing():
            raise PetlError(
                "the model's own gradient checkpointing is on; it recomputes blocks one by one, which breaks what they "
                f"exchange under {self.module.method.name!r}. Switch it off and set model.petl.checkpointing = True."
            )


class _Site:
    """The replacement of one block's ``forward``. A bound method of it survives deepcopy and pickle."""

    def __init__(self, run: Pass, index: int, block: BlockView) -> None:
        self.run, self.index, self.block = run, index, block

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.run.step(self.index, self.block, hidden_states, Call(args, kwargs))


class _Mode:
    """Replaces a model's ``train``: frozen modules stay in ``eval()`` (no dropout, DropPath, moving averages)."""

    def __init__(self, model: nn.Module, module: TowerModule) -> None:
        self.model, self.module = model, module

    def train(self, mode: bool = True) -> nn.Module:
        model, module = self.model, self.module
        type(model).train(model, mode and module.trains_backbone)
        module.train(mode)
        for _, head in module.view.head_modules():
            head.train(mode and any(p.requires_grad for p in head.parameters()))  # frozen as half of a pair
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
    return mount(fit(model, method))


def fit(model: nn.Module, method: Method) -> MethodModule:
    """The module of ``method`` for ``model``, which stays as it is. Raises `PetlError` as `attach`."""
    if not isinstance(method, Method):
        from petl.methods import entries

        raise PetlError(
            f"petl.attach takes a method such as petl.SparseTuning(), not {method!r}; "
            f"{nearest(str(method), [e.cls for e in entries().values()])}"
        )
    view = find_view(_free(model))
    if view.family not in method.backbones:
        works = f"it works on {', '.join(method.backbones)}" if method.backbones else f"it needs a {method.host}"
        raise PetlError(f"{method.name!r} does not work on a lone {view.family}; {works}.")
    return method.build(view)


def mount(module: MethodModule, identity: Identity | None = None) -> nn.Module:
    """Let ``module`` work in the model that it was built for. ``identity``: of the model, where it is known already."""
    model = module.view.model
    _install(*_plan(module, identity))
    for _, head in module.view.head_modules():
        head.requires_grad_(True)
    model.add_module("petl", module)
    return model


def attach_pair(vision: nn.Module, text: nn.Module, method: Method) -> PairModule:
    """Freeze two encoders and attach ``method`` to both; returns its trained module, which the caller registers.

    Raises:
        PetlError: as `attach`; both models are unchanged then.
    """
    views = image_encoder(_free(vision)), text_encoder(_free(text))
    for view in views:
        if view.family not in method.towers:
            works = f"works on {', '.join(method.towers)}" if method.towers else "is for image classifiers"
            raise PetlError(f"{method.name!r} does not work on {view.family} as half of a pair; it {works}.")
    pair = method.build_pair(*views)
    plans = [_plan(tower) for tower in (pair.vision, pair.text)]  # whatever is wrong with either shows before a change
    for plan in plans:
        _install(*plan)
    if pair.shared is not None:
        pair.shared.to(next(vision.parameters()).device)
    return pair


def _free(model: nn.Module) -> nn.Module:
    """``model``, or `PetlError` where a method is attached to it already."""
    mode = getattr(model.__dict__.get("train"), "__self__", None)
    if isinstance(mode, _Mode):
        raise PetlError(f"{mode.module.method.name!r} is attached to this model already; petl.detach(model) first.")
    return model


def _plan(module: TowerModule, identity: Identity | None = None) -> tuple[TowerModule, list[BlockView]]:
    """The views of the blocks that ``module`` will run. Raises `PetlError` where it cannot; changes nothing."""
    view = module.view
    blocks = [view.block_view(b) for b in view.block_modules()] if module.changes_blocks else []
    if any(isinstance(getattr(b.__dict__.get("forward"), "__self__", None), _Site) for b in view.block_modules()):
        raise PetlError(f"a method is attached to the blocks of this {view.family} already; detach it first.")
    module.identity = identity or identify(view)
    return module, blocks


def _install(module: TowerModule, blocks: list[BlockView]) -> None:
    """Freeze the model and let ``module`` run its blocks; `remove` undoes it."""
    view, model = module.view, module.view.model
    module.to(next(model.parameters()).device)  # trained tensors stay fp32, whatever the dtype of the backbone
    module.run = run = Pass(module)
    module._before = (
        {n: p.requires_grad for n, p in model.named_parameters()},
        {n: m.training for n, m in model.named_modules()},
    )
    module.install()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(view.is_backbone(name) and module.trains(name))
    for index, block in enumerate(blocks):
        block.module.forward = _Site(run, index, block).forward
    for index in module.capture_blocks():
        cast(RankingBlock, blocks[index]).capture()
    training = model.training
    module._blocks = blocks
    model.train = _Mode(model, module).train  # type: ignore[method-assign]
    model.train(training)


def detach(model: nn.Module) -> nn.Module:
    """Take the method off: the model computes bit for bit what it did before `attach`. Returns the same object.

    Raises:
        PetlError: nothing is attached, or the method trained the backbone itself (there is nothing to go back to).
    """
    module = _any_attached(model)
    if module.trains_backbone:
        raise PetlError(f"{module.method.name!r} trains the backbone's own weights, so there is no method to take off.")
    return remove(model)


def remove(model: nn.Module) -> nn.Module:
    """Undo `attach` apart from what the method did to the backbone's own weights. Returns the same object."""
    module = _any_attached(model)
    for tower in (module.vision, module.text) if isinstance(module, PairModule) else (module,):
        _take_off(tower.view.model, tower)
    del model.petl
    return model


def _take_off(model: nn.Module, module: TowerModule) -> None:
    undo(module)
    for block in module._blocks:
        del block.module.forward
        block.release()
    del model.train
    module.checkpointing = False
    module.uninstall()
    requires_grad, training = module._before
    for name, parameter in model.named_parameters():
        if not name.startswith("petl."):  # a bias that `merge` gave to a layer goes with its weight
            known = name if name in requires_grad else name.removesuffix("bias") + "weight"
            parameter.requires_grad_(requires_grad[known])
    for name, child in model.named_modules():
        child.training = training.get(name, child.training)


def merge(model: nn.Module) -> nn.Module:
    """Fold the trained tensors into the backbone's weights and take the method off: no extra cost is left.

    Raises:
        PetlError: nothing is attached, or the method has no exact merge.
    """
    module = _any_attached(model)
    if not module.method.mergeable:
        raise PetlError(
            f"{module.method.name!r} has no exact merge: what it adds is not a linear map of the frozen weights. "
            "Keep it attached."
        )
    for tower in (module.vision, module.text) if isinstance(module, PairModule) else (module,):
        cast(MethodModule, tower).merge()
    return remove(model)


def attached(model: nn.Module) -> MethodModule:
    """The method module of a model, or `PetlError` where none is attached."""
    module = _any_attached(model)
    if isinstance(module, PairModule):
        raise PetlError("this is a pair of encoders, with one module for both: see model.petl.")
    return module


def _any_attached(model: nn.Module) -> MethodModule | PairModule:
    module = getattr(model, "petl", None)
    if not isinstance(module, (MethodModule, PairModule)):
        raise PetlError("no method is attached to this model; call petl.attach(model, method) first.")
    return module
