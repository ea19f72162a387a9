"""What of a model is the same in every epoch, and the model run from it.

Which taps of a frozen network that takes follows from the method: a linear probe needs the network's output, a method
beside the network the blocks that it reads, any other the input of the first block that it changes. A model has one
`Stream` of taps for each encoder: a classifier one, a pair of encoders two.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from petl.backbones.base import BackboneView, EncoderView
from petl.backbones.replay import Recorder, stopping_after
from petl.methods.attach import attached
from petl.methods.base import TowerModule

FEATURES, OUTPUT = "features", "output"


class Frozen(Protocol):
    """What of a model can be computed once."""

    @property
    def streams(self) -> tuple[Stream, ...]: ...


class Stream(ABC):
    """The taps of one frozen encoder.

    ``names``: of the taps that `record` gives; empty where nothing is the same in every epoch, and ``obstacle`` says
    why. ``kind``: of the encoder's inputs, "image" or "text". ``takes``: the entries of a batch that `record` takes.
    ``dtype``: that floating-point taps are kept in, None = the cache's. ``alone``: whether batches with its taps have
    no pictures beside them.
    """

    kind: str
    takes: tuple[str, ...]
    names: tuple[str, ...]
    dtype: torch.dtype | None = None
    alone: bool = True
    view: EncoderView
    module: TowerModule

    @property
    def streams(self) -> tuple[Stream, ...]:
        return (self,)

    @property
    def name(self) -> str:
        """Under which batches have its taps."""
        return self.kind

    def fingerprint(self) -> dict[str, Any]:
        """What of the encoder the taps depend on, as JSON values."""
        module, view, modules = self.module, self.view, dict(self.view.model.named_modules())
        places, first = view.places(modules), module.first_used()
        kept = {
            n: m
            for n, m in modules.items()
            if n != "petl" and view.is_backbone(n) and (places[n] < first or first == view.depth)
        }
        return {"backbone": module.identity.to_dict(), "structure": structure(view, kept)}

    @property
    def obstacle(self) -> str:
        return f"{self.module.method.name} changes the network from its first block on"

    @abstractmethod
    def record(self, *inputs: Any) -> dict[str, Tensor]:
        """Taps (B, …) of B inputs."""

    def digests(self, contents: Sequence[str]) -> list[str]:
        """What tells the taps of inputs apart, from what tells apart the inputs (`petl.data.base.DataModule`)."""
        return list(contents)

    def filled(self, taps: dict[str, Tensor], missing: Tensor, *inputs: Any) -> dict[str, Tensor]:
        """``taps`` with the rows ``missing`` recorded now from their inputs, and rounded as the others."""
        for name, tap in self.record(*inputs).items():
            taps[name][missing] = tap.to(taps[name].dtype)
        return taps


def structure(view: EncoderView, modules: Mapping[str, nn.Module]) -> str:
    """Digest of what the weights do not say of these layers: their types and options, such as eps of a norm."""
    about = [f"{view.heads}", *(f"{n} {type(m).__name__}({m.extra_repr()})" for n, m in modules.items())]
    return hashlib.sha256("\n".join(about).encode()).hexdigest()


class FrozenFeatures(Stream):
    """The frozen part of a backbone with a method.

    Args:
        backbone: a model after `petl.attach`.

    ``names``: of the taps that `record` gives and `features` takes; empty where the method changes block 0.
    """

    kind, takes = "image", ("image",)
    view: BackboneView

    def __init__(self, backbone: nn.Module) -> None:
        self.module = module = attached(backbone)
        self.view, self.first, reads = module.view, module.first_used(), module.reads()
        if reads is not None:
            self.names = reads or (FEATURES,)
        else:
            self.names = (f"block.{self.first - 1}",) if self.first else ()

    @torch.no_grad()
    def record(self, images: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        """Taps (B, …) of images (B, 3, H, W), from one frozen pass, which ends where nothing more is needed."""
        with torch.compiler.set_stance("force_eager"):
            if self.names == (FEATURES,):
                return {FEATURES: self.view.features(images)}
            if self.module.reads() is None:
                found: list[Tensor] = []
                with stopping_after(self.view.block_modules()[self.first - 1], found):
                    self.view.features(images)
                return {self.names[0]: found[0]}
            recorder = Recorder(self.names)
            with self.module.run.recording(recorder):
                self.view.features(images)
            return recorder.taps

    def complete(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """The taps of a batch of `petl.data.cached.CachedDataset`; those of samples that were not recorded are recorded
        now, and rounded as the others."""
        taps: dict[str, Tensor] = batch["taps"]
        return self.filled(taps, batch["missing"], batch["image"]) if "missing" in batch else taps

    def features(self, taps: Mapping[str, Tensor]) -> Tensor:
        """Pooled features (B, C), as `BackboneView.features` of the images computes them with the method."""
        dtype = next(self.view.model.parameters()).dtype
        if self.names == (FEATURES,):
            return taps[FEATURES].to(dtype)
        if self.module.reads() is not None:
            return self.view.pool(self.module.run.replay(taps))
        x = taps[self.names[0]].to(dtype)
        self.module.run.resume(self.first, x)
        for block in self.view.block_modules()[self.first :]:
            out = block(x, **{self.view.mask_argument: None})
            x = out[0] if isinstance(out, tuple) else out
        return self.view.pool(x)


class FrozenTower(Stream):
    """The frozen part of one encoder of a pair with a method.

    Args:
        kind: of its inputs, "image" or "text".
        tower: the method's module of this encoder, after `petl.methods.attach.attach_pair`.
        encode: the encoder's own output (B, N, C), from what `record` takes.
        takes: the entries of a batch that `record` takes.
    """

    def __init__(self, kind: str, tower: TowerModule, encode: Callable[..., Tensor], takes: tuple[str, ...]) -> None:
        self.kind, self.module, self.view, self.encode, self.takes = kind, tower, tower.view, encode, takes
        reads = tower.reads()
        self.replayed = bool(reads)  # whether the method does anything beside the blocks
        changed = self.replayed and not tower.has_output  # whether it does so to the output of the last block
        self.names = () if reads is None else reads if changed else (*reads, OUTPUT)

    @property
    def obstacle(self) -> str:
        return f"{self.module.method.name} changes what the encoders compute"

    @torch.no_grad()
    def record(self, *inputs: Any) -> dict[str, Tensor]:
        recorder = Recorder(self.names)
        with torch.compiler.set_stance("force_eager"), self.module.run.recording(recorder):
            output = self.encode(*inputs)
        return recorder.taps | ({OUTPUT: output} if OUTPUT in self.names else {})

    def complete(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """The taps of a batch of `petl.data.cached_references.CachedReferences`."""
        taps, missing = batch["taps"][self.kind], batch["missing"].get(self.kind)
        return self.filled(taps, missing["rows"], *(missing[k] for k in self.takes)) if missing else taps

    def output(self, batch: Mapping[str, Any]) -> Tensor:
        """What the encoder with the method hands on, (B, N, C), as it computes it from its inputs."""
        taps, tower, view = self.complete(batch), self.module, self.module.view
        last = tower.run.replay(taps) if self.replayed else None
        if OUTPUT in self.names:
            return tower.output(taps[OUTPUT].to(next(view.model.parameters()).dtype), tower.run.take())
        assert last is not None
        return tower.output(view.after_blocks(last), tower.run.take())


class FrozenText(FrozenTower):
    """The text encoder of a pair; inputs are expressions, and equal token ids have the same taps.

    Args:
        tower: the method's module of this encoder.
        encode: the encoder's own output, from token ids and mask (B, L).
        tokens: ids and mask of expressions.
    """

    def __init__(
        self,
        tower: TowerModule,
        encode: Callable[[Tensor, Tensor], Tensor],
        tokens: Callable[[Sequence[str]], tuple[Tensor, Tensor]],
    ) -> None:
        super().__init__("text", tower, encode, ("expression",))
        self.tokens = tokens

    def record(self, expressions: Sequence[str]) -> dict[str, Tensor]:  # type: ignore[override]
        return super().record(*self.tokens(expressions))

    def fingerprint(self) -> dict[str, Any]:
        return super().fingerprint() | {"length": self.tokens(["0"])[0].shape[1]}  # of the padded token ids

    def digests(self, contents: Sequence[str]) -> list[str]:
        both = torch.cat(self.tokens(contents), 1).cpu()
        return [hashlib.sha256(row.tobytes()).hexdigest() for row in both.numpy()]


class FrozenPair:
    """The frozen parts of a pair of encoders with a method: ``vision`` and ``text``.

    Args:
        vision: with inputs "image" and "mask".
        text: with expressions.
    """

    def __init__(self, vision: FrozenTower, text: FrozenText) -> None:
        self.vision, self.text = vision, text

    @property
    def streams(self) -> tuple[Stream, ...]:
        return self.text, self.vision
