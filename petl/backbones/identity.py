"""The identity of a frozen backbone: a hash of its weights and a hash of its structure.

SHA-256 over the sorted (name, shape, digest of the bytes) of every parameter and buffer outside the classification
head. Both an fp32 and a bf16 digest are kept, so that a base loaded in bf16 can still be recognised.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from petl.backbones.base import EncoderView
from petl.errors import PetlError


@dataclass(frozen=True)
class Identity:
    """``structure``: names and shapes. ``weights``: fp32 bytes (None where the base has less). ``weights_bf16``."""

    family: str
    structure: str
    weights: str | None
    weights_bf16: str
    parameters: int

    def to_dict(self) -> dict[str, str | int | None]:
        return asdict(self)

    def difference(self, other: Identity) -> str | None:
        """Why ``other`` is not this backbone, in words, or None where it is."""
        if (self.family, self.structure) != (other.family, other.structure):
            return (
                f"another architecture ({other.family}, {other.parameters:,} parameters, structure "
                f"{other.structure[:12]}; expected {self.family}, {self.parameters:,} parameters, structure "
                f"{self.structure[:12]})"
            )
        mine, theirs, kind = self.weights_bf16, other.weights_bf16, "bf16"
        if self.weights and other.weights:
            mine, theirs, kind = self.weights, other.weights, "fp32"
        if mine != theirs:
            return f"the right architecture with other weights ({kind} digest {theirs[:12]}; expected {mine[:12]})"
        return None


def _digest(tensors: list[tuple[str, Tensor]], cast: Callable[[Tensor], Tensor]) -> str:
    def one(item: tuple[str, Tensor]) -> bytes:
        name, tensor = item
        data = cast(tensor.detach()).contiguous().cpu().view(-1).view(torch.uint8).numpy().data
        return hashlib.sha256(f"{name}{tuple(tensor.shape)}".encode() + hashlib.sha256(data).digest()).digest()

    with ThreadPoolExecutor(4) as pool:  # hashlib releases the GIL
        return hashlib.sha256(b"".join(pool.map(one, tensors))).hexdigest()


def identify(view: EncoderView) -> Identity:
    """The identity of the backbone under ``view``; what petl added to it and its classification head do not count."""
    named: Iterable[tuple[str, Tensor]] = view.model.state_dict().items()
    return identify_all(view.family, {n: t for n, t in named if view.is_backbone(n)})


def identify_all(family: str, state: Mapping[str, Tensor]) -> Identity:
    """The identity of all of these tensors."""
    tensors = sorted(state.items())
    if any(t.is_meta for _, t in tensors):
        raise PetlError("the backbone has no weights yet (it lies on the meta device): load them before petl.attach.")
    structure = "\n".join(f"{n} {tuple(t.shape)}" for n, t in tensors)
    floating = [t for _, t in tensors if t.is_floating_point()]
    full = all(t.dtype in (torch.float32, torch.float64) for t in floating)

    def to(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
        return lambda t: t.to(dtype) if t.is_floating_point() else t.to(torch.int64)

    return Identity(
        family=family,
        structure=hashlib.sha256(structure.encode()).hexdigest(),
        weights=_digest(tensors, to(torch.float32)) if full else None,
        weights_bf16=_digest(tensors, to(torch.bfloat16)),
        parameters=sum(t.numel() for t in floating),
    )
