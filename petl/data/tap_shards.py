"""The file of a tap store: a safetensors file that is whole and right, or refused.

A shard holds the taps of some samples, a tensor (samples, …) per tap. Its metadata name the key it was made for, the
digests of its samples, and type, shape and CRC-32 of every tensor; a CRC-32 of that text stands beside it, so that a
bit that flipped anywhere is found. Tensors are views of the mapped file: only what is read comes into memory.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from safetensors import SafetensorError, TensorSpec, safe_open
from torch import Tensor

SUFFIX, TEMPORARY = ".safetensors", ".tmp-"


class DamagedError(Exception):
    """A file that is no whole shard of its key."""


@dataclass
class Shard:
    """Taps of some samples. A shard of a file is pickled by its name and mapped again where it is used.

    Args:
        digests: of the samples, in the order of the rows; not pickled.
        held: the taps by name, each (samples, …).
        file: where they lie; None = in memory alone.
    """

    digests: Sequence[str]
    held: dict[str, Tensor] | None
    file: Path | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"digests": (), "held": None if self.file else self.held, "file": self.file}

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Raises OSError or `DamagedError` if the file is gone or changed since it was checked."""
        if self.held is None:
            assert self.file is not None
            self.held = _mapped(self.file)[1]
        return self.held


def write_shard(folder: Path, key: str, digests: Sequence[str], tensors: Mapping[str, Tensor]) -> Shard:
    """Written under a temporary name and renamed when it is whole. Raises OSError, with nothing left behind."""
    with ThreadPoolExecutor() as pool:
        sums = dict(zip(tensors, pool.map(_crc32, tensors.values())))
    about = json.dumps({"key": key, "digests": list(digests), "tensors": _layout(tensors, sums)})
    file = folder / f"{uuid4().hex}{SUFFIX}"
    temporary = folder / f"{TEMPORARY}{file.name}"
    try:
        with open(temporary, "xb") as out:
            for piece in _pieces(tensors, {"petl": about, "crc32": str(zlib.crc32(about.encode()))}):
                out.write(piece)
            out.flush()
            os.fsync(out.fileno())
        os.replace(temporary, file)
        return Shard(digests, _mapped(file)[1], file)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def _pieces(tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> Iterator[Any]:
    """The bytes of a safetensors file. The library's ``save`` copies all of it twice, ``save_file`` hides the errno."""
    order = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))  # keeps every tensor aligned
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name in order:
        t = tensors[name]
        start, end = end, end + t.nbytes
        kind = str(t.dtype).removeprefix("torch.")
        spec = TensorSpec(dtype=kind, shape=t.shape, data_ptr=t.data_ptr(), data_len=t.nbytes)
        header[name] = {"dtype": spec.dtype, "shape": spec.shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    yield from (_bytes(tensors[name]) for name in order)


def open_shard(file: Path, key: str) -> Shard:
    """Map the file and check it, once per process. Raises `DamagedError`, or OSError where it cannot be read."""
    stat = file.stat()
    about, tensors = _mapped(file)
    if about["key"] != key:
        raise DamagedError(f"{file} belongs to the key {about['key']}.")
    checked = _checked(file, stat.st_ino, stat.st_size, stat.st_mtime_ns)
    if not checked:
        if about["tensors"] != _layout(tensors, {name: _crc32(t) for name, t in tensors.items()}):
            raise DamagedError(f"{file}: its tensors are not those that were written.")
        checked.append(True)
    return Shard(about["digests"], tensors, file)


@lru_cache(maxsize=1 << 16)
def _checked(file: Path, *_version: int) -> list[bool]:
    """Not empty if this version of the file was checked by this process."""
    return []


def _mapped(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What the metadata say, and views of the mapped file; writing into them does not reach the file."""
    try:
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata() or {}
            names = opened.keys()
            tensors = {name: opened.get_tensor(name) for name in names}
        if zlib.crc32(metadata["petl"].encode()) != int(metadata["crc32"]):
            raise DamagedError(f"{file}: its metadata are not those that were written.")
        return json.loads(metadata["petl"]), tensors
    except (SafetensorError, KeyError, ValueError) as error:
        raise DamagedError(f"{file} is no shard of a tap store: {error}.") from error


def _layout(tensors: Mapping[str, Tensor], sums: Mapping[str, int]) -> dict[str, Any]:
    return {name: [str(t.dtype), list(t.shape), sums[name]] for name, t in sorted(tensors.items())}


def _bytes(tensor: Tensor) -> Any:
    return tensor.reshape(-1).view(torch.uint8).numpy()


def _crc32(tensor: Tensor) -> int:
    return zlib.crc32(_bytes(tensor))  # releases the GIL
