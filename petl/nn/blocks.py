"""Which blocks of a network an option means."""

from __future__ import annotations

from collections.abc import Sequence

from petl.errors import PetlError


def chosen_blocks(depth: int, layers: Sequence[int] | None) -> tuple[int, ...]:
    """The blocks ``layers`` of ``depth``, from 0 and in order; None = all, negative ones count from the end.

    Raises:
        PetlError: none, one that the network does not have, or one twice.
    """
    if layers is None:
        return tuple(range(depth))
    wrong = [i for i in layers if isinstance(i, bool) or not isinstance(i, int) or not -depth <= i < depth]
    found = () if wrong else tuple(sorted(i % depth for i in layers))
    if not found or len(set(found)) < len(found):
        what = f"{wrong} are out of range" if wrong else "it is empty" if not layers else "a block stands there twice"
        raise PetlError(
            f"layers={list(layers)}: {what}; this network has blocks 0 to {depth - 1} (from the end, -1 to {-depth}), "
            "and None takes all."
        )
    return found
