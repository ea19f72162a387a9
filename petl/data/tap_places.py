"""Where a tap store keeps its shards: a directory that many processes share, or the memory of this one.

Of the locks in a directory, ``use.lock`` is shared by all that have it open (it is evicted only when nobody has), and
every chunk that is being computed locks a byte of ``fill.lock``. The latter belong to the process alone: they fall with
it, although its forked loader workers may live on. Where the system has no such locks, nothing is evicted, and two
processes may compute the same, which does no harm.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import sys
import weakref
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol
from uuid import uuid4

from torch import Tensor

from petl.data.tap_shards import SUFFIX, TEMPORARY, DamagedError, Shard, open_shard, write_shard

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

USE, FILL, LIMIT, KEY = "use.lock", "fill.lock", "limit.lock", "key.json"
UNLIMITED = sys.maxsize


class Place(Protocol):
    """Keeps shards of one key."""

    problem: str | None  # why nothing can be kept here

    def scan(self) -> tuple[list[Shard], int]:
        """Shards that came since the last call, and how many damaged ones were met."""

    def put(self, digests: Sequence[str], tensors: Mapping[str, Tensor]) -> Shard:
        """Keep taps; raises OSError."""

    def room(self, need: int) -> int:
        """Bytes that may still be put here, after an attempt to make room for ``need``."""

    def turn(self) -> AbstractContextManager[None]:
        """A context in which nobody else puts anything, so that `room` stays true."""

    def take(self, chunk: Sequence[str], wait: bool) -> bool:
        """Reserve the work on these samples, unless another process has it."""

    def release(self) -> None:
        """Give back all that was taken."""


class Memory:
    """Shards in this process.

    Args:
        limit: most bytes of taps; None = no limit.
    """

    problem: str | None = None

    def __init__(self, limit: int | None) -> None:
        self.left = UNLIMITED if limit is None else limit

    def scan(self) -> tuple[list[Shard], int]:
        return [], 0

    def put(self, digests: Sequence[str], tensors: Mapping[str, Tensor]) -> Shard:
        self.left -= sum(t.nbytes for t in tensors.values())
        return Shard(digests, dict(tensors))

    def room(self, need: int) -> int:
        return self.left

    @contextmanager
    def turn(self) -> Iterator[None]:
        yield

    def take(self, chunk: Sequence[str], wait: bool) -> bool:
        return True

    def release(self) -> None:
        pass


class Folder:
    """The directory of one key, held against eviction as long as this object lives.

    Args:
        root: has a directory per key.
        name: of this key's.
        about: the key, written beside the shards for people to read.
        limit: most bytes of all directories below ``root``; None = no limit.
    """

    def __init__(self, root: Path, name: str, about: Mapping[str, Any], limit: int | None) -> None:
        self.root, self.path, self.limit = root, root / name, limit
        self.problem: str | None = None
        self._met: set[str] = set()
        self._fill: int | None = None  # file descriptor of FILL, while chunks are taken
        try:
            self._hold()
            if not (self.path / KEY).exists():
                temporary = self.path / f"{TEMPORARY}{uuid4().hex}"
                temporary.write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
                os.replace(temporary, self.path / KEY)
        except OSError as error:
            self.problem = reason(error)

    def _hold(self) -> None:
        """Lock the directory as in use; whoever is alone with it removes what dead processes left half written."""
        for _ in range(10):  # it may be evicted between two steps: then it is made anew
            self.path.mkdir(parents=True, exist_ok=True)
            try:
                file = os.open(self.path / USE, os.O_RDWR | os.O_CREAT, 0o666)
            except FileNotFoundError:
                continue
            if _flock(file, exclusive=True) and _is(file, self.path / USE):
                for leftover in self.path.glob(f"{TEMPORARY}*"):
                    leftover.unlink(missing_ok=True)
            _flock(file, exclusive=False)
            if _is(file, self.path / USE):
                break
            os.close(file)
        else:
            raise OSError(errno.EBUSY, "is removed again and again", str(self.path))
        weakref.finalize(self, os.close, file)
        os.utime(self.path / USE)  # the least recently used is evicted first

    def scan(self) -> tuple[list[Shard], int]:
        try:
            names = {f for f in os.listdir(self.path) if f.endswith(SUFFIX) and not f.startswith(TEMPORARY)}
        except OSError:
            return [], 0
        new = sorted(names - self._met)
        self._met |= names
        if not new:
            return [], 0
        with ThreadPoolExecutor() as pool:
            shards = list(pool.map(self._open, new))
        return [s for s in shards if isinstance(s, Shard)], sum(isinstance(s, DamagedError) for s in shards)

    def _open(self, name: str) -> Shard | Exception:
        """The shard, or why it is a miss; a damaged one is removed."""
        try:
            return open_shard(self.path / name, self.path.name)
        except DamagedError as error:
            with suppress(OSError):
                (self.path / name).unlink()
            return error
        except OSError as error:  # removed by another process in between, or unreadable
            return error

    def put(self, digests: Sequence[str], tensors: Mapping[str, Tensor]) -> Shard:
        shard = write_shard(self.path, self.path.name, digests, tensors)
        assert shard.file is not None
        self._met.add(shard.file.name)
        return shard

    # ---- the limit

    def room(self, need: int) -> int:
        if self.limit is None:
            return UNLIMITED
        for leftover in self.root.glob(f"{TEMPORARY}*"):  # of an eviction that was cut short
            shutil.rmtree(leftover, ignore_errors=True)
        sizes = {p: _size(p) for p in self.root.glob("*") if re.fullmatch("[0-9a-f]{32}", p.name)}
        free = self.limit - sum(sizes.values())
        for folder in sorted(sizes.keys() - {self.path}, key=_used):
            if free >= need:
                break
            if self._evict(folder):
                free += sizes[folder]
        return free

    def _evict(self, folder: Path) -> bool:
        """Remove the directory of another key unless a process has it open."""
        try:
            file = os.open(folder / USE, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError:
            return False
        try:
            if not (_flock(file, exclusive=True) and _is(file, folder / USE)):
                return False
            doomed = self.root / f"{TEMPORARY}{uuid4().hex}"
            os.rename(folder, doomed)  # at once: nobody meets half of it
            shutil.rmtree(doomed, ignore_errors=True)
            return True
        except OSError:
            return False
        finally:
            os.close(file)

    @contextmanager
    def turn(self) -> Iterator[None]:
        if self.limit is None:
            yield
            return
        file = os.open(self.root / LIMIT, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _lockf(file, 0, wait=True)
            yield
        finally:
            os.close(file)

    # ---- work on chunks

    def take(self, chunk: Sequence[str], wait: bool) -> bool:
        try:
            if self._fill is None:
                self._fill = os.open(self.path / FILL, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError:
            return True  # `put` will say what is wrong
        name = hashlib.sha256("\n".join(chunk).encode()).digest()
        return _lockf(self._fill, int.from_bytes(name[:7], "big"), wait)

    def release(self) -> None:
        if self._fill is not None:
            os.close(self._fill)
            self._fill = None


def reason(error: OSError) -> str:
    """Why nothing could be written, for a printed line."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return f"{'disk full' if full else 'cannot write'}: {error}"


def _size(folder: Path) -> int:
    total = 0
    with suppress(OSError):
        for entry in os.scandir(folder):
            with suppress(FileNotFoundError):
                total += entry.stat().st_size
    return total


def _used(folder: Path) -> float:
    try:
        return (folder / USE).stat().st_mtime
    except OSError:
        return 0.0


def _is(file: int, path: Path) -> bool:
    """Whether the open file is still what lies at ``path``."""
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except OSError:
        return False


def _flock(file: int, exclusive: bool) -> bool:
    """Lock the whole file: shared and waiting, or exclusive if that is possible at once. Closing it unlocks."""
    if fcntl is None:
        return False
    how = fcntl.LOCK_EX | fcntl.LOCK_NB if exclusive else fcntl.LOCK_SH
    try:
        fcntl.flock(file, how)
    except OSError:  # held by another, or a file system without locks
        return False
    return True


def _lockf(file: int, byte: int, wait: bool) -> bool:
    """Lock a byte for this process; False if another holds it. Without locks everything is granted."""
    if fcntl is None:
        return True
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB), 1, byte)
    except OSError as error:
        return error.errno not in (errno.EACCES, errno.EAGAIN)
    return True
