"""Batches from recorded taps of a frozen network, and what tells the samples apart whose taps were recorded."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from petl.data.loading import Key, KeyedDataset
from petl.data.tap_store import TapReader, TapStore

PICTURES = "image"
Needs = Sequence[tuple[int, frozenset[str]]]  # from which epoch on which streams are needed, and pictures
Inputs = Callable[[Sequence[int]], dict[str, Any]]


def content_digests(images: Sequence[Path | Image.Image]) -> list[str]:
    """SHA-256 of each picture: of the bytes of its file, or of size, mode and pixels of one in memory."""
    files = {p for p in images if isinstance(p, Path)}
    with ThreadPoolExecutor(8) as pool:  # reading and hashing release the GIL
        known = dict(zip(files, pool.map(_file_digest, files), strict=True))
    return [known[i] if isinstance(i, Path) else _pixel_digest(i) for i in images]


def _file_digest(path: Path) -> str:
    about = path.stat()
    return _version_digest(path, about.st_mtime_ns, about.st_size)


@lru_cache(maxsize=1 << 17)
def _version_digest(path: Path, *_version: int) -> str:
    """Read once for all streams and trainings of this process."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _pixel_digest(image: Image.Image) -> str:
    return hashlib.sha256(f"{image.mode}{image.size}".encode() + image.tobytes()).hexdigest()


class CachedBatches(Dataset):
    """Whole batches of a split from what was recorded of it.

    Args:
        data: the entries as they are without a cache.

    ``still``: whether no random numbers are drawn for a batch.
    """

    still = True

    def __init__(self, data: KeyedDataset) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    @abstractmethod
    def __getitems__(self, keys: list[Key]) -> dict[str, Any]: ...

    def whole(self, indices: Sequence[int]) -> dict[str, Any]:
        """The batch of these samples as it is without a cache; of a split without random transforms."""
        return default_collate([self.data.transform(self.data.source[i]) for i in indices])


class CachedDataset(CachedBatches):
    """Batches with ``"taps"`` in place of pictures.

    Samples that were not recorded come with ``"image"`` (M, 3, H, W), and ``"missing"`` (M,) says which rows of the
    batch they are; their rows of the taps are zero.

    Args:
        data: the entries as they are without a cache.
        light: an entry without its picture.
        reader: the taps, by sample index.
    """

    def __init__(self, data: KeyedDataset, light: Callable[[Any], dict[str, Any]], reader: TapReader) -> None:
        super().__init__(data)
        self.light, self.reader = light, reader

    def __getitems__(self, keys: list[Key]) -> dict[str, Any]:
        indices = [index for _, index in keys]
        batch = default_collate([{**self.light(self.data.source[i]), "index": i} for i in indices])
        batch["taps"], missing = self.reader.read(indices)
        if missing:
            batch["image"] = self.whole([indices[row] for row in missing])["image"]
            batch["missing"] = torch.tensor(missing)
        return batch


class CachedStages(CachedBatches):
    """Batches with what the stage of their epoch needs: ``"image"``, and ``"taps"`` by stream.

    ``missing[stream]`` is there where some were not recorded: ``"rows"`` says which rows of the taps these are, which
    are zero, and ``"image"`` holds their pictures.

    Args:
        data: the entries as they are without a cache.
        light: an entry without its picture.
        readers: the taps by stream and sample index.
        needs: of the stages.
    """

    def __init__(
        self,
        data: KeyedDataset,
        light: Callable[[Any], dict[str, Any]],
        readers: Mapping[str, TapReader],
        needs: Needs,
    ) -> None:
        super().__init__(data)
        self.light, self.readers, self.needs = light, readers, needs

    def __getitems__(self, keys: list[Key]) -> dict[str, Any]:
        epoch, indices = keys[0][0], [index for _, index in keys]
        needed = next(parts for first, parts in reversed(self.needs) if epoch >= first)
        streams = [stream for stream in self.readers if stream in needed]
        if len(streams) < len(needed - {PICTURES}) or PICTURES in needed:  # what has no taps is made from pictures
            batch = self.whole(indices)
        else:
            batch = default_collate([self.light(self.data.source[i]) for i in indices])
        batch |= {"index": torch.tensor(indices), "taps": {}, "missing": {}}
        for stream in streams:
            batch["taps"][stream], rows = self.readers[stream].read(indices)
            if rows:
                pictures = self.whole([indices[row] for row in rows])[PICTURES]
                batch["missing"][stream] = {"rows": torch.tensor(rows), PICTURES: pictures}
        return batch


def as_it_is(batch: Any) -> Any:
    """The collation of batches that are whole already."""
    return batch


class Recordable:
    """What `petl.TapCache` asks of a data module. A stream is what one encoder gets: "image" or "text".

    ``cached``: the taps that were recorded, by split and stream. ``place``: directory and limit of what `once` keeps,
    None = memory and no limit. ``needs``: of a training in stages, by split, see `CachedStages`.
    """

    splits: dict[str, Any]
    cached: dict[str, dict[str, TapReader]]
    place: tuple[Path | None, int | None] = (None, None)
    needs: Mapping[str, Needs]
    batch_size: int
    transform: Callable[..., Callable[[Any], dict[str, Any]]]

    def varies(self, split: str, stream: str = "image") -> str | None:
        """Why the inputs of ``split`` are not the same in every epoch, or None."""
        return "this data says nothing about it"

    def contents(self, split: str, stream: str = "image") -> list[str]:
        """What tells the inputs of a split apart: digests of its samples' pictures."""
        return content_digests([s.image for s in self.splits[split].samples])

    def inputs(self, split: str, stream: str = "image") -> Inputs:
        """What makes a batch of some of the inputs that `contents` lists, by their positions there."""
        source, transform = self.splits[split], self.transform(training=split == "train")

        def batch(positions: Sequence[int]) -> dict[str, Any]:
            with ThreadPoolExecutor(8) as pool:  # decoders release the GIL
                return default_collate(list(pool.map(lambda i: transform(source[i]), positions)))

        return batch

    def on_device(self, split: str) -> bool:
        """Whether taps of a split lie on a GPU: its batches are then made there, and not by loader processes."""
        return any(reader.device.type != "cpu" for reader in self.cached.get(split, {}).values())

    def from_taps(self, split: str, data: KeyedDataset) -> CachedBatches:
        """Batches of a split with what was recorded of it."""
        readers = self.cached[split]
        if "image" in readers:
            return CachedDataset(data, self.light, readers["image"])
        return CachedStages(data, self.light, readers, self.needs[split])

    def once(
        self,
        split: str,
        key: Mapping[str, Any],
        compute: Callable[[dict[str, Any]], Mapping[str, Tensor]],
        anyway: bool = False,
    ) -> TapReader:
        """What ``compute`` makes of the inputs of a split, computed once, also by several processes together.

        Args:
            split: whose inputs are the same in every epoch.
            key: all that the result depends on beside the input and its number, as JSON values.
            compute: gives tensors (B, …) for a batch; kept in fp32.
            anyway: where there is no room for all, keep it in memory; otherwise some inputs are not there.
        """
        digests, inputs = [f"{i} {d}" for i, d in enumerate(self.contents(split))], self.inputs(split)
        for place in (self.place, (None, None)):
            store = TapStore(key, torch.float32, *place)
            store.fill(digests, lambda rows: compute({**inputs(rows), "index": torch.tensor(rows)}), self.batch_size)
            if (reader := store.reader(digests)).complete or not anyway:
                break
        return reader

    def light(self, sample: Any) -> dict[str, Any]:
        """An entry of a batch without its picture."""
        raise NotImplementedError
