"""Token reduction by class-token attention (EViT, arXiv 2202.07800, and Sparse-Tuning, arXiv 2405.14700, section 2).

A `TokenReducer` turns the attention of the class token into a `Selection`: per sample, which patch tokens stay and
with which weights the rest is merged into one token. A selection is a linear map over tokens, so the same one can be
applied to every tensor with the same token layout (the residual stream, earlier adapter outputs, an index).
Shapes: B samples, P prefix tokens, n patch tokens, k kept.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from petl.errors import PetlError


def cls_attention(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """Head-averaged attention of the class token to all tokens, in fp32; O(n C), not the O(n² C) of the full map.

    ``query`` (B, H, 1, D) and ``key`` (B, H, N, D) as they enter the attention product -> (B, N), rows sum to 1.
    """
    with torch.autocast(query.device.type, enabled=False):
        logits = (query.float() * scale) @ key.float().transpose(-2, -1)  # (B, H, 1, N)
        return logits.softmax(-1).mean(1).squeeze(1)


class Selection(NamedTuple):
    """Kept patches ``keep`` (B, k), rejected ``reject`` (B, n - k), and their merge ``weights`` (B, n - k) or None."""

    keep: Tensor
    reject: Tensor
    weights: Tensor | None
    prefix: int

    def apply(self, x: Tensor, kept_anyway: bool = False) -> Tensor:
        """(B, P + n, C) -> (B, P + k + 1, C): prefix, kept tokens, merged token (left out when ``weights`` is None).

        ``kept_anyway``: autograd holds ``x`` for another reason, so weigh all of it instead of a copy of the rejected
        rows, which would be held besides. Same value, fewer bytes.
        """
        rows = torch.arange(x.shape[0], device=x.device)[:, None]
        parts = [x[:, : self.prefix], x[rows, self.keep + self.prefix]]
        if self.weights is not None:
            if kept_anyway and x.dtype == self.weights.dtype:
                patches = x[:, self.prefix :]
                weights = self.weights.new_zeros(patches.shape[:2]).scatter(1, self.reject, self.weights)
            else:
                patches, weights = x[rows, self.reject + self.prefix].to(self.weights.dtype), self.weights
            with torch.autocast(x.device.type, enabled=False):
                parts.append((weights[:, None] @ patches).to(x.dtype))
        return torch.cat(parts, 1)

    def apply_to_index(self, index: Tensor) -> Tensor:
        """Patch positions (B, n) -> (B, k + 1), -1 for the merged token; tells where each token came from."""
        kept = index.gather(1, self.keep)
        return kept if self.weights is None else torch.cat([kept, kept.new_full((len(kept), 1), -1)], 1)


@dataclass(frozen=True)
class TokenReducer:
    """Keep the share ``keep_rate`` of patch tokens that the class token attends to most; ``fuse`` merges the others.

    The merge weights are the raw scores, not normalised (as published). With ``ordered_reject`` rejected tokens are
    summed in ascending position (bit parity with the published code); ``skip_single`` leaves out an event that would
    replace a single rejected token by a shrunk copy of itself, which saves nothing.
    """

    keep_rate: float = 0.7
    fuse: bool = True
    ordered_reject: bool = False
    skip_single: bool = True
    tolerance: float = 1e-9  # ceil(r n) of the exact product, not of its float error

    def __post_init__(self) -> None:
        if not 0 < self.keep_rate <= 1:
            raise PetlError(
                f"keep_rate is {self.keep_rate}: the share of patch tokens kept at each event lies in (0, 1]; "
                "0.7 is the published value, 1.0 keeps all."
            )

    def count(self, patches: int) -> int:
        """Kept patch tokens k of n; equal to n where the event changes nothing."""
        k = max(1, math.ceil(self.keep_rate * patches - self.tolerance))
        return patches if self.fuse and self.skip_single and patches - k < 2 else k

    def after(self, patches: int) -> int:
        """Patch tokens after one event, the merged one included."""
        k = self.count(patches)
        return k if k == patches else k + self.fuse

    def select(self, scores: Tensor, prefix: int) -> Selection | None:
        """The selection for attention ``scores`` (B, P + n) of the class token; None where nothing is dropped."""
        patch_scores = scores[:, prefix:]
        k = self.count(patch_scores.shape[1])
        if k == patch_scores.shape[1]:
            return None
        order = patch_scores.detach().argsort(dim=1, descending=True, stable=True)  # static shapes, unlike masks
        keep, reject = order[:, :k], order[:, k:]
        if self.ordered_reject:
            reject = reject.sort(1).values
        weights = patch_scores.gather(1, reject) if self.fuse else None
        return Selection(keep, reject, weights, prefix)


def kept_masks(selections: list[Selection], patches: int) -> list[Tensor]:
    """After each event, which of the original patches still have a token of their own: list of bool (B, patches)."""
    masks: list[Tensor] = []
    if not selections:
        return masks
    first = selections[0].keep
    index = torch.arange(patches, device=first.device).expand(len(first), -1)
    for selection in selections:
        index = selection.apply_to_index(index)
        mask = torch.zeros(len(first), patches + 1, dtype=torch.bool, device=first.device)
        masks.append(mask.scatter_(1, index % (patches + 1), True)[:, :patches])  # -1 lands in the spare column
    return masks
