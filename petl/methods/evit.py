"""EViT (Liang et al., arXiv 2202.07800) on a frozen ViT: token reduction alone, no trained tensor but the head.

At each event block, after the attention residual and before the FFN: keep the patches that the class token attends to
most, merge the others into one token (petl/nn/token_reduction.py). Sparse-Tuning builds on the same module.

Deviation from the paper: the keep-rate warm-up belongs to training the whole network and is left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, cast

from torch import Tensor

from petl.backbones.base import BackboneView, BlockView, Call, RankingBlock
from petl.errors import PetlError
from petl.methods.base import Method, MethodModule, register
from petl.nn.token_reduction import Selection, TokenReducer


class State(NamedTuple):
    """Between blocks: tensors in the token layout that an event must reduce too, and past selections if recorded."""

    history: tuple[Tensor, ...] = ()
    selections: tuple[Selection, ...] = ()


class ReducingModule(MethodModule):
    """Blocks with token reduction at ``events``. ``record``: a list there collects the selections of each pass."""

    changes_blocks: ClassVar[bool] = True

    def __init__(self, method: ReducingMethod, view: BackboneView, reducer: TokenReducer) -> None:
        super().__init__(method, view)
        self.reducer, self.events = reducer, method.events(view)
        self.record: list[tuple[Selection, ...]] | None = None

    def capture_blocks(self) -> tuple[int, ...]:
        return self.events if self.reducer.keep_rate < 1 else ()

    def begin(self, x: Tensor) -> Any:
        return State()

    def attend(self, index: int, block: BlockView, x: Tensor, call: Call, state: State) -> tuple[Tensor, State]:
        """The attention residual, then the event of this block, if any, on tokens and history alike."""
        prefix = self.view.prefix_tokens
        patches = x.shape[1] - prefix
        if index not in self.events or self.reducer.count(patches) == patches:
            return x + block.attention(x, call), state
        if call.mask() is not None:
            raise PetlError(
                f"{self.method.name!r} drops tokens, so an attention mask over the original tokens cannot be applied."
            )
        branch, row = cast(RankingBlock, block).attention_and_cls_row(x, call)
        selection = self.reducer.select(row, prefix)
        assert selection is not None  # count() said so above
        selections = (*state.selections, selection) if self.record is not None else ()
        # all but the newest history entry were inputs of a trained projection already, so autograd holds them
        newest = len(state.history) - 1
        history = tuple(selection.apply(h, kept_anyway=j < newest) for j, h in enumerate(state.history))
        return selection.apply(x + branch), State(history, selections)

    def finish(self, index: int, state: State) -> None:
        """Hand the selections of a whole pass to whoever asked for them."""
        if self.record is not None and index + 1 == self.view.depth:
            self.record.append(state.selections)

    def block(self, index: int, block: BlockView, x: Tensor, call: Call, state: Any) -> tuple[Tensor, Any]:
        x, state = self.attend(index, block, x, call, state)
        self.finish(index, state)
        return x + block.ffn(x), state

    def token_counts(self, patches: int) -> list[tuple[int, int]]:
        counts, n, prefix = [], patches, self.view.prefix_tokens
        for i in range(self.view.depth):
            m = self.reducer.after(n) if i in self.events else n
            counts.append((n + prefix, m + prefix))
            n = m
        return counts

    def first_changed(self) -> int:
        """An event with too few patches to reject any changes nothing, which depends on the image."""
        reducing = self.events if self.reducer.keep_rate < 1 else ()
        return min([super().first_changed(), *reducing])

    def history_length(self, index: int) -> int:
        """Tensors beside the stream that an event at block ``index`` reduces."""
        return 0

    def macs(self, tokens: list[tuple[int, int]]) -> int:
        total = 0
        for i, (n, m) in enumerate(tokens):
            if n != m:
                total += n * self.view.width  # the class token's query row
                if self.reducer.fuse:
                    # merging: rejected tokens of the stream and of the newest history entry, all of the older ones
                    rejected, older = n - m + 1, self.history_length(i) - 1
                    whole = (n - self.view.prefix_tokens) * max(0, older)
                    total += (rejected * (1 + (older >= 0)) + whole) * self.view.width
        return total


@dataclass(frozen=True)
class ReducingMethod(Method):
    """Options of every method that drops tokens at certain blocks."""

    keep_rate: float = 0.7
    drop_blocks: tuple[int, ...] | None = None
    fuse: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.fuse, bool):
            raise PetlError(f"{type(self).__name__}(fuse={self.fuse!r}): fuse is true or false.")
        if self.drop_blocks is not None:
            if not isinstance(self.drop_blocks, (list, tuple)):
                raise PetlError(
                    f"{type(self).__name__}(drop_blocks={self.drop_blocks!r}): give a list of block numbers."
                )
            object.__setattr__(self, "drop_blocks", tuple(self.drop_blocks))
            for block in self.drop_blocks:
                self.require("drop_blocks", block, 0)
        self.require("keep_rate", self.keep_rate, 0, integer=False)
        TokenReducer(self.keep_rate)  # raises for a rate outside (0, 1]

    @property
    def identity_at_start(self) -> bool:
        return self.keep_rate == 1

    def events(self, view: BackboneView) -> tuple[int, ...]:
        """Event blocks on this backbone, in order; `PetlError` for a block beyond its depth."""
        if self.drop_blocks is None:
            return tuple(sorted({view.depth // 4, view.depth // 2, 3 * view.depth // 4}))
        beyond = [b for b in self.drop_blocks if b >= view.depth]
        if beyond:
            raise PetlError(
                f"drop_blocks {list(self.drop_blocks)}: this backbone has {view.depth} blocks, 0 to {view.depth - 1}; "
                f"{beyond} lie beyond. Leave drop_blocks out for blocks at 1/4, 1/2 and 3/4 of the depth."
            )
        return tuple(sorted(set(self.drop_blocks)))

    def check_reduction(self, view: BackboneView) -> None:
        """Raise `PetlError` where dropping tokens of this backbone would be wrong."""
        obstacle = view.reduction_obstacle()
        if obstacle and self.keep_rate < 1:
            raise PetlError(
                f"{self.name!r} cannot drop tokens of this {type(view.model).__name__}: {obstacle}. "
                "With keep_rate=1.0 nothing is dropped."
            )


@register("evit")
@dataclass(frozen=True)
class EViT(ReducingMethod):
    """EViT: drop and merge patch tokens of the frozen backbone; only the head is trained.

    Args:
        keep_rate: share of patch tokens kept at each event, in (0, 1].
        drop_blocks: blocks (from 0) at which tokens are dropped; None = a quarter, a half, three quarters of the depth.
        fuse: merge the rejected tokens into one instead of dropping them.
    """

    def build(self, view: BackboneView) -> ReducingModule:
        self.check_reduction(view)
        return ReducingModule(self, view, TokenReducer(self.keep_rate, self.fuse))

    def parameter_count(self, view: BackboneView) -> int:
        return 0
