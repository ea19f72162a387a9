"""The grid of the patches of each pass, for methods that convolve over it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from petl.backbones.base import BackboneView, Call, ThreadState
from petl.errors import PetlError


class PatchGrid:
    """Rows and columns of patches, read off the output of the patch embedding: right for every size and shape of image.

    The blocks see tokens alone. What is read belongs to the pass of one thread and is taken when block 0 starts.
    """

    def __init__(self, view: BackboneView, name: str) -> None:
        self.prefix, self.name = view.prefix_tokens, name
        self.embedding = view.outer_layers()["patch_embedding"]
        self.local = ThreadState()
        self.handle: RemovableHandle

    def watch(self) -> None:
        self.handle = self.embedding.register_forward_hook(self._keep)

    def release(self) -> None:
        self.handle.remove()

    def _keep(self, embedding: nn.Module, args: Any, output: Tensor) -> None:
        self.local.value = tuple(output.shape[-2:])

    def take(self, x: Tensor) -> tuple[int, int]:
        """The grid of the tokens ``x`` (B, P + R · S, C) that enter block 0; `PetlError` where they fill none."""
        grid, self.local.value = self.local.value, None
        patches = x.shape[1] - self.prefix
        if grid is None or grid[0] * grid[1] != patches:
            made = "no grid" if grid is None else f"a grid of {grid[0]} x {grid[1]}"
            raise PetlError(
                f"{self.name!r} convolves over the patches, and {patches} patch tokens enter the blocks where the "
                f"patch embedding made {made}. Run the whole model, without patch dropout or any other token reduction "
                "before its blocks (an explanation that removes patches needs removal='mean')."
            )
        return grid

    def refuse_mask(self, call: Call) -> None:
        """Raise `PetlError` where the call has an attention mask."""
        if call.mask() is not None:
            raise PetlError(
                f"{self.name!r} convolves over the patches, so what an attention mask hides would still reach its "
                "neighbours. Run it without a mask."
            )
