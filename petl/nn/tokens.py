"""Expressions to token ids of one length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor


def tokenize(tokenizer: Any, phrases: Sequence[str], length: int) -> tuple[Tensor, Tensor]:
    """Ids and mask (B, length) of lower-cased phrases, start and end tokens included; longer ones are cut."""
    batch = tokenizer(
        [p.lower() for p in phrases], padding="max_length", truncation=True, max_length=length, return_tensors="pt"
    )
    return batch["input_ids"], batch["attention_mask"]
