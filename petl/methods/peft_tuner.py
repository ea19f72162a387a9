"""The bridge to Hugging Face `peft`: its tuners work inside a frozen backbone, under petl's guarantees.

peft puts its layer around each target; the trained tensors live there (``blocks.0.attn.qkv.lora_A.default.weight``) and
nothing stands between peft's layer and the network in the forward pass. What petl adds: every target matches, the
backbone comes back bit for bit, dropout is live while the backbone rests in ``eval()``, trained tensors are fp32 for
every dtype of the backbone, and a merge that would lose something is refused.

On a backbone in half precision peft computes in fp32, which keeps half as many bytes again for the backward pass. For
plain LoRA, its own two layers compute here in the dtype of the backbone instead, as petl's other methods do; the
remaining types compute as peft does and hand on the dtype of the backbone.
"""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from petl.backbones.base import BackboneView
from petl.errors import PetlError
from petl.methods.base import Method, MethodModule
from petl.methods.peft_targets import Target, find_targets, split, unsplit
from petl.nn.linear import Linear

ADAPTER = "default"  # peft's name of the one adapter that is here
EXACT = 1e-4  # largest change of a probe's features by a merge, as a share of the largest of them
MERGE_LOSS = 0.1  # or, where merged weights are rounded, as a share of all that the method changes in them
FP32_LOSS = 0.01  # the same in fp32, where sums of spectra and products lose a little


