"""Batches of visual grounding from recorded taps of its pictures, of its expressions, or of both."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import default_collate

from petl.data.cached import CachedBatches
from petl.data.loading import Key, KeyedDataset
from petl.data.tap_store import TapReader


class CachedReferences(CachedBatches):
    """Batches of grounding data with ``"taps"``, by stream.

    ``taps["text"]`` (B, …) each; ``taps["image"]`` (U, …) each, in place of ``"image"``: a row for every run of samples
    about one ``"picture"``. ``missing[stream]`` is there where some were not recorded: ``"rows"`` says which rows of
    the taps these are, which are zero; the other entries are their inputs.

    Args:
        data: the entries as they are without a cache.
        light: an entry without its image.
        readers: the taps by stream: "image" by sample index, "text" by position in ``phrases``.
        phrases: every expression that there can be.
    """

    def __init__(
        self,
        data: KeyedDataset,
        light: Callable[[Any], dict[str, Any]] | None,
        readers: Mapping[str, TapReader],
        phrases: Sequence[str],
    ) -> None:
        super().__init__(data)
        self.light, self.readers, self.still = light, readers, "image" in readers
        self.positions = {phrase: i for i, phrase in enumerate(phrases)}

    def __getitems__(self, keys: list[Key]) -> dict[str, Any]:
        batch: dict[str, Any]
        if "image" in self.readers:
            assert self.light is not None
            batch = default_collate([{**self.light(self.data.source[i]), "index": i} for _, i in keys])
        else:
            batch = default_collate([self.data[key] for key in keys])
        batch |= {"taps": {}, "missing": {}}
        if "image" in self.readers:
            self._add_pictures(batch, keys)
        if "text" in self.readers:
            phrases = batch["expression"]
            taps, missing = self.readers["text"].read([self.positions[p] for p in phrases])
            self._add(batch, "text", taps, missing, lambda: {"expression": [phrases[row] for row in missing]})
        return batch

    def _add_pictures(self, batch: dict[str, Any], keys: list[Key]) -> None:
        _, counts = batch["picture"].unique_consecutive(return_counts=True)
        first = [keys[row][1] for row in (counts.cumsum(0) - counts).tolist()]
        taps, missing = self.readers["image"].read(first)

        def inputs() -> dict[str, Any]:
            whole = self.whole([first[row] for row in missing])
            return {"image": whole["image"], "mask": whole["mask"]}

        self._add(batch, "image", taps, missing, inputs)

    @staticmethod
    def _add(
        batch: dict[str, Any], stream: str, taps: dict[str, Any], missing: list[int], inputs: Callable[[], Any]
    ) -> None:
        batch["taps"][stream] = taps
        if missing:
            batch["missing"][stream] = {"rows": torch.tensor(missing), **inputs()}
