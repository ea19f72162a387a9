"""The one exception of petl for everything a user can put right, and the search for the nearest valid name."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class PetlError(Exception):
    """Bad input. The message says what was wrong, where, the nearest valid names, and what to do."""


def nearest(name: str, valid: Iterable[str], count: int = 3) -> str:
    """A phrase with the valid names closest to ``name``: ``"did you mean 'dtd'?"``, or the list when it is short."""
    names = sorted({str(v) for v in valid})
    close = get_close_matches(str(name), names, n=count, cutoff=0.5)
    if close:
        return f"did you mean {' or '.join(repr(c) for c in close)}?"
    if len(names) <= 12:
        return f"valid are: {', '.join(names) or 'none'}"
    return f"valid are: {', '.join(names[:12])}, and {len(names) - 12} more"