class PeftModule(MethodModule):
    """A peft tuner in a backbone. It has no tensors of its own: those that it trains are the backbone's `owns`."""

    method: PeftMethod

    def __init__(self, method: PeftMethod, view: BackboneView, targets: list[Target]) -> None:
        super().__init__(method, view)
        self.targets = targets
        self.config: Any = None  # peft's, from `install` on
        # modules of the backbone are kept in lists, so as not to register them here
        self.tuners: list[Any] = []  # the one of peft
        self.layers: list[Any] = []  # peft's, in the order of the targets
        self._names: frozenset[str] = frozenset()  # of the trained parameters

    def install(self) -> None:
        from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

        model: Any = self.view.model
        if self.layers:  # taken off before: the layers go back as they were, which is quicker than peft
            split(self.targets)
            for target, layer in zip(self.targets, self.layers, strict=True):
                parent, _, child = target.name.rpartition(".")
                model.get_submodule(parent)._modules[child] = layer
            return
        sums = [_checksum(t.layer) for t in self.targets]
        split(self.targets)
        self.config = self.method.peft_config(self.view, self.targets)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what peft corrects silently is checked by `PeftMethod.find`
                tuner = PEFT_TYPE_TO_TUNER_MAPPING[self.config.peft_type](model, self.config, ADAPTER)
                tuner._cast_adapter_dtype(ADAPTER)
            self.layers = [model.get_submodule(t.name) for t in self.targets]
            self._check(tuner, sums)
        except (ValueError, TypeError, RuntimeError, AttributeError, NotImplementedError, KeyError) as error:
            self.uninstall()
            self.layers = []
            reason = str(error).partition("\n")[0] or type(error).__name__
            names = ", ".join(t.name for t in self.targets[:3])
            raise PetlError(f"peft cannot put {self.config.peft_type.value} on {names}, …: {reason}") from error
        finally:
            model.__dict__.pop("peft_config", None)
        self.tuners = [tuner]
        self.frozen_cast()
        for layer in self.layers:
            _register_places(layer)
        self._names = frozenset(n for n, p in model.named_parameters() if p.requires_grad and self.owns(n))

    def _check(self, tuner: nn.Module, sums: list[float]) -> None:
        """Raise `ValueError` where peft did something else than putting its layers around the targets."""
        model = self.view.model
        for target, layer, before in zip(self.targets, self.layers, sums, strict=True):
            if not hasattr(layer, "get_base_layer"):
                raise ValueError(f"it leaves {target.name!r} as it is")
            if _checksum(target.layer) != before:
                raise ValueError(f"it changes the frozen weights of {target.name!r}, which could not be restored")
        inside = {id(t) for t in (*model.parameters(), *model.buffers())}
        stray = [n for n, t in (*tuner.named_parameters(), *tuner.named_buffers()) if id(t) not in inside]
        if stray:
            raise ValueError(f"it keeps tensors outside the layers ({stray[0]}), which petl would not save")

    def uninstall(self) -> None:
        for target in self.targets:
            parent, _, child = target.name.rpartition(".")
            layer = self.view.model.get_submodule(parent)._modules.get(child)
            if hasattr(layer, "get_base_layer"):
                self.view.model.get_submodule(parent)._modules[child] = cast(Any, layer).get_base_layer()
                cast(Any, layer).merged_adapters.clear()
        unsplit(self.targets)

    def frozen_cast(self) -> None:
        for layer in self.layers:
            _compute_in_dtype(layer)

    def owns(self, name: str) -> bool:
        if super().owns(name):
            return True
        inside = next((t.name for t in self.targets if f"{name}.".startswith(f"{t.name}.")), None)
        return inside is not None and not f"{name}.".startswith(f"{inside}.base_layer.")

    def trains(self, name: str) -> bool:
        return name in self._names

    def train(self, mode: bool = True) -> PeftModule:
        super().train(mode)
        for layer in self.layers:
            layer.training = mode and _draws(layer)
            for name, child in layer.named_children():
                if name != "base_layer":
                    child.train(mode)
        return self

    # ---- merge

    @torch.no_grad()
    def merge(self) -> None:
        """Merge, in fp32. Raises `PetlError`, and changes nothing, where rounding the merged weights costs too much."""
        for target, layer in zip(self.targets, self.layers, strict=True):
            _refuse_quantised(target, layer)
        model, training = self.view.model, self.view.model.training
        model.eval()
        images = torch.randn(2, *self.view.preprocessing["input_size"], generator=torch.Generator().manual_seed(0))
        probe = images.to(next(model.parameters()).device)
        kept = [[p.clone() for p in t.layer.parameters(recurse=False)] for t in self.targets]
        with _full_precision(model):
            frozen, wanted = self._features(probe, adapted=False), self._features(probe)
            try:
                for layer in self.layers:
                    layer.merge()
            except NotImplementedError as error:
                raise PetlError(f"{self.method.name!r} has no exact merge: {error} Keep it attached.") from error
            for target, tensors in zip(self.targets, kept, strict=True):
                for parameter, tensor in zip(target.layer.parameters(recurse=False), tensors, strict=True):
                    parameter.copy_(parameter.to(tensor.dtype))
            loss, effect = (self._features(probe) - wanted).abs().max(), (wanted - frozen).abs().max()
            rounded = any(t.dtype in (torch.bfloat16, torch.float16) for tensors in kept for t in tensors)
            allowed = MERGE_LOSS if rounded else FP32_LOSS
            if loss <= max(allowed * effect, EXACT * wanted.abs().max()):
                return
            for target, layer, tensors in zip(self.targets, self.layers, kept, strict=True):
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # that dividing by scales is inexact: the weights are copied back
                    layer.unmerge()
                for parameter, tensor in zip(target.layer.parameters(recurse=False), tensors, strict=True):
                    parameter.copy_(tensor)
        model.train(training)
        dtype = str(kept[0][0].dtype).removeprefix("torch.")
        raise PetlError(
            f"merged weights in {dtype} change the features of a probe batch by up to {loss:.3g}, "
            f"{loss / effect:.0%} of all that {self.method.name!r} changes in them (allowed are {allowed:.0%}). "
            "Nothing was merged. Merge in full precision: model.float() before petl.merge(model)."
        )

    def _features(self, probe: Tensor, adapted: bool = True) -> Tensor:
        for layer in self.layers:
            layer._disable_adapters = not adapted
        try:
            return self.view.features(probe)
        finally:
            for layer in self.layers:
                layer._disable_adapters = False

    # ---- costs

    def macs(self, tokens: list[tuple[int, int]]) -> int:
        patches = tokens[0][0] - self.view.prefix_tokens
        total = 0
        for target, layer in zip(self.targets, self.layers, strict=True):
            positions = patches if self._embeds(target) else 1
            if target.block is not None:
                positions = tokens[target.block][0]
            formula = self.method.layer_macs(target, positions)
            total += _count(layer, positions) if formula is None else formula
        return total

    def first_gradient(self) -> tuple[str, str]:
        if any(self._embeds(t) for t in self.targets):
            return "patch embedding", "it carries the first trained tensors"
        blocks = [t.block for t in self.targets if t.block is not None]
        return f"block {min(blocks)}" if blocks else "head", "its layers carry the first trained tensors"

    def _embeds(self, target: Target) -> bool:
        return target.block is None and target.layer is self.view.outer_layers().get("patch_embedding")


@contextmanager
def _full_precision(model: nn.Module) -> Iterator[None]:
    """All tensors of ``model`` in fp32; afterwards each is what it was, in its own precision."""
    tensors = [t for t in (*model.parameters(), *model.buffers()) if t.dtype in (torch.bfloat16, torch.float16)]
    before = [t.dtype for t in tensors]
    for tensor in tensors:
        tensor.data = tensor.data.float()
    try:
        yield
    finally:
        for tensor, dtype in zip(tensors, before, strict=True):
            tensor.data = tensor.data.to(dtype)


def _checksum(layer: nn.Module) -> float:
    return sum(p.detach().double().abs().sum().item() for p in layer.parameters(recurse=False))


