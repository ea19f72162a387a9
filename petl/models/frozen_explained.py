"""What of an explained classifier is the same in every epoch: its outputs, and the blocks that the ladders read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from petl.backbones.base import BackboneView
from petl.backbones.classifier import Classifier
from petl.backbones.identity import Identity, identify, identify_all
from petl.models.explained import ExplainedClassifier
from petl.models.frozen import FEATURES, Stream, structure
from petl.models.recorded import Recorded

OUTPUTS, BLOCKS, LOGITS = "outputs", "blocks", "logits"


class _Part(Stream):
    """Taps of the classifier's whole pass.

    Args:
        model: whose classifier is frozen.
        trains_head: whether the classifier's head is yet to be trained.
    """

    kind, takes = "image", ("image",)
    alone = False  # the surrogate's training masks pictures

    def __init__(self, model: ExplainedClassifier, trains_head: bool) -> None:
        self.model, self.view, self.trains_head = model, model.view, trains_head
        self.names = self.taps() if isinstance(model.view, BackboneView) else ()

    def taps(self) -> tuple[str, ...]:
        raise NotImplementedError

    @property
    def obstacle(self) -> str:
        return "a text is padded to the longest of its batch, so that its activations differ in the last bits"

    def fingerprint(self) -> dict[str, Any]:
        return _about(self.model, identify(self.view) if self.trains_head else self.model.identity)


class FrozenOutputs(_Part):
    """What the classifier's head gets where it is still trained, its logits otherwise; kept in fp32, being small."""

    name = OUTPUTS
    dtype = torch.float32

    def taps(self) -> tuple[str, ...]:
        return (FEATURES,) if self.trains_head else (LOGITS,)

    @torch.no_grad()
    def record(self, images: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        if self.trains_head:
            return {FEATURES: cast(BackboneView, self.view).features(images)}
        return {LOGITS: self.model.logits(images)}

    def logits(self, taps: Mapping[str, Tensor]) -> Tensor:
        """(B, C) of the classifier as it is now."""
        if not self.trains_head:
            return taps[LOGITS]
        features = taps[FEATURES].to(next(self.view.model.parameters()).dtype)
        return cast(Classifier, self.model.classifier).head(features)


class FrozenBlocks(_Part):
    """What the ladders read."""

    name = BLOCKS

    def taps(self) -> tuple[str, ...]:
        return self.model.reads()

    @torch.no_grad()
    def record(self, images: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        return self.model.record(images)


class FrozenExplained:
    """Both parts of an explained classifier.

    Args:
        model: whose classifier is frozen.
        trains_head: whether the classifier's head is yet to be trained.
    """

    def __init__(self, model: ExplainedClassifier, trains_head: bool) -> None:
        self.model = model
        self.outputs, self.blocks = FrozenOutputs(model, trains_head), FrozenBlocks(model, trains_head)

    @property
    def streams(self) -> tuple[Stream, ...]:
        return self.outputs, self.blocks

    def logits(self, batch: Mapping[str, Any]) -> Tensor | None:
        """(B, C) of a batch of `petl.data.cached.CachedStages`; None where it has no outputs."""
        taps = self._complete(batch, self.outputs)
        return None if taps is None else self.outputs.logits(taps)

    def recorded(self, batch: Mapping[str, Any], size: Sequence[int]) -> Recorded | None:
        """What is known of a batch of images of ``size`` (H, W); None where it has no outputs or no blocks."""
        taps, logits = self._complete(batch, self.blocks), self.logits(batch)
        return None if taps is None or logits is None else Recorded(logits, taps, (size[0], size[1]))

    def surrogate_key(self) -> dict[str, Any]:
        """What the game v(S) depends on beside the input, as JSON values."""
        model, weights = self.model, next(self.model.view.model.parameters())
        surrogate = identify_all("surrogate", model.petl.surrogate.state_dict())
        return {
            **_about(model, model.identity),
            "surrogate": surrogate.to_dict(),
            "options": model.method.to_dict(),
            "tokenizer": _tokenizer(model.tokenizer),
            "device": weights.device.type,
            "torch": torch.__version__,
        }

    @staticmethod
    def _complete(batch: Mapping[str, Any], part: _Part) -> dict[str, Tensor] | None:
        taps: dict[str, Tensor] | None = batch.get("taps", {}).get(part.name)
        missing = batch.get("missing", {}).get(part.name)
        if taps is None or missing is None:
            return taps
        return part.filled(taps, missing["rows"], missing["image"])


def _tokenizer(tokenizer: Any) -> str | None:
    """Digest of what decides the tokens and words of a text."""
    if tokenizer is None:
        return None
    about = [type(tokenizer).__name__, tokenizer.init_kwargs.get("do_lower_case"), tokenizer.get_vocab()]
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def _about(model: ExplainedClassifier, identity: Identity) -> dict[str, Any]:
    return {
        "classifier": identity.to_dict(),
        "method": model.adapter.to_dict() if model.adapter else None,
        "structure": structure(model.view, dict(model.classifier.named_modules())),
    }