def _refuse_quantised(target: Target, layer: Any) -> None:
    plain = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    quantised = getattr(layer, "quantization_backend", None) is not None or target.weight.dtype not in plain
    if quantised or type(target.weight) is not nn.Parameter:
        raise PetlError(
            f"{target.name!r} is quantised ({type(target.layer).__name__}, {target.weight.dtype}): merged weights "
            "would be rounded to its few levels. Keep the adapter attached, or load the backbone in floating point."
        )


@torch.no_grad()
def _count(layer: Any, positions: int) -> int:
    """Multiply-accumulates that ``layer`` adds to its base layer at ``positions``, counted on zeros."""
    base = layer.get_base_layer()
    size = base.kernel_size if isinstance(base, nn.Conv2d) else (1, 1)
    x = torch.zeros(1, positions, base.weight.shape[1], dtype=base.weight.dtype, device=base.weight.device)
    if isinstance(base, nn.Conv2d):
        x = x.new_zeros(1, base.in_channels, size[0], size[1] * positions)
    counts = []
    for module in (layer, base):
        with FlopCounterMode(display=False) as counter:
            module(x)
        counts.append(counter.get_total_flops() // 2)
    return counts[0] - counts[1]


def _register_places(layer: Any) -> None:
    """Make a buffer of SHiRA's random places, which peft saves too but keeps in a plain dict."""
    from peft.tuners._buffer_dict import BufferDict

    if isinstance(getattr(layer, "shira_indices", None), dict):
        layer.shira_indices = BufferDict(layer.shira_indices, persistent=True)


def _draws(layer: Any) -> bool:
    """False for LoHa and LoKr without dropout: peft draws a number at each step all the same, and branches on it, which
    does not compile."""
    rates = [r for r in (getattr(layer, n, None) for n in ("rank_dropout", "module_dropout")) if isinstance(r, dict)]
    return not rates or any(rate.get(ADAPTER) for rate in rates)


def _compute_in_dtype(layer: Any) -> None:
    """Let plain LoRA on a linear layer in half precision compute in that precision; its weights stay fp32."""
    from peft.tuners.lora import Linear as LoraLinear

    if type(layer) is LoraLinear and not layer.lora_variant and layer.weight.dtype in (torch.bfloat16, torch.float16):
        layer.cast_input_dtype_enabled = False
        for small in (layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]):
            small.__class__ = Linear


class PeftMethod(Method):
    """Options of a method that peft computes, one of them ``targets``: the layers that it changes."""

    mergeable: ClassVar[bool] = True
    option: ClassVar[str] = "targets"  # which holds them
    splits: ClassVar[bool] = False  # whether a target may be one part of a fused layer
    layer_types: ClassVar[tuple[type[nn.Module], ...]] = (nn.Linear,)
    layers: tuple[int, ...] | None  # blocks whose targets are changed; None = all, and those outside the blocks

    def __post_init__(self) -> None:
        given = getattr(self, self.option)
        if not isinstance(given, (list, tuple)) or not given or not all(isinstance(t, str) for t in given):
            raise PetlError(f"{type(self).__name__}({self.option}={given!r}): give a list of block parts or modules.")
        object.__setattr__(self, self.option, tuple(given))
        self.check_layers()

    def find(self, view: BackboneView) -> list[Target]:
        """The layers of ``view`` that are changed. Raises `PetlError` for one that the method cannot change."""
        mine = getattr(view.model, "petl", None)
        if isinstance(mine, PeftModule) and mine.method == self:
            return mine.targets  # peft's layers stand in their places now
        blocks = None if self.layers is None else self.blocks(view)
        found = find_targets(view, getattr(self, self.option), self.name, blocks)
        for target in found:
            if target.of > 1 and not self.splits:
                raise PetlError(
                    f"{self.name}: {target.name!r} is a part of the fused layer {target.whole!r}, which only petl.LoRA "
                    "splits. Take 'qkv', the whole layer."
                )
            if not isinstance(target.layer, self.layer_types):
                kinds = " and ".join(t.__name__ for t in self.layer_types)
                raise PetlError(f"{self.name} changes {kinds}; {target.name!r} is a {type(target.layer).__name__}.")
        return found

    def build(self, view: BackboneView) -> PeftModule:
        return PeftModule(self, view, self.find(view))

    def parameter_count(self, view: BackboneView) -> int:
        return sum(self.layer_parameters(target) for target in self.find(view))

    @abstractmethod
    def peft_config(self, view: BackboneView, targets: list[Target]) -> Any:
        """peft's config for these layers."""

    @abstractmethod
    def layer_parameters(self, target: Target) -> int:
        """Trained parameters on one layer, from the formula of the paper."""

    def layer_macs(self, target: Target, positions: int) -> int | None:
        """Multiply-accumulates on one layer at ``positions``; None = count them in peft's layer."""
        return None
